"""Recipes: files to settings, and every way in which a file can be wrong."""

import json
from dataclasses import FrozenInstanceError, asdict, fields

import pytest

from adalora_fast.experiments.data.tasks import TASKS
from adalora_fast.experiments.settings.recipes import RECIPES, Recipe, load_recipe

OTHER = {  # a value for every field that is not its default
    "epochs": 1.5, "learning_rate": 2e-4, "batch_size": 7, "max_length": 33, "weight_decay": 0.2, "warmup": 9,
    "max_grad_norm": 0.3, "init_r": 12, "target_r": 5, "scale": 3.0, "tinit": 4, "tfinal": 0.25, "deltaT": 6,
    "orth_reg_weight": 0.7, "beta1": 0.6, "beta2": 0.65, "classifier_dropout": 0.35, "dropout": 0.15,
    "precision": "bf16", "train_rows": 11, "evaluation_rows": 12, "stride": 13, "n_best": 3,
    "max_answer_length": 7, "beams": 2, "matrices": ("query",), "adapter_dropout": 0.05, "bottleneck": 9,
    "virtual_tokens": 4, "train_biases": True, "triplet": "lambda", "orth_penalty": "squared",
    "weights": "before", "hysteresis": 0.5, "remember": True,
    "redraw": 0.3, "ranks_from": "fisher", "shuffled": True,
}  # fmt: skip


def write(tmp_path, content):
    path = tmp_path / "mine.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def test_the_examples_cover_every_field():
    assert set(OTHER) == {field.name for field in fields(Recipe)}
    assert all(OTHER[field.name] != field.default for field in fields(Recipe))


@pytest.mark.parametrize("name", OTHER)
def test_every_field_from_defaults_task_and_override(tmp_path, name):
    others = {"init_r": 16} if name == "target_r" else {}
    value, plain = OTHER[name], Recipe(**others)
    by_default = load_recipe(write(tmp_path, {"defaults": others | {name: value}}), "mrpc")
    by_task = load_recipe(write(tmp_path, {"defaults": others, "tasks": {"mrpc": {name: value}}}), "mrpc")
    of_another = load_recipe(write(tmp_path, {"defaults": others, "tasks": {"rte": {name: value}}}), "mrpc")
    overridden = load_recipe(write(tmp_path, {"defaults": others}), "mrpc", **{name: value})
    assert by_default == by_task == overridden != of_another == plain
    assert asdict(overridden) == asdict(plain) | {name: value}


def test_the_task_goes_before_the_defaults_and_an_override_before_both(tmp_path):
    path = write(tmp_path, {"defaults": {"epochs": 4, "deltaT": 2}, "tasks": {"mrpc": {"epochs": 5}}})
    assert load_recipe(path, "mrpc").epochs == 5
    assert load_recipe(path, "rte").epochs == 4
    changed = load_recipe(path, "mrpc", epochs=6)
    assert (changed.epochs, changed.deltaT, changed.learning_rate) == (6, 2, Recipe().learning_rate)


def test_a_variant_adds_to_its_arm(tmp_path):
    arms = {"lora": {"scale": 4.0, "target_r": 2}, "lora-r4": {"target_r": 4}}
    path = write(tmp_path, {"arms": arms})
    variant = load_recipe(path, "mrpc", "lora-r4")
    assert (variant.scale, variant.target_r) == (4.0, 4)
    assert load_recipe(path, "mrpc", "lora").target_r == 2
    with pytest.raises(ValueError, match=r"mine\.json has no settings for the arm lora-r8; write them under"):
        load_recipe(path, "mrpc", "lora-r8")


def test_a_default_for_matrices_is_for_the_arms_that_adapt_any(tmp_path):
    path = write(tmp_path, {"defaults": {"matrices": ["query"]}, "arms": {"head": {"matrices": ["key"]}}})
    assert load_recipe(path, "mrpc", "lora").matrices == load_recipe(path, "mrpc", "gsnr+sum").matrices
    assert load_recipe(path, "mrpc", "lora").matrices == ("query",)
    assert load_recipe(path, "mrpc", "full").matrices is None
    # what is said for an arm alone is a mistake that the run then refuses
    assert load_recipe(path, "mrpc", "head").matrices == ("key",)
    assert load_recipe(path, "mrpc", "full", matrices=["value"]).matrices == ("value",)


def test_an_empty_file_of_settings_gives_the_defaults(tmp_path):
    assert load_recipe(write(tmp_path, {}), "mrpc") == Recipe()


def test_a_recipe_cannot_be_changed():
    with pytest.raises(FrozenInstanceError):
        Recipe().epochs = 1


@pytest.mark.parametrize("name", sorted(path.stem for path in RECIPES.glob("*.json")))
def test_the_packaged_recipes_load_for_every_task(name):
    for task in TASKS:
        recipe = load_recipe(name, task)
        assert recipe.init_r > recipe.target_r, task
        assert recipe.tinit + recipe.tfinal < (1 if isinstance(recipe.tinit, float) else 100_000), task


def test_packaged_recipes_name_only_tasks_that_exist():
    for path in RECIPES.glob("*.json"):
        assert set(json.loads(path.read_text())["tasks"]) <= set(TASKS)


@pytest.mark.parametrize(
    ("task", "expected"),
    [  # AdaLoRA's scripts: alpha 16 or 32 with init_r 3 or 2
        (
            "mnli",
            {"init_r": 3, "target_r": 1, "tinit": 8000, "tfinal": 50000, "learning_rate": 5e-4, "alpha": 16},
        ),
        (
            "cola",
            {"init_r": 3, "target_r": 1, "tinit": 800, "tfinal": 3500, "learning_rate": 8e-4, "alpha": 32},
        ),
        (
            "mrpc",
            {"init_r": 2, "target_r": 1, "tinit": 600, "tfinal": 1800, "learning_rate": 1e-3, "alpha": 32},
        ),
    ],
)
def test_the_paper_recipe(task, expected):
    recipe = load_recipe("adalora-glue", task)
    assert recipe.scale * recipe.init_r == pytest.approx(expected.pop("alpha"))
    assert {name: getattr(recipe, name) for name in expected} == expected


@pytest.mark.parametrize(
    "name", ["epochs", "learning_rate", "batch_size", "max_length", "init_r", "target_r", "scale", "deltaT"]
)
def test_what_must_be_positive(name):
    for value in (0, -1, float("nan")):
        with pytest.raises(ValueError, match=f"^{name} is .*must be greater than 0"):
            Recipe(**{name: value})


@pytest.mark.parametrize("name", ["weight_decay", "warmup", "tinit", "tfinal", "orth_reg_weight"])
def test_what_must_not_be_negative(name):
    Recipe(**{name: 0})
    with pytest.raises(ValueError, match=f"^{name} is -0.1; it must not be negative"):
        Recipe(**{name: -0.1})


def test_a_target_above_the_start():
    Recipe(init_r=8, target_r=8)
    with pytest.raises(ValueError, match=r"target_r \(9\) is larger than init_r \(8\); raise init_r"):
        Recipe(init_r=8, target_r=9)


def test_an_unknown_recipe_names_those_that_exist():
    with pytest.raises(
        FileNotFoundError, match=r"no recipe 'nope'; choose adalora-glue, .*study-table2, .*or give"
    ):
        load_recipe("nope", "mrpc")


@pytest.mark.parametrize("content", ["", "{", "{'epochs': 3}", "epochs: 3"])
def test_what_is_not_json(tmp_path, content):
    with pytest.raises(ValueError, match=r"mine\.json is not JSON \(.*\); correct it"):
        load_recipe(write(tmp_path, content), "mrpc")


@pytest.mark.parametrize("place", ["defaults", "task"])
def test_an_unknown_setting(tmp_path, place):
    wrong = {"learning_rte": 1.0}
    content = {"defaults": wrong} if place == "defaults" else {"tasks": {"mrpc": wrong}}
    with pytest.raises(
        ValueError, match="unknown setting 'learning_rte'; choose from epochs, learning_rate,"
    ):
        load_recipe(write(tmp_path, content), "mrpc")


def test_an_unknown_part_of_the_file(tmp_path):
    """ "default" for "defaults" would otherwise train with quite other settings, and say nothing."""
    with pytest.raises(ValueError, match=r"mine\.json.*'default'"):
        load_recipe(write(tmp_path, {"default": {"epochs": 1}}), "mrpc")


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        "3",
        "null",
        '{"defaults": []}',
        '{"tasks": {"mrpc": 3}}',
        '{"tasks": []}',
        '{"grid": {"arms": [1]}}',
        '{"grid": {"tasks": [["sst2"]]}}',
        '{"grid": {"tasks": "sst2"}}',
        '{"grid": {"seeds": 5}}',
    ],
)
def test_json_of_the_wrong_shape(tmp_path, content):
    with pytest.raises(ValueError, match=r"mine\.json"):
        load_recipe(write(tmp_path, content), "mrpc")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("epochs", "3"),
        ("epochs", None),
        ("epochs", True),
        ("epochs", float("inf")),
        ("learning_rate", float("inf")),
        ("batch_size", 8.5),
        ("init_r", 16.5),
        ("deltaT", [1]),
        ("tinit", 1.5),
        ("beta1", 2),
        ("beta2", -0.1),
        ("classifier_dropout", 3),
        ("matrices", []),
        ("matrices", "query"),
        ("matrices", [1]),
        ("train_biases", 1),
        ("adapter_dropout", 1),
    ],
)
def test_a_value_that_cannot_be_used(tmp_path, name, value):
    """Found before a model is loaded: ValueError with the setting's name."""
    with pytest.raises(ValueError, match=name):
        load_recipe(write(tmp_path, {"defaults": {name: value}}), "mrpc")


def test_a_file_that_is_not_text(tmp_path):
    path = tmp_path / "mine.json"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"mine\.json"):
        load_recipe(str(path), "mrpc")
