"""What lies in a checkpoint folder, read without running anything that it holds."""
