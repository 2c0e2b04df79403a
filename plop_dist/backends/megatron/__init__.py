"""A model in Megatron-core, loaded through Megatron-Bridge or handed over by its host."""
