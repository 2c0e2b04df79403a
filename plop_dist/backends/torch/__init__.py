"""A model that PyTorch's own wrappers shard."""
