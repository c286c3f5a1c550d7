"""Compile every Triton kernel without a device, and print what it takes: `python -m tests.triton_compile [sm_90 …]`.

What is compiled is what would be launched: the kernels' callers run on small tensors of the host, and each launch is
recorded in place of being made. A kernel that spills registers, takes more shared memory than the device has, multiplies
without tensor cores, computes in float64 or moves one of its arrays' addresses by a number of 32 bits is an error.
"""

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kdecore.core.state import AttentionState
from kdecore.kernels.attend_blocks import contract as widths
from kdecore.kernels.attend_blocks import triton as forward
from kdecore.kernels.attend_blocks import triton_backward as backward
from kdecore.kernels.attend_tree import contract as attending_sizes
from kdecore.kernels.attend_tree import triton as attending
from kdecore.kernels.gap_moments import triton as gaps
from kdecore.kernels.hash_codes import triton as hashing
from kdecore.kernels.node_summaries import triton as summaries
from kdecore.kernels.open_tree import contract as sizes
from kdecore.kernels.open_tree import triton as opening
from kdecore.kernels.pick_threshold import triton as picking
from kdecore.kernels.project_rows import triton as project
from kdecore.kernels.rank_codes import triton as codes
from kdecore.kernels.site import Largest

SHARED_BYTES = {"sm_80": 163 * 1024, "sm_90": 227 * 1024}
"""That a program may have."""
POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
POINTERS |= {torch.int16: "*i16", torch.int32: "*i32", torch.int64: "*i64"}
SIZES = (2, 128, 512)
"""Blocks, their queries and their slots: what matters to the compiler is whether 16 divides them."""
KERNELS = [
    *((forward, name) for name in ("attend_tile", "clear_rows")),
    *((backward, name) for name in ("gradient_of_queries", "gradient_of_keys")),
    *((summaries, name) for name in ("summarise_rows", "summarise_nodes")),
    *((codes, name) for name in ("deal_bits", "number_cells")),
    (project, "project_tile"),
    *((hashing, name) for name in ("project_signs", "pack_signs")),
    (opening, "open_blocks"),
    *((picking, name) for name in ("meet_level", "last_threshold")),
    *((attending, name) for name in ("open_blocks", "attend_opened")),
    (gaps, "measure_gaps"),
]
"""Every kernel, as its module names it."""
MULTIPLYING = (
    *("attend_tile", "gradient_of_queries", "gradient_of_keys", "project_tile", "project_signs"),
    *("open_blocks", "meet_level", "attend_opened", "measure_gaps"),
)
"""Those that are meant for tensor cores."""


@dataclass(frozen=True)
class Launch:
    """A launch that was not made: of a kernel, with arguments by name."""

    kernel: Any
    arguments: dict[str, Any]
    warps: int
    stages: int
    most_registers: int | None


@dataclass(frozen=True)
class Recorder:
    """Stands for a kernel and notes its launches."""

    kernel: Any
    launches: list[Launch]

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return self.record

    def record(
        self, *arguments: Any, num_warps: int = 4, num_stages: int = 3, maxnreg: int | None = None, **more: Any
    ) -> None:
        given = dict(zip(self.kernel.arg_names, arguments, strict=False)) | more
        self.launches.append(Launch(self.kernel, given, num_warps, num_stages, maxnreg))


@dataclass(frozen=True)
class Compiled:
    """What the compiler says of a kernel."""

    registers: int
    spilled: int
    shared: int
    products: int
    doubles: int
    problem: str


def rows(dtype: torch.dtype, d: int, d_v: int) -> list[torch.Tensor]:
    """Return queries, keys and values; rows of values lie at multiples of 16 numbers, as those of a tree's nodes should."""
    q, k = (torch.zeros(256, d, dtype=dtype) for _ in range(2))
    return [q, k, torch.zeros(256, -(-d_v // 16) * 16, dtype=dtype)[:, :d_v]]


def launch_all(dtype: torch.dtype, d: int, d_v: int, case: str) -> None:
    """Launch the kernels of one case: of hashes, of a tree, or of lists, with a bias and merging, or without lists."""
    if case == "tree":
        build_tree(dtype, d, d_v)
        return
    if case == "hashes":
        for bits in (12, 30):
            hashing.hash_codes(torch, *(torch.zeros(2, n, d, dtype=dtype) for n in (8192, 4096)), torch.zeros(d, bits))
        return
    q, k, v = rows(dtype, d, d_v)
    blocks, b, s = SIZES
    lists = torch.zeros(blocks, b, dtype=torch.int64), torch.zeros(blocks, s, dtype=torch.int64), torch.zeros(blocks, s)
    given = None if case == "dense" else lists
    bias = torch.zeros(1 if "shared" in case else blocks, b, s) if "bias" in case else None
    before = AttentionState(torch.zeros(len(q), d_v), torch.zeros(len(q))) if "before" in case else None
    found = forward.attend_lists(q, k, v, given, SIZES, 0.125, bias, before)
    if widths.backward_limit(forward.widest(q, v)) is None:
        out = found.out if case == "dense" else None
        backward.gradients(
            q, k, v, given, SIZES, 0.125, found.lse, found.out, found.lse, bias, of_bias=bias is not None, out=out
        )


def build_tree(dtype: torch.dtype, d: int, d_v: int) -> None:
    """Project keys, number their cells, summarise the nodes of a tree over them, and open it."""
    groups, n, p = 2, 8192, 16
    k, v = torch.zeros(groups, n, d, dtype=dtype), torch.zeros(groups, n, d_v, dtype=dtype)
    coordinates, norms, order = torch.zeros(groups, n, p), torch.zeros(groups, n), torch.zeros(groups, n, dtype=torch.int64)
    for width in (p, d_v):
        project.project_rows(torch, k, torch.zeros(groups, d, width), torch.zeros(groups, 1, width))
    codes.rank_codes(torch, coordinates, 24)
    nodes = summaries.node_summaries(torch, k, v, coordinates, norms, order, 4, torch.zeros(groups))
    tree = sizes.Tree(nodes.keys, nodes.spread, nodes.variances, nodes.sizes)
    for rows in (64, sizes.MOST_ROWS):
        queries = sizes.BlockQueries(k, 0.125, coordinates, torch.zeros(groups, n // rows, rows, dtype=torch.int64), True)
        largest = Largest(d=d, directions=p, rows=rows, item_bytes=nodes.keys.element_size())
        if sizes.triton_limit(largest) is None:
            opened = torch.tensor(0.1), 2048, (6, 0, 64)
            key_index, _, share, _ = opening.open_tree(torch, queries, tree, *opened)
            gaps.gap_moments(torch, nodes.keys, nodes.values, key_index, share, tree.nodes, 512)
            own, slope = torch.zeros(groups, n, dtype=torch.int64), torch.zeros(groups, 2, d, d_v)
            limits, before = torch.zeros(2, groups, d_v), AttentionState(torch.zeros(groups, n, d_v), torch.zeros(groups, n))
            if attending_sizes.triton_limit(replace(largest, d_v=d_v)) is None:
                attending.attend_tree(torch, queries, tree, nodes.values, *opened, own, slope, tuple(limits), before)
                attending.attend_tree(torch, queries, tree, nodes.values, *opened)
            picking.pick_threshold(torch, queries, tree, 512, 1024, (6, 0, 64))


def recorded(dtype: torch.dtype, d: int, d_v: int, case: str) -> list[Launch]:
    """Return the launches of one case."""
    launches: list[Launch] = []
    originals = [getattr(module, name) for module, name in KERNELS]
    for (module, name), kernel in zip(KERNELS, originals, strict=True):
        setattr(module, name, Recorder(kernel, launches))
    try:
        launch_all(dtype, d, d_v, case)
    finally:
        for (module, name), kernel in zip(KERNELS, originals, strict=True):
            setattr(module, name, kernel)
    return launches


def source(launch: Launch) -> ASTSource:
    """Return what Triton would compile for a launch, specialised as it would be."""
    signature, constants, attributes = {}, {}, {}
    for place, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
            signature[parameter.name], constants[(place,)] = "constexpr", value
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = "i32" if isinstance(value, int) else POINTERS[value.dtype]
            if not isinstance(value, int) or value % 16 == 0:
                attributes[(place,)] = [["tt.divisibility", 16]]
    return ASTSource(launch.kernel, signature, constants, attributes)


def compile_launch(launch: Launch, architecture: str) -> Compiled:
    """Compile a kernel for one architecture."""
    version = int(architecture[3:])
    options = {"num_warps": launch.warps, "num_stages": launch.stages, "maxnreg": launch.most_registers}
    found = triton.compile(source(launch), target=GPUTarget("cuda", version, 32), options=options)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(found.asm["cubin"])
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", str(path)]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    # What is spilled lies on the stack, and nothing else does.
    (registers, spilled), ptx = map(int, re.findall(r"REG:(\d+) STACK:(\d+)", said)[0]), found.asm["ptx"]
    shared, doubles = found.metadata.shared, ptx.count(".f64")
    products = len(re.findall(r"^\s*(?:wgmma\.mma_async|mma\.sync)", ptx, re.MULTILINE))
    # Of arrays of 2**31 numbers, that would be too few.
    arrays = "|".join(launch.kernel.arg_names)
    narrow = re.findall(rf"tt\.addptr %(?:{arrays}), %(?!c\d|cst)\w+ : !tt\.ptr<\w+>, i32", found.asm["ttir"])
    problems = {
        "spills registers": spilled > 0,
        "takes too much shared memory": shared > SHARED_BYTES[architecture],
        "multiplies without tensor cores": not products and launch.kernel.__name__ in MULTIPLYING,
        "computes in float64": doubles > 0,
        "moves addresses by 32 bits": bool(narrow),
    }
    problem = ", ".join(name for name, holds in problems.items() if holds)
    return Compiled(registers, spilled, shared, products, doubles, problem)


CASES = [
    *((dtype, 64, 64, case) for dtype in (torch.bfloat16, torch.float32) for case in ("lists", "bias before", "dense")),
    (torch.float16, 64, 64, "lists"),
    *((dtype, 64, 65, "lists") for dtype in (torch.bfloat16, torch.float32)),
    (torch.bfloat16, 64, 65, "shared bias before"),
    *((dtype, 128, 128, "lists") for dtype in (torch.bfloat16, torch.float32)),
    *((dtype, w, w, "tree") for dtype in (torch.bfloat16, torch.float32) for w in (64, 128)),
    (torch.float16, 64, 64, "tree"),
    *((dtype, w, w, "hashes") for dtype in (torch.bfloat16, torch.float32) for w in (64, 128)),
    (torch.float16, 64, 64, "hashes"),
]
"""Dtype, d, d_v and what is launched; 65 are the values of a tree's nodes, with their spread."""


def every_launch() -> Iterator[tuple[str, Launch]]:
    """Return every launch and what it is for, each once."""
    seen = set()
    for dtype, d, d_v, case in CASES:
        for launch in recorded(dtype, d, d_v, case):
            key = source(launch).hash(), launch.warps, launch.stages
            if key not in seen:
                seen.add(key)
                yield f"{str(dtype).removeprefix('torch.'):<8} {d:>3} {d_v:>3} {case}", launch


def main(architectures: list[str]) -> int:
    """Print the table; return how many kernels have a problem."""
    print(f"{'kernel':<20} {'dtype, d, d_v, case':<36} {'for':<6} warps  registers  spilled  shared  products  .f64")
    bad = 0
    work = [(text, launch, architecture) for text, launch in every_launch() for architecture in architectures]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for (text, launch, architecture), x in zip(work, pool.map(lambda x: compile_launch(*x[1:]), work), strict=True):
            bad += bool(x.problem)
            print(
                f"{launch.kernel.__name__:<20} {text:<36} {architecture:<6} {launch.warps:>5}  {x.registers:>9}  "
                f"{x.spilled:>7}  {x.shared:>6}  {x.products:>8}  {x.doubles:>4}  {x.problem}",
                flush=True,
            )
    return bad


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or list(SHARED_BYTES)))
