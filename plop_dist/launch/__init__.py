"""Where the ranks run: in this process, under a launcher, as Ray workers or as a Ray job."""
