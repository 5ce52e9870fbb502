"""The pictures of a sweep: the numbers and words in them."""

from dataclasses import replace

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from adalora_fast.experiments.report.collect import read_sweep
from adalora_fast.experiments.report.contrasts import compare_all
from adalora_fast.experiments.report.figures import draw_figures, forest_panels, mean_ranks
from adalora_fast.experiments.report.logs import arm_curves
from adalora_fast.experiments.report.plots.agreement import agreement_figure
from adalora_fast.experiments.report.plots.contrasts import Bar, contrasts_figure
from adalora_fast.experiments.report.plots.curves import curves_figure
from adalora_fast.experiments.report.plots.ranks import rank_figure
from adalora_fast.experiments.report.plots.style import arm_styles, save, styled
from adalora_fast.experiments.report.rank_maps import agreement
from tests.helpers.sweeps import write_json, write_sweep

RATES = {"sensitivity": 0.85, "movement": 0.8, "uniform": 0.8, "lora": 0.7}


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    return read_sweep(
        write_sweep(tmp_path_factory.mktemp("out"), RATES, tasks=["rte"], seeds=[0, 1], rows=100)
    )


def curves_of(sweep):
    return {arm: arm_curves(list(sweep.of("rte", arm).values())) for arm in RATES}


def test_curves_are_means_with_their_range(sweep):
    curve = arm_curves(list(sweep.of("rte", "sensitivity").values()))
    points = [run.points for run in sweep.of("rte", "sensitivity").values()]
    assert curve.metric.steps.tolist() == [16, 28, 40]
    assert (curve.metric.mean[-1], curve.metric.low[-1], curve.metric.high[-1]) == pytest.approx(
        (np.mean(points), min(points), max(points))
    )
    assert curve.budget.mean[0] == 48 and curve.budget.mean[-1] == 24  # 12 matrices, rank 4 to 2
    middles = [10.0 ** (-4 - seed / 10) * 2 for seed in (0, 1)]
    assert curve.scores["p50"].mean[-1] == pytest.approx(np.mean(middles))
    assert curve.scores["p50"].steps[0] == 8  # at step 4 there are no scores yet


def test_an_arm_without_allocation_has_no_budget(sweep):
    curve = arm_curves(list(sweep.of("rte", "lora").values()))
    assert curve.budget is None and curve.scores == {} and curve.metric is not None
    empty = arm_curves([])
    assert empty.budget is None and empty.metric is None


def test_a_broken_log_is_named(tmp_path):
    sweep = read_sweep(write_sweep(tmp_path, {"a": 0.8}, tasks=["rte"], seeds=[0]))
    path = tmp_path / "rte" / "a-seed0" / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"ste')
    with pytest.raises(ValueError, match=r"metrics.jsonl line 2 is not JSON"):
        arm_curves(list(sweep.of("rte", "a").values()))
    path.write_text("[1]\n")
    with pytest.raises(ValueError, match=r"metrics.jsonl line 1 is no object with a step"):
        arm_curves(list(sweep.of("rte", "a").values()))


def test_curves_figure(sweep):
    curves = curves_of(sweep)
    figure = curves_figure(curves, styles=arm_styles(list(RATES)), heading="RTE accuracy")
    budget, metric, *scores = figure.findobj(match=lambda part: part.__class__.__name__ == "Axes")
    assert (budget.get_ylabel(), budget.get_xlabel()) == ("budget, triplets", "optimizer step")
    assert metric.get_ylabel() == "development metric, points"
    (line,) = budget.lines
    assert line.get_label() == "3 arms alike"
    assert np.array_equal(line.get_ydata(), curves["sensitivity"].budget.mean)
    assert [line.get_label() for line in metric.lines] == list(RATES)
    for line in metric.lines:
        assert np.array_equal(line.get_ydata(), curves[line.get_label()].metric.mean)
    titles = [axis.get_title() for axis in scores if axis.get_visible()]
    assert titles == ["sensitivity", "movement", "uniform"]
    scales = {axis.get_title(): axis.get_yscale() for axis in scores}
    assert scales["sensitivity"] == "log" and scales["movement"] == "symlog"  # movement has negative scores
    assert "importance S" in scores[0].get_ylabel()


def test_no_two_arms_look_the_same():
    styles = arm_styles([f"arm {i}" for i in range(28)])
    assert len({tuple(style.items()) for style in styles.values()}) == 28


def test_forest(sweep):
    contrasts = compare_all(sweep)
    ((heading, rows),) = forest_panels(sweep, contrasts)
    assert heading == "RTE accuracy" and [row[0] for row in rows] == [
        f"{arm} − sensitivity" for arm in ("movement", "uniform", "lora")
    ]
    figure = contrasts_figure([(heading, rows)], margin=0.3)
    (axis,) = figure.axes
    assert [label.get_text() for label in axis.get_yticklabels()] == [name for name, _ in rows]
    assert "difference, points (right: the first is better)" in figure.get_supxlabel()
    drawn = {
        tuple(line.get_xdata()): line.get_linewidth() for line in axis.lines if len(line.get_xdata()) == 2
    }
    for name, bar in rows:
        found = contrasts.between("rte", *name.split(" − "))
        bounds = found.estimate.bounds
        assert (bar.value, bar.verdict) == (found.estimate.value, found.verdict)
        assert (bar.low, bar.low90, bar.high90, bar.high) == (
            bounds.low, bounds.low90, bounds.high90, bounds.high
        )  # fmt: skip
        assert drawn[bar.low, bar.high] < drawn[bar.low90, bar.high90]
    (band,) = axis.patches
    assert (band.get_x(), band.get_x() + band.get_width()) == (-0.3, 0.3)
    least, most = axis.get_xlim()
    assert least < min(bar.low for _, bar in rows) and most > max(0.3, *(bar.high for _, bar in rows))
    declared = (("uniform", "movement"), ("movement", "sensitivity"))  # the first two predict the same
    other = replace(sweep, plan=replace(sweep.plan, contrasts=declared))
    ((_, rows),) = forest_panels(other, compare_all(other))
    assert [name for name, _ in rows] == [
        "uniform − movement", "movement − sensitivity", "uniform − sensitivity", "lora − sensitivity"
    ]  # fmt: skip
    assert rows[0][1].verdict == "equivalent within ±0.3" and rows[2][1].words == "exploratory"


def bar(value, verdict):
    return Bar(
        value=value, low=value - 0.5, high=value + 0.5, low90=value - 0.4, high90=value + 0.4, verdict=verdict
    )


def test_forest_shows_verdicts_and_names_gaps():
    """Two intervals exclude 0; only one of the arms is said to differ, and looks so."""
    rows = [
        ("a", bar(1.0, "differs")),
        ("b", bar(2.0, "not decided")),
        ("c", bar(0.0, "equivalent within ±0.6")),
        ("d", bar(-1.0, "differs, by less than 2")),
        ("e", bar(3.0, "exploratory, 95 % interval above 0")),
        ("f", None),
    ]
    figure = contrasts_figure([("t", rows)], margin=0.3)
    (axis,) = figure.axes
    looks = {
        line.get_xdata()[0]: (line.get_marker(), line.get_color())
        for line in axis.lines
        if len(line.get_xdata()) == 1
    }
    assert len(set(looks.values())) == 5 and looks[1.0][1] == looks[-1.0][1] != looks[2.0][1]
    assert [text.get_text() for text in axis.texts] == ["incomplete"]
    (legend,) = figure.legends
    handles = {handle.get_label(): handle for handle in legend.legend_handles}
    for _, own in rows[:5]:
        handle = handles[own.words]
        assert (handle.get_marker(), handle.get_color()) == looks[own.value]
    assert "95 % interval, not corrected (thick: 90 %)" in handles and len(handles) == 7


def test_the_forests_caption_agrees_with_its_legend(sweep, tmp_path):
    figures, _ = draw_figures(sweep, compare_all(sweep), tmp_path)
    ((name, words),) = figures["contrasts"]
    assert name == "contrasts.png" and "95 % intervals (thick: 90 %), not corrected" in words
    assert "colours and markers are the verdicts" in words and "one seed" not in words
    alone = read_sweep(write_sweep(tmp_path / "one", RATES, tasks=["rte"], seeds=[0], rows=20))
    ((_, words),) = draw_figures(alone, compare_all(alone), tmp_path)[0]["contrasts"]
    assert "with one seed in common, the examples' chance alone" in words


def test_agreement(sweep):
    arms, table = agreement(sweep, "rte")
    assert arms == ["sensitivity", "movement"]  # the others have the same rank everywhere
    maps = [np.mean([list(r.ranks.values()) for r in sweep.of("rte", arm).values()], axis=0) for arm in arms]
    ranks = [np.array([np.sum(m < x) + (np.sum(m == x) + 1) / 2 for x in m]) for m in maps]
    assert table[0, 1] == table[1, 0] == pytest.approx(np.corrcoef(*ranks)[0, 1])
    figure = agreement_figure({"RTE": (arms, np.array([[1, np.nan], [-0.5, 1]]))})
    axis, bar = figure.axes
    assert axis.get_title() == "RTE" and "Spearman" in bar.get_ylabel()
    assert [text.get_text() for text in axis.texts] == ["1.00", "–", "−0.50", "1.00"]
    assert axis.images[0].get_clim() == (-1, 1)
    FigureCanvasAgg(figure).draw()
    label = bar.yaxis.label.get_window_extent()
    assert label.y0 >= 0 and label.y1 <= figure.bbox.height  # of two arms, the lowest figure


def test_mean_ranks(sweep):
    panels = mean_ranks(sweep, "rte")
    assert [label for label, _ in panels] == ["sensitivity (2 seeds)", "movement (2 seeds)"]
    runs = list(sweep.of("rte", "movement").values())
    for name, rank in panels[1][1].items():
        assert rank == np.mean([run.ranks[name] for run in runs])
    figure = rank_figure(panels, init_r=4, title="x")
    shown = {float(text.get_text()) for text in figure.axes[1].texts}
    assert shown == {round(rank, 1) for rank in panels[1][1].values()} and any(x % 1 for x in shown)


def test_ranks_of_an_unknown_model_are_no_reason_to_fail(tmp_path):
    folder = write_sweep(tmp_path, {"sensitivity": 0.8}, tasks=["rte"], seeds=[0], rows=20)
    place = folder / "rte" / "sensitivity-seed0"
    write_json(place / "ranks.json", {"init_r": 4, "ranks": {"strange.a": 1, "strange.b": 3}})
    (place / "metrics.jsonl").unlink()
    (place / "allocation.jsonl").unlink()
    sweep = read_sweep(folder)
    figures, remarks = draw_figures(sweep, compare_all(sweep), tmp_path)
    assert not any(figures.values())
    assert len(remarks) == 1 and remarks[0].startswith("RTE: no picture of the ranks (none of ")


def test_runs_that_adapt_other_matrices_are_named(tmp_path):
    folder = write_sweep(tmp_path, {"sensitivity": 0.8}, tasks=["rte"], seeds=[0, 1], rows=20)
    write_json(folder / "rte" / "sensitivity-seed1" / "ranks.json", {"init_r": 4, "ranks": {"x": 1}})
    sweep = read_sweep(folder)
    with pytest.raises(
        ValueError, match=r"seed1/ranks.json adapts other matrices than the arm's other seeds"
    ):
        mean_ranks(sweep, "rte")
    write_json(folder / "rte" / "sensitivity-seed1" / "ranks.json", {"ranks": 3})
    with pytest.raises(ValueError, match=r"ranks.json has no ranks and init_r"):
        mean_ranks(read_sweep(folder), "rte")


def test_saving_twice_gives_the_same_bytes(tmp_path):
    def draw(stem):
        with styled():
            rows = [("a", bar(1.0, "differs"))]
            return save(contrasts_figure([("t", rows)], margin=0.3), tmp_path / stem)

    first, second = draw("first"), draw("second")
    assert [path.suffix for path in first] == [".png", ".svg"]
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
