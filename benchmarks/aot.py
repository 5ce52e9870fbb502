"""Compile kernels for GPUs that are not here, and say what each compiled one needs.

A launcher runs on tensors of the ``meta`` device with its launches observed; each is compiled exactly as a
real launch with such arguments would be (types, divisibility by 16, constants), for sm_80 and sm_90, by a
driver that knows its target and nothing else.
"""

import os

os.environ.pop("TRITON_INTERPRET", None)  # read when kernels are imported
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # the default so far; 3.9 warns where it is not said

import contextlib
import importlib
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from itertools import groupby
from multiprocessing import get_context

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.runtime import driver

from adalora_fast.ops.dispatch.launch import observed

ARCHITECTURES = (80, 90)
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}  # bytes a block can have


@dataclass(frozen=True, kw_only=True)
class Specialisation:
    """A kernel as one launch compiles it: types, what is known of integers, constants."""

    module: str
    kernel: str
    arch: int
    arguments: tuple[object, ...]  # a tensor's type; the least integer that specialises alike; None; float
    meta: tuple[tuple[str, object], ...]

    @property
    def constants(self) -> dict[str, object]:
        return {name: value for name, value in self.meta if name not in ("num_warps", "num_stages")}


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What one specialisation of a kernel needs on one architecture."""

    kernel: str
    arch: int
    types: str
    constants: str
    warps: int
    stages: int
    registers: int
    shared: int  # bytes a block
    spills: int  # bytes stored and loaded
    matrix: str  # the matrix instruction in its PTX: wgmma, mma or ""


class _TargetOnly:
    """A driver for compilation alone."""

    def __init__(self, arch: int) -> None:
        self.target = GPUTarget("cuda", arch, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")


@contextlib.contextmanager
def compiling_for(arch: int) -> Iterator[None]:
    """Within the context kernels compile for ``arch``, whatever GPU is here."""
    before = driver._active  # the property would look for a GPU
    driver.set_active(_TargetOnly(arch))
    try:
        yield
    finally:
        driver._active = before


def _abstract(argument: object) -> object:
    """What of an argument decides how the kernel compiles."""
    if isinstance(argument, torch.Tensor):
        return argument.dtype
    if isinstance(argument, int) and not isinstance(argument, bool):
        if argument == 1:
            return 1
        small = 16 if argument % 16 == 0 else 17
        return small if argument < 2**31 else 2**32 + small % 16
    return argument if argument is None else float


def _concrete(abstract: object) -> object:
    if isinstance(abstract, torch.dtype):
        return torch.empty(16, dtype=abstract, device="meta")
    return 0.5 if abstract is float else abstract


@dataclass
class Collector:
    """Observes launches and keeps their specialisations for some architectures."""

    architectures: tuple[int, ...] = ARCHITECTURES
    found: set[Specialisation] = field(default_factory=set)

    def __call__(self, kernel, grid: tuple[int, ...], arguments: tuple, meta: dict) -> None:
        for arch in self.architectures:
            self.found.add(
                Specialisation(
                    module=kernel.fn.__module__,
                    kernel=kernel.fn.__name__,
                    arch=arch,
                    arguments=tuple(_abstract(argument) for argument in arguments),
                    meta=tuple(sorted(meta.items())),
                )
            )

    def observe(self, run: Callable[[], object]) -> None:
        """Run a launcher (on meta tensors) and keep what it launches."""
        with observed(self):
            run()


def _assembled(ptx: str, arch: int) -> tuple[int, int]:
    """(registers, spill bytes) as the assembler counts them; a spill does not show in the machine code."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "kernel.ptx")
        with open(path, "w") as file:
            file.write(ptx)
        name = f"sm_{arch}a" if arch >= 90 else f"sm_{arch}"
        command = [get_ptxas(arch).path, "-v", f"--gpu-name={name}", path, "-o", os.devnull]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers = int(re.search(r"Used (\d+) registers", said).group(1))
    return registers, sum(int(n) for n in re.findall(r"(\d+) bytes spill", said))


def _matrix_instruction(ptx: str) -> str:
    return next((name for name in ("wgmma", "mma") if f"{name}." in ptx), "")


def compile_one(wanted: Specialisation) -> Resources:
    """Compile one specialisation and read what it needs."""
    kernel = getattr(importlib.import_module(wanted.module), wanted.kernel)
    arguments = [_concrete(abstract) for abstract in wanted.arguments]
    with compiling_for(wanted.arch):
        kernel.device_caches.clear()  # it is kept by device, not by target
        compiled = kernel.warmup(*arguments, grid=(1,), **dict(wanted.meta))
    ptx = compiled.asm["ptx"]
    registers, spills = _assembled(ptx, wanted.arch)
    return Resources(
        kernel=wanted.kernel,
        arch=wanted.arch,
        types=" ".join(str(t).removeprefix("torch.") for t in wanted.arguments if isinstance(t, torch.dtype)),
        constants=" ".join(f"{name}={value}" for name, value in wanted.constants.items()),
        warps=compiled.metadata.num_warps,
        stages=compiled.metadata.num_stages,
        registers=registers,
        shared=compiled.metadata.shared,
        spills=spills,
        matrix=_matrix_instruction(ptx),
    )


def compile_all(wanted: Iterable[Specialisation], workers: int = 1) -> list[Resources]:
    """Compile each, in a stable order, in ``workers`` processes."""
    ordered = sorted(wanted, key=repr)
    if workers == 1:
        return [compile_one(one) for one in ordered]
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        return list(pool.map(compile_one, ordered, chunksize=4))


def faults(found: Iterable[Resources]) -> list[str]:
    """What must not be: a spilled register, more shared memory than a block has."""
    said = []
    for one in found:
        name = f"{one.kernel} for sm_{one.arch} ({one.types}; {one.constants})"
        if one.spills:
            said.append(f"{name} spills {one.spills} bytes")
        if one.shared > SHARED_LIMIT[one.arch]:
            said.append(f"{name} needs {one.shared} bytes of shared memory")
    return said


def table(found: Iterable[Resources]) -> str:
    """One line a specialisation."""
    lines = [f"{'kernel':18}{'sm':>3}{'regs':>5}{'shared':>8}{'spills':>7} {'matrix':7}constants | types"]
    for one in sorted(found, key=lambda one: (one.kernel, one.arch, -one.registers, one.constants)):
        numbers = f"{one.arch:>3}{one.registers:5}{one.shared:8}{one.spills:7} {one.matrix or '-':7}"
        lines.append(f"{one.kernel:18}{numbers}w{one.warps} s{one.stages} {one.constants} | {one.types}")
    return "\n".join(lines)


def summary(found: Iterable[Resources]) -> str:
    """A Markdown table: for each kernel and architecture the most that any specialisation needs."""
    lines = [
        "| kernel | sm | specialisations | registers | shared, KiB | spills, bytes | matrix instructions |",
        "|---|---|---|---|---|---|---|",
    ]
    ordered = sorted(found, key=lambda one: (one.kernel, one.arch))
    for (kernel, arch), group in groupby(ordered, key=lambda one: (one.kernel, one.arch)):
        group = list(group)
        registers, shared = max(one.registers for one in group), max(one.shared for one in group)
        matrix = ", ".join(sorted({one.matrix or "none" for one in group}))
        lines.append(
            f"| `{kernel}` | {arch} | {len(group)} | ≤ {registers} | ≤ {shared / 1024:.0f} | "
            f"{sum(one.spills for one in group)} | {matrix} |"
        )
    return "\n".join(lines)


def as_content(found: list[Resources], wrong: list[str]) -> dict:
    """What a result file holds: a line for each specialisation, as :func:`table` prints them."""
    return {
        "benchmark": "ahead-of-time compilation",
        "versions": {"triton": triton.__version__, "torch": torch.__version__},
        "count": len(found),
        "faults": wrong,
        "summary": summary(found).splitlines(),
        "specialisations": table(found).splitlines(),
    }
