"""How a job that already runs calls us: what its model is, what its batches hold, and how it is left as it was."""
