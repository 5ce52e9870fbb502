"""The tests that a version of PyTorch can break, with that version, in an environment of their own.

    python -m tests.helpers.compat --torch 2.11.0 [--folder .venv-2.11.0] [PYTEST ARGUMENT ...]

The environment has the pinned packages of constraints.txt, but for those that PyTorch chooses: itself,
Triton, setuptools, and NumPy where its Triton is too old for the newest. The package is not installed: a copy
of the tree in the folder is built and tested, so that libraries of another PyTorch stay as they are.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
CHOSEN_BY_TORCH = ("torch", "triton", "numpy", "setuptools")
EXTRAS = ("demo", "experiments", "quantized", "dev")
LEFT_OUT = (*CHOSEN_BY_TORCH, "adalora-fast", "ruff", "clang-format", "pre-commit")
BUILDS = "setuptools>=77.0.3"  # as in pyproject.toml
TESTS = ("tests/ops", "tests/nn", "tests/allocator", "tests/integrations")
OLD_INTERPRETER = (2, 12)  # the Triton that older versions bring interprets kernels with NumPy below 2.4 only


def name_of(requirement: str) -> str:
    return re.match(r"[A-Za-z0-9._-]+", requirement)[0].lower().replace("_", "-")


def constraints(text: str) -> str:
    """The pins that hold with any PyTorch."""
    lines = (line for line in text.splitlines() if line and not line.startswith("#"))
    return "\n".join(line for line in lines if name_of(line) not in CHOSEN_BY_TORCH) + "\n"


def requirements(project: dict, torch: str) -> list[str]:
    """What the tests need, beside this version of PyTorch."""
    needed = list(project["dependencies"])
    for extra in EXTRAS:
        needed += project["optional-dependencies"][extra]
    numpy = "numpy<2.4" if version(torch) < OLD_INTERPRETER else "numpy>=2"
    others = (one for one in needed if name_of(one) not in LEFT_OUT)
    return [f"torch=={torch}", numpy, BUILDS, *dict.fromkeys(others)]


def version(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(".")[:2])


def copy_tree(target: Path) -> None:
    """The files of the tree, without builds, where nothing of an older copy is left but its builds."""
    listed = ("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, check=True).stdout.decode().split("\0")
    for old in target.iterdir() if target.is_dir() else ():
        if old.name != "build":
            shutil.rmtree(old) if old.is_dir() else old.unlink()
    for name in filter(None, names):
        source, place = ROOT / name, target / name
        if source.is_file():
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, place)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--torch", required=True, help="the version of PyTorch, such as 2.11.0")
    parser.add_argument("--folder", type=Path, help="the environment (default: .venv-VERSION)")
    arguments, passed_on = parser.parse_known_args()
    folder = (arguments.folder or ROOT / f".venv-{arguments.torch}").resolve()
    tree, python = folder / "tree", folder / "bin/python"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

    def call(*command: str | Path, where: Path = ROOT) -> None:
        subprocess.run(list(map(str, command)), cwd=where, check=True)

    if not python.exists():
        call(sys.executable, "-m", "venv", folder)
    pins = folder / "constraints.txt"
    pins.write_text(constraints((ROOT / "constraints.txt").read_text()))
    pip = (python, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-compile")
    call(*pip, "-c", pins, *requirements(project, arguments.torch))
    copy_tree(tree)
    call(python, "setup.py", "--quiet", "build_ext", "--inplace", where=tree)
    call(python, "-m", "adalora_fast", where=tree)
    chosen = [one for one in passed_on if not one.startswith("-")]
    done = subprocess.run(
        [python, "-m", "pytest", "-q", *passed_on, *([] if chosen else TESTS)], cwd=tree, check=False
    )
    return done.returncode


if __name__ == "__main__":
    try:
        sys.exit(main())
    except subprocess.CalledProcessError as error:
        sys.exit(f"tests.helpers.compat: {' '.join(map(str, error.cmd))[:200]} ended with {error.returncode}")
