"""What each command does: one thin function for each, which reads its arguments and prints what it is told."""
