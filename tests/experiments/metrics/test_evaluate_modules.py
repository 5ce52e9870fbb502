"""The modules for Hugging Face's `evaluate`: their formats, and that they touch neither disk nor network."""

import importlib
import math
import socket
import sys

import numpy as np
import pytest

from adalora_fast.experiments import metrics
from adalora_fast.experiments.data.tasks import TASKS
from adalora_fast.experiments.metrics import bootstrap, glue_core, squad_core

MODULE = "adalora_fast.experiments.metrics.evaluate_modules"
evaluate = pytest.importorskip("evaluate", reason="Hugging Face's evaluate is not installed")
modules = importlib.import_module(MODULE)

REFERENCES = [
    {"id": "x", "answers": {"text": ["1976", "in 1976"], "answer_start": [97, 94]}},
    {"id": "y", "answers": {"text": ["climate change"], "answer_start": [5]}},
    {"id": "z", "answers": {"text": [], "answer_start": []}},
]
PREDICTIONS = [
    {"id": "x", "prediction_text": "1976.", "no_answer_probability": 0.1},
    {"id": "y", "prediction_text": "the climate", "no_answer_probability": 0.3},
    {"id": "z", "prediction_text": "Paris", "no_answer_probability": 0.7},
]


def without_probability(rows):
    return [{key: row[key] for key in ("id", "prediction_text")} for row in rows]


@pytest.fixture(autouse=True)
def sealed(monkeypatch, tmp_path):
    """No connection may be opened, and the cache must stay as it is: not even its folder is there."""
    from datasets import config

    def refuse(*arguments):
        raise AssertionError(f"a connection to {arguments[1:]} was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", tmp_path / "metrics")
    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.chdir(tmp_path)
    yield
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("task", modules.GLUE_METRICS)
def test_glue(task):
    generator = np.random.default_rng(0)
    regression = task == "stsb"
    references = generator.normal(size=30) if regression else generator.integers(0, 2, 30)
    predictions = references + generator.normal(size=30) if regression else generator.integers(0, 2, 30)
    found = modules.glue(task).compute(predictions=predictions, references=references)
    names = {"cola": ["matthews_correlation"], "stsb": ["pearson", "spearmanr"]}
    assert list(found) == names.get(task, ["accuracy", "f1"] if task in ("mrpc", "qqp") else ["accuracy"])
    for name, value in found.items():
        ours = {"matthews_correlation": "matthews", "spearmanr": "spearman"}.get(name, name)
        assert value == metrics.METRICS[ours](references, predictions) and type(value) is float


def test_every_glue_task_has_a_module():
    assert set(TASKS) - {"squad", "squad_v2", "wmt16_ro_en"} <= set(modules.GLUE_METRICS)
    for name in set(TASKS) & set(modules.GLUE_METRICS) - {"stsb", "cola"}:
        assert modules.GLUE_METRICS[name] == TASKS[name].metrics


def test_squad():
    found = modules.squad().compute(
        predictions=without_probability(PREDICTIONS[:2]), references=REFERENCES[:2]
    )
    assert found == {"exact_match": 50.0, "f1": pytest.approx(100 * (1 + 2 / 3) / 2)}


def test_squad_v2():
    found = modules.squad_v2().compute(predictions=PREDICTIONS, references=REFERENCES)
    assert found == pytest.approx(
        {
            "exact": 100 / 3,
            "f1": 100 * (1 + 2 / 3) / 3,
            "total": 3,
            "HasAns_exact": 50.0,
            "HasAns_f1": 100 * (1 + 2 / 3) / 2,
            "HasAns_total": 2,
            "NoAns_exact": 0.0,
            "NoAns_f1": 0.0,
            "NoAns_total": 1,
            "best_exact": 200 / 3,
            "best_exact_thresh": 0.1,
            "best_f1": 100 * (2 + 2 / 3) / 3,
            "best_f1_thresh": 0.3,
        }
    )


def test_squad_v2_threshold():
    compute = modules.squad_v2().compute
    found = compute(predictions=PREDICTIONS, references=REFERENCES, no_answer_threshold=0.2)
    assert found["exact"] == pytest.approx(200 / 3) and found["NoAns_exact"] == 100.0
    only = compute(predictions=PREDICTIONS[:1], references=REFERENCES[:1])
    assert not any(key.startswith("NoAns_") for key in only) and only["total"] == 1


def test_squad_v2_is_the_core():
    texts = {row["id"]: row["prediction_text"] for row in PREDICTIONS}
    golds = {row["id"]: row["answers"]["text"] for row in REFERENCES}
    scores = {row["id"]: row["no_answer_probability"] for row in PREDICTIONS}
    found = modules.squad_v2().compute(predictions=PREDICTIONS, references=REFERENCES)
    assert found == squad_core.evaluate_v2(texts, golds, scores)


def test_batches_and_single_examples():
    module = modules.glue("mrpc")
    module.add_batch(predictions=np.array([1, 0]), references=[1, 1])
    module.add(prediction=1, reference=0)
    module.add_batch(predictions=[], references=[])
    assert len(module) == 3
    assert module.compute(predictions=[1], references=[1]) == {"accuracy": 0.5, "f1": pytest.approx(2 / 3)}
    # what was added is used up
    assert module.compute(predictions=[0], references=[0]) == {"accuracy": 1.0, "f1": 0.0}
    questions = modules.squad()
    for prediction, reference in zip(without_probability(PREDICTIONS), REFERENCES[:2]):
        questions.add(prediction=prediction, reference=reference)
    assert questions.compute()["exact_match"] == 50.0


def test_two_at_once():
    first, second = modules.glue("sst2"), modules.glue("sst2")
    first.add(prediction=1, reference=1)
    second.add(prediction=1, reference=0)
    assert (first.compute(), second.compute()) == ({"accuracy": 1.0}, {"accuracy": 0.0})


def test_more_fields_than_needed():
    """Rows of the data set as they are, and predictions of v2.0 to v1.1."""
    references = [{**row, "context": "…", "question": "?"} for row in REFERENCES[:2]]
    assert modules.squad().compute(predictions=PREDICTIONS[:2], references=references)["exact_match"] == 50.0
    bare = [{"id": row["id"], "answers": {"text": np.array(row["answers"]["text"])}} for row in REFERENCES]
    assert modules.squad_v2().compute(predictions=PREDICTIONS, references=bare)["total"] == 3


def test_description():
    for module in (modules.glue("cola"), modules.squad(), modules.squad_v2()):
        assert module.description and module.inputs_description and module.citation.startswith("@")
        assert set(module.features) == {"predictions", "references"}
    assert [metrics.squad().name, metrics.squad_v2().name] == ["squad", "squad_v2"]


@pytest.mark.parametrize(
    ("predictions", "references", "message"),
    [
        ([], [], "there are no examples"),
        (None, None, "there are no examples"),
        ([1], None, "references are missing"),
        ([1], [1, 0], "1 predictions do not match 2 references"),
        ([1, math.nan], [1, 0], "predictions row 1 is nan"),
        ([1, 0.5], [1, 0], "predictions row 1 is 0.5, not a class code"),
        (["a"], [1], "not a column of numbers"),
    ],
)
def test_bad_columns(predictions, references, message):
    with pytest.raises(ValueError, match=message) as error:
        modules.glue("sst2").compute(predictions=predictions, references=references)
    assert "\n" not in str(error.value)


def changed(row, **values):
    return [{**row, **values}]


@pytest.mark.parametrize(
    ("predictions", "references", "message"),
    [
        (
            without_probability(PREDICTIONS[:1]),
            REFERENCES[:1],
            "needs the keys id, prediction_text, no_answer",
        ),
        (PREDICTIONS[:1], REFERENCES[1:2], "question 'y' has no prediction"),
        (PREDICTIONS[:1] * 2, REFERENCES[:2], "question 'x' is given twice"),
        (PREDICTIONS[:2], REFERENCES[:1] * 2, "question 'x' is given twice"),
        (
            changed(PREDICTIONS[0], no_answer_probability=math.nan),
            REFERENCES[:1],
            "'x' is nan; give a finite",
        ),
        (changed(PREDICTIONS[0], prediction_text=None), REFERENCES[:1], "prediction_text of 'x' is None"),
        (changed(PREDICTIONS[0], id=3), REFERENCES[:1], "the id of prediction 0 is 3; give a text"),
        (PREDICTIONS[:1], changed(REFERENCES[0], answers=["1976"]), "the answers of question 'x' are"),
        (
            PREDICTIONS[:1],
            changed(REFERENCES[0], answers={"text": "1976"}),
            "the answers of question 'x' are",
        ),
        (["1976"], REFERENCES[:1], "prediction 0 comes as '1976'"),
    ],
)
def test_bad_questions(predictions, references, message):
    with pytest.raises(ValueError, match=message) as error:
        modules.squad_v2().compute(predictions=predictions, references=references)
    assert "\n" not in str(error.value)


def test_a_bad_batch_leaves_nothing_behind():
    module = modules.glue("sst2")
    module.add_batch(predictions=[1], references=[1])
    with pytest.raises(ValueError, match="predictions row 0 is nan"):
        module.add_batch(predictions=[math.nan], references=[1])
    with pytest.raises(ValueError, match="unknown input 'weights'"):
        module.add_batch(predictions=[0], references=[1], weights=[1])
    assert module.compute() == {"accuracy": 1.0}


def test_unknown_task():
    with pytest.raises(ValueError, match="unknown GLUE task 'squad'; choose one of cola"):
        modules.glue("squad")


def test_without_evaluate_only_this_module_is_missing(monkeypatch):
    # Importing puts the fresh package into its parent; this puts the present one back in the end.
    monkeypatch.setattr(sys.modules["adalora_fast.experiments"], "metrics", metrics)
    for name in [name for name in sys.modules if name.startswith("adalora_fast.experiments.metrics")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "evaluate", None)
    for module in (metrics, glue_core, squad_core, bootstrap):
        assert importlib.import_module(module.__name__) is not module
    with pytest.raises(ModuleNotFoundError, match="pip install evaluate"):
        importlib.import_module(MODULE)
