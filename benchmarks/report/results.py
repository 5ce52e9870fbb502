"""What a benchmark leaves behind: one JSON file of rows, of the same form for every suite and machine.

A row is one contestant of one case. A figure that could not be taken is a row too, with the reason in
``missing``, so that a table shows it as missing and never leaves it out.
"""

import json
import math
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from adalora_fast.environment import write_json

FORMAT = 1
UNITS = ("seconds", "bytes", "calls")
CLOCKS = {
    "graph": "replays of a CUDA graph, inputs not in the cache",
    "events": "CUDA events around eager calls",
    "host": "the host's clock, contestants in turns",
    "count": "counted, not timed",
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One contestant of one case; smaller values are better.

    Args:
        suite: ``adapter``, ``importance``, ``step``, ...
        case: what was done, unique within the suite: ``"768x3072 r16 bfloat16 forward"``.
        what: the same as names and values, for plots: ``{"inner": 768, "rank": 16, ...}``.
        contestant, baseline: who did it, and against whom ``ratio`` is.
        unit: one of ``UNITS``.
        clock: one of ``CLOCKS``.
        value, p20, p80: median, 20th and 80th percentile; None where missing.
        ratio: value over the baseline's, the median of the rounds' ratios where turns were taken.
        moved, operations: bytes and floating-point operations that any implementation needs.
        floor: seconds that they take at the ceilings of the same run.
        launches: kernels and copies of one call on a GPU.
        missing: why there is no value.
    """

    suite: str
    case: str
    what: dict[str, str | int | float | bool]
    contestant: str
    baseline: str
    unit: str = "seconds"
    clock: str = "host"
    value: float | None = None
    p20: float | None = None
    p80: float | None = None
    ratio: float | None = None
    moved: float | None = None
    operations: float | None = None
    floor: float | None = None
    launches: int | None = None
    missing: str | None = None

    @property
    def achieved(self) -> float | None:
        """Floor over time: 1 is as fast as this device can."""
        return self.floor / self.value if self.floor and self.value else None


@dataclass(kw_only=True)
class Results:
    """One run of the benchmark command.

    Args:
        device: ``cpu`` or the GPU's name as a file name, ``nvidia-h200``.
        environment: as :func:`adalora_fast.environment.environment` has it.
        scale: ``full``, ``quick`` or ``tiny`` (which checks the plan, its times mean nothing).
        gate: counts and verdict of the correctness tests that ran first, and by op under ``ops``; None where
            none ran.
        ceilings: bytes per second of a copy and operations per second of a product, by type.
        rows: what was measured.
    """

    device: str
    environment: dict[str, Any]
    scale: str = "full"
    gate: dict[str, Any] | None = None
    ceilings: dict[str, Any] | None = None
    rows: list[Row] = field(default_factory=list)

    def done(self) -> set[tuple[str, str]]:
        """(suite, case) of every case that has rows."""
        return {(row.suite, row.case) for row in self.rows}

    def write(self, path: Path) -> None:
        """Write all of it or nothing."""
        content = {"format": FORMAT, **{f.name: getattr(self, f.name) for f in fields(self)}}
        content["rows"] = [asdict(row) for row in self.rows]
        write_json(path, content)


def read(path: Path) -> Results:
    """The results in a file.

    Raises:
        ValueError: it is not one, or something in it does not fit; the message names the row and the field.
        OSError: it cannot be read.
    """
    try:
        content = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no JSON file ({error}); run the benchmark again") from error
    try:
        return _checked(content)
    except (TypeError, KeyError) as error:
        raise ValueError(f"{path} is no benchmark result ({error})") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _checked(content: Any) -> Results:
    if not isinstance(content, dict) or "rows" not in content:
        raise ValueError("no benchmark result: it has no rows")
    content = dict(content)
    if (found := content.pop("format", None)) != FORMAT:
        raise ValueError(f"format {found!r}, this version reads {FORMAT}")
    rows = content.pop("rows")
    result = Results(**content)
    if result.scale not in ("full", "quick", "tiny"):
        raise ValueError(f"scale {result.scale!r} is none of full, quick, tiny")
    for name in ("versions", "machine", "started", "command"):
        if name not in result.environment:
            raise ValueError(f"the environment lacks {name!r}")
    seen = set()
    for number, values in enumerate(rows):
        try:
            row = Row(**values)
            _check_row(row)
        except (TypeError, ValueError) as error:
            raise ValueError(f"row {number}: {error}") from error
        key = (row.suite, row.case, row.contestant)
        if key in seen:
            raise ValueError(f"row {number}: {' / '.join(key)} is there twice")
        seen.add(key)
        result.rows.append(row)
    return result


def _check_row(row: Row) -> None:
    if row.unit not in UNITS:
        raise ValueError(f"unit {row.unit!r} is none of {UNITS}")
    if row.clock not in CLOCKS:
        raise ValueError(f"clock {row.clock!r} is none of {tuple(CLOCKS)}")
    for name in ("value", "p20", "p80", "ratio", "moved", "operations", "floor", "launches"):
        number = getattr(row, name)
        if number is None:
            continue
        if isinstance(number, bool) or not isinstance(number, int | float):
            raise ValueError(f"{name} is {number!r}, not a number")
        if not math.isfinite(number) or number < 0:
            raise ValueError(f"{name} is {number!r}; it must be finite and not negative")
    if (row.value is None) == (row.missing is None):
        raise ValueError(
            "a row has either a value or the reason why it is missing, "
            f"this one has {row.value!r} and {row.missing!r}"
        )
    if row.p20 is not None and row.p80 is not None and not row.p20 <= row.value <= row.p80:
        raise ValueError(f"the median {row.value} is outside of p20 {row.p20} and p80 {row.p80}")
