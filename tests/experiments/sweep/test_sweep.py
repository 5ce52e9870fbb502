"""Sweeps: planned before they run, complete or recorded as failed, shared by processes, resumable after a
kill.
"""

import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from adalora_fast.experiments.settings.files import read_json
from adalora_fast.experiments.settings.recipes import RECIPES
from adalora_fast.experiments.sweep import plan as plans
from adalora_fast.experiments.sweep import sweep
from adalora_fast.experiments.sweep.plan import make_plan, write_plan
from tests.helpers.planning import DEFAULTS, GRID, TUNING, carry_out
from tests.helpers.tiny import write_sst2


def test_the_whole_grid_runs_seed_after_seed(plan, tmp_path, pretend):
    failed, said = carry_out(plan(), tmp_path / "out")
    assert failed == 0 and "4 runs, 0 of them complete already" in said
    assert pretend.ran == ["sensitivity-0-0.005", "lora-0-0.005", "sensitivity-1-0.005", "lora-1-0.005"]
    assert {path.name for path in (tmp_path / "out" / "sst2").iterdir()} == {
        "sensitivity-seed0", "lora-seed0", "sensitivity-seed1", "lora-seed1",
    }  # fmt: skip
    assert carry_out(plan(), tmp_path / "out")[0] == 0 and len(pretend.ran) == 4  # nothing is run twice


def test_the_plan_is_written_before_anything_runs(plan, tmp_path, pretend):
    written = []
    pretend.does["lora"] = lambda settings: written.append(read_json(tmp_path / "out" / "plan.json")) or 0.5
    carry_out(plan(arms=["lora"]), tmp_path / "out")
    described = written[0]
    assert (described["tasks"], described["arms"], described["seeds"]) == (["sst2"], ["lora"], [0, 1])
    assert described["primary"] == {"sst2": "accuracy"} and described["equivalence_margin"] == 0.3
    assert described["recipe"]["defaults"] == DEFAULTS and described["amended"] == []
    assert described["environment"]["versions"]["torch"]


def test_a_plan_may_grow_and_says_so(plan, tmp_path, pretend):
    carry_out(plan(seeds=[0]), tmp_path / "out")
    carry_out(plan(seeds=[2, 0], arms=["head"], content={"description": "with a control"}), tmp_path / "out")
    described = read_json(tmp_path / "out" / "plan.json")
    assert described["seeds"] == [0, 2] and described["arms"] == ["sensitivity", "lora", "head"]
    assert described["description"] == "with a control"
    (note,) = described["amended"]
    assert (note["tasks"], note["arms"], note["seeds"]) == ([], ["head"], [2]) and note["at"]


@pytest.mark.parametrize(
    ("changed", "name"),
    [
        ({"overrides": {"epochs": 3}}, "overrides.epochs = None, and 3"),
        ({"content": {"defaults": DEFAULTS | {"epochs": 4}}}, r"recipe\.sst2\.lora\.epochs = 2, and 4"),
        ({"content": {"tasks": {"sst2": {"epochs": 4}}}}, r"recipe\.sst2\.lora\.epochs = 2, and 4"),
        ({"content": {"arms": {"lora": {"scale": 3}}}}, r"recipe\.sst2\.lora\.scale = 2\.0, and 3"),
        ({"options": {"dtype": "bfloat16"}}, "options.dtype = None, and 'bfloat16'"),
        ({"tune": True}, "tuning = None, and .*"),
    ],
)
def test_another_plan_in_the_same_folder_is_refused(plan, tmp_path, pretend, changed, name):
    carry_out(plan(), tmp_path / "out")
    before = (tmp_path / "out" / "plan.json").read_bytes()
    with pytest.raises(ValueError, match=f"holds a sweep with {name} was asked for; choose another --output"):
        carry_out(plan(**changed), tmp_path / "out")
    assert (tmp_path / "out" / "plan.json").read_bytes() == before


def test_a_plan_may_grow_by_an_arm_and_a_task_that_the_recipe_had_not(plan, tmp_path, pretend):
    """Its settings and its rates are new; those of the runs that were planned stay what they were."""
    wide, content = {"init_r": 64, "target_r": 64}, {"tuning": TUNING}
    carry_out(plan(content=content, tune=True, arms=["lora"], seeds=[0]), tmp_path / "out")
    grown = {
        "tuning": TUNING | {"arms": {"lora-r64": [1e-4, 2e-4, 3e-4]}},
        "arms": {"lora-r64": wide, "head": {"epochs": 1}},
        "tasks": {"rte": {"epochs": 9}},
    }
    for _ in range(2):
        failed, _ = carry_out(
            plan(content=grown, tune=True, arms=["lora", "lora-r64"], seeds=[0]), tmp_path / "out"
        )
        assert failed == 0 and pretend.ran[-1] == "lora-r64-0-0.0001"
    described = read_json(tmp_path / "out" / "plan.json")
    assert described["arms"] == ["lora", "lora-r64"] and described["recipe"]["arms"]["lora-r64"] == wide
    assert described["tuning"]["arms"] == {"lora-r64": [1e-4, 2e-4, 3e-4]}
    before = (tmp_path / "out" / "plan.json").read_bytes()
    for part, settings in (("lora-r64", {"init_r": 32, "target_r": 32}), ("lora", {"scale": 8.0})):
        changed = grown | {"arms": grown["arms"] | {part: settings}}
        with pytest.raises(ValueError, match=r"holds a sweep with recipe\.sst2\.lora.* was asked for"):
            carry_out(plan(content=changed, tune=True, arms=["lora"], seeds=[0]), tmp_path / "out")
    changed = grown | {"tuning": grown["tuning"] | {"learning_rates": [1, 2, 3]}}
    with pytest.raises(ValueError, match=r"tuning\.learning_rates\.lora = .* and \(1, 2, 3\) was asked for"):
        carry_out(plan(content=changed, tune=True, arms=["lora"], seeds=[0]), tmp_path / "out")
    assert (tmp_path / "out" / "plan.json").read_bytes() == before


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"recipe": 1}'])
def test_a_file_that_is_no_plan(plan, tmp_path, content):
    (tmp_path / "plan.json").write_text(content)
    with pytest.raises(ValueError, match="is no plan of a sweep"):
        write_plan(plan(), tmp_path)


def test_a_run_that_fails_is_recorded_and_the_others_go_on(plan, tmp_path, pretend):
    def fail(settings):
        raise RuntimeError("out of\nmemory")

    pretend.does["sensitivity"] = fail
    failed, said = carry_out(plan(), tmp_path / "out")
    assert failed == 2 and len(pretend.ran) == 4
    assert "failed: sst2/sensitivity-seed0: RuntimeError: out of memory" in said
    record = read_json(tmp_path / "out" / "sst2" / "sensitivity-seed1.failed.json")
    assert record["error"] == "RuntimeError: out of memory" and record["settings"]["seed"] == 1
    assert 'raise RuntimeError("out of\\nmemory")' in record["traceback"]
    pretend.does.clear()
    assert carry_out(plan(), tmp_path / "out")[0] == 0
    assert len(pretend.ran) == 6  # the two that had failed
    assert not list((tmp_path / "out").rglob("*.failed.json"))


def test_a_full_disk_fails_the_run_and_nothing_is_half_written(plan, tmp_path, pretend):
    def full(settings):
        raise OSError(28, "No space left on device")

    pretend.does["lora"] = full
    assert carry_out(plan(seeds=[0]), tmp_path / "out")[0] == 1
    assert not (tmp_path / "out" / "sst2" / "lora-seed0").exists()


def test_an_interrupted_sweep_stops_at_once(plan, tmp_path, pretend):
    def interrupt(settings):
        raise KeyboardInterrupt

    pretend.does["sensitivity"] = interrupt
    with pytest.raises(KeyboardInterrupt):
        carry_out(plan(), tmp_path / "out")
    assert len(pretend.ran) == 1 and not list((tmp_path / "out").rglob("*.failed.json"))


def test_processes_share_the_runs(plan, tmp_path, pretend, monkeypatch):
    """What another one is at work on is come back to, and not run again when that one has done it."""
    monkeypatch.setattr(sweep, "WAIT_SECONDS", 0)
    runs = plan().runs(tmp_path / "out")
    theirs = runs[0].folder
    lock = theirs.locked()
    lock.__enter__()
    busy = []

    def finish_theirs(settings):
        if not busy:
            busy.append(settings)
            theirs.start()
            theirs.finish({"primary": 0.5})
            lock.__exit__(None, None, None)
        return 0.5

    pretend.does["lora"] = finish_theirs
    failed, said = carry_out(plan(), tmp_path / "out")
    assert failed == 0 and "sst2/sensitivity-seed0: done by another process" in said
    assert (
        pretend.ran[0].startswith("sensitivity-0") and len(pretend.ran) == 4
    )  # the first came to a locked door


def test_a_plan_is_read_and_changed_by_one_process_at_a_time(plan, tmp_path, pretend, monkeypatch):
    """Else what one adds is lost where another has read the plan before and writes it after."""
    carry_out(plan(), tmp_path / "out")
    alone = []

    @contextmanager
    def watched(folder):
        alone.append(folder)
        yield
        alone.pop()

    def read(path):
        assert path.name != "plan.json" or alone == [tmp_path / "out"]
        return read_json(path)

    monkeypatch.setattr(plans, "alone_in", watched)
    monkeypatch.setattr(plans, "read_json", read)
    assert carry_out(plan(seeds=[0, 1, 2]), tmp_path / "out")[0] == 0
    assert read_json(tmp_path / "out" / "plan.json")["seeds"] == [0, 1, 2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": ["squid"]}, "unknown task 'squid'"),
        ({"arms": ["fischer"]}, "unknown arm 'fischer'"),
        ({"seeds": [1, 1]}, "the seeds 1, 1 name one twice"),
        ({"content": {"grid": {"tasks": ["sst2"]}}}, "has no arms in its grid; give --arms"),
        (
            {"content": {"grid": GRID | {"seeds": ["0"]}}},
            r"seeds of the grid is \['0'\]; give a list of integers",
        ),
        ({"seeds": ["0"]}, "are not all integers"),
        ({"content": {"model": None}, "model": None}, "names no model; give --model"),
        ({"content": {"defaults": {"epoch": 1}}}, "unknown setting 'epoch'"),
        ({"content": {"tuning": {"rates": [1]}}, "tune": True}, "unknown setting 'rates' under tuning"),
        ({"content": {"tuning": {"learning_rates": []}}, "tune": True}, "needs learning_rates above zero"),
        ({"content": {"tuning": {"held_out": 1.5}}, "tune": True}, "held_out is 1.5"),
        ({"content": {"tuning": {"held_out": "x"}}, "tune": True}, "held_out is 'x'"),
        ({"content": {"tuning": {"learning_rates": 1e-3}}, "tune": True}, "tuning must hold lists"),
        (
            {"content": {"tuning": {"learning_rates": ["1e-3"]}}, "tune": True},
            "needs learning_rates above zero",
        ),
        ({"content": {"tuning": {"seeds": ["a"]}}, "tune": True}, "needs seeds, integers from 0"),
        ({"seeds": [-1]}, "seed -1 is not an integer from 0"),
        ({"arms": ["full"], "options": {"dtype": "bfloat16"}}, "dtype 'bfloat16' is for frozen weights"),
    ],
)
def test_a_plan_that_cannot_be(plan, options, message):
    with pytest.raises(ValueError, match=message):
        plan(**options)


def test_mistakes_in_the_data_show_before_the_first_run(plan, tmp_path, pretend):
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no train\.parquet"):
        carry_out(plan(data_dir=tmp_path / "empty"), tmp_path / "out")
    assert pretend.ran == [] and not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", sorted(path.stem for path in RECIPES.glob("*.json")))
def test_the_packaged_recipes_are_sweeps(name):
    plan = make_plan(recipe=name, tune=name.startswith("minilm"))
    runs = plan.runs(Path("out"))
    assert len(runs) == len(plan.tasks) * len(plan.arms) * len(plan.seeds)
    assert len({run.path for run in runs}) == len(runs)
    if plan.tuning:
        assert len(plan.tuning.learning_rates) == 5 and len(plan.tuning.seeds) == 2
        assert not set(plan.tuning.seeds) & set(plan.seeds)


def test_another_spelling_of_an_arm_is_the_same_arm(plan):
    assert plan(arms=["fisher+task+ema"]).arms == ("fisher+ema+task",)
    with pytest.raises(ValueError, match="name one twice"):
        plan(arms=["fisher+task+ema", "fisher+ema+task"])


def test_the_settings_of_an_arm(plan):
    """They go before the task's; --set, which would go before both, is refused for what an arm sets."""
    own = {"arms": {"lora": {"scale": 3.0, "epochs": 5}}, "tasks": {"sst2": {"epochs": 4}}}
    made = plan(content=own)
    recipes = {arm: made.settings("sst2", arm, 0).recipe for arm in made.arms}
    assert (recipes["lora"].scale, recipes["lora"].epochs) == (3.0, 5)
    assert (recipes["sensitivity"].scale, recipes["sensitivity"].epochs) == (2.0, 4)
    with pytest.raises(ValueError, match=r"cannot set scale for all: recipe .* its own for the arm lora"):
        plan(content=own, overrides={"scale": 8.0})
    assert plan(content=own, overrides={"batch_size": 4}).settings("sst2", "lora", 0).recipe.batch_size == 4


def test_the_words_of_a_recipe_may_change(plan, tmp_path, pretend):
    carry_out(plan(content={"description": "one"}), tmp_path / "out")
    assert carry_out(plan(content={"description": "other"}), tmp_path / "out")[0] == 0


def test_torchrun_is_refused(plan, tmp_path, pretend, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="a sweep is not for torchrun; start its command several times"):
        carry_out(plan(), tmp_path / "out")


def test_kill_in_mid_sweep_and_run_again(recipe, encoder, tmp_path):
    """SIGKILL while the second run trains: the first stays, the second resumes, the rest is done; then
    nothing.
    """
    data = write_sst2(tmp_path / "data", train=80)
    command = [sys.executable, "-m", "adalora_fast", "sweep", "--recipe", recipe(), "--model", str(encoder),
               "--data-dir", str(data), "--output", str(tmp_path / "out"), "--seeds", "0",
               "--arms", "lora", "fisher", "--set", "epochs=5"]  # fmt: skip
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(Path(__file__).parents[3])}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    folder = tmp_path / "out" / "sst2"
    deadline = time.monotonic() + 200
    while not list(
        (folder / ".fisher-seed0.partial" / "checkpoints").glob("checkpoint-*/trainer_state.json")
    ):
        assert process.poll() is None, process.stdout.read().decode()
        assert time.monotonic() < deadline, "the second run never came to its first checkpoint"
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert (folder / "lora-seed0" / "result.json").is_file() and not (folder / "fisher-seed0").exists()
    first = (folder / "lora-seed0" / "result.json").stat().st_mtime_ns
    again = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "2 runs, 1 of them complete already" in again.stdout
    assert read_json(folder / "fisher-seed0" / "result.json")["resumed"] is True
    assert (folder / "lora-seed0" / "result.json").stat().st_mtime_ns == first
    assert sorted(path.name for path in folder.iterdir()) == ["fisher-seed0", "lora-seed0"]
