"""What kdecore needs to know of PyTorch and CuPy, and of models made with them."""

from contextlib import suppress
from importlib import import_module
from importlib.metadata import entry_points

from kdecore.arrays.backend import GROUP, register


def register_backends() -> None:
    """Bring the backends of the libraries that are here, where kdecore runs from its folders and is not installed."""
    for library in ("torch", "cupy"):
        if not entry_points(group=GROUP, name=library):
            with suppress(ImportError, OSError):
                register(library, import_module(f"kdecore_adapters.{library}_backend").BACKEND)
