"""What the kernels are to reach, as data, and how far a file of results shows it.

A goal that a file says nothing about is missing, never met.
"""

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.report.results import Results, Row


@dataclass(frozen=True, kw_only=True)
class Goal:
    """A figure and its limit.

    Args:
        what: in words.
        limit: the figure is to be at most this.
        device: ``gpu`` or ``cpu``: on the other it says nothing.
        figure: finds it in the results; None where they do not have it.
    """

    what: str
    limit: float
    device: str
    figure: Callable[[Results], float | None]


def _row(results: Results, suite: str, contestant: str, **what) -> Row | None:
    """The first row with a value whose ``what`` has these."""
    for row in results.rows:
        same = all(row.what.get(name) == value for name, value in what.items())
        if row.suite == suite and row.contestant == contestant and row.value is not None and same:
            return row
    return None


def _over(suite: str, contestant: str, other: str, **what) -> Callable[[Results], float | None]:
    """One contestant's value over another's in the same case."""

    def figure(results: Results) -> float | None:
        own = _row(results, suite, contestant, **what)
        if own is None:
            return None
        if own.baseline == other:
            return own.ratio  # of rounds, where turns were taken
        base = _row(results, suite, other, **own.what)
        if base is None or base.clock != own.clock:
            return None
        return own.ratio / base.ratio if own.ratio and base.ratio else own.value / base.value

    return figure


def _backward(inner: int, outer: int) -> Callable[[Results], float | None]:
    """(step - forward) of the adapted layer over the same of the frozen one, whose backward is dx alone."""

    def figure(results: Results) -> float | None:
        parts = [
            _row(results, "adapter", name, **{**_LAYER, "inner": inner, "outer": outer, "pass": direction})
            for name in ("adalora_fast", "frozen")
            for direction in ("step", "forward")
        ]
        if any(part is None or part.clock != "graph" for part in parts):
            return None
        ours, frozen = parts[0].value - parts[1].value, parts[2].value - parts[3].value
        return ours / frozen if frozen > 0 and ours > 0 else None

    return figure


def _over_floor(suite: str, **what) -> Callable[[Results], float | None]:
    def figure(results: Results) -> float | None:
        row = _row(results, suite, "adalora_fast", **what)
        return row.value / row.floor if row is not None and row.floor else None

    return figure


def _microseconds(suite: str, **what) -> Callable[[Results], float | None]:
    def figure(results: Results) -> float | None:
        row = _row(results, suite, "adalora_fast", **what)
        return row.value * 1e6 if row is not None else None

    return figure


def _launches(suite: str, **what) -> Callable[[Results], float | None]:
    def figure(results: Results) -> float | None:
        row = _row(results, suite, "adalora_fast", **what)
        return row.launches if row is not None else None

    return figure


_LAYER = {"rank": 16, "dtype": "bfloat16", "dropout": 0.0, "tokens": 4096}
_BASE = {"model": "deberta-v3-base", "batch": 32, "length": 128}
_SENSITIVITY = {"score": "sensitivity", "model": "deberta-v3-base"}


def _layer_goals() -> list[Goal]:
    shapes = {(768, 768): (1.35, 1.7), (3072, 768): (1.35, 1.45), (768, 3072): (1.15, 1.45)}
    shapes[3072, 3072] = (1.15, 1.25)
    found = []
    for (inner, outer), (forward, backward) in shapes.items():
        name = f"{inner} → {outer}, bf16, r 16, 4,096 tokens"
        what = {**_LAYER, "inner": inner, "outer": outer, "pass": "forward"}
        frozen = _over("adapter", "adalora_fast", "frozen", **what)
        found.append(
            Goal(what=f"forward ÷ frozen linear, {name}", limit=forward, device="gpu", figure=frozen)
        )
        dx = _backward(inner, outer)
        found.append(Goal(what=f"backward ÷ frozen dx, {name}", limit=backward, device="gpu", figure=dx))
    return found


GOALS = (
    *_layer_goals(),
    Goal(what="importance update ÷ its floor", limit=1.5, device="gpu",
         figure=_over_floor("importance", **_SENSITIVITY)),
    Goal(what="importance update, launches", limit=2, device="gpu",
         figure=_launches("importance", **_SENSITIVITY)),
    Goal(what="orthogonality ÷ its floor", limit=2.0, device="gpu", figure=_over_floor("orthogonality")),
    Goal(what="select among 1,152 triplets, µs", limit=10, device="gpu",
         figure=_microseconds("allocation", triplets=1152, work="select")),
    Goal(what="select among 65,536 triplets, µs", limit=40, device="gpu",
         figure=_microseconds("allocation", triplets=65536)),
    Goal(what="whole step ÷ PEFT AdaLoRA, DeBERTa-v3-base bf16 32 x 128", limit=0.5, device="gpu",
         figure=_over("step", "adalora_fast", "peft", **_BASE)),
    Goal(what="whole step ÷ PEFT LoRA, DeBERTa-v3-base bf16 32 x 128", limit=1.0, device="gpu",
         figure=_over("step", "adalora_fast", "peft lora", **_BASE)),
    Goal(what="peak memory of that step ÷ PEFT AdaLoRA", limit=0.8, device="gpu",
         figure=_over("memory", "adalora_fast", "peft", **_BASE)),
    Goal(what="whole step ÷ PEFT AdaLoRA, MiniLM-L6 float32 16 x 64", limit=1 / 1.25, device="cpu",
         figure=_over("step", "adalora_fast", "peft", model="minilm-l6")),
    Goal(what="importance update ÷ PEFT's loop", limit=1 / 5, device="cpu",
         figure=_over("importance", "adalora_fast", "peft", **_SENSITIVITY)),
)  # fmt: skip


def goals(results: Results) -> str:
    """A table of the goals for this kind of device; "" where there are none or the sizes mean nothing."""
    from benchmarks.report.report import markdown

    if results.scale == "tiny":
        return ""
    kind = "cpu" if results.device == "cpu" else "gpu"
    lines = [["goal", "at most", "measured", ""]]
    for goal in GOALS:
        if goal.device == kind:
            figure = goal.figure(results)
            verdict = "missing" if figure is None else "met" if figure <= goal.limit else "**missed**"
            measured = "" if figure is None else f"{figure:.3g}"
            lines.append([goal.what, f"{goal.limit:.3g}", measured, verdict])
    return markdown(lines)
