"""The report's account of what was run: the plan, rates, settings, and how the arms scored."""

import json

from adalora_fast.experiments.report.collect import read_sweep
from adalora_fast.experiments.report.sections_run import costs, what_was_run
from tests.helpers.sweeps import write_json, write_plan, write_sweep

SEEDS = [0, 1, 2]


def test_tuning(tmp_path):
    tuning = {"learning_rates": [1e-3, 2e-3, 4e-3], "seeds": [100, 101], "held_out": 0.1}
    folder = write_sweep(
        tmp_path, {"sensitivity": 0.8, "lora": 0.8}, tasks=["rte"], seeds=[0], plan={"tuning": tuning}
    )
    assert "tuned.json is not there yet" in what_was_run(read_sweep(folder))
    chosen = {
        "sensitivity": {"learning_rate": 2e-3, "scores": {}},
        "lora": {"learning_rate": 4e-3, "scores": {}},
    }
    write_json(folder / "tuned.json", {"rte": chosen})
    text = what_was_run(read_sweep(folder))
    assert "from 0.001, 0.002, 0.004 on 10% of the training data" in text and "| lora | 0.004 |" in text
    assert "a better one may lie beyond, for lora on RTE." in text


def test_tuning_with_a_grid_of_an_arms_own(tmp_path):
    tuning = {"learning_rates": [1e-3, 2e-3], "seeds": [100], "held_out": 0.1, "arms": {"full": [2e-5, 1e-3]}}
    rates = {"sensitivity": 0.8, "full": 0.8}
    folder = write_sweep(tmp_path, rates, tasks=["rte"], seeds=[0], plan={"tuning": tuning})
    chosen = {"sensitivity": {"learning_rate": 1e-3}, "full": {"learning_rate": 2e-5}}
    write_json(folder / "tuned.json", {"rte": chosen})
    text = what_was_run(read_sweep(folder))
    assert "from 0.001, 0.002 (2e-05, 0.001 for full) on 10%" in text
    assert "may lie beyond, for sensitivity on RTE, full on RTE." in text


def test_what_the_plan_left_out_and_did_not_plan(tmp_path):
    """The reader sees which controls a recipe had, and which runs are older than their plan."""
    recipe = {"grid": {"tasks": ["rte"], "arms": ["lora", "uniform"], "seeds": [0, 1]}}
    late = {"recipe": recipe, "environment": {"started": "2027-01-01T00:00:00+00:00"}}
    folder = write_sweep(tmp_path, {"lora": 0.8}, tasks=["rte"], seeds=[0], plan=late)
    path = folder / "rte" / "lora-seed0" / "config.json"
    config = json.loads(path.read_text())
    config["environment"]["started"] = "2026-12-31T23:59:00+00:00"
    write_json(path, config)
    text = what_was_run(read_sweep(folder))
    assert "the plan leaves out: arms uniform; seeds 1." in text
    assert "Begun before plan.json was written (2027-01-01T00:00:00+00:00)" in text
    assert "rte/lora-seed0" in text


def test_what_was_changed_from_the_recipe(tmp_path):
    changed = {"overrides": {"train_rows": 2000, "epochs": 5}}
    folder = write_sweep(tmp_path, {"lora": 0.8}, tasks=["rte"], seeds=[0], plan=changed)
    assert "whatever is said of it above: train_rows = 2000, epochs = 5." in what_was_run(read_sweep(folder))


def test_what_equals_the_recipe_is_no_change(tmp_path):
    """Of the overrides, only those that differ from the recipe for some task and arm are named."""
    recipe = {
        "defaults": {"epochs": 3, "learning_rate": 1e-3},
        "tasks": {"rte": {"epochs": 5}},
        "arms": {"lora": {"matrices": ["query"]}},
    }
    same = {"overrides": {"epochs": 3.0, "learning_rate": 0.001}, "recipe": recipe}
    folder = write_sweep(tmp_path / "a", {"lora": 0.8}, tasks=["mrpc"], seeds=[0], plan=same)
    assert "Changed from the recipe" not in what_was_run(read_sweep(folder))
    folder = write_sweep(tmp_path / "b", {"lora": 0.8}, tasks=["mrpc", "rte"], seeds=[0], plan=same)
    assert "whatever is said of it above: epochs = 3.0.**" in what_was_run(read_sweep(folder))
    same["overrides"] = {"matrices": ["query"], "init_r": 16, "batch_size": 8}  # init_r is the default
    folder = write_sweep(tmp_path / "c", {"lora": 0.8}, tasks=["mrpc"], seeds=[0], plan=same)
    assert "whatever is said of it above: batch_size = 8.**" in what_was_run(read_sweep(folder))


def test_seconds_of_resumed_runs(tmp_path):
    """Of all parts where the run wrote them; a run that wrote those of its last part is left out."""
    folder = write_sweep(tmp_path, {"lora": 0.8}, tasks=["rte"], seeds=[0, 1, 2])
    for seed, more in ((0, {"part_seconds": [100.0, 12.0], "seconds": 112.0}), (1, {})):
        path = folder / "rte" / f"lora-seed{seed}" / "result.json"
        write_json(path, json.loads(path.read_text()) | {"resumed": True} | more)
    text = costs(read_sweep(folder))
    assert "| 62 |" in text  # the mean of 112 and 12.5
    assert "1 run(s) were resumed, and their seconds are those of all parts" in text
    assert "1 run(s) were resumed, and their seconds, those of the last part, are left out" in text


def settings_of(folder):
    """Rows of the report's table of settings by name."""
    text = what_was_run(read_sweep(folder)).partition("| setting |")[2].partition("\n\n")[0]
    rows = [[cell.strip() for cell in line.strip("| ").split("|")] for line in text.splitlines()[2:]]
    return {name: values for name, *values in rows}


def test_settings_are_those_that_decide_a_run(tmp_path):
    """None of them for arms or tasks where it plays no role, and the defaults where it does."""
    folder = write_sweep(tmp_path / "a", {"lora": 0.8, "full": 0.8}, tasks=["rte"], seeds=[0], rows=20)
    found = settings_of(folder)
    assert found["matrices"] == ["all"] and found["adapter_dropout"] == ["0"] and found["scale"] == ["2"]
    assert found["max_grad_norm"] == ["1"]
    assert not found.keys() & {
        "init_r", "tinit", "beta1", "orth_reg_weight", "stride", "n_best", "beams", "bottleneck",
        "virtual_tokens", "train_biases", "dropout", "train_rows",
    }  # fmt: skip
    rates = dict.fromkeys(("sensitivity", "lora", "houlsby", "prefix"), 0.8)
    recipe = {"matrices": ["query", "value"], "bottleneck": 32, "init_r": 12, "train_biases": True}
    folder = write_sweep(tmp_path / "b", rates, tasks=["rte", "squad"], seeds=[0], rows=20, recipe=recipe)
    path = folder / "rte" / "lora-seed0" / "config.json"
    config = json.loads(path.read_text())
    config["settings"]["recipe"] |= {"init_r": 99, "bottleneck": 99, "scale": 4.0}
    write_json(path, config)
    found = settings_of(folder)
    assert found["matrices"] == ["query + value"] * 2 and found["train_biases"] == ["True"] * 2
    assert found["init_r"] == ["12"] * 2 and found["bottleneck"] == ["32"] * 2  # not those of lora
    assert found["scale"] == ["2, 4", "2"] and found["virtual_tokens"] == ["20"] * 2
    assert found["beta1"] == found["beta2"] == ["0.85"] * 2
    assert found["stride"] == ["–", "128"] and found["n_best"] == ["–", "20"] and "beams" not in found


def test_settings_of_what_has_not_run_are_the_plans(tmp_path):
    recipe = {
        "defaults": {"epochs": 3, "scale": 8.0},
        "tasks": {"wmt16_ro_en": {"beams": 7}},
        "arms": {"lora": {"scale": 2.0}, "lora-r1": {"target_r": 1}},
    }
    plan = {"recipe": recipe, "overrides": {"epochs": 5}, "primary": {}}
    write_plan(tmp_path, tasks=["wmt16_ro_en"], arms=["sensitivity", "lora-r1"], seeds=[0], **plan)
    found = settings_of(tmp_path)
    assert found["epochs"] == ["5"] and found["beams"] == ["7"]
    assert found["scale"] == ["8, 2"] and found["target_r"] == ["8, 1"]


def test_how_the_arms_scored(tmp_path):
    rates = dict.fromkeys(("sensitivity", "fisher+task", "gsnr", "mine", "uniform", "lora"), 0.8)
    folder = write_sweep(tmp_path, rates, tasks=["rte"], seeds=[0], rows=20)
    path = folder / "rte" / "gsnr-seed0" / "config.json"
    config = json.loads(path.read_text())
    config["settings"]["smoothing"] = "sum"
    write_json(path, config)
    text = what_was_run(read_sweep(folder)).partition("| arm | score | smoothing | gradient |")[2]
    assert [line for line in text.partition("\n\n")[0].splitlines()[2:]] == [
        "| sensitivity | sensitivity | ema_uncertainty (its own) | total |",
        "| fisher+task | fisher | ema (its own) | task |",
        "| gsnr | gsnr | sum | total |",
        "| mine | mine | its own | total |",
    ]


def test_a_plan_that_grew(tmp_path):
    grown = [{"at": "2026-02-03T00:00:00+00:00", "tasks": [], "arms": ["lora"], "seeds": [3, 4]}]
    folder = write_sweep(tmp_path, {"lora": 0.8}, tasks=["rte"], seeds=[0], plan={"amended": grown})
    assert "The plan grew on 2026-02-03T00:00:00+00:00 by arms lora; seeds 3, 4." in what_was_run(
        read_sweep(folder)
    )
