"""Systematic sampling without replacement, outside each block's own window."""
