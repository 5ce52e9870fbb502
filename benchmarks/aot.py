"""Compile kernels for GPUs that are not here, and say what each compiled one needs.

A launcher is run on tensors of the ``meta`` device with its launches observed; each is compiled exactly as a
real launch with such arguments would be (dtypes, divisibility by 16, constexprs), for sm_80 and sm_90, through a
driver that knows its target and nothing else.
"""

import os

os.environ.pop("TRITON_INTERPRET", None)  # read when kernels are imported
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # the default so far; 3.9 warns where it is not said

import contextlib
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.runtime import driver

from adalora_fast.ops.launch import observed

ARCHITECTURES = (80, 90)
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}  # bytes a block can have


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What one specialisation of a kernel needs on one architecture."""

    kernel: str
    arch: int
    warps: int
    stages: int
    constants: str
    types: str
    registers: int
    shared: int  # bytes a block
    spills: int  # bytes stored and loaded
    matrix: str  # the matrix instruction in its PTX: wgmma, mma or ""

    def as_row(self) -> dict:
        return asdict(self)


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


def _type_name(argument: object) -> str:
    if isinstance(argument, torch.Tensor):
        return str(argument.dtype).removeprefix("torch.")
    return type(argument).__name__


class Compiler:
    """Compiles observed launches for every architecture, each specialisation once."""

    def __init__(self, architectures: tuple[int, ...] = ARCHITECTURES) -> None:
        self.architectures = architectures
        self.found: dict[tuple[int, str], Resources] = {}

    def __call__(self, kernel, grid: tuple[int, ...], arguments: tuple, meta: dict) -> None:
        for arch in self.architectures:
            with compiling_for(arch):
                kernel.device_caches.clear()  # it is kept by device, not by target
                compiled = kernel.warmup(*arguments, grid=grid, **meta)
            key = (arch, compiled.hash)
            if key not in self.found:
                self.found[key] = _resources(compiled, arch, arguments, meta)


def _resources(compiled, arch: int, arguments: tuple, meta: dict) -> Resources:
    ptx = compiled.asm["ptx"]
    registers, spills = _assembled(ptx, arch)
    constants = {k: v for k, v in meta.items() if k not in ("num_warps", "num_stages")}
    return Resources(
        kernel=compiled.metadata.name,
        arch=arch,
        warps=compiled.metadata.num_warps,
        stages=compiled.metadata.num_stages,
        constants=" ".join(f"{k}={v}" for k, v in constants.items()),
        types=" ".join(_type_name(a) for a in arguments if isinstance(a, torch.Tensor)),
        registers=registers,
        shared=compiled.metadata.shared,
        spills=spills,
        matrix=_matrix_instruction(ptx),
    )


def compile_launches(run: Callable[[], object], compiler: Compiler) -> None:
    """Run a launcher (on meta tensors) and compile what it launches."""
    with observed(compiler):
        run()


def environment() -> dict[str, str]:
    """What the numbers depend on."""
    return {"triton": triton.__version__, "torch": torch.__version__}
