"""What a result needs beside it (versions, commit, machine, command), and writing it whole or not at all."""

import errno
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = (
    "adalora_fast", "torch", "triton", "transformers", "peft", "accelerate", "safetensors", "datasets",
    "numpy", "scikit-learn",
)  # fmt: skip
# What a figure depends on, in the repository: its own file must not make it one of edited code.
CODE = (".", ":/benchmarks", ":/csrc", ":(top,exclude)benchmarks/results")


def environment() -> dict[str, Any]:
    """Versions, commit and machine, as far as they can be told."""
    import torch

    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": git_commit(Path(__file__).parent),
        "versions": package_versions(),
        "machine": {
            "platform": platform.platform(),
            "processor": _processor(),
            "processors": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        },
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
    }


def package_versions() -> dict[str, str]:
    """Python's version and that of every package of ``PACKAGES`` that is installed."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:  # optional, or run from a source tree that is not installed
            continue
    return versions


def git_commit(folder: Path) -> str | None:
    """The commit of the repository that tracks ``folder`` ("+changes" if its code was edited); None outside
    of one.
    """

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    if not git("ls-files", "."):  # an installed copy inside somebody else's repository
        return None
    commit = git("rev-parse", "HEAD")
    changed = git("status", "--porcelain", "--", *CODE)
    return f"{commit}+changes" if commit and changed else commit


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


def write_json(path: Path, content: Any) -> None:
    """As `write_text`; ValueError where a number is not finite."""
    write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write all of it or nothing: to a temporary name first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def is_no_room(error: BaseException) -> bool:
    """Whether this came of a full disk or quota, whatever library made it of that."""
    causes = []
    while error is not None and error not in causes:
        causes.append(error)
        error = error.__cause__ or error.__context__
    numbers = {errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)}  # Windows has no quota error
    signs = ("No space left", "os error 28", "quota exceeded", "inline_container")  # the last is torch.save's
    return any(
        getattr(cause, "errno", None) in numbers or any(sign in str(cause) for sign in signs)
        for cause in causes
    )


@contextmanager
def writing_to(
    place: Path, remedy: str = "choose another --output", what: str = "write to"
) -> Iterator[None]:
    """An error of the file system in here says in one line where it was and what to do."""
    try:
        yield
    except OSError as error:
        raise type(error)(f"cannot {what} {place} ({error.strerror or error}); {remedy}") from error
