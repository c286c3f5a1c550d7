"""What empty arrays hold while kernels are tested, so that what is read before it is written, or never written, shows."""

import numpy as np
import torch


def poisoned(empty):
    """Return a function that makes arrays full of NaN, of integers too large for any place, or of False."""

    def call(*args, **kwargs):
        found = empty(*args, **kwargs)
        kind = str(found.dtype)
        if "bool" in kind:
            found[...] = False
        elif "float" in kind:
            found[...] = float("nan")
        else:
            found[...] = (torch if isinstance(found, torch.Tensor) else np).iinfo(found.dtype).max // 3
        return found

    return call
