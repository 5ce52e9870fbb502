"""Finished runs of the other tasks evaluated again: questions, translations, the demo's docstrings, soups."""

from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import load_file

from adalora_fast.analysis.soups import make_soup
from adalora_fast.experiments.data import docstrings
from adalora_fast.experiments.data.docstrings import corpus_splits
from adalora_fast.experiments.data.workloads import Classification
from adalora_fast.experiments.demo import corpus_task
from adalora_fast.experiments.run.progress import TrainingProgress
from adalora_fast.experiments.run.training import train_run
from adalora_fast.experiments.settings.settings import RunSettings
from tests.experiments.data import test_question_answering
from tests.experiments.test_evaluation import SHORT, evaluate
from tests.helpers import mbart, tiny
from tests.helpers.tiny import quiet_console, write_parquet, write_sst2
from tests.helpers.training_runs import read, settings, train


def assert_as_the_run_itself(folder, result, output):
    own = read(folder, "result.json")
    for split, metrics in own["metrics"].items():
        assert result["metrics"][split] == pytest.approx(metrics, abs=1e-5)
    ours, theirs = (load_file(place / "predictions.safetensors") for place in (output, folder))
    assert ours.keys() == theirs.keys()
    for array in ours:
        np.testing.assert_allclose(ours[array], theirs[array], atol=1e-5)


@pytest.mark.parametrize(
    ("task", "method"), [("squad", "adalora"), ("squad_v2", "full"), ("squad", "prompt"), ("squad", "head")]
)
def test_questions(encoder, tmp_path, task, method):
    data = test_question_answering.write_squad(tmp_path / "data", task, unanswerable=2 * (task != "squad"))
    recipe = replace(test_question_answering.RECIPE, virtual_tokens=3)
    run = test_question_answering.settings(data, encoder, task, method=method, recipe=recipe)
    train(run, tmp_path / "run", resumable=False)
    result, said = evaluate(tmp_path / "run", output=tmp_path / "out")
    assert_as_the_run_itself(tmp_path / "run", result, tmp_path / "out")
    for place in ("run", "out"):
        (tmp_path / place / "predictions-validation.json").read_text()
    assert read(tmp_path / "out", "predictions-validation.json").keys() == {
        f"validation-{i}" for i in range(6)
    }
    low, high = result["intervals"]["validation"]["f1"]
    assert low <= result["metrics"]["validation"]["f1"] <= high and "exact_match" in said
    file = data / task / "train.parquet"
    assert evaluate(tmp_path / "run", file=file)[0]["splits"]["file"]["rows"] == 12
    write_parquet(tmp_path / "bad.parquet", id=["a"], context=["moon"], question=["which"])
    with pytest.raises(ValueError, match="has no column 'answers'"):
        evaluate(tmp_path / "run", file=tmp_path / "bad.parquet")


@mbart.needs_sentencepiece
@pytest.mark.parametrize("method", ["adalora", "full"])
def test_translations(tmp_path, method):
    model = mbart.save_mbart(tmp_path / "mbart")
    english, romanian = mbart.pairs(14)
    data = mbart.write_pairs(
        tmp_path / "data", train=(english[:8], romanian[:8]), validation=(english[8:], romanian[8:])
    )
    recipe = replace(SHORT, batch_size=4, max_length=24, beams=2, learning_rate=1e-3)
    run = RunSettings(task="wmt16_ro_en", model=str(model), data_dir=str(data), method=method, recipe=recipe)
    train(run, tmp_path / "run", resumable=False)
    result, _ = evaluate(tmp_path / "run", output=tmp_path / "out")
    assert_as_the_run_itself(tmp_path / "run", result, tmp_path / "out")
    assert read(tmp_path / "out", "predictions-validation.json") == read(
        tmp_path / "run", "predictions-validation.json"
    )
    assert result["intervals"]["validation"].keys() == {"bleu", "chrf"}
    low, high = result["intervals"]["validation"]["chrf"]
    assert low <= result["metrics"]["validation"]["chrf"] <= high


def corpus():
    labels = [place % 3 for place in range(24)]
    texts = tuple(
        f"{('old moon', 'warm soup', 'far star')[label]} {'new ' * (i % 5)}" for i, label in enumerate(labels)
    )
    return docstrings.DocstringCorpus(
        modules=("json", "email", "ast"), train_texts=texts[:16], train_labels=tuple(labels[:16]),
        test_texts=texts[16:], test_labels=tuple(labels[16:]), counts={}, python_version="3.11.0",
    )  # fmt: skip


def test_docstrings(encoder, tmp_path, monkeypatch):
    """The demo's task is in no file: it is read from Python again, which must be the same one."""
    texts = corpus()
    run = settings(encoder, tmp_path, "adalora", task="docstrings", recipe=SHORT)
    run = replace(run, data_dir="standard library of Python 3.11.0")
    workload = Classification(task=corpus_task(texts), splits=corpus_splits(texts))
    with TrainingProgress(console=quiet_console()) as progress:
        train_run(run, workload, tmp_path / "run", progress, resumable=False)
    monkeypatch.setattr(docstrings, "build_corpus", lambda: texts)
    result, _ = evaluate(tmp_path / "run", output=tmp_path / "out")
    assert_as_the_run_itself(tmp_path / "run", result, tmp_path / "out")
    rows = write_parquet(tmp_path / "rows.parquet", text=["old moon", "far star"], label=[0, 2])
    assert evaluate(tmp_path / "run", file=rows)[0]["splits"]["file"]["rows"] == 2
    write_parquet(tmp_path / "bad.parquet", text=["old moon"], label=[3])
    with pytest.raises(ValueError, match="label 3 is not an integer from 0 to 2"):
        evaluate(tmp_path / "run", file=tmp_path / "bad.parquet")
    with pytest.raises(ValueError, match="docstrings has no split 'dev'; choose train or test"):
        evaluate(tmp_path / "run", split="dev")
    other = replace(texts, python_version="3.12.1")
    monkeypatch.setattr(docstrings, "build_corpus", lambda: other)
    with pytest.raises(ValueError, match=r"standard library of Python 3\.12\.1, whose labels may be others"):
        evaluate(tmp_path / "run", output=tmp_path / "other")


@pytest.mark.parametrize("save", ["lora", "full"])
def test_a_soup(encoder, tmp_path, save):
    """The folder that `soup` writes: on the rows that it reported on, what it reported."""
    data = write_sst2(tmp_path / "data", train=16, validation=20)
    for seed in (0, 1):
        train(settings(encoder, data, "lora", seed=seed, recipe=SHORT), tmp_path / f"{seed}", resumable=False)
    members = [tmp_path / "0", tmp_path / "1"]
    soup = make_soup(members, tmp_path / "soup", recipe="uniform", save=save)
    result, said = evaluate(tmp_path / "soup")
    both = [
        soup["uniform"][part]["metrics"]["accuracy"] * soup["rows"][part]["rows"]
        for part in ("selection", "report")
    ]
    assert result["metrics"]["validation"]["accuracy"] == pytest.approx(sum(both) / 20)
    assert "soup" in said
    unsaved = make_soup(members, tmp_path / "unsaved", save="none")
    assert unsaved["saved"] is None
    with pytest.raises(ValueError, match="no model was saved; make it again with --save lora or full"):
        evaluate(tmp_path / "unsaved")


def test_regression(encoder, tmp_path):
    for split, count in (("train", 16), ("validation", 12)):
        texts, labels = tiny.sentences(count, seed=len(split))
        numbers = [2.5 + label + i / 10 for i, label in enumerate(labels)]
        numbers = [min(number, 5.0) for number in numbers]
        write_parquet(
            tmp_path / "data" / "stsb" / f"{split}.parquet", sentence1=texts, sentence2=texts, label=numbers
        )
    run = settings(encoder, tmp_path / "data", "lora", task="stsb", recipe=replace(SHORT, max_length=32))
    train(run, tmp_path / "run", resumable=False)
    result, _ = evaluate(tmp_path / "run", output=tmp_path / "out")
    assert_as_the_run_itself(tmp_path / "run", result, tmp_path / "out")
    assert result["intervals"]["validation"].keys() == {"pearson_spearman", "pearson", "spearman"}
