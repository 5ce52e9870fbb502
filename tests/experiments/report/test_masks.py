"""Churn and the terms of the scores, from lines as a run writes them to tables and a picture."""

import json

import pytest

from adalora_fast.experiments.report.collect import read_sweep
from adalora_fast.experiments.report.figures import churn_panels
from adalora_fast.experiments.report.masks import mask_facts
from adalora_fast.experiments.report.plots.masks import churn_figure
from adalora_fast.experiments.report.sections_masks import masks
from tests.helpers.sweeps import agreeing, write_plan, write_run

RATES = {"sensitivity": 0.8, "random": 0.7}


def log(folder, arm, seed, changes, terms):
    lines = [{"step": 5, "budget": 24, "ranks": [4] * 6, "scores": None}]
    for number, (kept, revived, dropped) in enumerate(changes):
        line = {"step": 10 * (number + 1), "terms": terms}
        lines.append(line | {"mask": {"kept": kept, "revived": revived, "dropped": dropped}})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "sst2" / f"{arm}-seed{seed}" / "allocation.jsonl").write_text(text)


@pytest.fixture
def sweep(tmp_path):
    write_plan(tmp_path, tasks=["sst2"], arms=list(RATES), seeds=[0, 1])
    for arm in RATES:
        for seed in (0, 1):
            write_run(tmp_path, "sst2", arm, seed, agreeing(RATES))
    share = {"lora_E": 0.9, "lora_A": 0.06, "lora_B": 0.04}
    spearman = {"lora_E": 0.98, "lora_A": None, "lora_B": 0.5}
    terms = {"share": share, "spearman": spearman, "same_mask": 0.95}
    log(tmp_path, "sensitivity", 0, [(20, 0, 4), (16, 4, 8), (12, 0, 4), (12, 6, 6)], terms)
    log(tmp_path, "sensitivity", 1, [(20, 0, 4), (16, 0, 4), (12, 0, 4), (12, 0, 0)], terms)
    log(tmp_path, "random", 0, [(20, 0, 4), (16, 8, 12), (12, 6, 10), (12, 6, 6)], None)
    return read_sweep(tmp_path)


def test_facts_by_hand(sweep):
    facts = mask_facts(list(sweep.of("sst2", "sensitivity").values()))
    assert (facts.runs, facts.masks) == (2, 3)
    assert facts.churn == pytest.approx(((4 / 16 + 0 + 6 / 12) / 3 + 0) / 2)
    assert facts.last_churn == pytest.approx((6 / 12 + 0) / 2)
    assert facts.returns == pytest.approx((10 / 12 + 0) / 2)
    assert facts.share["lora_E"] == pytest.approx(0.9) and facts.spearman == pytest.approx(0.98)
    assert facts.same_mask == pytest.approx(0.95)
    null = mask_facts(list(sweep.of("sst2", "random").values()))
    assert null.runs == 1 and null.share is None and null.spearman is None and null.same_mask is None


def test_the_table(sweep):
    text = masks(sweep)
    assert "| SST-2 | sensitivity | 2 | 3 | 12.5 | 25.0 | 0.42 | 90.0 | 6.0 | 4.0 | 0.9800 | 95.0 |" in text
    assert "| SST-2 | random | 1 | 3 | 50.0 | 50.0 | 1.67 | – | – | – | – | – |" in text


def test_runs_that_have_not_logged_any(tmp_path):
    write_plan(tmp_path, tasks=["sst2"], arms=["sensitivity"], seeds=[0])
    write_run(tmp_path, "sst2", "sensitivity", 0, agreeing(RATES))
    assert "No run has logged its masks" in masks(read_sweep(tmp_path))
    assert churn_panels(read_sweep(tmp_path)) == {}


def test_the_picture(sweep):
    panels = churn_panels(sweep)
    assert list(panels) == ["SST-2 accuracy"] and list(panels["SST-2 accuracy"]) == ["sensitivity", "random"]
    curve = panels["SST-2 accuracy"]["sensitivity"]
    assert curve.steps.tolist() == [20, 30, 40] and curve.mean.tolist() == pytest.approx([12.5, 0, 25])
    figure = churn_figure(panels, styles={arm: {"color": "black"} for arm in RATES})
    axis = figure.axes[0]
    assert [len(line.get_xdata()) for line in axis.lines] == [3, 3]
    assert axis.get_ylabel() and axis.get_xlabel() and axis.get_ylim()[0] == 0
