"""Rows, losses and metrics: regressions, splits by name, and numbers that are none."""

import numpy as np
import pytest
import torch

from adalora_fast.analysis.analyses import analyze_cka, analyze_connectivity
from adalora_fast.analysis.rows import RowSet, batches_of, read_rows
from adalora_fast.analysis.saved import open_run
from adalora_fast.analysis.shared import SharedModel
from tests.helpers.tiny import sentences, write_parquet
from tests.helpers.training_runs import settings


def test_a_regression(encoder, tmp_path):
    """The loss that transformers computes of all rows at once."""
    texts, others = sentences(9, seed=1)[0], sentences(9, seed=2)[0]
    labels = np.linspace(0, 5, 9).tolist()
    write_parquet(tmp_path / "stsb" / "validation.parquet", sentence1=texts, sentence2=others, label=labels)
    run = settings(encoder, tmp_path, task="stsb", method="head")
    shared = SharedModel.load(run, device="cpu")
    shared.model.classifier.weight.mul_(100)  # answers that differ
    rows = RowSet(run, {"all": read_rows(run)}, shared.tokenizer, shared.device, tokens=40)
    found = rows.evaluate(shared.model, "all")
    inputs = shared.tokenizer(
        texts, others, truncation=True, max_length=16, padding=True, return_tensors="pt"
    )
    with torch.no_grad():
        expected = shared.model(**inputs, labels=torch.tensor(labels)).loss
    assert found.loss == pytest.approx(float(expected), rel=1e-5)
    assert set(found.metrics) == {"pearson_spearman", "pearson", "spearman"}
    assert rows.describe()["all"]["rows"] == 9


def test_batches():
    lengths = [9, 3, 30, 4, 4, 9, 1]
    found = batches_of(lengths, 12)
    assert found == [[6, 1, 3], [4], [0], [5], [2]]
    assert batches_of(lengths, 10**6) == [sorted(range(7), key=lengths.__getitem__)]
    assert batches_of(lengths, 1) == [[row] for row in sorted(range(7), key=lengths.__getitem__)]


def test_splits_by_name(encoder, tmp_path):
    for split, label in (("matched", 0), ("mismatched", 2)):
        columns = {"premise": ["moon"] * 3, "hypothesis": ["star"] * 3, "label": [label] * 3}
        write_parquet(tmp_path / "mnli" / f"validation_{split}.parquet", **columns)
    run = settings(encoder, tmp_path, task="mnli")
    assert read_rows(run).labels == [0] * 3
    assert read_rows(run, "validation_mismatched").labels == [2] * 3
    with pytest.raises(ValueError, match="choose validation_matched or validation_mismatched"):
        read_rows(run, "validation")


def test_a_loss_that_is_no_number(runs):
    run = open_run(runs["head"])
    shared = SharedModel.load(run.settings, device="cpu")
    rows = RowSet(run.settings, {"all": read_rows(run.settings)}, shared.tokenizer, shared.device)
    (logits,) = rows.logits(shared.model, "all")
    logits[3, 1] = np.nan
    with pytest.raises(ValueError, match="loss of the third one is not finite"):
        rows.judge((logits,), "all", "the third one")


def test_said_before_anything_slow(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(SharedModel, "load", lambda *args, **options: pytest.fail("the model was loaded"))
    folders = [runs["lora-2"], runs["lora-4"]]
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"cannot write to .*--output"):
        analyze_connectivity(folders, output=tmp_path / "file" / "out")
    with pytest.raises(ValueError, match="1 rows are too few"):
        analyze_cka(folders, rows=1)
    with pytest.raises(ValueError, match="batches of 3 rows"):
        analyze_cka(folders, batch_size=3)
    with pytest.raises(ValueError, match="2 points"):
        analyze_connectivity(folders, points=2)
