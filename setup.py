"""Builds the optional C++ and CUDA kernels of csrc/; everything else is in pyproject.toml.

The libraries use PyTorch's stable ABI and no Python headers. They are built where a C++ compiler and an
installed PyTorch are found (pip's isolated build environment has none: then the one of the environment that
is installed into). Nothing is ever downloaded for the build, and where it is not possible the installation
succeeds without it, and the package works in plain PyTorch. pip hides what a successful installation prints,
so the reason is also written where the library would be, and `python -m adalora_fast` shows it.

    ADALORA_FAST_BUILD_CUDA=0|1   leave the CUDA part out, or insist on it (default: where nvcc and a CUDA
                                  PyTorch are found)
    ADALORA_FAST_STRICT_BUILD=1   a warning is an error, and so is a build that is not possible
"""

import logging
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError

ROOT = Path(__file__).parent
STRICT = os.environ.get("ADALORA_FAST_STRICT_BUILD") == "1"
DEFINES = ["-DTORCH_TARGET_VERSION=0x020a000000000000"]  # the stable ABI of PyTorch 2.10, the oldest allowed
# No -march and no contraction to fused multiply-adds: one wheel runs, with one result, on every machine.
CPU = ["-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno",
       "-fno-trapping-math", "-Wall", "-Wextra", *(["-Werror"] if STRICT else []), *DEFINES]  # fmt: skip
LIBRARIES = ("torch", "torch_cpu", "torch_cuda", "c10")
GPUS = ["-gencode=arch=compute_80,code=sm_80", "-gencode=arch=compute_90,code=[sm_90,compute_90]"]
CUDA = ["-O3", "-std=c++17", "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra", *GPUS,
        *(["-Werror=all-warnings"] if STRICT else []), "-DUSE_CUDA", *DEFINES]  # fmt: skip


def installed_torch() -> Path | None:
    """The folder of the PyTorch to build against, without importing it."""
    spec = find_spec("torch")
    candidates = [Path(spec.origin).parent] if spec and spec.origin else []
    candidates += [Path(sysconfig.get_path(name)) / "torch" for name in ("platlib", "purelib")]
    return next((folder for folder in candidates if (folder / "include/torch/csrc/stable").is_dir()), None)


def cuda_refusal(torch: Path) -> str | None:
    """Why the CUDA part is not built, or None."""
    asked = os.environ.get("ADALORA_FAST_BUILD_CUDA", "")
    if asked not in ("", "0", "1"):
        raise SystemExit(f"ADALORA_FAST_BUILD_CUDA={asked!r} is neither 0 nor 1")
    if asked == "0":
        return "ADALORA_FAST_BUILD_CUDA=0"
    if nvcc() is None:
        if asked == "1":
            raise SystemExit("ADALORA_FAST_BUILD_CUDA=1, but there is no nvcc in PATH or CUDA_HOME")
        return "there is no nvcc in PATH or CUDA_HOME"
    if asked == "" and re.search(r"^cuda\b.*= *None", (torch / "version.py").read_text(), re.M):
        return "the installed PyTorch is built without CUDA"
    return None


def nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc", path=f"{home}/bin") if home else shutil.which("nvcc")


def extension(name: str, folder: str) -> Extension:
    """Every source of a folder of csrc/, rebuilt when a header changes."""
    files = [path.relative_to(ROOT) for path in sorted((ROOT / "csrc").rglob("*.*"))]
    sources = [str(path) for path in files if path.parts[1] == folder and path.suffix in (".cpp", ".cu")]
    headers = [str(path) for path in files if path.suffix in (".h", ".cuh")]
    depends = [*headers, "setup.py"]
    return Extension(
        f"adalora_fast.{name}", sources, depends=depends, py_limited_api=True, optional=not STRICT
    )


class Build(build_ext):
    """Runs the compilers directly: what it runs is what it prints."""

    def run(self) -> None:
        self.outcome: dict[str, str | None] = {}  # library → why it was not built
        reason = cuda_refusal(installed_torch())
        if reason is not None:
            print(f"adalora_fast: adalora_fast._C_cuda is not built: {reason}", file=sys.stderr)
            self.outcome["_C_cuda"] = reason
        super().run()
        in_place = self.inplace or self.editable_mode
        for library, reason in self.outcome.items():
            for folder in (Path(self.build_lib), *([ROOT] if in_place else [])):
                leave_note(folder / "adalora_fast", library, reason)

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        newest = max((ROOT / path).stat().st_mtime for path in (*ext.sources, *ext.depends))
        if target.exists() and target.stat().st_mtime > newest and not self.force:
            return
        library = ext.name.rpartition(".")[2]
        try:
            self._compile(ext, target)
            self.outcome[library] = None
        except (OSError, BaseError) as error:
            self.outcome[library] = str(error)
            refuse(f"{ext.name} was not built: {error}")

    def _run(self, command: list[str]) -> None:
        self.announce(" ".join(command), level=logging.INFO)
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
        output = done.stdout.decode(errors="replace")
        sys.stderr.write(output)
        if done.returncode != 0:
            lines = output.split("\n")
            error = next((line.strip() for line in lines if "error" in line.lower()), lines[0].strip())
            raise OSError(f"{command[0]} ended with {done.returncode}{': ' if error else ''}{error}")

    def _compile(self, ext: Extension, target: Path) -> None:
        torch = installed_torch()
        host = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)
        if host is None:
            raise OSError("there is no C++ compiler (c++, g++, clang++ or $CXX)")
        with_cuda = any(source.endswith(".cu") for source in ext.sources)
        compile_ = [nvcc(), "-ccbin", host, *CUDA] if with_cuda else [host, *CPU]
        link = [nvcc(), "-ccbin", host] if with_cuda else [host]
        libraries = [name for name in LIBRARIES if any((torch / "lib").glob(f"lib{name}.*"))]
        undefined = ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else []
        objects = []
        for source in ext.sources:
            output = Path(self.build_temp) / ext.name / f"{Path(source).stem}.o"
            output.parent.mkdir(parents=True, exist_ok=True)
            self._run([*compile_, "-isystem", str(torch / "include"), "-c", source, "-o", str(output)])
            objects.append(str(output))
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_suffix(".partial")  # a broken link never looks like a library
        self._run([*link, "-shared", *objects, *undefined, f"-L{torch / 'lib'}",
                    *(f"-l{name}" for name in libraries), "-o", str(partial)])  # fmt: skip
        partial.replace(target)


def leave_note(package: Path, library: str, reason: str | None) -> None:
    """Why a library is not there, in its place; a library of older sources goes."""
    note = package / f"{library}.not-built.txt"
    if reason is None:
        note.unlink(missing_ok=True)
        return
    for old in package.glob(f"{library}.*so"):
        old.unlink()
    package.mkdir(parents=True, exist_ok=True)
    note.write_text(reason + "\n", encoding="utf-8")


def refuse(reason: str) -> None:
    """The package works without the extension, unless a strict build was asked for."""
    if STRICT:
        raise SystemExit(f"adalora_fast: {reason}")
    print(f"adalora_fast: {reason}; the package works without it", file=sys.stderr)


def extensions() -> list[Extension]:
    """What can be built here."""
    torch = installed_torch()
    if torch is None:
        refuse("adalora_fast._C was not built: install torch first, then this package again")
        return []
    with_cuda = cuda_refusal(torch) is None
    return [extension("_C", "cpu"), *([extension("_C_cuda", "cuda")] if with_cuda else [])]


setup(
    ext_modules=extensions(),
    cmdclass={"build_ext": Build},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},  # no Python headers at all, in fact
)
