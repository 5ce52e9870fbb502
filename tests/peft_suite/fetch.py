"""PEFT's tests from the source distribution of the pinned version, downloaded once and unpacked."""

import re
import subprocess
import sys
import tarfile
from importlib import metadata
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
PACKAGE = "peft_tests"  # not ``tests``, which is this project's
REQUIREMENTS = ("parameterized==0.9.0",)  # what PEFT's tests import and this project does not need


def pinned_version() -> str:
    """The version of PEFT in constraints.txt.

    Raises:
        SystemExit: another one is installed.
    """
    lines = (REPOSITORY / "constraints.txt").read_text()
    version = re.search(r"^peft==(\S+)$", lines, re.MULTILINE)[1]
    if metadata.version("peft") != version:
        raise SystemExit(
            f"peft {metadata.version('peft')} is installed, constraints.txt says {version}; run make venv"
        )
    return version


def fetch(folder: Path) -> str:
    """Make sure of ``folder / PACKAGE`` (PEFT's tests) and ``folder / "site"`` (what they import).

    Returns:
        PEFT's version.

    Raises:
        SystemExit: the package index cannot be reached.
    """
    version = pinned_version()
    folder.mkdir(parents=True, exist_ok=True)
    archive = folder / f"peft-{version}.tar.gz"
    if not archive.is_file():
        only_source = ("--no-deps", "--no-binary", ":all:", f"peft=={version}")
        _pip(f"the source distribution of peft {version}", "download", *only_source, "--dest", str(folder))
    tests = folder / version / PACKAGE
    if not (tests / "__init__.py").is_file():
        unpack_tests(archive, f"peft-{version}/tests/", tests)
    if not (folder / "site").is_dir():
        _pip(", ".join(REQUIREMENTS), "install", "--no-deps", "--target", str(folder / "site"), *REQUIREMENTS)
    return version


def unpack_tests(archive: Path, prefix: str, target: Path) -> None:
    """Unpack the members below ``prefix`` into the package ``target``; none gets out of it.

    Raises:
        SystemExit: there is none below ``prefix``.
        tarfile.FilterError: a member's path or link leaves ``target``.
    """
    with tarfile.open(archive) as file:
        members = []
        for member in file.getmembers():
            if member.isfile() and member.name.startswith(prefix):
                member.name = member.name.removeprefix(prefix)
                members.append(member)
        if not members:
            raise SystemExit(f"{archive} has no {prefix}; remove it and run make peft-suite again")
        target.mkdir(parents=True, exist_ok=True)
        file.extractall(target, members, filter="data")
    (target / "__init__.py").touch()  # last: it says that all is there


def _pip(what: str, command: str, *arguments: str) -> None:
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", command, "--quiet", *arguments]
    done = subprocess.run(pip, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise SystemExit(
            f"make peft-suite needs {what}, and pip could not get it ({last}); is an index there?"
        )
