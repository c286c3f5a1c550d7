"""Compile every Numba CUDA kernel without a device, and print what it takes: `python -m tests.cuda_compile [sm_90 …]`.

Kernels are compiled as they are at run time, to LTO code that nvJitLink links for an architecture with ptxas's report. One
that spills registers, takes more shared memory than every device gives a block, more registers than its threads can have,
computes in float64 though its arguments are in float32, or reads one by one what it is meant to read together, is an error.
"""

import importlib
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

from cuda.core import Linker, LinkerOptions, ObjectCode
from numba import cuda, types
from numba.cuda import dispatcher

from kdecore import kernels
from kdecore.kernels.runtime.cuda_jit import DECLARED, CudaKernel

ARCHITECTURES = ("sm_80", "sm_90")
SHARED_BYTES, REGISTERS = 48 * 1024, 65536
"""Of a block, on every device."""
TOGETHER = frozenset(["attend_blocks.attend_tile"])
"""Kernels that are meant to read two or four neighbouring numbers of shared memory at once."""
# What `number` and `stored` stand for, by the name of a reader.
DTYPES = {
    "number": [("float32", "float32"), ("float64", "float64")],
    "float32": [("float32", "float32")],
    "float64": [("float64", "float64")],
    "float16": [("float32", "float16")],
    "bfloat16": [("float32", "uint16")],
}


@dataclass(frozen=True)
class Compiled:
    """What the compiler says of a kernel."""

    kernel: str
    dtypes: str
    architecture: str
    registers: int
    spilled: int
    stack: int
    shared: int
    doubles: int
    problem: str


def declared() -> list[CudaKernel]:
    """Import all kernels."""
    for path in sorted(Path(kernels.__path__[0]).glob("*/cuda.py")):
        importlib.import_module(f"kdecore.kernels.{path.parent.name}.cuda")
    return DECLARED


def signatures(kernel: CudaKernel):
    """Return the dtypes that a kernel is made for, and its types for them."""
    of_rows = "stored" in kernel.arguments
    for number, stored in DTYPES[kernel.stored] if of_rows or "number" in kernel.arguments else [("", "")]:
        text = kernel.arguments.replace("number", number).replace("stored", stored)
        yield f"{kernel.stored.replace('number', number)} → {number}" if of_rows else number, eval(f"({text},)", vars(types))


def compile_kernel(kernel: CudaKernel, dtypes: str, arguments, architecture: str) -> Compiled:
    """Compile a kernel for one architecture."""
    version = int(architecture[3]), int(architecture[4:])
    # Numba asks the current device where a kernel calls a device function.
    dispatcher.get_current_device = lambda: SimpleNamespace(compute_capability=version)
    found, _ = cuda.compile_all(kernel.function, arguments, device=False, abi="numba", cc=version, output="ltoir")

    def link(target, **options):
        objects = [ObjectCode.from_ltoir(x) if isinstance(x, bytes) else x for x in found]
        linker = Linker(*objects, options=LinkerOptions(arch=architecture, link_time_optimization=True, **options))
        return linker.link(target), linker.get_info_log()

    _, log = link("cubin", ptxas_options="-v", verbose=True)
    ptx, _ = link("ptx", ptx=True)

    def number(pattern):
        return max((int(x) for x in re.findall(pattern, log)), default=0)

    registers, shared = number(r"Used (\d+) registers"), number(r"(\d+) bytes smem")
    stored, loaded = number(r"(\d+) bytes spill stores"), number(r"(\d+) bytes spill loads")
    stack = number(r"(\d+) bytes stack frame")
    text = bytes(ptx.code).decode()
    doubles = text.count(".f64")
    wide = "float64" in kernel.arguments or "float64" in dtypes
    problems = {
        "does not report": not registers,
        "spills registers": stored + loaded > 0,
        "has arrays in local memory": stack > 0,
        "takes too much shared memory": shared > SHARED_BYTES,
        "takes too many registers": registers * kernel.threads > REGISTERS,
        "computes in float64": doubles > 0 and not wide,
        "reads numbers one by one": kernel.name in TOGETHER and not re.search(r"ld\.shared\.v[24]\.f", text),
    }
    said = ", ".join(name for name, holds in problems.items() if holds)
    return Compiled(kernel.name, dtypes, architecture, registers, stored + loaded, stack, shared, doubles, said)


def main(architectures, only="") -> int:
    """Print the table; return how many kernels have a problem."""
    print(f"{'kernel':<36} {'dtypes':<20} {'for':<6} registers  spilled  stack  shared  .f64")
    bad = 0
    for kernel in (x for x in declared() if only in x.name):
        for dtypes, arguments in signatures(kernel):
            for architecture in architectures:
                x = compile_kernel(kernel, dtypes, arguments, architecture)
                bad += bool(x.problem)
                print(
                    f"{x.kernel:<36} {x.dtypes:<20} {x.architecture:<6} {x.registers:>9}  {x.spilled:>7}  {x.stack:>5}  "
                    f"{x.shared:>6}  {x.doubles:>4}  {x.problem}",
                    flush=True,
                )
    return bad


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or ARCHITECTURES))
