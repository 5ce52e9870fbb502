"""Runs on SQuAD: windows, no label maps, losses that do not depend on padding."""

import numpy as np
import pytest

from adalora_fast.analysis.analyses import analyze_cka, analyze_connectivity
from adalora_fast.analysis.rows import RowSet, read_rows
from adalora_fast.analysis.saved import open_run
from adalora_fast.analysis.shared import SharedModel
from adalora_fast.analysis.soups import make_soup
from tests.experiments.data.test_question_answering import settings, write_squad
from tests.helpers.training_runs import train


@pytest.fixture(scope="module")
def question_runs(tmp_path_factory, encoder):
    folder = tmp_path_factory.mktemp("questions")
    data = write_squad(folder / "data", repeat=2)
    for method in ("adalora", "lora"):
        train(settings(data, encoder, method=method), folder / method, resumable=False)
    return [folder / "adalora", folder / "lora"]


def test_everything(question_runs, tmp_path):
    result = analyze_connectivity(question_runs, points=3)
    for end, folder in zip(result["ends"], question_runs):
        kept = open_run(folder).result["metrics"]["validation"]
        assert end["metrics"] == pytest.approx({name: kept[name] for name in ("f1", "exact_match")})
        assert end["loss"] == pytest.approx(kept["loss"], rel=0.1)  # which includes padding
    assert 0 < analyze_cka(question_runs)["cka"][0][1] <= 1
    soup = make_soup(question_runs, tmp_path / "soup")
    assert soup["greedy"]["loss"] <= min(each["selection"]["loss"] for each in soup["members"])
    assert "f1" in soup["ensemble"]["report"]["metrics"]


def test_batches_do_not_change_the_loss(question_runs):
    run = open_run(question_runs[0])
    shared = SharedModel.load(run.settings, device="cpu")
    losses = []
    for tokens in (1, 500):
        parts = {"all": read_rows(run.settings)}
        rows = RowSet(run.settings, parts, shared.tokenizer, shared.device, tokens=tokens)
        with shared.mixed(shared.read([run]), [1.0]) as model:
            losses.append(rows.evaluate(model, "all").loss)
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    assert np.isfinite(losses).all()
