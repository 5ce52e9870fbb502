"""Pictures of results: what is drawn has the rows' values."""

import math

import pytest

from benchmarks.report import plots
from tests.benchmarks.report.made import everything, results, row


def test_every_picture_is_written_and_the_same_twice(tmp_path):
    files, without = plots.draw(everything(), tmp_path / "one")
    again, _ = plots.draw(everything(), tmp_path / "two")
    assert without == [] and len(files) == 2 * len(plots.PICTURES) == 8
    for first, second in zip(files, again, strict=True):
        assert first.stat().st_size > 2000
        if first.suffix == ".svg":
            assert first.read_text() == second.read_text()


def test_nothing_to_draw_is_said(tmp_path):
    files, without = plots.draw(results([row("allocation")]), tmp_path)
    assert files == [] and len(without) == 4 and list(tmp_path.iterdir()) == []
    assert without[0] == "step: the results have nothing to draw"


def test_bars_are_as_long_as_the_steps():
    axis = plots.step_bars(everything()).axes[0]
    assert [bar.get_width() for bar in axis.patches] == [0.02, 0.03, 0.04, 0.08]
    assert "2.67x PEFT's speed" in axis.get_title(loc="left")
    texts = [text.get_text() for text in axis.texts]
    assert texts[1] == "adalora_fast: 30.0 ms (1.50x)" and "PEFT LoRA: 40.0 ms (2.00x)" in texts


def test_a_compiled_contestant_of_the_same_step_is_a_bar():
    """It is a case of its own, with the baseline once more."""
    found = everything()
    for name, seconds in (("frozen", 0.021), ("peft compiled", 0.05)):
        found.rows.append(row("step", "deberta 32x128, peft compiled", name, seconds, ratio=seconds / 0.021))
    axis = plots.step_bars(found).axes[0]
    assert [bar.get_width() for bar in axis.patches] == [0.02, 0.03, 0.04, 0.05, 0.08]
    assert "deberta 32x128, r = 16" in axis.get_title(loc="left")


def test_layers_are_drawn_as_ratios():
    forward, step = plots.layer_bars(everything()).axes
    assert sorted({bar.get_height() for bar in forward.patches}) == [1.2, 2.0, 4.0]
    assert len(step.patches) == 5 * 3


def test_growth_lines():
    first = plots.growth(everything()).axes[0]
    lines = {line.get_label(): list(line.get_ydata()) for line in first.lines}
    assert lines["PEFT AdaLoRA"] == pytest.approx([1.0, 12.0, 500.0])
    assert lines["adalora_fast"] == pytest.approx([0.2, 2.4, 100.0])
    assert list(first.lines[0].get_xdata()) == [1, 12, 500] and first.get_xlabel() == "adapted layers"


def test_the_roof_is_the_lower_ceiling():
    found = everything()
    axis = plots.roofline(found).axes[0]
    x, y = axis.lines[0].get_data()
    peak, bandwidth = found.ceilings["flops"]["bfloat16"], found.ceilings["bandwidth"]
    assert all(math.isclose(b, min(peak, a * bandwidth)) for a, b in zip(x, y, strict=True))
    assert y[0] < peak == y[-1]


def test_figures_that_should_not_be_quoted_say_so():
    found = everything()
    found.scale = "tiny"
    assert "its times mean nothing" in plots.step_bars(found).axes[0].get_title(loc="left")
