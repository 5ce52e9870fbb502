"""What figures of many runs show."""

import numpy as np
import pytest

from adalora_fast.analysis import plots
from tests.analysis.synthetic import STUDY, made_up

CKA, PATHS = made_up()


def drawn(result, values, **options):
    options = {"title": "t", "label": "CKA", "limits": (0.0, 1.0)} | options
    return plots.comparison_figure(result, np.array(values, dtype=float), **options)


def texts(labels):
    return [label.get_text() for label in labels]


def test_many_runs_are_named_by_group_with_means_beside():
    runs, groups, _ = drawn(CKA, CKA["cka"]).axes
    assert texts(runs.get_yticklabels()) == list(STUDY) == texts(groups.get_xticklabels())
    assert list(runs.get_yticks()) == [1.5 + 4 * place for place in range(len(STUDY))]
    assert len(runs.lines) == 2 * (len(STUDY) - 1) and not runs.texts
    assert runs.lines[0].get_ydata()[0] == 3.5
    assert texts(groups.texts)[1] == f"{CKA['group_means'][0][1]:.2f}"


def test_few_runs_have_names_and_numbers():
    few, _ = made_up(("lora-r4", "full"), 2)
    runs, groups, _ = drawn(few, few["cka"]).axes
    assert texts(runs.get_xticklabels()) == ["lora-r4-seed0", "lora-r4-seed1", "full-seed0", "full-seed1"]
    assert len(runs.texts) == 16 and len(groups.texts) == 4
    alone, _ = made_up(("lora-r4", "full"), 1)
    assert len(drawn(alone, alone["cka"]).axes) == 2  # no means of single runs


def test_pairs_that_were_not_computed_are_said_to_be_grey():
    _, within = made_up(within=True)
    figure = drawn(within, within["convexity_gap"], label="gap")
    assert figure.axes[2].get_ylabel() == "gap (grey: not computed)"
    assert np.ma.getmaskarray(figure.axes[0].images[0].get_array())[0, 4]
    assert len(figure.axes[1].texts) == len(STUDY)


def test_paths_above_their_chords():
    panels = plots.paths_figure(PATHS).axes
    assert panels[0].get_ylabel() == "loss above the chord" and "accuracy" in panels[1].get_ylabel()
    labels = [line.get_label() for line in panels[0].lines]
    assert "runs of one group, other seed (66 paths)" in labels and "runs of two groups (880 paths)" in labels
    highest = max(path["height"] for path in PATHS["paths"])
    assert max(line.get_ydata().max() for line in panels[0].lines[1:]) == pytest.approx(highest)


def test_captions_name_the_precision(tmp_path):
    cka, _ = made_up(("lora-r4", "full"), 1, precision="fp32")
    _, paths = made_up(("lora-r4", "full"), 1)
    files = [*plots.cka_figures(cka, tmp_path), *plots.connectivity_figures(paths, tmp_path)]
    captions = {file.stem: file.read_text() for file in files if file.suffix == ".svg"}
    assert len(files) == 6 and "computed in float32" in captions["cka"]
    assert all("computed in bf16" in captions[name] for name in ("paths", "convexity-gap"))
