"""Sweeps: planned before they run, complete or recorded as failed, shared by processes, resumable after a
kill.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from adalora_fast.experiments import sweep
from adalora_fast.experiments.recipes import RECIPES
from adalora_fast.experiments.runs import open_run, read_json
from adalora_fast.experiments.sweep import make_plan, run_sweep, write_plan
from tests.experiments.tiny import printed, quiet_console, write_sst2

GRID = {"tasks": ["sst2"], "arms": ["sensitivity", "lora"], "seeds": [0, 1]}
DEFAULTS = {
    "epochs": 2, "learning_rate": 5e-3, "batch_size": 8, "max_length": 16, "init_r": 4, "target_r": 2,
    "tinit": 2, "tfinal": 4, "deltaT": 2,
}  # fmt: skip


@pytest.fixture
def recipe(tmp_path):
    def write(**content):
        path = tmp_path / "mine.json"
        path.write_text(json.dumps({"model": "tiny", "defaults": DEFAULTS, "grid": GRID} | content))
        return str(path)

    return write


@pytest.fixture
def plan(recipe, encoder, data_dir):
    def make(*, content=None, **options):
        return make_plan(
            recipe=recipe(**(content or {})), **({"model": str(encoder), "data_dir": data_dir} | options)
        )

    return make


@pytest.fixture
def pretend(monkeypatch):
    """Instead of training: a result at once, or what `pretend.does[arm]` does. Keeps what was run."""

    def start(settings, path, progress):
        pretend.ran.append(f"{settings.arm}-{settings.seed}-{settings.recipe.learning_rate:g}")
        folder = open_run(path, settings)
        with folder.locked():
            folder.start()
            primary = pretend.does.get(settings.arm, lambda settings: 0.5)(settings)
            folder.finish({"primary": primary})

    start.ran, start.does = [], {}
    pretend = start
    monkeypatch.setattr(sweep, "start_run", start)
    return start


def carry_out(plan, output, **options):
    console = quiet_console()
    return run_sweep(plan, output, console, **options), printed(console)


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
    carry_out(plan(seeds=[2, 0], arms=["head"]), tmp_path / "out")
    described = read_json(tmp_path / "out" / "plan.json")
    assert described["seeds"] == [0, 2] and described["arms"] == ["sensitivity", "lora", "head"]
    (note,) = described["amended"]
    assert (note["tasks"], note["arms"], note["seeds"]) == ([], ["head"], [2]) and note["at"]


@pytest.mark.parametrize(
    ("changed", "name"),
    [
        ({"overrides": {"epochs": 3}}, "overrides"),
        ({"content": {"defaults": DEFAULTS | {"epochs": 4}}}, "recipe"),
        ({"options": {"dtype": "bfloat16"}}, "options"),
    ],
)
def test_another_plan_in_the_same_folder_is_refused(plan, tmp_path, pretend, changed, name):
    carry_out(plan(), tmp_path / "out")
    before = (tmp_path / "out" / "plan.json").read_bytes()
    with pytest.raises(ValueError, match=f"holds a sweep with another {name} .*; choose another --output"):
        carry_out(plan(**changed), tmp_path / "out")
    assert (tmp_path / "out" / "plan.json").read_bytes() == before


@pytest.mark.parametrize("content", ["{", "[]", "{}"])
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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": ["squid"]}, "unknown task 'squid'"),
        ({"arms": ["fischer"]}, "unknown arm 'fischer'"),
        ({"seeds": [1, 1]}, "the seeds 1, 1 name one twice"),
        ({"content": {"grid": {"tasks": ["sst2"]}}}, "has no arms in its grid; give --arms"),
        ({"content": {"grid": GRID | {"seeds": ["0"]}}}, "are not all integers"),
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


TUNING = {"learning_rates": [1e-3, 4e-3, 2e-3], "seeds": [7, 8], "held_out": 0.25}


def test_rates_are_chosen_on_held_out_data_per_arm(plan, tmp_path, pretend):
    """The best mean over the seeds; of two equally good rates the lower one."""
    table = {("sensitivity", 1e-3): 0.5, ("sensitivity", 2e-3): 0.8, ("sensitivity", 4e-3): 0.8,
             ("lora", 1e-3): 0.4, ("lora", 2e-3): 0.6, ("lora", 4e-3): 0.7}  # fmt: skip

    def score(settings):
        if settings.held_out:
            assert settings.held_out == 0.25 and settings.seed in (7, 8)
            return table[settings.arm, settings.recipe.learning_rate] + (0.1 if settings.seed == 8 else -0.1)
        return 0.5

    pretend.does |= dict.fromkeys(("sensitivity", "lora"), score)
    tuned = plan(content={"tuning": TUNING}, tune=True)
    assert carry_out(tuned, tmp_path / "out")[0] == 0
    assert len(pretend.ran) == 12 + 4
    assert pretend.ran[12:] == ["sensitivity-0-0.002", "lora-0-0.004", "sensitivity-1-0.002", "lora-1-0.004"]
    chosen = read_json(tmp_path / "out" / "tuned.json")
    assert chosen["sst2"]["lora"]["scores"] == {"0.001": 0.4, "0.002": 0.6, "0.004": 0.7}
    before = (tmp_path / "out" / "tuned.json").read_bytes()
    assert carry_out(tuned, tmp_path / "out")[0] == 0
    assert (tmp_path / "out" / "tuned.json").read_bytes() == before and len(pretend.ran) == 16


def test_a_rate_at_which_a_run_diverged_is_not_chosen(plan, tmp_path, pretend):
    def score(settings):
        if settings.held_out and settings.recipe.learning_rate == 4e-3 and settings.seed == 8:
            raise ValueError("lora-r2 diverged: the evaluation loss is not finite")
        return settings.recipe.learning_rate

    pretend.does["lora"] = score
    assert carry_out(plan(content={"tuning": TUNING}, tune=True, arms=["lora"]), tmp_path / "out")[0] == 1
    assert read_json(tmp_path / "out" / "tuned.json")["sst2"]["lora"]["learning_rate"] == 2e-3


def test_no_rate_is_chosen_before_every_run_is_there(plan, tmp_path, pretend):
    """A machine that went down must not decide which rate is best."""

    def score(settings):
        if settings.recipe.learning_rate == 4e-3 and settings.seed == 8:
            raise RuntimeError("CUDA out of memory")
        return settings.recipe.learning_rate

    pretend.does["lora"] = score
    tuned = plan(content={"tuning": TUNING}, tune=True, arms=["lora"])
    with pytest.raises(ValueError, match=r"for lora on sst2 before lora-lr0\.004-seed8 is there"):
        carry_out(tuned, tmp_path / "out")
    assert not (tmp_path / "out" / "tuned.json").exists()
    pretend.does["lora"] = lambda settings: settings.recipe.learning_rate
    assert carry_out(tuned, tmp_path / "out")[0] == 0
    assert read_json(tmp_path / "out" / "tuned.json")["sst2"]["lora"]["learning_rate"] == 4e-3


def test_no_rate_works(plan, tmp_path, pretend):
    def fail(settings):
        raise ValueError("it diverged")

    pretend.does["lora"] = fail
    with pytest.raises(ValueError, match=r"every learning rate of .* diverged for lora on sst2"):
        carry_out(plan(content={"tuning": TUNING}, tune=True, arms=["lora"]), tmp_path / "out")


def test_an_arm_may_have_a_grid_of_its_own(plan, tmp_path, pretend):
    tuning = TUNING | {"arms": {"full": [1e-5, 2e-5, 4e-5]}}
    pretend.does["full"] = lambda settings: 1 - settings.recipe.learning_rate
    assert carry_out(plan(content={"tuning": tuning}, tune=True, arms=["full"]), tmp_path / "out")[0] == 0
    assert pretend.ran[-1] == "full-1-1e-05"
    with pytest.raises(ValueError, match="full has 1 learning rates to choose from and the others 3"):
        plan(content={"tuning": TUNING | {"arms": {"full": [1e-5]}}}, tune=True)


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
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
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
