"""Loading a model sharded and listing its linear modules: one file per framework."""
