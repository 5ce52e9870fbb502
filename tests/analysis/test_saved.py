"""Which folders are opened as runs, and which are refused in one line."""

import json
import shutil

import pytest

from adalora_fast.analysis.saved import names_of, open_run, open_runs


def changed(folder, target, file="config.json", **values):
    """A copy of a run with other values in one of its JSON files (of the settings, in config.json)."""
    shutil.copytree(folder, target)
    content = json.loads((target / file).read_text())
    (content["settings"] if file == "config.json" else content).update(values)
    (target / file).write_text(json.dumps(content))
    return target


def test_a_run(runs):
    run = open_run(runs["lora-4"])
    assert run.settings.recipe.target_r == 4 and run.task.name == "sst2" and run.name == "lora-r4-seed1"
    assert run.result["metrics"]["validation"]["accuracy"] == run.result["primary"]


def test_names_are_all_different(runs, tmp_path):
    again = shutil.copytree(runs["lora-2"], tmp_path / "again")
    opened = open_runs([runs["lora-2"], again, again, runs["full"]])
    names = names_of(opened)
    assert names == ["lora-2", "again", "again (2)", "full-seed0"]
    siblings = [shutil.copytree(again, tmp_path / str(i) / "same") for i in (1, 2)]
    assert names_of(open_runs([runs["lora-4"], *siblings])) == ["lora-r4-seed1", "1/same", "2/same"]


def fails(folder, *expected, error=ValueError):
    with pytest.raises(error) as raised:
        open_run(folder)
    message = str(raised.value)
    assert "\n" not in message and all(text in message for text in expected), message


def test_refused(runs, tmp_path):
    fails(tmp_path / "nothing", "no run folder", error=FileNotFoundError)
    (tmp_path / ".begun.partial").mkdir()
    fails(tmp_path / "begun", "not finished", error=FileNotFoundError)
    part = shutil.copytree(runs["lora-2"], tmp_path / "part")
    (part / "result.json").unlink()
    fails(part, "no result.json", error=FileNotFoundError)
    for name, file in (
        ("lora-2", "adapter_model.safetensors"),
        ("head", "trained.safetensors"),
        ("full", "model.safetensors"),
    ):
        bare = shutil.copytree(runs[name], tmp_path / f"bare-{name}")
        (bare / "adapter" / file).unlink()
        fails(bare, f"no {file}", error=FileNotFoundError)
    broken = shutil.copytree(runs["lora-2"], tmp_path / "broken")
    (broken / "config.json").write_text("{")
    fails(broken, "not readable")
    (broken / "config.json").write_text('{"settings": 3}')
    fails(broken, "no settings")
    fails(changed(runs["lora-2"], tmp_path / "other", depth=3), "not of this version", "depth")
    fails(
        changed(runs["lora-2"], tmp_path / "task", task="docstrings"),
        "run on 'docstrings'",
        "demo",
        "train or sweep",
    )
    labels = {"0": "positive", "1": "negative"}
    swapped = changed(runs["full"], tmp_path / "labels", "adapter/config.json", id2label=labels)
    fails(swapped, "labels", "negative, positive")


@pytest.mark.parametrize("method", ["houlsby", "fusion", "prompt", "prefix", "p_tuning", "ia3"])
def test_methods_that_change_no_weights(runs, tmp_path, method):
    other = changed(runs["lora-2"], tmp_path / method, method=method)
    fails(other, f"trained with {method}", "cannot be mixed; give runs of lora, adalora, peft")


def test_the_demo(runs, tmp_path):
    fails(changed(runs["lora-2"], tmp_path / "run", task="docstrings"), "as those of the demo")


def test_fingerprints_are_of_what_was_trained(runs, tmp_path):
    moved = changed(runs["lora-2"], tmp_path / "moved", seed=9)
    assert open_run(moved).fingerprint() == open_run(runs["lora-2"]).fingerprint()
    assert open_run(moved).fingerprint() != open_run(runs["lora-4"]).fingerprint()
    changed(moved, tmp_path / "other", "adapter/adapter_config.json", lora_alpha=3)
    assert open_run(tmp_path / "other").fingerprint() != open_run(moved).fingerprint()


def test_a_weights_file_outside_of_the_run(runs, tmp_path):
    linked = shutil.copytree(runs["lora-2"], tmp_path / "linked")
    file = linked / "adapter" / "adapter_model.safetensors"
    file.unlink()
    file.symlink_to(runs["lora-4"] / "adapter" / "adapter_model.safetensors")
    fails(linked, "leaves its folder")


@pytest.mark.parametrize("name", ["task", "model", "dtype", "held_out"])
def test_runs_that_do_not_compare(runs, tmp_path, name):
    other = {"task": "cola", "model": "minilm", "dtype": "bfloat16", "held_out": 0.1}[name]
    different = changed(runs["lora-2"], tmp_path / "different", **{name: other})
    with pytest.raises(ValueError, match=f"has {name} .*{other}"):
        open_runs([runs["adalora-0"], different])


def test_other_lengths_and_too_few(runs, tmp_path):
    recipe = json.loads((runs["lora-2"] / "config.json").read_text())["settings"]["recipe"]
    short = changed(runs["lora-2"], tmp_path / "short", recipe=recipe | {"max_length": 8})
    with pytest.raises(ValueError, match="max_length 16"):
        open_runs([runs["lora-4"], short])
    with pytest.raises(ValueError, match="1 runs are too few"):
        open_runs([runs["lora-4"]])
