"""Whether versions exist that keep all bounds of pyproject.toml together: `python -m tests.helpers.bounds`.

Asks the package index, through pip, without installing anything. Three questions:

- newest: is there a set of versions within the bounds, of the package and every extra?
- oldest: is there one in which each dependency of a base installation has its lowest allowed release?
- above: which newer releases exist that a bound keeps out? That is news and no failure.

It is run by hand (`make test-newest`): what exists changes without a change here.
"""

import argparse
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[2]


def requirements() -> tuple[list[Requirement], list[Requirement]]:
    """What pyproject.toml asks for on this system: of a base installation, and of all extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = [line for lines in project["optional-dependencies"].values() for line in lines]

    def read(lines: Sequence[str]) -> list[Requirement]:
        found = [Requirement(line) for line in lines if not line.startswith(project["name"])]
        return [one for one in found if one.marker is None or one.marker.evaluate()]

    return read(project["dependencies"]), read(extras)


def at_its_lowest(requirement: Requirement) -> str:
    """`torch>=2.10` as `torch==2.10.*`: any patch of the oldest release.

    Raises:
        ValueError: it has no lower bound.
    """
    lower = [part.version for part in requirement.specifier if part.operator in (">=", "==")]
    if not lower:
        raise ValueError(f"{requirement} has no lower bound; give one")
    release = Version(lower[0]).release
    if len(release) > 2:
        return f"{requirement.name}=={lower[0]}"
    return f"{requirement.name}=={'.'.join(map(str, (*release, 0)[:2]))}.*"


def resolved(wanted: Sequence[str]) -> dict[str, str]:
    """The versions that pip would install in an empty environment.

    Raises:
        RuntimeError: there is no such set; the message is pip's.
    """
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", "install", "--dry-run"]
    command += ["--ignore-installed", "--report", "-", *wanted]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        errors = [line for line in done.stderr.splitlines() if line.strip()]
        raise RuntimeError("\n".join(errors[-12:]))
    found = [item["metadata"] for item in json.loads(done.stdout)["install"]]
    return {canonical(item["name"]): item["version"] for item in found}


def canonical(name: str) -> str:
    """As package indexes spell it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def latest(name: str) -> str:
    """The newest release that the index offers for this Python."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "index", "versions", name]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return re.search(r"\(([^)]+)\)", done.stdout).group(1)


def main() -> int:
    """0 if both sets exist."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pins", nargs="*", help="for the newest set, such as torch==2.13.0")
    pins, failed = parser.parse_args().pins, 0
    pinned = {canonical(Requirement(pin).name) for pin in pins}
    base, extras = requirements()
    every = base + extras
    for title, names, wanted in (
        ("newest", every, [*pins, *map(str, every)]),
        ("oldest", base, [at_its_lowest(requirement) for requirement in base]),
    ):
        try:
            found = resolved(wanted)
        except RuntimeError as error:
            print(f"{title}: no set of versions is within the bounds\n{error}")
            failed = 1
            continue
        listed = dict.fromkeys(canonical(requirement.name) for requirement in names)
        print(f"{title}: {', '.join(f'{name} {found[name]}' for name in listed)}")
    for requirement in every:
        newest = latest(requirement.name)
        if canonical(requirement.name) not in pinned and not requirement.specifier.contains(newest):
            print(f"above: {requirement.name} {newest} is kept out by {requirement}")
    return failed


if __name__ == "__main__":
    sys.exit(main())
