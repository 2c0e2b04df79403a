"""Training engines that run by themselves: what they are handed, and how they are started."""
