"""Imports between the rooms of the package only go down, and no files import each other in a circle.

All imports count: inside functions, and those that only a type checker reads.
"""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "adalora_fast"
# From the ground up. What is not named belongs to the room above it: "ops" is ops/__init__.py.
ROOMS = (
    "environment", "locks", "extras",
    "ops.dispatch", "ops.adapter", "ops.importance", "ops.orthogonality", "ops.allocation", "ops",
    "distributed", "nn", "allocator", "uneven", "integrations",
    "experiments.settings", "experiments.metrics", "experiments.data", "experiments.models",
    "experiments.methods", "experiments.run", "experiments.sweep", "experiments.report",
    "experiments.demo", "experiments.evaluation", "experiments.cli", "experiments",
    "analysis", "export_command", "exits", "cli", "entry",
    "",  # adalora_fast/__init__.py, which hands out the public names
    "__main__",
)  # fmt: skip


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def room_of(name: str) -> int:
    while name not in ROOMS:
        name = name.rpartition(".")[0]
    return ROOMS.index(name)


def imported(name: str, path: Path) -> set[str]:
    """The files of the package that a file imports."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.removeprefix("adalora_fast.") for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".") if package else []
            base = ".".join(above[: len(above) - node.level + 1]) if node.level else ""
            module = node.module or ""
            if not node.level:
                if module.partition(".")[0] != "adalora_fast":
                    continue
                module = module.partition(".")[2]
            base = ".".join(filter(None, (base, module)))
            inside = {".".join(filter(None, (base, alias.name))) for alias in node.names}
            found |= inside & FILES.keys() or {base}
    return found & FILES.keys()


IMPORTS = {name: imported(name, path) for name, path in FILES.items()}


def test_the_imports_are_read():
    """Relative, absolute, of a module, of a package, inside a function."""
    assert {"allocator.schedule", "nn", "distributed.processes"} <= IMPORTS["allocator.allocator"]
    assert "ops.dispatch.backend" in IMPORTS["ops.adapter"]
    assert "experiments.run.training" in IMPORTS["experiments.demo"]
    assert sum(map(len, IMPORTS.values())) > 500


def test_every_room_exists():
    assert [room for room in ROOMS if room not in FILES] == []


def test_imports_go_down():
    up = [
        f"{name} imports {other}"
        for name, others in IMPORTS.items()
        for other in sorted(others)
        if room_of(other) > room_of(name)
    ]
    assert not up


def test_no_circles():
    """A package does not count as what its files import from each other."""
    try:
        TopologicalSorter(IMPORTS).prepare()
    except CycleError as error:
        pytest.fail(f"in a circle: {' → '.join(error.args[1])}")


def test_the_front_door_says_the_same_twice():
    """What type checkers read in adalora_fast/__init__.py is what `__getattr__` hands out."""
    import adalora_fast

    tree = ast.parse(FILES[""].read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    typed = {
        alias.name: node.module.removeprefix("adalora_fast.") for node in block.body for alias in node.names
    }
    assert typed == adalora_fast._WHERE and set(typed) == set(adalora_fast.__all__)


def test_the_place_of_uneven_data_stays():
    """docs/distributed.md named it first."""
    from adalora_fast import JoinableAllocator, uneven

    assert uneven.JoinableAllocator is JoinableAllocator
