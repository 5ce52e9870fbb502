"""What is measured: each module of this package is a suite and lists its cases for a scale and a device.

A suite has ``cases(scale, device) -> list[Case]``. Scales: ``full``; ``quick``, a few cases of every kind;
``tiny``, sizes that Triton's interpreter can do in seconds, to walk the plan without a GPU.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

SCALES = ("full", "quick", "tiny")


@dataclass(frozen=True)
class Contestant:
    """Someone's way to do the work.

    Args:
        calls: the same work on different inputs. A GPU is timed over all of them in turn, so that none finds
            its inputs in the cache; a CPU is timed on the first.
        capturable: whether a CUDA graph may contain it; otherwise events around eager calls time it.
    """

    calls: list[Callable[[], object]]
    capturable: bool = True


@dataclass(frozen=True)
class Work:
    """A case made real: inputs, and who takes part.

    Args:
        contestants: name → function that makes the contestant; one that raises is reported as missing, with
            its error's first line as the reason.
        gate: called with a name before that contestant is timed; raises AssertionError where it computes
            something else than the truth.
    """

    contestants: dict[str, Callable[[], Contestant]]
    gate: Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One thing that every contestant does.

    Args:
        suite, name, what, baseline, unit: as in :class:`benchmarks.report.results.Row` (``name`` is its
            ``case``). Where ``unit`` is not ``seconds``, a contestant's first call returns the value.
        build: makes inputs and contestants; nothing is allocated before.
        moved, operations: bytes and operations that any implementation needs; None where nobody can say.
        dtype: the type whose matrix product is the ceiling of ``operations``.
        contestants: the names that ``build`` will offer, for those who list cases without building them.
    """

    suite: str
    name: str
    what: dict[str, str | int | float | bool]
    baseline: str
    build: Callable[[], Work]
    contestants: tuple[str, ...]
    unit: str = "seconds"
    moved: float | None = None
    operations: float | None = None
    dtype: torch.dtype = torch.float32


COMPILED = " compiled"  # how the name of a contestant ends that a compiler makes


def apart(case: Case) -> list[Case]:
    """The case without compiled contestants, then one of its own for each of those, with the baseline: the
    minutes of a compiler cost no other contestant its time.
    """
    compiled = [name for name in case.contestants if name.endswith(COMPILED)]
    others = tuple(name for name in case.contestants if name not in compiled)
    if not compiled:
        return [case]
    alone = [_only(case, f"{case.name}, {name}", (case.baseline, name)) for name in compiled]
    return [_only(case, case.name, others), *alone]


def _only(case: Case, name: str, contestants: tuple[str, ...]) -> Case:
    def build() -> Work:
        work = case.build()
        chosen = {who: make for who, make in work.contestants.items() if who in contestants}
        return replace(work, contestants=chosen)

    return replace(case, name=name, contestants=contestants, build=build)


def is_compiled(case: Case) -> bool:
    """Whether a compiler has a part in the case."""
    return any(name.endswith(COMPILED) for name in case.contestants)
