"""What has been done so far: the files of a run directory, its stages, events and progress."""
