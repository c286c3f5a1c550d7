"""Attention of all queries to all keys, without the n × n matrix."""
