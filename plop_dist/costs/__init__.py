"""What scoring costs: the plan before it runs, benchmarks, scaling."""
