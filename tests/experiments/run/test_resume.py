"""Interrupted runs: they go on where they were, and end as if nothing had happened."""

import json
from dataclasses import replace

import pytest
from safetensors.torch import load_file

from adalora_fast.experiments.run import stopwatch, training
from adalora_fast.experiments.run.progress import TrainingProgress
from tests.helpers.tiny import RECIPE, printed, quiet_console, write_sst2
from tests.helpers.training_runs import StopAfter, lines, read, settings, train, without_times

RECIPE_OF_THREE = replace(RECIPE, epochs=3)  # of four steps each, the last one of four rows


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_sst2(tmp_path_factory.mktemp("data"), train=28)


@pytest.fixture(scope="module")
def run(encoder, data):
    def make(method="adalora", **options):
        return settings(encoder, data, method, recipe=RECIPE_OF_THREE, **options)

    return make


@pytest.fixture(scope="module")
def whole(run, tmp_path_factory):
    """Folders of runs that nobody interrupted, by method and score."""
    made = {}

    def get(method="adalora", **options):
        key = (method, *options.items())
        if key not in made:
            made[key] = tmp_path_factory.mktemp("whole") / "run"
            train(run(method, **options), made[key])
        return made[key]

    return get


def interrupt(settings, path, steps, **options):
    with pytest.raises(KeyboardInterrupt):
        train(settings, path, progress=StopAfter(steps), **options)
    assert not path.exists()


def same_weights(first, second):
    (one,), (two,) = (
        list((folder / "adapter").glob("*adapter_model.safetensors")) for folder in (first, second)
    )
    one, two = load_file(one), load_file(two)
    return one.keys() == two.keys() and all(one[name].equal(two[name]) for name in one)


def assert_same_run(path, expected):
    result, reference = (without_times(read(folder, "result.json")) for folder in (path, expected))
    differences = {name for name in reference if result[name] != reference[name]}
    assert differences <= {"resumed", "train_loss"}  # test_the_mean_training_loss is about that one
    assert result["resumed"] is True
    assert read(path, "ranks.json") == read(expected, "ranks.json")
    assert same_weights(path, expected)
    ours, theirs = (
        [{k: v for k, v in without_times(line).items() if k != "train_loss"} for line in lines(folder)]
        for folder in (path, expected)
    )
    assert ours == theirs


@pytest.mark.parametrize(
    ("method", "options", "steps"),
    [
        ("adalora", {"score": "sensitivity"}, 6),
        ("adalora", {"score": "gsnr"}, 9),
        ("lora", {}, 6),
    ],
)
def test_an_interrupted_run_ends_like_one_that_was_not(run, whole, tmp_path, method, options, steps):
    asked, path = run(method, **options), tmp_path / "run"
    interrupt(asked, path, steps)
    train(asked, path)
    assert_same_run(path, whole(method, **options))


def test_interrupted_twice(run, whole, tmp_path):
    for steps in (6, 6):  # in the second epoch, then in the third
        interrupt(run(), tmp_path / "run", steps)
    train(run(), tmp_path / "run")
    assert_same_run(tmp_path / "run", whole())


def test_interrupted_before_the_first_checkpoint(run, whole, tmp_path):
    interrupt(run(), tmp_path / "run", 3)
    result = train(run(), tmp_path / "run")
    assert result["resumed"] is False
    assert without_times(result) == without_times(read(whole(), "result.json"))


@pytest.mark.parametrize("method", ["adalora", "head"])
def test_interrupted_while_the_last_files_are_written(run, whole, tmp_path, monkeypatch, method):
    """Everything is trained, the adapter is saved, the folder has not got its name yet."""

    def stop(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "write_json", stop)
    with pytest.raises(KeyboardInterrupt):
        train(run(method), tmp_path / "run")
    monkeypatch.undo()
    result = train(run(method), tmp_path / "run")
    assert result["primary"] == read(whole(method), "result.json")["primary"]
    assert read(tmp_path / "run", "ranks.json") == read(whole(method), "ranks.json")
    # evaluated at the end of the training once more, not written down twice
    assert [line["step"] for line in lines(tmp_path / "run")] == [
        line["step"] for line in lines(whole(method))
    ]


def test_the_mean_training_loss(run, whole, tmp_path):
    """Of the whole run, whether or not it was interrupted."""
    interrupt(run(), tmp_path / "run", 6)
    result = train(run(), tmp_path / "run")
    assert result["train_loss"] == pytest.approx(read(whole(), "result.json")["train_loss"], rel=1e-4)


class Hours(StopAfter):
    """Every step takes an hour."""

    def __init__(self, steps, time):
        super().__init__(steps)
        self.time = time

    def advance(self):
        self.time[0] += 3600
        super().advance()


def test_a_resumed_run_says_so_and_has_the_seconds_of_all_parts(run, tmp_path, monkeypatch):
    """Of four steps an epoch: two are lost twice, and counted where they are repeated."""
    time = [0.0]
    monkeypatch.setattr(stopwatch.time, "perf_counter", lambda: time[0])
    for _ in range(2):  # from step 0 to 6 (4 are kept), from 4 to 10 (8 are kept)
        with pytest.raises(KeyboardInterrupt):
            train(run(), tmp_path / "run", progress=Hours(6, time))
    last = Hours(100, time)
    result = train(run(), tmp_path / "run", progress=last)
    assert result["seconds"] == result["train_seconds"] == 12 * 3600
    assert result["part_seconds"] == [4 * 3600, 4 * 3600, 4 * 3600] and result["resumed"]
    said = printed(last.console).splitlines()
    assert said == [
        "sensitivity: resumed after step 8, 8 h 00 min so far",
        f"sensitivity: accuracy {result['primary']:.3f}, total rank 24, 43200 s in 3 parts",
    ]
    assert [(part["step"], part["seconds"]) for part in read(tmp_path / "run", "config.json")["resumed"]] == [
        (4, 4 * 3600),
        (8, 8 * 3600),
    ]


def test_a_part_of_a_version_that_wrote_no_seconds(run, tmp_path):
    """Then those of the whole run are not known, and it says so."""
    interrupt(run("lora"), tmp_path / "run", 6)
    log = tmp_path / ".run.partial" / "metrics.jsonl"
    log.write_text("".join(json.dumps(without_times(line)) + "\n" for line in lines(log.parent)))
    interrupt(run("lora"), tmp_path / "run", 6)  # and stays so, whatever the next one writes
    console = quiet_console()
    with TrainingProgress(console=console) as progress:
        result = train(run("lora"), tmp_path / "run", progress=progress)
    assert "part_seconds" not in result and "(of the last part)" in printed(console)


def test_what_begins_again_says_so(run, tmp_path):
    interrupt(run("peft"), tmp_path / "run", 6)
    console = quiet_console()
    with TrainingProgress(console=console) as progress:
        result = train(run("peft"), tmp_path / "run", progress=progress)
    assert "peft-adalora: begins again, as what was interrupted left no checkpoint" in printed(console)
    assert not result["resumed"] and "part_seconds" not in result


def test_a_run_that_is_not_resumable_begins_again(run, tmp_path):
    interrupt(run(), tmp_path / "run", 6, resumable=False)
    assert not (tmp_path / ".run.partial" / "checkpoints" / "checkpoint-4").exists()
    result = train(run(), tmp_path / "run", resumable=False)
    assert result["resumed"] is False
    assert result["best_epoch"] == {"epoch": 3.0, "primary": result["primary"]}  # evaluated at the end only
    losses = [line["step"] for line in lines(tmp_path / "run") if "loss" in line]
    assert losses == list(range(1, 13))


def test_a_line_that_was_cut_off(run, whole, tmp_path):
    """The machine went down while a line was written."""
    interrupt(run(), tmp_path / "run", 6)
    log = tmp_path / ".run.partial" / "metrics.jsonl"
    log.write_text(log.read_text()[:-20])
    train(run(), tmp_path / "run")
    assert_same_run(tmp_path / "run", whole())


@pytest.mark.parametrize(
    "damage",
    ["trainer_state.json", "adapter_model.safetensors", "adalora_allocator.safetensors", "everything"],
)
def test_a_checkpoint_that_was_cut_off(run, whole, tmp_path, damage):
    """The machine went down while it was saved: the run goes on from before, or from the beginning."""
    interrupt(run(), tmp_path / "run", 6)
    checkpoint = tmp_path / ".run.partial" / "checkpoints" / "checkpoint-4"
    for file in list(checkpoint.iterdir()):
        if damage in (file.name, "everything"):
            file.unlink()
    try:
        result = train(run(), tmp_path / "run")
    except (ValueError, OSError) as error:  # or the user is told what to do about it
        assert "delete" in str(error)
    else:
        assert result["primary"] == read(whole(), "result.json")["primary"]


def test_a_run_that_fails_leaves_no_folder_of_its_name(run, tmp_path, monkeypatch):
    def fail(*arguments):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(training, "save_adapter", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        train(run("head"), tmp_path / "run")
    assert [path.name for path in tmp_path.iterdir()] == [".run.partial"]
    monkeypatch.undo()
    assert train(run("head"), tmp_path / "run")["steps"] == 12


@pytest.mark.parametrize("wrong", ["schedule", "model"])
def test_a_run_that_could_not_begin_is_not_in_the_way_of_the_next(run, encoder, tmp_path, wrong):
    """Nothing was trained, so the user corrects the setting and asks for the same folder again."""
    if wrong == "schedule":
        bad = replace(run(), recipe=replace(RECIPE_OF_THREE, tinit=50, tfinal=50))
    else:
        bad = replace(run(), model="nobody/nothing")
    with pytest.raises((ValueError, OSError)):
        train(bad, tmp_path / "run")
    assert train(run(), tmp_path / "run")["steps"] == 12


def test_other_settings_do_not_go_on_with_an_interrupted_run(run, tmp_path):
    interrupt(run(), tmp_path / "run", 6)
    before = (tmp_path / ".run.partial" / "config.json").read_text()
    with pytest.raises(ValueError, match="holds a run with seed = 0, and 1 was asked for"):
        train(run(seed=1), tmp_path / "run")
    assert (tmp_path / ".run.partial" / "config.json").read_text() == before
    assert json.loads(before)["settings"]["seed"] == 0
