"""A model sharded by DeepSpeed: ZeRO, AutoTP, PipelineModule."""
