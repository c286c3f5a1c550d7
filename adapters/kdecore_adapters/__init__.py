"""Bridges to single array libraries; each file imports its library, so import only the one you use."""
