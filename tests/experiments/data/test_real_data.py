"""The real GLUE files, where they are: rows, labels and which of them are samples."""

import os
from pathlib import Path

import pytest

from adalora_fast.experiments.data.tasks import TASKS, load_split
from adalora_fast.experiments.settings.recipes import Recipe
from adalora_fast.experiments.settings.settings import RunSettings
from tests.helpers.training_runs import train

DATA = Path(os.environ.get("ADALORA_FAST_DATA", Path(__file__).parents[4] / "shared" / "data"))
pytestmark = pytest.mark.skipif(
    not DATA.is_dir(), reason="no GLUE files; set ADALORA_FAST_DATA to a folder with <task>/<split>.parquet"
)

ROWS = {  # rows, and whether this is only part of the official split
    ("cola", "train"): (8551, False),
    ("cola", "validation"): (1043, False),
    ("sst2", "train"): (67349, False),
    ("sst2", "validation"): (872, False),
    ("mrpc", "train"): (3668, False),
    ("mrpc", "validation"): (408, False),
    ("rte", "train"): (2490, False),
    ("rte", "validation"): (277, False),
    ("qnli", "train"): (7999, True),
    ("qnli", "validation"): (5463, False),
    ("qqp", "train"): (7999, True),
    ("qqp", "validation"): (1000, True),
    ("wnli", "train"): (635, False),
    ("wnli", "validation"): (71, False),
    ("stsb", "train"): (5749, False),
    ("stsb", "validation"): (1500, False),
    ("mnli", "train"): (7999, True),
    ("mnli", "validation_matched"): (1000, True),
    ("mnli", "validation_mismatched"): (1000, True),
}
# What always answering with the more common class gets: facts about GLUE's validation sets.
MAJORITY = {"cola": 721 / 1043, "sst2": 444 / 872, "mrpc": 279 / 408, "rte": 146 / 277, "wnli": 40 / 71}


def test_every_split_that_a_run_reads_is_listed():
    assert set(ROWS) == {
        (name, split)
        for name, task in TASKS.items()
        for split in ("train", *task.evaluation)
        # test_squad_answers.py, test_translation.py
        if task.kind not in ("question_answering", "translation")
    }


@pytest.mark.parametrize(("name", "split"), ROWS)
def test_rows(name, split):
    task = TASKS[name]
    if not any((DATA / name).glob(f"{split}*.parquet")):
        pytest.skip(f"no {split} of {name} in the data folder")
    loaded = load_split(task, split, DATA)
    expected, sample = ROWS[name, split]
    if not sample and loaded.sample:
        pytest.skip(f"only a sample of {split} of {name} in the data folder")
    if sample == loaded.sample:  # a machine may have the whole split instead of our sample
        assert len(loaded) == expected
    assert all(len(column) == len(loaded) for column in loaded.texts)
    if task.is_regression:
        assert min(loaded.labels) == 0.0 and max(loaded.labels) == 5.0
    else:
        assert set(loaded.labels) == set(range(task.num_labels))
        counts = loaded.label_counts
        assert sum(counts.values()) == len(loaded)
        if split == "validation" and name in MAJORITY:
            assert max(counts.values()) / len(loaded) == pytest.approx(MAJORITY[name])


@pytest.mark.parametrize(
    ("task", "metrics"), [("mrpc", {"accuracy", "f1"}), ("squad", {"exact_match", "f1"})]
)
def test_a_run_on_real_rows(encoder, tmp_path, task, metrics):
    """From the real file to a folder with a result that says it is a sample."""
    if not (DATA / task / "train.parquet").is_file():
        pytest.skip(f"no {task} in the data folder")
    recipe = Recipe(epochs=1, max_length=40, stride=8, batch_size=4, init_r=4, target_r=2, tinit=1, tfinal=1,
                    deltaT=1, train_rows=16, evaluation_rows=8)  # fmt: skip
    run = RunSettings(task=task, model=str(encoder), data_dir=str(DATA), recipe=recipe)
    result = train(run, tmp_path / "run")
    assert result["sample"] and result["splits"]["validation"]["rows"] == 8 and result["total_rank"] == 24
    assert set(result["metrics"]["validation"]) == metrics | {"loss"}
