"""Tests of plop_dist/compare."""
