"""From settings to tables for the Trainer, and from the model's outputs to metrics and predictions."""

import json
import os
from dataclasses import replace

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from adalora_fast.experiments.data import rows
from adalora_fast.experiments.data.rows import cached, tokenize
from adalora_fast.experiments.data.tasks import Split
from adalora_fast.experiments.data.workloads import load_workload
from adalora_fast.experiments.models.encoders import load_model
from adalora_fast.experiments.settings.settings import RunSettings
from tests.helpers.tiny import RECIPE, write_parquet, write_sst2


def settings(data_dir, **options):
    return RunSettings(
        **({"task": "sst2", "model": "tiny", "data_dir": str(data_dir), "recipe": RECIPE} | options)
    )


@pytest.fixture(scope="module")
def tokenizer(encoder):
    return load_model(str(encoder), kind="classification", labels=("a", "b"))[1]


def test_a_sample_of_the_rows_is_always_the_same_and_says_so(data_dir):
    whole = load_workload(settings(data_dir)).splits
    recipe = replace(RECIPE, train_rows=10, evaluation_rows=5)
    some, again = (load_workload(settings(data_dir, recipe=recipe, seed=seed)) for seed in (0, 1))
    assert {name: len(split) for name, split in some.splits.items()} == {"train": 10, "validation": 5}
    assert some.splits == again.splits
    assert all(split["sample"] for split in some.describe().values())
    rows = list(zip(whole["train"].texts[0], whole["train"].labels))
    places = [rows.index(row) for row in zip(some.splits["train"].texts[0], some.splits["train"].labels)]
    assert places == sorted(places)
    every = load_workload(settings(data_dir, recipe=replace(RECIPE, train_rows=1000)))
    assert not every.describe()["train"]["sample"]


def test_held_out_rows_take_the_place_of_the_development_set(tmp_path):
    write_parquet(
        tmp_path / "sst2" / "train.parquet",
        sentence=[f"text {i // 2}" for i in range(40)],
        label=[i % 2 for i in range(40)],
    )
    work = load_workload(settings(tmp_path, held_out=0.2))  # there is no validation.parquet
    assert work.evaluation == ("held_out",)
    train, held = (set(work.splits[name].texts[0]) for name in ("train", "held_out"))
    assert len(work.splits["held_out"]) == 8 and not train & held  # equal texts stay together


def test_judging_a_classification(data_dir):
    work = load_workload(settings(data_dir))
    labels = np.array(work.splits["validation"].labels)
    logits = np.stack([np.zeros(len(labels)), np.where(labels == 1, 1.0, -1.0)], axis=1)
    logits[0] *= -1
    judged = work.judge("validation", (logits, "hidden states"))
    assert judged.metrics == {"accuracy": pytest.approx(1 - 1 / len(labels))}
    assert judged.arrays["labels"].dtype == judged.arrays["predictions"].dtype == np.int64
    assert judged.arrays["logits"].dtype == np.float32 and judged.answers is None
    assert (judged.arrays["predictions"] == judged.arrays["labels"]).sum() == len(labels) - 1


def test_judging_a_regression(tmp_path):
    for split in ("train", "validation"):
        columns = {"sentence1": ["a", "b", "c"], "sentence2": ["a", "b", "c"], "label": [0.0, 2.5, 5.0]}
        write_parquet(tmp_path / "stsb" / f"{split}.parquet", **columns)
    judged = load_workload(settings(tmp_path, task="stsb")).judge(
        "validation", np.array([[1.0], [2.0], [3.0]])
    )
    assert judged.metrics["pearson"] == pytest.approx(1) and judged.metrics["spearman"] == pytest.approx(1)
    assert judged.arrays["predictions"].tolist() == [1, 2, 3] and judged.arrays["labels"].dtype == np.float32


def test_a_long_table_is_tokenised_once(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("ADALORA_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(rows, "CACHED_ROWS", 3)
    texts, made = ["the moon", "old bread", "new soup"], []

    def table(*, texts=texts, length=16):
        def encode():
            made.append(length)
            return {**tokenizer(texts, truncation=True, max_length=length), "labels": [0, 1, 1]}

        return cached(encode, len(texts), texts, tokenizer, length)

    first, again = table(), table()
    assert made == [16] and first[:] == again[:]
    assert len(table(length=3)[0]["input_ids"]) == 3 and made == [16, 3]  # other settings, another table
    table(texts=["the moon", "old bread", "big soup"])
    assert len(made) == 3 and len(list((tmp_path / "cache").iterdir())) == 3


def test_a_tokenizer_that_names_other_inputs_makes_another_table(tmp_path, monkeypatch):
    """BERT's and DistilBERT's have one vocabulary, and only BERT reads segments."""
    monkeypatch.setenv("ADALORA_FAST_CACHE", str(tmp_path))
    monkeypatch.setattr(rows, "CACHED_ROWS", 1)
    fast = Tokenizer(WordLevel({"[UNK]": 0, "moon": 1, "[PAD]": 2}, unk_token="[UNK]"))
    split = Split(texts=(["moon"],), labels=[1], source="", sample=False)
    found = []
    for names in (["input_ids", "attention_mask"], ["input_ids", "token_type_ids", "attention_mask"]):
        own = PreTrainedTokenizerFast(tokenizer_object=fast, model_input_names=names)
        found.append(set(tokenize(split, own, 8).column_names) - {"labels"} == set(names))
    assert found == [True, True]


def test_a_table_that_could_not_be_kept_leaves_nothing(tokenizer, tmp_path, monkeypatch):
    def full(table, folder):
        folder.mkdir()
        raise OSError(28, "No space left on device")

    killed = tmp_path / ".tokens-half.17"
    killed.mkdir()
    os.utime(killed, (0, 0))
    (tmp_path / ".tokens-at-work.18").mkdir()
    monkeypatch.setenv("ADALORA_FAST_CACHE", str(tmp_path))
    monkeypatch.setattr(rows, "CACHED_ROWS", 1)
    monkeypatch.setattr(rows.Dataset, "save_to_disk", full)
    with pytest.raises(OSError, match=r"cannot keep tokens in .* \(No space left on device\); set ADALORA"):
        cached(lambda: {"a": [1]}, 1, ["x"], tokenizer)
    assert [path.name for path in tmp_path.iterdir()] == [".tokens-at-work.18"]


def test_what_is_evaluated_is_not_trained_on(tmp_path):
    """A development set that is cut out of the training data may lie beside all of them."""
    rows = {"sentence": ["a", "b", "c", "d"], "label": [0, 1, 0, 1]}
    write_parquet(tmp_path / "sst2" / "train.parquet", **rows)
    write_parquet(tmp_path / "sst2" / "validation_from_train_sample.parquet", sentence=["b"], label=[1])
    work = load_workload(settings(tmp_path))
    assert work.splits["train"].texts == (["a", "c", "d"],) and work.splits["train"].labels == [0, 0, 1]


def test_a_cache_that_cannot_be_written(tokenizer, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ADALORA_FAST_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(rows, "CACHED_ROWS", 1)
    with pytest.raises(OSError, match=r"cannot keep tokens in .*; set ADALORA_FAST_CACHE to another folder"):
        cached(lambda: {"a": [1]}, 1, ["x"], tokenizer)


def test_a_short_table_is_not_kept(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("ADALORA_FAST_CACHE", str(tmp_path / "cache"))
    cached(lambda: {"a": [1]}, 1, ["x"], tokenizer)
    assert not (tmp_path / "cache").exists()


def test_labels_that_do_not_fit_show_when_the_data_are_loaded(tmp_path):
    data = write_sst2(tmp_path)
    write_parquet(tmp_path / "sst2" / "validation.parquet", sentence=["a"], label=[7])
    with pytest.raises(ValueError, match="label 7 is not an integer from 0 to 1"):
        load_workload(settings(data))


def test_descriptions_are_json(data_dir):
    assert json.loads(json.dumps(load_workload(settings(data_dir)).describe()))["train"]["rows"] == 40
