"""Tables of results: the numbers in them are the rows' numbers, and what is missing is shown as missing."""

import re
import subprocess
import sys

import pytest

from benchmarks.report.goals import goals
from benchmarks.report.report import SIZES, TIMES, scaled, tables
from tests.benchmarks.report.made import BASE, LAYER, everything, results, row


def line(text: str, start: str) -> list[str]:
    """The cells of the first table line that starts so."""
    found = next(line for line in text.splitlines() if line.startswith(f"| {start}"))
    return [cell.strip() for cell in found.strip("|").split("|")]


@pytest.mark.parametrize(
    ("value", "said"),
    [(1.5, "1.50 s"), (0.0123, "12.3 ms"), (4.56e-5, "45.6 µs"), (7e-9, "7.00 ns"), (3e-10, "0.30 ns"),
     (0.9999, "1000 ms"), (123.4, "123 s")],
)  # fmt: skip
def test_times_are_scaled(value, said):
    assert scaled(value, TIMES) == said


def test_sizes_are_scaled():
    assert [scaled(value, SIZES) for value in (12, 3456, 7.8e6, 9.1e9)] == [
        "12.0 B",
        "3.46 kB",
        "7.80 MB",
        "9.10 GB",
    ]


def test_every_number_is_the_rows():
    found = everything()
    text = tables(found)
    assert "# Benchmark on nvidia-h200, 2026-01-02" in text and "0123456789abcdef" in text
    header = line(text, "case | floor | frozen | adalora_fast | peft | peft lora | of the floor")
    cells = line(text, "768x3072 r16 bfloat16 step")
    size = 1e-9 * 768 * 3072 * 3
    assert cells == [
        "768x3072 r16 bfloat16 step", scaled(size / 2, TIMES), scaled(size, TIMES),
        f"{scaled(1.2 * size, TIMES)}, 1.20x", f"{scaled(4 * size, TIMES)}, 4.00x",
        f"{scaled(2 * size, TIMES)}, 2.00x", f"{0.5 / 1.2:.0%}",
    ]  # fmt: skip
    assert len(header) == len(cells)
    step = dict(zip(line(text, "case | frozen | adalora_fast | peft lora | peft | peft compiled"),
                    line(text, "deberta 32x128 | 20.0 ms"), strict=True))  # fmt: skip
    assert step["adalora_fast"] == "30.0 ms, 1.50x, 137 k tokens/s, events"
    assert step["peft compiled"] == "missing [1]" and "- [1] no time" in text


def test_a_reason_is_given_once():
    rows = [row(case=case, value=None, ratio=None, missing="too late") for case in "abc"]
    text = tables(results(rows))
    assert text.count("too late") == 1 and text.count("missing [1]") == 3


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"scale": "tiny"}, "its times mean nothing"),
        ({"scale": "quick"}, "A quick run"),
        ({"gate": None}, r"did not pass before this run \(not run\)"),
        (
            {"gate": {"verdict": "failed", "counts": {"failed": 2}}},
            r"did not pass before this run \(failed\)",
        ),
    ],
)
def test_warnings_come_first(changes, said):
    text = tables(results([row()], **changes))
    assert re.search(rf"^\*\*.*{said}", text.split("## ")[0], re.MULTILINE)


def test_edited_code_is_marked():
    found = results([row()])
    found.environment = {**found.environment, "commit": "abc+changes"}
    assert "**The code was not that of a commit.**" in tables(found)
    assert "not that of a commit" not in tables(results([row()]))


def verdict(found, start):
    cells = line(goals(found), start)
    return cells[1], cells[2], cells[3]


def test_goals():
    found = everything()
    assert verdict(found, "forward ÷ frozen linear, 768 → 768") == ("1.35", "1.2", "met")
    assert verdict(found, "forward ÷ frozen linear, 3072 → 3072") == ("1.15", "1.2", "**missed**")
    # (3 · 1.2 - 1.2) / (3 - 1) of the frozen forward
    assert verdict(found, "backward ÷ frozen dx, 768 → 3072") == ("1.45", "1.2", "met")
    assert verdict(found, "whole step ÷ PEFT AdaLoRA") == ("0.5", "0.375", "met")
    assert verdict(found, "whole step ÷ PEFT LoRA") == ("1", "0.75", "met")
    assert verdict(found, "peak memory of that step") == ("0.8", "0.375", "met")
    assert verdict(found, "select among 65,536 triplets, µs") == ("40", "", "missing")
    select = row("allocation", "many", value=55e-6, what={"triplets": 65536, "work": "select"})
    assert verdict(results([select]), "select among 65,536 triplets, µs") == ("40", "55", "**missed**")


def test_a_goal_is_not_met_by_another_setting_or_clock():
    other = {**LAYER, "rank": 4, "inner": 768, "outer": 768, "pass": "forward"}
    assert (
        verdict(results([row("adapter", what=other)]), "forward ÷ frozen linear, 768 → 768")[2] == "missing"
    )
    rows = [row("step", contestant="adalora_fast", what=BASE, value=1.0),
            row("step", contestant="peft", what=BASE, value=4.0, clock="events")]  # fmt: skip
    assert verdict(results(rows), "whole step ÷ PEFT AdaLoRA")[2] == "missing"


def test_a_cpu_has_its_own_goals_and_tiny_sizes_none():
    text = goals(results([], device="cpu"))
    assert "MiniLM-L6" in text and "DeBERTa" not in text
    assert goals(results([], scale="tiny")) == ""


def test_the_tables_need_the_standard_library_only():
    code = (
        "import sys; from benchmarks.report import report; "
        "sys.exit(str({'matplotlib', 'rich', 'tyro', 'pandas'} & set(sys.modules)).replace('set()', '') or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
