"""Attention of blocks of queries to lists of keys."""
