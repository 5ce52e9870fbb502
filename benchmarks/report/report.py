"""Tables of benchmark results in Markdown; the standard library is enough for them."""

from collections.abc import Iterable

from benchmarks.report.goals import goals
from benchmarks.report.results import CLOCKS, Results, Row

TIMES = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"), (1e-9, "ns"))
SIZES = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "B"))
RATES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""))
PURPOSE = {
    "adapter": "One adapted layer, forward or forward and backward (step)",
    "importance": "One importance update of a whole model's adapters",
    "orthogonality": "The orthogonality regulariser of a whole model, value and gradient",
    "allocation": "Scoring, selecting and masking triplets",
    "step": "A whole training step, importance, orthogonality and allocation included",
    "inference": "The forward of a whole model",
    "memory": "Memory",
    "growth": "Growth with layers, rank and tokens",
}


def tables(results: Results) -> str:
    """Everything that a file of results says: a heading, a table for each suite, the goals, and why figures
    are missing.
    """
    reasons: list[str] = []
    parts = [heading(results)]
    for suite in dict.fromkeys(row.suite for row in results.rows):
        rows = [row for row in results.rows if row.suite == suite]
        parts += [f"## {suite}", PURPOSE.get(suite, ""), _suite_table(rows, reasons)]
    if found := goals(results):
        parts += ["## Goals", found]
    if reasons:
        parts += ["## Missing", "\n".join(f"- [{i}] {reason}" for i, reason in enumerate(reasons, 1))]
    return "\n\n".join(part for part in parts if part)


def heading(results: Results) -> str:
    """What was measured where, and how far it can be trusted."""
    environment = results.environment
    versions, machine = environment["versions"], environment["machine"]
    names = ("torch", "triton", "peft", "transformers")
    software = ", ".join(f"{name} {versions[name]}" for name in names if name in versions)
    hardware = ", ".join(machine.get("gpus") or []) or machine.get("processor", "unknown processor")
    commit = environment.get("commit") or "no commit"
    lines = [f"# Benchmark on {results.device}, {environment['started'][:10]}", ""]
    lines += [f"**{warning}**\n" for warning in warnings(results)]
    lines += [
        f"- {hardware}; {machine.get('threads', '?')} threads of PyTorch on the host",
        f"- Python {versions.get('python', '?')}, {software}",
        f"- commit {commit}; `{' '.join(map(str, environment['command']))}`",
    ]
    if results.gate is not None:
        counts = ", ".join(f"{number} {name}" for name, number in results.gate.get("counts", {}).items())
        lines.append(f"- correctness tests first: {results.gate.get('verdict')} ({counts or 'no counts'})")
    if results.ceilings is not None:
        flops = ", ".join(f"{name} {rate / 1e12:.3g}" for name, rate in results.ceilings["flops"].items())
        bandwidth = scaled(results.ceilings["bandwidth"], SIZES)
        lines.append(f"- measured in the same run: copy {bandwidth}/s; products in TFLOP/s: {flops}")
    clocks = {row.clock for row in results.rows if row.value is not None}
    lines += [f"- clock `{clock}`: {meaning}" for clock, meaning in CLOCKS.items() if clock in clocks]
    return "\n".join(lines)


def warnings(results: Results) -> list[str]:
    """Reasons not to quote these figures."""
    found = []
    if results.scale == "tiny":
        found.append("Tiny sizes: this run walks through the plan, its times mean nothing.")
    elif results.scale == "quick":
        found.append("A quick run: a few cases only.")
    if results.device != "cpu":
        verdict = (results.gate or {}).get("verdict")
        if verdict != "passed":
            found.append(f"The correctness tests did not pass before this run ({verdict or 'not run'}).")
    commit = results.environment.get("commit")
    if commit is None or commit.endswith("+changes"):
        found.append("The code was not that of a commit.")
    return found


def _suite_table(rows: list[Row], reasons: list[str]) -> str:
    contestants = _in_order(rows)
    floors = any(row.floor for row in rows)
    header = ["case", *(["floor"] if floors else []), *contestants, *(["of the floor"] if floors else [])]
    lines = [header]
    for case in dict.fromkeys(row.case for row in rows):
        found = {row.contestant: row for row in rows if row.case == case}
        line = [_case_name(next(iter(found.values())))]
        if floors:
            floor = next((row.floor for row in found.values() if row.floor), None)
            line.append(scaled(floor, TIMES) if floor else "")
        line += [_cell(found.get(name), reasons) for name in contestants]
        if floors:
            ours = found.get("adalora_fast")
            line.append(f"{ours.achieved:.0%}" if ours is not None and ours.achieved else "")
        lines.append(line)
    return markdown(lines)


def _in_order(rows: list[Row]) -> list[str]:
    """Baselines first, then ours, then the others as they come."""
    names = dict.fromkeys(row.contestant for row in rows)
    baselines = dict.fromkeys(row.baseline for row in rows if row.baseline in names)
    ours = [name for name in names if name.startswith("adalora_fast")]
    return list(dict.fromkeys([*baselines, *ours, *names]))


def _case_name(row: Row) -> str:
    metric = row.what.get("metric")
    return f"{row.case}, {metric}" if metric else row.case


def _cell(row: Row | None, reasons: list[str]) -> str:
    if row is None:
        return ""
    if row.value is None:
        if row.missing not in reasons:
            reasons.append(row.missing)
        return f"missing [{reasons.index(row.missing) + 1}]"
    parts = [with_unit(row)]
    if row.ratio is not None and row.contestant != row.baseline:
        parts.append(f"{row.ratio:.2f}x")
    if row.suite == "step" and row.what.get("tokens"):
        parts.append(f"{scaled(row.what['tokens'] / row.value, RATES)} tokens/s")
    if row.clock == "events":
        parts.append("events")
    return ", ".join(parts)


def with_unit(row: Row) -> str:
    """The row's value as people read it."""
    if row.unit == "calls":
        return f"{row.value:,.0f} calls"
    return scaled(row.value, TIMES if row.unit == "seconds" else SIZES)


def scaled(value: float, units: Iterable[tuple[float, str]]) -> str:
    """Three figures, in the largest unit that leaves something before the point."""
    units = list(units)
    size, name = next(((size, name) for size, name in units if value >= size), units[-1])
    number = value / size
    digits = max(0, 2 - len(str(int(number))) + 1)
    return f"{number:.{digits}f} {name}".rstrip()


def markdown(lines: list[list[str]]) -> str:
    """A table; the first line is its header."""
    rows = ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]
    return "\n".join([rows[0], "|" + "---|" * len(lines[0]), *rows[1:]])
