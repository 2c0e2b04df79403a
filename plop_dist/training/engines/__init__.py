"""How each layout runs one optimizer step over the adapters."""
