"""Running every implementation of a kernel on every backend."""

import numpy as np
import pytest

from kdecore.kernels.registry import KERNELS, Site
from kdecore.namespaces import namespace_name


def implementations(kernel):
    """Parametrise a test over the implementations of one kernel."""
    return pytest.mark.parametrize("implementation", KERNELS[kernel], ids=lambda found: found.target)


def run(implementation, backend, *arguments, dtype="float64"):
    """Call an implementation with NumPy arguments on a backend, or skip where it says that it cannot run there."""
    arrays = [backend.array(x) if isinstance(x, np.ndarray) else x for x in arguments]
    device = next(str(x.device) for x in arrays if hasattr(x, "device"))
    gradient = "reverse" if implementation.target == "torch-autograd" else ""
    reason = implementation.unsupported(Site(namespace_name(backend.xp), device, dtype, gradient))
    if reason is not None:
        pytest.skip(reason)
    found = implementation.function(backend.xp, *arrays)
    if hasattr(found, "lse"):
        return backend.numpy(found.out), backend.numpy(found.lse)
    return tuple(backend.numpy(x) for x in found) if isinstance(found, tuple) else backend.numpy(found)
