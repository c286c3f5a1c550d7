"""Kernels: one folder each, with its contract, an array-API reference and faster implementations; `registry` chooses."""
