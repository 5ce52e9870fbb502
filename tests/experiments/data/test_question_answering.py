"""SQuAD through the harness: windows to the Trainer, logits to answers and the official numbers."""

from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import load_file

from adalora_fast.experiments.data.workloads import load_workload
from adalora_fast.experiments.models.encoders import load_model
from adalora_fast.experiments.settings.recipes import Recipe
from adalora_fast.experiments.settings.settings import RunSettings
from tests.helpers.tiny import write_parquet
from tests.helpers.training_runs import read, train

RECIPE = Recipe(
    epochs=2, batch_size=8, max_length=24, stride=6, init_r=4, target_r=2, tinit=1, tfinal=2, deltaT=1
)
PASSAGES = ["the moon and a star near the old comet", "warm bread with soup and an apple for the cold orbit"]
ROWS = [
    (0, "moon", 4),
    (0, "old comet", 30),
    (1, "bread", 5),
    (1, "an apple", 25),
    (0, "star", 15),
    (1, "soup", 16),
]


def write_squad(folder, task="squad", *, unanswerable=0, repeat=2):
    """A few questions about two passages; the last `unanswerable` of the validation have no answer."""
    for split, count in (("train", repeat), ("validation", 1)):
        rows = [(*row, i) for i, row in enumerate(ROWS * count)]
        answers = [{"text": [text], "answer_start": [start]} for _, text, start, _ in rows]
        if unanswerable:
            answers[-unanswerable:] = [{"text": [], "answer_start": []}] * unanswerable
        write_parquet(
            folder / task / f"{split}.parquet",
            id=[f"{split}-{i}" for *_, i in rows],
            context=[PASSAGES[passage] for passage, *_ in rows],
            question=["which moon" if i % 2 else "what soup" for *_, i in rows],
            answers=answers,
        )
    return folder


def settings(data_dir, model, task="squad", **options):
    return RunSettings(task=task, model=str(model), data_dir=str(data_dir), **({"recipe": RECIPE} | options))


def oracle(work, split, *, null=()):
    """Logits that are right about every question, and say "no answer" to the rows in `null`."""
    features = work._features[split]
    windows, tokens = features.offsets.shape[:2]
    start, end = np.zeros((2, windows, tokens + 3), np.float32)  # padded, as the Trainer's are
    for w in range(windows):
        start[w, features.start_positions[w]] = end[w, features.end_positions[w]] = 9
        if features.example[w] in null:
            start[w, features.null[w]] = end[w, features.null[w]] = 20
    start[:, tokens:] = end[:, tokens:] = -100
    return start, end


@pytest.fixture(scope="module")
def tokenizer(encoder):
    return load_model(str(encoder), kind="question_answering")[1]


def test_right_logits_give_full_marks(tmp_path, encoder, tokenizer):
    work = load_workload(settings(write_squad(tmp_path), encoder))
    tables = work.prepare(tokenizer, RECIPE)
    assert set(tables["train"].column_names) == set(tables["validation"].column_names)
    judged = work.judge("validation", oracle(work, "validation"))
    assert judged.metrics == {"exact_match": 1.0, "f1": 1.0}
    assert judged.arrays["f1"].tolist() == [1.0] * 6 and judged.arrays["f1"].dtype == np.float32
    assert [entry["text"] for entry in judged.answers.values()] == [text for _, text, _ in ROWS]


def test_version_2_counts_questions_without_answer_apart(tmp_path, encoder, tokenizer):
    work = load_workload(settings(write_squad(tmp_path, "squad_v2", unanswerable=2), encoder, "squad_v2"))
    work.prepare(tokenizer, RECIPE)
    assert work.describe()["validation"]["unanswerable"] == 2
    right = work.judge("validation", oracle(work, "validation"))
    assert right.metrics["f1"] == right.metrics["best_f1"] == right.metrics["NoAns_exact_match"] == 1.0
    # "no answer" to one that has one: lost at threshold 0, and won back by the best threshold only if it can
    # be.
    wrong = work.judge("validation", oracle(work, "validation", null=(0,)))
    assert wrong.metrics["exact_match"] == pytest.approx(5 / 6)
    assert wrong.metrics["HasAns_exact_match"] == pytest.approx(3 / 4)
    assert wrong.metrics["NoAns_exact_match"] == 1.0 and "total" not in wrong.metrics
    assert wrong.arrays["exact_match"].tolist() == [0, 1, 1, 1, 1, 1]
    assert wrong.answers["validation-0"]["text"] == "moon"  # the span: any threshold can be applied later
    assert wrong.answers["validation-0"]["no_answer"] > 0


def test_a_run_leaves_answers_and_scores_per_question(tmp_path, encoder):
    run = settings(write_squad(tmp_path / "data"), encoder)
    result = train(run, tmp_path / "run")
    assert result["primary_metric"] == "f1" and set(result["metrics"]["validation"]) == {
        "f1",
        "exact_match",
        "loss",
    }
    assert result["total_rank"] == 24 and result["best_epoch"]["primary"] >= result["primary"]
    arrays = load_file(tmp_path / "run" / "predictions.safetensors")
    assert arrays["validation/f1"].mean() == pytest.approx(result["primary"])
    answers = read(tmp_path / "run", "predictions-validation.json")
    assert list(answers) == [f"validation-{i}" for i in range(6)]


def test_held_out_questions_are_about_other_passages(tmp_path, encoder):
    work = load_workload(settings(write_squad(tmp_path), encoder, held_out=0.3))
    assert work.evaluation == ("held_out",)
    assert not set(work.splits["train"].contexts) & set(work.splits["held_out"].contexts)
    few = load_workload(settings(tmp_path, encoder, held_out=0.3, recipe=replace(RECIPE, train_rows=3)))
    assert len(few.splits["train"]) == 3  # of the rest: the same questions are held out
    assert few.splits["held_out"].ids == work.splits["held_out"].ids


def test_a_part_of_the_questions(tmp_path, encoder):
    recipe = replace(RECIPE, train_rows=5, evaluation_rows=2)
    work = load_workload(settings(write_squad(tmp_path), encoder, recipe=recipe))
    assert {name: (len(split), split.sample) for name, split in work.splits.items()} == {
        "train": (5, True), "validation": (2, True),
    }  # fmt: skip
