"""Small results, made up for tests; nothing here was measured."""

from benchmarks.report.results import Results, Row

ENVIRONMENT = {
    "started": "2026-01-02T03:04:05+00:00",
    "commit": "0123456789abcdef",
    "versions": {"python": "3.12.0", "torch": "2.11.0", "peft": "0.21.2"},
    "machine": {"processor": "A Processor", "threads": 1, "gpus": []},
    "command": ["cpu.py", "--quick"],
}
CEILINGS = {"bandwidth": 1e10, "flops": {"float32": 1e11, "float16": 1e11, "bfloat16": 2e11}}
LAYER = {"rank": 16, "dtype": "bfloat16", "dropout": 0.0, "tokens": 4096, "goal": True}
BASE = {"model": "deberta-v3-base", "batch": 32, "length": 128, "tokens": 4096, "rank": 16}


def row(suite="step", case="a case", contestant="adalora_fast", value=1.0, **changes) -> Row:
    """A row whose spread is ten per cent on each side."""
    plain = {"what": {}, "baseline": "frozen", "ratio": value, "clock": "graph"}
    if value is not None:
        plain |= {"p20": 0.9 * value, "p80": 1.1 * value}
    return Row(suite=suite, case=case, contestant=contestant, value=value, **{**plain, **changes})


def results(rows=(), device="nvidia-h200", **changes) -> Results:
    plain = {"environment": ENVIRONMENT, "gate": {"verdict": "passed", "counts": {"passed": 7}}}
    return Results(device=device, rows=list(rows), **{**plain, "ceilings": CEILINGS, **changes})


def everything() -> Results:
    """Something of every suite: shapes, ranks and types as on a GPU."""
    rows = []
    for inner, outer in ((768, 768), (768, 3072), (3072, 768), (3072, 3072), (4096, 14336)):
        for direction, factor in (("forward", 1.0), ("step", 3.0)):
            case = f"{inner}x{outer} r16 bfloat16 {direction}"
            what = {**LAYER, "inner": inner, "outer": outer, "pass": direction}
            size = 1e-9 * inner * outer * factor
            for name, times in (("frozen", 1.0), ("adalora_fast", 1.2), ("peft", 4.0), ("peft lora", 2.0)):
                work = {"moved": 1e4 * size * 1e9 / 1e3, "operations": 8192e9 * size, "floor": size / 2}
                rows.append(
                    row("adapter", case, name, size * times, what=what, ratio=times, **work, launches=3)
                )
    for name, seconds in (("frozen", 0.02), ("adalora_fast", 0.03), ("peft lora", 0.04), ("peft", 0.08)):
        what = dict(BASE)
        rows.append(
            row("step", "deberta 32x128", name, seconds, what=what, ratio=seconds / 0.02, clock="events")
        )
        rows.append(row("memory", "deberta 32x128", name, seconds * 1e11, what=what, unit="bytes",
                        ratio=seconds / 0.02, clock="count", p20=None, p80=None))  # fmt: skip
    rows.append(
        row("step", "deberta 32x128", "peft compiled", None, what=BASE, ratio=None, missing="no time")
    )
    for part, varies, values in (("bookkeeping", "layers", (1, 12, 500)), ("layer", "rank", (4, 16, 64))):
        for number in values:
            for name, times in (("peft", 1.0), ("adalora_fast", 0.2)):
                what = {"part": part, "varies": varies, varies: number, "width": 256}
                case = f"{part} by {varies}: {number}"
                rows.append(
                    row("growth", case, name, 1e-3 * number * times, what=what, baseline="peft", ratio=times)
                )
    return results(rows)
