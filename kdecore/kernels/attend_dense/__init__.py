"""Attention of all queries to all keys, without the n × n matrix."""

from kdecore.kernels.attend_dense import cpu, reference

__all__ = ["cpu", "reference"]
