"""Finished runs evaluated again: the model that comes back is the one that was trained, by any method."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from adalora_fast.experiments import evaluation
from adalora_fast.experiments.evaluation import evaluate_run
from adalora_fast.experiments.metrics import interval
from tests.helpers.tiny import RECIPE, printed, quiet_console, save_encoder, write_parquet, write_sst2
from tests.helpers.training_runs import files, read, settings, train

SHORT = replace(RECIPE, epochs=2, tinit=1, tfinal=1, deltaT=1, bottleneck=4, virtual_tokens=3)
WITH_BIASES = replace(SHORT, train_biases=True)
RUNS = {
    "adalora": {"method": "adalora"},
    "adalora-biases": {"method": "adalora", "recipe": WITH_BIASES, "score": "fisher"},
    "adalora-bfloat16": {"method": "adalora", "dtype": "bfloat16"},
    "adalora-bf16": {"method": "adalora", "recipe": replace(SHORT, precision="bf16")},
    "peft": {"method": "peft"},
    "lora": {"method": "lora"},
    "full": {"method": "full", "recipe": replace(SHORT, learning_rate=1e-3)},
    "head": {"method": "head"},
    "bitfit": {"method": "bitfit"},
    "houlsby": {"method": "houlsby"},
    "fusion": {"method": "fusion"},
    "prompt": {"method": "prompt"},
    "prefix": {"method": "prefix"},
    "p_tuning": {"method": "p_tuning"},
    "ia3": {"method": "ia3"},
    "ia3-biases": {"method": "ia3", "recipe": WITH_BIASES},
    "held-out": {"method": "lora", "held_out": 0.25},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_sst2(tmp_path_factory.mktemp("data"), train=16, validation=20)


@pytest.fixture(scope="module")
def finished(encoder, data, tmp_path_factory):
    """The folder of a finished run by its name in RUNS, trained when it is first asked for."""
    root = tmp_path_factory.mktemp("runs")

    def get(name):
        options = {"recipe": SHORT} | RUNS[name]
        if name == "fusion":
            for seed in (0, 1):
                source = settings(encoder, data, "houlsby", seed=seed, recipe=SHORT)
                train(source, root / f"source-{seed}", resumable=False)
            options["adapters"] = (str(root / "source-0"), str(root / "source-1"))
        if not (root / name).is_dir():
            train(settings(encoder, data, **options), root / name, resumable=False)
        return root / name

    return get


def evaluate(folder, **options):
    console = quiet_console()
    return evaluate_run(folder, console=console, **options), printed(console)


@pytest.mark.parametrize("name", RUNS)
def test_the_model_that_comes_back_is_the_one_that_was_trained(finished, tmp_path, name, monkeypatch):
    """On the run's own rows: its own predictions, loss and metrics."""
    folder = finished(name)
    if name == "fusion":  # the runs that it started from are not needed
        monkeypatch.setattr("adalora_fast.experiments.methods.fusion.open_sources", lambda settings: 1 / 0)
    result, said = evaluate(folder, output=tmp_path / "out")
    own = read(folder, "result.json")
    assert result["metrics"].keys() == own["metrics"].keys()
    for split, metrics in own["metrics"].items():
        if name == "peft":  # which added its orthogonality term
            assert result["metrics"][split]["loss"] < metrics["loss"]
            metrics = metrics | {"loss": result["metrics"][split]["loss"]}
        assert result["metrics"][split] == pytest.approx(metrics, abs=1e-5)
    assert result["splits"] == {split: own["splits"][split] for split in own["metrics"]}
    ours, theirs = (load_file(place / "predictions.safetensors") for place in (tmp_path / "out", folder))
    assert ours.keys() == theirs.keys()
    for array in ours:
        np.testing.assert_allclose(ours[array], theirs[array], atol=1e-5)
    assert files(tmp_path / "out") == {"evaluation.json", "predictions.safetensors"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert "accuracy" in said and "95% interval" in said


@pytest.fixture
def rows(tmp_path):
    """A labelled file of the user's."""
    texts = ["old moon near a star", "warm soup", "bread and apple", "the far comet"]
    return write_parquet(tmp_path / "mine" / "rows.parquet", sentence=texts, label=[0, 1, 1, 0], note=texts)


def test_a_file_of_labelled_rows(finished, rows):
    result, said = evaluate(finished("lora"), file=rows)
    output = finished("lora") / "evaluations" / "rows"
    assert read(output, "evaluation.json") == json.loads(json.dumps(result))
    assert result["splits"]["file"]["rows"] == 4 and result["splits"]["file"]["source"] == str(rows)
    arrays = load_file(output / "predictions.safetensors")
    assert arrays["file/labels"].tolist() == [0, 1, 1, 0] and arrays["file/logits"].shape == (4, 2)
    own = interval("accuracy", arrays["file/labels"], arrays["file/predictions"])
    assert result["metrics"]["file"]["accuracy"] == own.value
    assert result["intervals"] == {"file": {"accuracy": [own.low, own.high]}}
    assert "rows.parquet" in said and f"evaluation  {output}" in said
    assert f"{own.low:.4f} to {own.high:.4f}" in said and "say nothing of other seeds" in said


def test_the_same_again_is_not_computed_again(finished, rows, tmp_path, monkeypatch):
    first, _ = evaluate(finished("lora"), file=rows, output=tmp_path / "out")
    monkeypatch.setattr(evaluation, "restore", lambda *arguments: pytest.fail("the model was loaded"))
    again, said = evaluate(finished("lora"), file=rows, output=tmp_path / "out")
    assert again == json.loads(json.dumps(first)) and "evaluated before, in" in said
    write_parquet(rows, sentence=["old moon"], label=[0])
    with pytest.raises(ValueError, match="holds an evaluation of other rows or of another run; choose"):
        evaluate(finished("lora"), file=rows, output=tmp_path / "out")


def test_splits(finished, tmp_path):
    result, _ = evaluate(finished("lora"), split="train", output=tmp_path / "train")
    assert result["splits"]["training"]["rows"] == 16 and result["metrics"].keys() == {"training"}
    with pytest.raises(FileNotFoundError, match=r"no test\.parquet or test_sample\.parquet in .*sst2; check"):
        evaluate(finished("lora"), split="test", output=tmp_path / "test")
    with pytest.raises(ValueError, match="so none of it is held out; choose --split validation"):
        evaluate(finished("lora"), split="held_out", output=tmp_path / "test")
    with pytest.raises(ValueError, match="are given; leave one of them out"):
        evaluate(finished("lora"), split="train", file=Path("rows.parquet"))
    assert [path.name for path in tmp_path.iterdir()] == ["train"]


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        (
            {"text": ["a"], "label": [0]},
            r"rows\.parquet has no column 'sentence' \(it has text, label\); re",
        ),
        ({"sentence": ["a"]}, "has no column 'label'"),
        ({"sentence": ["a", "b"], "label": [-1, -1]}, "has no labels: all are -1, as in the test splits"),
        ({"sentence": ["a", "b"], "label": [0, 2]}, "row 1: label 2 is not an integer from 0 to 1; fix"),
        ({"sentence": ["a", None], "label": [0, 1]}, "row 1: sentence is None, not a text"),
        ({"sentence": [], "label": []}, "has no rows; give a file with at least one"),
    ],
)
def test_files_that_are_not_of_the_task(finished, tmp_path, columns, words):
    file = write_parquet(tmp_path / "mine" / "rows.parquet", **columns)
    with pytest.raises(ValueError, match=words):
        evaluate(finished("lora"), file=file, output=tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_no_such_file(finished, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no file .*nowhere; check --file"):
        evaluate(finished("lora"), file=tmp_path / "nowhere")


def test_runs_that_are_not_finished(finished, tmp_path):
    (tmp_path / ".begun.partial").mkdir()
    with pytest.raises(FileNotFoundError, match="begun is not finished; let the command that began it go on"):
        evaluate(tmp_path / "begun")
    with pytest.raises(FileNotFoundError, match="there is no run folder"):
        evaluate(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"has no config\.json, so it is no finished run"):
        evaluate(tmp_path / ".begun.partial")


def test_a_run_that_was_kept_without_its_adapter(finished, tmp_path):
    for name in ("config.json", "result.json"):
        (tmp_path / name).write_bytes((finished("lora") / name).read_bytes())
    with pytest.raises(FileNotFoundError, match="was kept without what it trained; train it again"):
        evaluate(tmp_path)
    assert files(tmp_path) == {"config.json", "result.json"}


@pytest.mark.parametrize("name", ["lora", "full", "bitfit", "prompt"])
def test_another_base_model(finished, tmp_path, name):
    other = save_encoder(tmp_path / "other", model_type="distilbert")
    with pytest.raises(ValueError, match=r"does not fit the base model .*other .*with --model"):
        evaluate(finished(name), model=str(other), output=tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_something_in_the_way(finished, tmp_path, kind):
    if kind == "file":
        (tmp_path / "out").write_text("mine")
    else:
        write_parquet(tmp_path / "out" / "mine", a=[1])
    with pytest.raises(ValueError, match="exists and is not an evaluation; choose another --output"):
        evaluate(finished("lora"), output=tmp_path / "out")


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_nothing_is_left_of_what_was_interrupted(finished, tmp_path, error, monkeypatch):
    def stop(*arguments):
        raise error

    monkeypatch.setattr(evaluation, "save_predictions", stop)
    with pytest.raises(error):
        evaluate(finished("lora"), output=tmp_path / "deep" / "out")
    assert list(tmp_path.iterdir()) == []
