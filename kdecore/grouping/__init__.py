"""Grouping: orders in which similar queries and keys lie next to each other."""
