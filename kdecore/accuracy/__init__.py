"""How far off a result is, and how to stay within a tolerance."""
