"""Gaps and barriers against their definitions, and paths between real runs."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from adalora_fast.analysis.analyses import analyze_connectivity
from adalora_fast.analysis.connectivity import convexity_gap, describe_path, error_barrier, grid, height
from adalora_fast.analysis.rows import Evaluation, RowSet, cross_entropy, read_rows
from adalora_fast.analysis.saved import open_run
from adalora_fast.analysis.shared import SharedModel
from tests.helpers.training_runs import read

LOSSES = st.lists(st.floats(0, 10, width=16), min_size=3, max_size=12)


def heights(losses, first, last):
    """L − chord at every point from `first` to `last`, term by term."""
    for k in range(first, last + 1):
        share = (k - first) / (last - first)
        yield losses[k] - ((1 - share) * losses[first] + share * losses[last])


@settings(max_examples=200, deadline=None)
@given(LOSSES)
@example([0.0, 1.0, 0.0, 5.0, 0.0])
@example([3.0, 3.0, 3.0])
def test_the_definitions(losses):
    last = len(losses) - 1
    everywhere = [max(heights(losses, i, j)) for i in range(last) for j in range(i + 1, last + 1)]
    gap = convexity_gap(losses)
    assert gap.gap == pytest.approx(max(everywhere), abs=1e-12)
    assert height(losses) == pytest.approx(max(heights(losses, 0, last)), abs=1e-12)
    assert gap.gap >= height(losses) - 1e-12 >= -1e-12
    if gap.gap > 0:  # it is where it is said to be
        first, k, end = (round(last * place) for place in (gap.gamma, gap.alpha, gap.beta))
        assert first < k < end and list(heights(losses, first, end))[k - first] == pytest.approx(gap.gap)
    barrier = max(losses) - (losses[0] + losses[-1]) / 2
    assert error_barrier(losses) == pytest.approx(barrier, abs=1e-12)


def test_known_paths():
    assert convexity_gap([1, 0.25, 0, 0.25, 1]).gap == 0 == height([1, 0.25, 0, 0.25, 1])
    hill = convexity_gap([0, 2, 0])
    assert (hill.gap, hill.alpha, hill.gamma, hill.beta) == (2, 0.5, 0, 1)
    # A hill in a valley is below the chord of the whole path, and above that of its own feet.
    valley = [10, 1, 3, 1, 10]
    assert height(valley) == 0 and convexity_gap(valley).gap == 2
    assert convexity_gap(valley).gamma == 0.25
    assert error_barrier([0.2, 0.1, 0.6, 0.4]) == pytest.approx(0.3)
    assert error_barrier([0.2, 0.1, 0.4]) == pytest.approx(0.1)  # the worse end counts


def test_what_is_written_of_a_path():
    points = [(1.0, 0.9), (3.0, 0.5), (2.0, 0.7)]
    path = [Evaluation(loss=loss, metrics={"accuracy": a, "f1": 0.1}) for loss, a in points]
    found = describe_path(path, "accuracy")
    assert found["loss"] == [1, 3, 2] and found["metrics"]["accuracy"] == [0.9, 0.5, 0.7]
    assert found["error_barrier"] == pytest.approx(0.5 - (0.1 + 0.3) / 2)
    assert (found["loss_barrier"], found["height"], found["convexity_gap"]) == (1.5, 1.5, 1.5)
    assert found["gap_at"] == {"alpha": 0.5, "gamma": 0, "beta": 1}


def test_refused():
    for losses in ([1, 2], [1, np.nan, 2], [[1, 2, 3]]):
        with pytest.raises(ValueError, match="three or more finite numbers"):
            convexity_gap(losses)
    with pytest.raises(ValueError, match="2 points are too few"):
        grid(2)


def test_paths_between_runs(runs, tmp_path):
    names = ("lora-4", "full", "adalora-0", "peft", "head")
    result = analyze_connectivity([runs[name] for name in names], output=tmp_path, points=5)
    assert read(tmp_path, "connectivity.json") == result
    assert len(result["paths"]) == 10 and result["alphas"] == [0, 0.25, 0.5, 0.75, 1]
    for path in result["paths"]:
        a, b = result["ends"][path["a"]], result["ends"][path["b"]]
        assert (path["loss"][0], path["loss"][-1]) == (b["loss"], a["loss"])
        assert path["metrics"]["accuracy"][-1] == a["metrics"]["accuracy"]
        assert path["convexity_gap"] == convexity_gap(path["loss"]).gap
        assert path["error_barrier"] == error_barrier(1 - np.array(path["metrics"]["accuracy"]))
        assert result["convexity_gap"][path["a"]][path["b"]] == path["convexity_gap"]
    for end, name in zip(result["ends"], names):
        kept = open_run(runs[name]).result["metrics"]["validation"]
        assert end["metrics"]["accuracy"] == kept["accuracy"]
        if name != "peft":  # whose own loss has the orthogonality term in it
            assert end["loss"] == pytest.approx(kept["loss"])
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".jsonl", ".md", ".png", ".svg"}
    assert (tmp_path / "paths.png").stat().st_size > 10_000


def test_the_path_is_in_the_weights(runs):
    """At α = 1/4, the loss of a model whose merged weights are averaged by hand."""
    folders = [runs["lora-4"], runs["adalora-0"]]
    found = analyze_connectivity(folders, points=5)["paths"][0]["loss"][1]
    opened = [open_run(folder) for folder in folders]
    shared = SharedModel.load(opened[0].settings, device="cpu")
    changes = shared.read(opened)
    parameters = dict(shared.model.named_parameters())
    merged = []
    for change in changes:
        with shared.mixed([change], [1.0]):
            merged.append({name: parameter.data.clone() for name, parameter in parameters.items()})
    for name, parameter in parameters.items():
        parameter.data = 0.25 * merged[0][name] + 0.75 * merged[1][name]
    rows = RowSet(opened[0].settings, {"all": read_rows(opened[0].settings)}, shared.tokenizer, shared.device)
    assert found == pytest.approx(rows.evaluate(shared.model, "all").loss, abs=1e-6)


def test_a_run_with_itself(runs):
    result = analyze_connectivity([runs["full"], runs["full"]], points=4, rows=10)
    path = result["paths"][0]
    assert path["convexity_gap"] == pytest.approx(0, abs=1e-6)
    assert path["loss"] == pytest.approx([path["loss"][0]] * 4, abs=1e-6)
    assert result["rows"]["rows"] == 10


def test_cross_entropy():
    import torch

    logits, labels = np.random.default_rng(0).normal(0, 50, (7, 3)), np.array([0, 1, 2, 2, 1, 0, 0])
    expected = torch.nn.functional.cross_entropy(torch.tensor(logits), torch.tensor(labels))
    assert cross_entropy(logits, labels) == pytest.approx(float(expected), rel=1e-12)
