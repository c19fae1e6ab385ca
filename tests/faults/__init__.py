"""Fault trials: real processes, real signals, and servers that fail in every way."""
