"""GLUE rows from parquet files: which file is read, what is checked, and what a wrong file is told."""

import pyarrow
import pyarrow.parquet
import pytest

from adalora_fast.experiments.data.tasks import TASKS, find_split_file, get_task, load_split
from tests.helpers.tiny import write_parquet

SST2 = TASKS["sst2"]


def write(folder, name="train", task="sst2", **columns):
    return write_parquet(folder / task / f"{name}.parquet", **columns)


def rows(folder, sentences, labels, name="train"):
    write(folder, name, sentence=sentences, label=labels)
    return load_split(SST2, "train", folder)


def test_the_tasks():
    glue = {"cola", "sst2", "mrpc", "rte", "qnli", "qqp", "wnli", "stsb", "mnli"}
    assert set(TASKS) == glue | {"squad", "squad_v2", "wmt16_ro_en"}
    assert all(get_task(name).name == name for name in TASKS)
    assert {name for name, task in TASKS.items() if task.is_regression} == {"stsb"}
    assert {name: TASKS[name].num_labels for name in glue if TASKS[name].num_labels != 2} == {
        "stsb": 1,
        "mnli": 3,
    }
    assert TASKS["cola"].metrics[0] == "matthews" and TASKS["stsb"].metrics[0] == "pearson_spearman"
    assert TASKS["mnli"].evaluation == ("validation_matched", "validation_mismatched")


def test_an_unknown_task_names_all_of_them():
    with pytest.raises(
        ValueError, match="unknown task 'squid'; choose one of mrpc, sst2, cola, rte, qnli, qqp"
    ):
        get_task("squid")


@pytest.mark.parametrize(
    ("name", "address"),
    [
        ("mrpc", ("nyu-mll/glue", "mrpc")),
        ("squad", ("rajpurkar/squad",)),
        ("wmt16_ro_en", ("wmt/wmt16", "ro-en")),
    ],
)
def test_where_the_hub_has_it(name, address):
    assert TASKS[name].hub_address == address


@pytest.mark.parametrize("name", [name for name, task in TASKS.items() if task.kind != "translation"])
def test_a_whole_split_of_every_task(tmp_path, name):
    task = TASKS[name]
    labels = [0.0, 2.5, 5.0] if task.is_regression else [0, task.num_labels - 1, 0]
    columns = {column: [f"{column} {row}" for row in range(3)] for column in task.text_columns}
    path = write(tmp_path, "train", name, **columns, label=labels, idx=[0, 1, 2])
    split = load_split(task, "train", tmp_path)
    assert split.labels == labels and len(split) == 3
    assert split.texts == tuple(columns[column] for column in task.text_columns)
    assert split.source == str(path) and not split.sample


@pytest.mark.parametrize("end", ["_sample", "_from_train_sample"])
def test_a_sample_is_marked(tmp_path, end):
    split = rows(tmp_path, ["a"], [0], f"train{end}")
    assert split.sample and split.source.endswith(f"train{end}.parquet")


def test_the_whole_split_goes_before_a_sample(tmp_path):
    rows(tmp_path, ["sampled"], [0], "train_sample")
    rows(tmp_path, ["from train"], [0], "train_from_train_sample")
    assert load_split(SST2, "train", tmp_path).texts == (["sampled"],)
    split = rows(tmp_path, ["whole"], [1])
    assert split.texts == (["whole"],) and not split.sample


def test_mnli_matched_and_mismatched(tmp_path):
    for name, label in (("matched", 0), ("mismatched_sample", 2)):
        write(tmp_path, f"validation_{name}", "mnli", premise=["p"], hypothesis=[name], label=[label])
    matched, mismatched = (load_split(TASKS["mnli"], name, tmp_path) for name in TASKS["mnli"].evaluation)
    assert (matched.texts[1], matched.labels, matched.sample) == (["matched"], [0], False)
    assert (mismatched.texts[1], mismatched.labels, mismatched.sample) == (["mismatched_sample"], [2], True)


def test_a_file_of_another_split_is_not_taken(tmp_path):
    write(tmp_path, "validation_from_train_sample", "mnli", premise=["p"], hypothesis=["h"], label=[0])
    with pytest.raises(
        FileNotFoundError, match=r"no validation_matched\.parquet or validation_matched_sample"
    ):
        load_split(TASKS["mnli"], "validation_matched", tmp_path)


@pytest.mark.parametrize("present", [None, "task", "data"])
def test_a_missing_file_is_named(tmp_path, present):
    folder = tmp_path / "data"
    if present:
        (folder / "sst2" if present == "task" else folder).mkdir(parents=True)
    with pytest.raises(FileNotFoundError) as error:
        find_split_file(SST2, "train", folder)
    assert str(folder / "sst2") in str(error.value)
    assert "no train.parquet or train_sample.parquet in" in str(error.value)
    assert "check --data-dir" in str(error.value)


@pytest.mark.parametrize("missing", ["sentence1", "sentence2", "label"])
def test_a_missing_column(tmp_path, missing):
    columns = {"sentence1": ["a"], "sentence2": ["b"], "label": [0], "idx": [0]}
    del columns[missing]
    write(tmp_path, "train", "mrpc", **columns)
    with pytest.raises(ValueError) as error:
        load_split(TASKS["mrpc"], "train", tmp_path)
    assert f"has no column {missing!r} (it has {', '.join(columns)})" in str(error.value)
    assert "rename its columns to sentence1, sentence2, label" in str(error.value)


@pytest.mark.parametrize("label", [2, -1, None, 0.5, "1"])
def test_a_label_out_of_range(tmp_path, label):
    kind = type(label) if label is not None else int
    with pytest.raises(ValueError) as error:
        rows(tmp_path, ["a", "b", "c"], [kind(0), label, kind(1)])
    row = 1 if kind is int else 0
    assert f"row {row}: label " in str(error.value)
    assert "is not an integer from 0 to 1; fix or remove that row" in str(error.value)


def test_the_highest_label_of_three(tmp_path):
    write(tmp_path, "train", "mnli", premise=["p"] * 3, hypothesis=["h"] * 3, label=[2, 1, 0])
    assert load_split(TASKS["mnli"], "train", tmp_path).label_counts == {"0": 1, "1": 1, "2": 1}


@pytest.mark.parametrize("label", [None, float("nan"), float("inf"), -1.0, 5.1])  # -1: a hidden test label
def test_a_score_that_is_none(tmp_path, label):
    write(tmp_path, "train", "stsb", sentence1=["a", "b"], sentence2=["a", "b"], label=[5.0, label])
    with pytest.raises(ValueError, match=r"row 1: label .* is not a number from 0 to 5"):
        load_split(TASKS["stsb"], "train", tmp_path)


@pytest.mark.parametrize(("task", "column"), [("stsb", "label"), ("sst2", "label")])
def test_truth_values_are_no_labels(tmp_path, task, column):
    """`true` counts as 1 in Python; a column of them is a mistake, and a correlation fails on it."""
    columns = {name: ["a", "b"] for name in TASKS[task].text_columns}
    write(tmp_path, "train", task, **columns, label=[True, False])
    with pytest.raises(ValueError, match="row 0: label True is not"):
        load_split(TASKS[task], "train", tmp_path)


def test_empty_strings_are_texts(tmp_path):
    assert rows(tmp_path, ["", " ", "a"], [0, 1, 0]).texts == (["", " ", "a"],)


@pytest.mark.parametrize("value", [None, 7])
def test_what_is_no_text(tmp_path, value):
    texts = ["a", None, "c"] if value is None else [value]
    with pytest.raises(ValueError, match=f"row {int(value is None)}: sentence is {value}, not a text"):
        rows(tmp_path, texts, [0] * len(texts))


def test_no_rows(tmp_path):
    with pytest.raises(ValueError, match=r"train\.parquet has no rows"):
        rows(tmp_path, [], [])


def test_narrow_integers_and_dictionaries_of_texts(tmp_path):
    texts = pyarrow.array(["b", "a", "b"]).dictionary_encode()
    write(tmp_path, sentence=texts, label=pyarrow.array([1, 0, 1], pyarrow.int8()))
    split = load_split(SST2, "train", tmp_path)
    assert split.texts == (["b", "a", "b"],) and split.labels == [1, 0, 1]
    assert split.label_counts == {"0": 1, "1": 2}


@pytest.mark.parametrize("content", [b"", b"PAR1", b"sentence,label\na,0\n" * 10])
def test_what_is_not_parquet(tmp_path, content):
    path = tmp_path / "sst2" / "train.parquet"
    path.parent.mkdir()
    path.write_bytes(content)
    with pytest.raises(
        ValueError, match=r"train\.parquet is not readable parquet \(.+\); write it again"
    ) as error:
        load_split(SST2, "train", tmp_path)
    assert "\n" not in str(error.value)


def test_a_damaged_page(tmp_path):
    path = tmp_path / "sst2" / "train.parquet"
    rows(tmp_path, ["some words", "other words"] * 50, [0, 1] * 50)
    whole = path.read_bytes()
    path.write_bytes(whole[:20] + b"\xff" * 40 + whole[60:])
    with pytest.raises(ValueError, match=r"train\.parquet is not readable parquet \(.+\); write it again"):
        load_split(SST2, "train", tmp_path)


def test_a_home_folder_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    rows(tmp_path / "data", ["a"], [0])
    assert load_split(SST2, "train", "~/data").texts == (["a"],)


def test_the_hub_out_of_reach(monkeypatch):
    import datasets

    asked = []

    def unreachable(*arguments, **options):
        asked.append((arguments, options))
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    said = r"nyu-mll/glue .* not reachable \(no network\); give a local folder with --data-dir"
    with pytest.raises(FileNotFoundError, match=said):
        load_split(SST2, "train", None)
    assert asked == [(("nyu-mll/glue", "sst2"), {"split": "train"})]


def test_rows_from_the_hub(monkeypatch):
    import datasets

    table = datasets.Dataset.from_dict({"sentence": ["a", "b"], "label": [1, 0], "idx": [0, 1]})
    monkeypatch.setattr(datasets, "load_dataset", lambda *arguments, **options: table)
    split = load_split(SST2, "train", None)
    assert (split.texts, split.labels, split.sample) == ((["a", "b"],), [1, 0], False)
    assert split.source == "nyu-mll/glue/sst2:train"
