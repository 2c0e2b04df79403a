"""Who writes the completions."""
