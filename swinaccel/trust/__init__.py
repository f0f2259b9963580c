"""Decide once, at `accelerate()`, whether a module computes what its family reads out of it."""
