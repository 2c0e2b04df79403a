"""Training with TRL's trainers, in one process and at ZeRO."""
