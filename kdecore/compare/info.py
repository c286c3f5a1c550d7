"""`kdecore info`: what runs here, and why something does not."""

import textwrap

from kdecore import __version__
from kdecore.arrays.backend import LIBRARIES, backend_named, unusable
from kdecore.compare.machine import this_machine
from kdecore.kernels.registry import KERNELS, TARGETS, choose
from kdecore.kernels.site import Site

DTYPES = ("float32", "float64")


def info_lines() -> list[str]:
    """Return what `kdecore info` prints."""
    machine = this_machine()
    lines = [f"kdecore {__version__}, Python {machine.python}, {machine.system}"]
    memory = "" if machine.memory_bytes is None else f", {machine.memory_bytes / 2**30:.0f} GiB"
    threads = ", ".join(f"{name} {count}" for name, count in machine.threads.items())
    lines += [f"{machine.cpu}, {machine.cores} cores{memory}; threads: {threads}", "", "Array libraries"]
    devices: list[tuple[str, str]] = []
    for library in LIBRARIES:
        reason = unusable(library)
        if reason is None:
            ours = backend_named(library)
            names = ours.devices()
            devices += [(library, name) for name in names]
            lines += _item(library, f"{ours.version()}, devices: {', '.join(names)}")
        else:
            lines += _item(library, reason)
    other = [f"{name} {version}" for name, version in machine.versions.items() if name not in ("kdecore", *LIBRARIES)]
    lines += _item("also", ", ".join(other))
    lines += ["", *_kernel_table(devices), "", "Targets, and where they run"]
    for target in TARGETS:
        lines += _item(target, ", ".join(_places(target, devices)) or f"nowhere here: {_hindrance(target, devices)}", 16)
    return lines


def _kernel_table(devices: list[tuple[str, str]]) -> list[str]:
    """Say which target runs each kernel on each device, in float32 and where it is another one in float64."""
    names = [f"{library} {device}" for library, device in devices]
    rows = [("Kernel", *names)]
    for kernel in KERNELS:
        chosen = ([choose(kernel, Site(*device, dtype)).target for dtype in DTYPES] for device in devices)
        rows.append((kernel, *(" / ".join(dict.fromkeys(targets)) for targets in chosen)))
    widths = [max(len(row[i]) for row in rows) for i in range(len(names) + 1)]
    return ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _places(target: str, devices: list[tuple[str, str]]) -> list[str]:
    """Return the devices on which a kernel of that target can run."""
    every = [one for implementations in KERNELS.values() for one in implementations if one.target == target]
    recorded = "reverse" if target == "torch-autograd" else ""
    return [
        f"{library} {device}"
        for library, device in devices
        if any(one.unsupported(Site(library, device, DTYPES[0], recorded)) is None for one in every)
    ]


def _hindrance(target: str, devices: list[tuple[str, str]]) -> str:
    """Return why a target runs nowhere: what a CUDA device would lack, and what the last device found is not."""
    one = next(one for implementations in KERNELS.values() for one in implementations if one.target == target)
    reasons = (one.unsupported(Site(*place, DTYPES[0])) for place in (("torch", "cuda:0"), devices[-1]))
    return "; ".join(dict.fromkeys(reason for reason in reasons if reason))


def _item(name: str, text: str, width: int = 12) -> list[str]:
    indent, further = f"  {name:<{width}}", " " * (2 + width)
    return textwrap.wrap(text, 80, initial_indent=indent, subsequent_indent=further, break_long_words=False) or [indent]
