"""Training that continues with the chosen adapters."""
