"""Group relative policy optimisation, step by step, on the engines that train adapters in sharded layouts."""
