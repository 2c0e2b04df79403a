"""What is passed around: scores, placements, projections, names and sizes. Plain, immutable, equal to their files."""
