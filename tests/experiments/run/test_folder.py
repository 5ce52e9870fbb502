"""Run folders: complete or not there, never half."""

import json
import subprocess
import sys
from dataclasses import FrozenInstanceError, asdict, fields, replace

import pytest

from adalora_fast.experiments.run import folder as runs
from adalora_fast.experiments.run.folder import alone_in, open_run
from adalora_fast.experiments.settings.files import read_json
from adalora_fast.experiments.settings.recipes import Recipe
from adalora_fast.experiments.settings.settings import METHODS, RunSettings

SETTINGS = RunSettings(task="sst2", model="tiny")
OTHER = {
    "variant": "r4",
    "adapters": ["a", "b"],
    "task": "rte", "model": "other", "method": "lora", "score": "fisher", "smoothing": "sum",
    "score_gradient": "task", "seed": 1, "held_out": 0.1, "data_dir": "/data", "dtype": "bfloat16",
    "attention": "eager", "compile": True, "record_scores": True, "recipe": Recipe(epochs=9),
}  # fmt: skip


def complete(path, settings=SETTINGS, result=None):
    folder = open_run(path, settings)
    folder.start()
    folder.finish(result or {"primary": 0.5})
    return folder


def names(path):
    return sorted(item.name for item in path.iterdir())


def test_labels():
    labels = {"adalora": "sensitivity", "lora": "lora-r8", "head": "head-only", "full": "full"}
    labels["peft"] = "peft-adalora"
    labels |= {method: method for method in METHODS if method not in labels}
    assert {method: replace(SETTINGS, method=method).label for method in METHODS} == labels
    assert replace(SETTINGS, method="lora", variant="r4").label == "lora-r4"


@pytest.mark.parametrize("name", ["method", "score_gradient", "dtype"])
def test_unknown_choices(name):
    with pytest.raises(ValueError, match=f"unknown {name} 'nope'; choose one of "):
        RunSettings(task="sst2", model="tiny", **{name: "nope"})


def test_settings_cannot_be_changed():
    with pytest.raises(FrozenInstanceError):
        SETTINGS.seed = 1


def test_a_new_folder_appears_only_when_it_is_complete(tmp_path):
    path = tmp_path / "deep" / "run"
    folder = open_run(path, SETTINGS)
    assert not folder.is_complete and not path.parent.exists()  # looking writes nothing
    folder.start()
    assert names(path.parent) == [".run.partial"] and names(folder.working) == ["config.json"]
    folder.checkpoints.mkdir()
    folder.finish({"primary": 0.5})
    assert names(path.parent) == ["run"] and names(path) == ["config.json", "result.json"]
    again = open_run(path, SETTINGS)
    assert again.is_complete and again.result == {"primary": 0.5}


def test_config_holds_settings_and_environment(tmp_path):
    config = json.loads((complete(tmp_path / "run").path / "config.json").read_text())
    assert config["settings"] == json.loads(json.dumps(asdict(SETTINGS)))
    assert {"started", "commit", "versions", "machine", "command"} <= set(config["environment"])


@pytest.mark.parametrize("name", [field.name for field in fields(RunSettings)])
@pytest.mark.parametrize("finished", [True, False])
def test_other_settings_are_refused_by_name(tmp_path, name, finished):
    path = tmp_path / "run"
    if finished:
        complete(path)
    else:
        open_run(path, SETTINGS).start()
    with pytest.raises(ValueError) as error:
        open_run(path, replace(SETTINGS, **{name: OTHER[name]}))
    setting, value = ("recipe.epochs", 9) if name == "recipe" else (name, OTHER[name])
    assert f"holds a run with {setting} = " in str(error.value)
    assert f"and {value!r} was asked for; choose another --output or delete it" in str(error.value)
    assert str(tmp_path) in str(error.value)
    assert open_run(path, SETTINGS).is_complete is finished  # the refused one left it as it was


@pytest.mark.parametrize("name", [field.name for field in fields(Recipe)])
def test_every_setting_of_the_recipe_counts(tmp_path, name):
    complete(tmp_path / "run")
    others = {"target_r": 4, "classifier_dropout": 0.4, "beta1": 0.5, "beta2": 0.5}
    others |= {"dropout": 0.2, "precision": "bf16", "train_rows": 5, "evaluation_rows": 5}
    others |= {"matrices": ("query",), "adapter_dropout": 0.1, "train_biases": True, "triplet": "lambda"}
    others |= {"orth_penalty": "squared", "weights": "before"}
    others |= {"hysteresis": 0.5, "remember": True, "redraw": 0.3, "ranks_from": "fisher", "shuffled": True}
    value = others[name] if name in others else getattr(SETTINGS.recipe, name) * 2
    with pytest.raises(ValueError, match=rf"holds a run with recipe\.{name} = "):
        open_run(tmp_path / "run", replace(SETTINGS, recipe=replace(SETTINGS.recipe, **{name: value})))


def test_a_run_of_before_a_setting_existed_has_its_default(tmp_path):
    path = complete(tmp_path / "run").path
    config = json.loads((path / "config.json").read_text())
    del config["settings"]["variant"], config["settings"]["recipe"]["bottleneck"]
    (path / "config.json").write_text(json.dumps(config))
    assert open_run(path, SETTINGS).is_complete
    with pytest.raises(ValueError, match=r"recipe\.bottleneck = 64, and 8 was asked for"):
        open_run(path, replace(SETTINGS, recipe=replace(SETTINGS.recipe, bottleneck=8)))


def test_an_interrupted_run_is_taken_over(tmp_path, monkeypatch):
    """Its config.json says under what it was begun, and under what it went on."""
    monkeypatch.setattr(runs, "environment", lambda: {"commit": "old"})
    folder = open_run(tmp_path / "run", SETTINGS)
    folder.start()
    (folder.working / "metrics.jsonl").write_text("{}\n")
    monkeypatch.setattr(runs, "environment", lambda: {"commit": "new"})
    again = open_run(tmp_path / "run", SETTINGS)
    again.start(resumes=True)
    assert not again.is_complete and names(again.working) == ["config.json", "metrics.jsonl"]
    config = read_json(again.working / "config.json")
    assert config["environment"] == {"commit": "old"} and config["resumed"] == [{"commit": "new"}]
    again.start()  # begun again from its first step: nothing of it is the old one's
    assert read_json(again.working / "config.json").keys() == {"settings", "environment"}
    assert read_json(again.working / "config.json")["environment"] == {"commit": "new"}


def test_a_run_that_is_killed_while_it_cleans_up_is_complete(tmp_path, monkeypatch):
    def killed(*arguments, **options):
        raise KeyboardInterrupt

    folder = open_run(tmp_path / "run", SETTINGS)
    folder.start()
    folder.checkpoints.mkdir()
    monkeypatch.setattr(runs.shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        folder.finish({"primary": 0.5})
    assert open_run(tmp_path / "run", SETTINGS).result == {"primary": 0.5}


def test_data_are_the_same_wherever_they_are_named_from(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    relative = replace(SETTINGS, data_dir="../data")
    folder = open_run("run", relative)
    folder.start()
    folder.finish({"primary": 0.5})
    assert open_run("run", replace(SETTINGS, data_dir=str(tmp_path.parent / "data"))).is_complete
    with pytest.raises(ValueError, match="data_dir"):
        open_run("run", replace(SETTINGS, data_dir=str(tmp_path / "data")))


def test_one_process_at_a_time_changes_what_all_share(tmp_path):
    file = str(tmp_path / ".plan.json.lock")
    code = f"import filelock; filelock.FileLock({file!r}, timeout=0).acquire(); print('alone')"
    with alone_in(tmp_path):
        kept_off = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert "filelock._error.Timeout" in kept_off.stderr and kept_off.stdout == ""
    assert names(tmp_path) == []
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).stdout == b"alone\n"


def test_a_file_in_the_way(tmp_path):
    (tmp_path / "run").write_text("something")
    with pytest.raises(ValueError, match=r"run exists and is not a run; choose another --output"):
        open_run(tmp_path / "run", SETTINGS)
    assert (tmp_path / "run").read_text() == "something"


def test_a_folder_of_something_else_in_the_way(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "letters.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"run exists and is not a run; choose another --output"):
        open_run(tmp_path / "run", SETTINGS)


@pytest.mark.parametrize("content", ['{"model_type": "bert"}', "[]", "{", ""])
def test_a_folder_with_some_other_config_in_the_way(tmp_path, content):
    """Models, among others, have a config.json too."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"run.* not a run; choose another --output"):
        open_run(tmp_path / "run", SETTINGS)


def test_a_run_without_a_result_in_the_way(tmp_path):
    folder = complete(tmp_path / "run")
    (folder.path / "result.json").unlink()
    with pytest.raises(ValueError, match=r"has no result\.json; choose another --output or delete it"):
        open_run(tmp_path / "run", SETTINGS)


def test_an_empty_folder_is_not_in_the_way(tmp_path):
    (tmp_path / "run").mkdir()
    assert complete(tmp_path / "run").is_complete


@pytest.mark.parametrize("call", ["mkdir", "write_json"])
def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch, call):
    def refuse(*arguments, **options):
        raise PermissionError(13, "Permission denied")

    folder = open_run(tmp_path / "run", SETTINGS)
    if call == "mkdir":
        monkeypatch.setattr(runs.Path, "mkdir", refuse)
    else:
        monkeypatch.setattr(runs, "write_json", refuse)
    with pytest.raises(PermissionError) as error:
        folder.start()
    expected = f"cannot write to {tmp_path / 'run'} (Permission denied); choose another --output"
    assert str(error.value) == expected
    assert not (tmp_path / "run").exists()


def test_a_parent_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"cannot write to .*; choose another --output"):
        open_run(tmp_path / "file" / "run", SETTINGS).start()


def test_a_run_that_fails_at_the_last_moment_is_not_complete(tmp_path, monkeypatch):
    folder = open_run(tmp_path / "run", SETTINGS)
    folder.start()

    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(runs, "write_json", full)
    with pytest.raises(OSError, match="No space"):
        folder.finish({"primary": 0.5})
    assert names(tmp_path) == [".run.partial"]
    assert not open_run(tmp_path / "run", SETTINGS).is_complete
    monkeypatch.undo()
    open_run(tmp_path / "run", SETTINGS).finish({"primary": 0.25})
    assert open_run(tmp_path / "run", SETTINGS).result == {"primary": 0.25}


@pytest.mark.parametrize("fraction", [-0.1, 1, 2.5])
def test_a_part_held_out_that_is_none(fraction):
    with pytest.raises(ValueError, match=f"held_out is {fraction}; it must be a fraction"):
        replace(SETTINGS, held_out=fraction)


def test_a_run_at_work_keeps_others_off(tmp_path):
    folder, same = (open_run(tmp_path / "runs" / "run", SETTINGS) for _ in range(2))
    with folder.locked():
        with pytest.raises(BlockingIOError, match="another process is at work"), same.locked():
            pytest.fail("both have it")
        with open_run(tmp_path / "runs" / "other", SETTINGS).locked():  # a neighbour is free
            pass
    with same.locked():
        pass
    assert names(tmp_path / "runs") == []  # nothing is left lying


def test_other_processes_of_a_distributed_run_write_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    folder = open_run(tmp_path / "run", SETTINGS)
    with folder.locked():
        folder.start()
    folder.abandon()
    assert names(tmp_path) == []


def test_a_place_where_no_lock_can_be(tmp_path):
    (tmp_path / "file").write_text("")
    folder = open_run(tmp_path / "file" / "run", SETTINGS)
    with pytest.raises(OSError, match=r"cannot write to .*; choose another --output"), folder.locked():
        pytest.fail("written")
