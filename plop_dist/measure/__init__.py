"""How large ||W z|| / ||z|| is against chance: hooks, sums, reductions, baselines, scores."""
