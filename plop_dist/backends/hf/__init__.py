"""A Hugging Face model in one process or sharded by its own tensor-parallel plan."""
