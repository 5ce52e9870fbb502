"""Learning rates: chosen per arm on held-out data, and only from whole files."""

import traceback
from pathlib import Path

import pytest

from adalora_fast.experiments.settings.files import read_json
from adalora_fast.experiments.sweep.learning_rates import Tuning
from tests.helpers.planning import TUNING, carry_out


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
    tuned = plan(content={"tuning": TUNING}, tune=True, arms=["lora"])
    assert carry_out(tuned, tmp_path / "out")[0] == 0  # that it diverged is what was asked
    assert carry_out(tuned, tmp_path / "out")[0] == 0 and len(pretend.ran) == 8  # nor is it tried again
    assert read_json(tmp_path / "out" / "tuned.json")["sst2"]["lora"]["learning_rate"] == 2e-3


def test_no_rate_is_chosen_before_every_run_is_there(plan, tmp_path, pretend):
    """A machine that went down must not decide which rate is best."""

    def score(settings):
        if settings.recipe.learning_rate == 4e-3 and settings.seed == 8:
            raise RuntimeError("CUDA out of memory")
        return settings.recipe.learning_rate

    pretend.does["lora"] = score
    tuned = plan(content={"tuning": TUNING}, tune=True, arms=["lora"])
    failed, said = carry_out(tuned, tmp_path / "out")
    assert failed == 1 + 2  # that run, and the two seeds that wait for it
    assert "sst2/lora: no rate is chosen before lora-lr0.004-seed8 is there; run the command again" in said
    assert not (tmp_path / "out" / "tuned.json").exists()
    pretend.does["lora"] = lambda settings: settings.recipe.learning_rate
    assert carry_out(tuned, tmp_path / "out")[0] == 0
    assert read_json(tmp_path / "out" / "tuned.json")["sst2"]["lora"]["learning_rate"] == 4e-3


def test_no_rate_works(plan, tmp_path, pretend):
    """The other arms go on."""

    def fail(settings):
        raise ValueError("it diverged")

    pretend.does["lora"] = fail
    tuned = plan(content={"tuning": TUNING}, tune=True, arms=["lora", "sensitivity"])
    failed, said = carry_out(tuned, tmp_path / "out")
    assert failed == 2 and "sst2/lora: every learning rate of [0.001, 0.002, 0.004] diverged" in said
    assert sorted(path.name for path in (tmp_path / "out" / "sst2").glob("*-seed?")) == [
        "sensitivity-seed0", "sensitivity-seed1",
    ]  # fmt: skip
    assert list(read_json(tmp_path / "out" / "tuned.json")["sst2"]) == ["sensitivity"]


def test_an_arm_may_have_a_grid_of_its_own(plan, tmp_path, pretend):
    tuning = TUNING | {"arms": {"full": [1e-5, 2e-5, 4e-5]}}
    pretend.does["full"] = lambda settings: 1 - settings.recipe.learning_rate
    assert carry_out(plan(content={"tuning": tuning}, tune=True, arms=["full"]), tmp_path / "out")[0] == 0
    assert pretend.ran[-1] == "full-1-1e-05"
    with pytest.raises(ValueError, match="full has 1 learning rates to choose from and the others 3"):
        plan(content={"tuning": TUNING | {"arms": {"full": [1e-5]}}}, tune=True)


def test_a_variant_has_the_grid_of_its_arm_unless_it_has_its_own():
    tuning = Tuning.of({"learning_rates": [1e-3, 2e-3], "arms": {"full": [1e-5, 2e-5], "full-b": [3, 4]}})
    grids = {arm: tuning.rates(arm) for arm in ("full", "full-slow", "full-b", "lora-r4")}
    assert grids["full-slow"] == grids["full"] == (1e-5, 2e-5)
    assert grids["full-b"] == (3, 4) and grids["lora-r4"] == (1e-3, 2e-3)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("tuned.json", "{", r"tuned\.json is not readable JSON \(.*\); restore or delete it"),
        ("tuned.json", "[]", r"tuned\.json holds a list, not an object"),
        ("tuned.json", '{"sst2": {"lora": {}}}', r"tuned\.json has no learning_rate for an arm of sst2"),
        ("lora-lr0.002-seed7/result.json", "{", r"result\.json is not readable JSON"),
        ("lora-lr0.002-seed7/result.json", "{}", r"result\.json: primary is None, not a number; delete"),
        ("lora-lr0.002-seed7.failed.json", "\0", r"failed\.json is not readable JSON"),
        ("lora-lr0.002-seed7.failed.json", "[]", r"failed\.json holds a list"),
    ],
)
def test_damaged_files_are_named_in_one_line(plan, tmp_path, pretend, name, content, words):
    tuned = plan(content={"tuning": TUNING}, tune=True, arms=["lora"], seeds=[0])
    carry_out(tuned, tmp_path / "out")
    (tmp_path / "out" / "tuned.json").unlink()
    place = tmp_path / "out" if name == "tuned.json" else tmp_path / "out" / "tuning" / "sst2"
    (place / name).write_text(content)
    with pytest.raises(ValueError, match=words) as error:
        carry_out(tuned, tmp_path / "out")
    assert "\n" not in str(error.value)
    frame = traceback.extract_tb(error.value.__traceback__)[-1]
    assert "adalora_fast" in Path(frame.filename).parts  # so that the command line shows the message alone
