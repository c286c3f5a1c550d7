"""Products of many rows with a small matrix."""

from kdecore.kernels.project_rows import cpu, reference

__all__ = ["cpu", "reference"]
