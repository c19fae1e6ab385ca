"""Measurements of the whole: `make bench`. Not part of the test suite, and nothing in it is timed there."""
