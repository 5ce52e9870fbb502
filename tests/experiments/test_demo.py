"""The demonstration from beginning to end, on a tiny encoder and a small corpus instead of the real ones."""

import random

import pytest

from adalora_fast.experiments import demo
from adalora_fast.experiments.data.docstrings import DocstringCorpus
from adalora_fast.experiments.models import packages as models
from adalora_fast.experiments.run import training
from tests.helpers.tiny import FILLERS, printed, quiet_console, save_encoder
from tests.helpers.training_runs import files, read

LABELS = ["head-only", "lora-r8", *demo.SCORES]
MODULES = tuple(f"module{i}" for i in range(10))


def small_corpus(progress=None):
    generator = random.Random(0)
    texts = [" ".join(generator.choices(FILLERS, k=8)) for _ in range(420)]
    labels = [generator.randrange(10) for _ in texts]
    if progress is not None:
        progress(1, 1)
    return DocstringCorpus(
        modules=MODULES,
        train_texts=tuple(texts[:330]),
        train_labels=tuple(labels[:330]),
        test_texts=tuple(texts[330:]),
        test_labels=tuple(labels[330:]),
        counts={
            "docstrings": 500,
            "too_short": 10,
            "duplicates": 20,
            "shared_between_modules": 5,
            "in_other_modules": 45,
            "train": 330,
            "test": 90,
        },
        python_version="3.11.0",
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(folder, summary, what was printed, what a second call printed)"""
    root = tmp_path_factory.mktemp("demo")
    encoder = save_encoder(root / "encoder")
    with pytest.MonkeyPatch.context() as patch:
        for module in (models, demo):
            patch.setattr(module, "packaged_minilm", lambda: encoder)
        patch.setattr(demo, "build_corpus", small_corpus)
        consoles = [quiet_console(), quiet_console()]
        options = {"output": root / "out", "fast": True, "seed": 0}
        summary = demo.run_demo(**options, console=consoles[0])
        patch.setattr(training, "load_encoder", lambda *arguments: pytest.fail("trained twice"))
        assert demo.run_demo(**options, console=consoles[1]) == summary
    return root / "out", summary, *map(printed, consoles)


def test_every_run_has_its_folder(finished):
    out, _, _, _ = finished
    assert sorted(path.name for path in out.iterdir() if path.is_dir()) == sorted(
        f"{name}-seed0" for name in LABELS
    )
    for label in LABELS:
        assert {"config.json", "metrics.jsonl", "ranks.json", "result.json"} <= files(out / f"{label}-seed0")


def test_every_score_spends_the_same_budget_as_plain_lora(finished):
    out, _, _, _ = finished
    totals = {label: read(out / f"{label}-seed0", "result.json")["total_rank"] for label in LABELS}
    assert totals == dict.fromkeys(LABELS, 8 * 12) | {"head-only": 0}


def test_same_data_seed_and_steps(finished):
    out, _, _, _ = finished
    results = [read(out / f"{label}-seed0", "result.json") for label in LABELS]
    assert {result["steps"] for result in results} == {3}  # a fifth of 11 batches
    assert all(result["splits"] == results[0]["splits"] for result in results)


def test_summary(finished):
    out, summary, _, _ = finished
    assert read(out, "summary-seed0.json") == summary | {"modules": list(MODULES)}
    assert list(summary["results"]) == LABELS
    assert summary["results"] == {
        label: read(out / f"{label}-seed0", "result.json")["primary"] for label in LABELS
    }
    assert summary["majority"] == small_corpus().majority
    assert summary["counts"]["train"] == 330 and summary["recipe"]["epochs"] == 0.2


def test_pictures(finished):
    out, _, _, _ = finished
    assert {"ranks-seed0.png", "ranks-seed0.svg"} <= {path.name for path in out.iterdir()}
    svg = (out / "ranks-seed0.svg").read_text()
    assert all(f"{score}: accuracy " in svg for score in demo.SCORES) and "16 → 8 on average" in svg


def test_what_is_printed(finished):
    out, _, shown, again = finished
    assert (
        "Python 3.11.0: 500 docstrings of functions and classes; left out 10 too short, 20 repeated" in shown
    )
    assert "modules: module0, module1" in shown and "330 to train, 90 to test" in shown
    for label in LABELS:
        assert f"\n{label}: accuracy " in shown and f"{label}: already complete in {out}" in again
    assert "majority class" in shown and "90 test texts" in shown
    assert str(out / "ranks-seed0.png") in shown
    assert "without it the differences mean more" in shown


def test_a_folder_in_the_way_is_refused_before_any_training(tmp_path, monkeypatch):
    for module in (models, demo):
        monkeypatch.setattr(module, "packaged_minilm", lambda: tmp_path)
    monkeypatch.setattr(demo, "build_corpus", small_corpus)
    monkeypatch.setattr(training, "train_run", lambda *arguments, **options: pytest.fail("trained"))
    last = tmp_path / f"{LABELS[-1]}-seed0"
    last.mkdir()
    (last / "letter.txt").write_text("mine")
    with pytest.raises(ValueError, match="exists and is not a run; choose another --output"):
        demo.run_demo(output=tmp_path, fast=True, seed=0, console=quiet_console())


def test_a_missing_model_is_said_before_anything_slow(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(demo, "build_corpus", lambda **options: pytest.fail("read the library first"))
    with pytest.raises(FileNotFoundError, match="not installed; install it with"):
        demo.run_demo(output=tmp_path / "out", fast=True, seed=0, console=quiet_console())
    assert not (tmp_path / "out").exists()


def test_the_runs_differ_only_in_method_and_score():
    runs = demo.demo_runs(small_corpus(), recipe=demo.FULL, seed=3)
    assert [run.label for run in runs] == LABELS
    assert len({(run.task, run.model, run.seed, run.recipe, run.data_dir) for run in runs}) == 1
    assert runs[0].seed == 3 and "3.11.0" in runs[0].data_dir  # another Python is another corpus
