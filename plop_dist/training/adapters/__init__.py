"""What an adapter is on one rank: how it is drawn, sharded, gathered and saved."""
