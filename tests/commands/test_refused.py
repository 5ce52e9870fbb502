"""One line and exit code 2 for every mistake of the user."""

import pytest

from adalora_fast import cli
from tests.commands.calling import left_behind, refused, sweep, train
from tests.helpers.tiny import write_parquet


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"task": "squid"}, "unknown task 'squid'; choose one of mrpc"),
        ({"task": "mrpc"}, "no train.parquet or train_sample.parquet in {here}/data/mrpc; check --data-dir"),
        ({"data_dir": "/no/such/folder"}, "no train.parquet or train_sample.parquet in /no/such/folder/sst2"),
        (
            {"data_dir": None},
            "OfflineModeIsEnabled)); give a local folder with --data-dir",
        ),
        ({"model": "./nowhere"}, "no model folder at nowhere; check --model"),
        ({"model": "/no/such/model"}, "no model folder at /no/such/model; check --model"),
        ({"model": "data/"}, "has no config.json; give a folder written by save_pretrained"),
        ({"recipe": "nope"}, "no recipe 'nope'; choose adalora-glue, "),
        ({"data_dir": "two\nlines"}, "no train.parquet or train_sample.parquet in {here}/two lines/sst2"),
        ({"method": "prefixes"}, "unknown method 'prefixes'; choose one of adalora, peft, lora, full, head"),
        ({"score": "luck"}, "unknown arm 'luck'; choose one of sensitivity, "),
        ({"score": "fisher+much"}, "unknown part 'much' of the arm 'fisher+much'; choose ema_uncertainty, "),
        ({"score": "lora"}, "lora is no score but a method; give --method lora"),
        ({"set": "target_r=9"}, "target_r (9) is larger than init_r (4); raise init_r"),
        ({"set": "epochs=0"}, "epochs is 0; it must be greater than 0"),
        ({"set": "learning_rate=-1"}, "learning_rate is -1; it must be greater than 0"),
    ],
)
def test_mistakes_before_anything_is_written(capsys, here, changes, words):
    assert words.format(here=here) in refused(capsys, train(**changes))
    assert left_behind(here) == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": "nobody/nothing"}, "the model 'nobody/nothing' is not reachable; give --model minilm"),
        ({"set": "epochs=0.2"}, "tinit (2) + tfinal (4) must be smaller than total_step (1)"),
    ],
)
def test_mistakes_found_while_a_run_is_set_up(capsys, here, changes, words):
    assert words in refused(capsys, train(**changes))
    assert left_behind(here) == []  # nothing was trained, so there is nothing to go on with


def test_corrected_after_a_mistake(capsys, here):
    """What was asked for wrongly does not stand in the way of the right command."""
    refused(capsys, train(model="nobody/nothing"))
    assert cli.main(train("--method", "head")) == 0


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"defaults": {"epochz": 1}}', '{"defaults": {"epochs": "3"}}']
)
def test_wrong_recipes(capsys, here, content):
    (here / "mine.json").write_text(content)
    assert "mine.json" in refused(capsys, train(recipe="mine.json")) or "epochs" in content
    (here / "mine.json").unlink()
    assert left_behind(here) == []


def test_wrong_data(capsys, here):
    write_parquet(here / "other" / "sst2" / "train.parquet", text=["a"], label=[0])
    line = refused(capsys, train(data_dir="other"))
    assert (
        "train.parquet has no column 'sentence' (it has text, label); rename its columns to sentence, label"
        in line
    )
    write_parquet(here / "other" / "sst2" / "train.parquet", sentence=["a", "b"], label=[0, 2])
    assert "train.parquet row 1: label 2 is not an integer from 0 to 1" in refused(
        capsys, train(data_dir="other")
    )
    (here / "other" / "sst2" / "train.parquet").write_bytes(b"no parquet")
    assert "is not readable parquet" in refused(capsys, train(data_dir="other"))
    assert left_behind(here) == ["other"]


@pytest.mark.parametrize("kind", ["file", "folder", "model"])
def test_something_in_the_way(capsys, here, kind):
    if kind == "file":
        (here / "out").write_text("mine")
    else:
        (here / "out").mkdir()
        (here / "out" / ("config.json" if kind == "model" else "letter.txt")).write_text("{}")
    assert "not a run; choose another --output" in refused(capsys, train())
    assert left_behind(here) == ["out"]


def test_another_run_in_the_way(capsys, here):
    assert cli.main(train("--method", "head")) == 0
    capsys.readouterr()
    assert "holds a run with seed = 0, and 1 was asked for" in refused(
        capsys, train("--seed", "1", method="head")
    )


def test_a_place_that_cannot_be_written(capsys, here, monkeypatch):
    def refuse(*arguments, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("adalora_fast.experiments.run.folder.Path.mkdir", refuse)
    line = refused(capsys, train())
    assert f"cannot write to {here} (Permission denied); choose another --output" in line


@pytest.mark.parametrize("folder", [".", "nowhere", "data"])
def test_report_without_runs(capsys, here, folder):
    assert f"no complete run below {folder}; give the folder that holds them" in refused(
        capsys, ["report", folder]
    )


@pytest.mark.parametrize("content", ["{", "[]", '{"loss": 0.1}'])
def test_report_of_a_foreign_result(capsys, here, content):
    (here / "theirs").mkdir()
    (here / "theirs" / "result.json").write_text(content)
    assert "result.json" in refused(capsys, ["report", "theirs"])
    assert "result.json" in refused(capsys, ["report", "theirs", "--html"])


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--tasks", "squid"], "unknown task 'squid'"),
        (["--arms", "fischer"], "unknown arm 'fischer'"),
        (["--set", "epoch=3"], "cannot set 'epoch=3'; write <setting>=<value> with one of adapter_dropout"),
        (["--set", "epochs"], "cannot set 'epochs'"),
        (["--set", "epochs=many"], "epochs is 'many'; it must be a finite number"),
        (["--set", "precision=fp8"], "unknown precision 'fp8'; choose one of fp32, bf16, fp16"),
        (["--dtype", "float8"], "unknown dtype 'float8'"),
        (["--attention", "fast"], "of type 'bert' cannot use attention 'fast' here; choose eager or sdpa"),
    ],
)
def test_mistakes_in_a_sweep(capsys, here, more, words):
    arguments = sweep(*more)
    for name, value in (("--tasks", "sst2"), ("--arms", "head"), ("--seeds", "0")):
        if name not in more:
            arguments += [name, value]
    assert words in refused(capsys, arguments)
    assert left_behind(here) == []


def test_a_model_that_no_run_of_a_sweep_could_load(capsys, here):
    """One line before the first run, instead of one failure for each."""
    line = refused(
        capsys,
        sweep("--tasks", "sst2", "--arms", "head", "lora", "--seeds", "0", "1", model="nobody/nothing"),
    )
    assert "the model 'nobody/nothing' is not reachable; give --model minilm" in line
    assert left_behind(here) == []


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["nowhere"], "there is no run folder {here}/nowhere; give one that train or sweep has written"),
        (["data"], "{here}/data has no config.json, so it is no finished run"),
        (["begun"], "the run {here}/begun is not finished; let the command that began it go on"),
        (
            ["data", "--file", "a", "--split", "b"],
            "the file a and the split 'b' are given; leave one of",
        ),
    ],
)
def test_nothing_to_evaluate(capsys, here, more, words):
    (here / ".begun.partial").mkdir()
    assert words.format(here=here) in refused(capsys, ["evaluate", *more])
    assert left_behind(here) == [".begun.partial"]


def test_runs_that_cannot_be_compared(capsys, here):
    assert "nowhere" in refused(capsys, ["analyze", "cka", "nowhere", "data"])
    assert "nowhere" in refused(capsys, ["soup", "nowhere", "data"])
