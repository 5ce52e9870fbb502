"""The compiled libraries of csrc/: where they are, and why one cannot be used.

``_C`` holds the CPU kernels, ``_C_cuda`` the CUDA ones; both are plain shared libraries that register
``torch.ops.adalora_fast_C`` when they are loaded, which happens when an op first asks for its backend.
"""

from functools import cache
from pathlib import Path

import torch

PACKAGE = Path(__file__).parents[2]
BUILD = "install a C++ compiler and build it (docs/native.md)"


@cache
def refusal(library: str) -> str | None:
    """Why ``_C`` or ``_C_cuda`` cannot be used here; None once it is loaded."""
    if library == "_C_cuda":
        if torch.version.cuda is None:
            return "this PyTorch is built without CUDA"  # which has not all of the symbols that it needs
        if refusal("_C") is not None:  # where the operators are defined
            return refusal("_C")
    found = sorted(PACKAGE.glob(f"{library}.*so"))
    if not found:
        note = PACKAGE / f"{library}.not-built.txt"  # setup.py leaves it
        if note.is_file():
            reason = note.read_text(encoding="utf-8").strip()
            return f"the extension adalora_fast.{library} is not built: {reason} (docs/native.md)"
        return f"the extension adalora_fast.{library} is not built; {BUILD}"
    try:
        torch.ops.load_library(found[0])
    except OSError as error:
        return f"the extension {found[0].name} does not load: {str(error).splitlines()[0]}"
    return None


def cpu_refusal(device_type: str) -> str | None:
    """Why the C++ kernels cannot run on a device."""
    return f"the C++ kernels do not run on {device_type}" if device_type != "cpu" else refusal("_C")


def cuda_refusal(device_type: str) -> str | None:
    """Why the CUDA kernels cannot run on a device."""
    return f"the CUDA kernels do not run on {device_type}" if device_type != "cuda" else refusal("_C_cuda")
