"""Errors that `kdecore` raises: each names the argument, what was expected and what came."""


class KdecoreError(Exception):
    """Base of every error that kdecore raises on purpose."""


class ShapeError(KdecoreError, ValueError):
    """An array has the wrong rank, or its dimensions do not fit the other arrays'."""


class DTypeError(KdecoreError, TypeError):
    """An argument is not an array, or its dtype is not a real floating-point one."""


class DeviceError(KdecoreError, ValueError):
    """Arrays come from different libraries or lie on different devices."""


class OptionError(KdecoreError, ValueError):
    """An option (method, budget, scale, seed, …) has a value outside its range."""


class KernelUnavailable(KdecoreError, RuntimeError):
    """A kernel that was asked for by name cannot run here; the message says why."""


class MemoryLimitError(KdecoreError, MemoryError):
    """A call cannot be made to fit into ``max_memory``; the message says how much it needs."""


class InputFileError(KdecoreError, ValueError):
    """An input file cannot be read or does not hold what is needed; the message names the file."""
