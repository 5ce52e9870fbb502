"""The contrasts that a plan declares: read, checked, and grown by an amendment only."""

import pytest

from adalora_fast.cli import Sweep
from adalora_fast.experiments.report.collect import read_sweep
from adalora_fast.experiments.settings.files import read_json
from adalora_fast.experiments.settings.recipes import RECIPES
from adalora_fast.experiments.sweep.plan import make_plan
from adalora_fast.experiments.sweep.plan_contrasts import (
    default_contrasts,
    parse_contrasts,
    read_contrasts,
)
from tests.helpers.planning import GRID, carry_out
from tests.helpers.tiny import quiet_console

ARMS = ["sensitivity", "lora", "head"]


def grid(*contrasts, arms=ARMS):
    return {"grid": GRID | {"arms": arms, "contrasts": [list(pair) for pair in contrasts]}}


def test_pairs_in_words_and_in_json():
    assert parse_contrasts(["lora:head", "head:sensitivity"], ARMS) == (
        ("lora", "head"),
        ("head", "sensitivity"),
    )
    assert read_contrasts([["fisher+sum", "lora-r4"]], ["lora-r4", "fisher+sum"]) == (
        ("fisher+sum", "lora-r4"),
    )
    assert default_contrasts(["lora", "sensitivity", "head"], "sensitivity") == (
        ("lora", "sensitivity"),
        ("head", "sensitivity"),
    )
    assert default_contrasts(["lora", "head"], "sensitivity") == (("head", "lora"),)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["lora"], "the contrast 'lora' is no pair of arms; write fisher:lora"),
        (["lora:"], "the contrast 'lora:' is no pair of arms"),
        (["lora:head:sensitivity"], "is no pair of arms"),
        (["lora:hat"], "the contrast lora:hat names hat, no arm of the plan: sensitivity, lora, head"),
        (["lora:lora"], "the contrast lora:lora compares an arm with itself; name two"),
        (["lora:head", "head:lora"], "the contrast head:lora is there twice; give each pair once"),
    ],
)
def test_pairs_that_are_none(plan, texts, message):
    with pytest.raises(ValueError, match=message) as error:
        plan(arms=ARMS, contrasts=texts)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("lora:head", "contrasts is 'lora:head'; give a list of pairs of arms"),
        ([], r"contrasts is \[\]; give a list"),
        ([["lora", 3]], r"the contrast \['lora', 3\] is no pair of arms"),
        (["lora"], "the contrast 'lora' is no pair of arms"),
        ([["lora", "hat"]], "the contrast lora:hat names hat, no arm of the plan"),
    ],
)
def test_a_recipe_whose_contrasts_are_none(plan, content, message):
    with pytest.raises(ValueError, match=rf"recipe .*mine\.json: {message}") as error:
        plan(content={"grid": GRID | {"contrasts": content}})
    assert "\n" not in str(error.value)


def test_the_recipes_contrasts_are_those_of_planned_arms(plan):
    content = grid(("lora", "sensitivity"), ("head", "lora"))
    assert plan(content=content).contrasts == (("lora", "sensitivity"), ("head", "lora"))
    assert plan(content=content, arms=["sensitivity", "lora"]).contrasts == (("lora", "sensitivity"),)
    assert plan(content=content, arms=["sensitivity", "head"]).contrasts is None
    assert plan(content=content, contrasts=["head:sensitivity"]).contrasts == (("head", "sensitivity"),)
    assert plan().contrasts is None


def test_the_command_passes_them_on(recipe, encoder, data_dir, tmp_path, pretend):
    sweep = Sweep(
        recipe=recipe(), model=str(encoder), data_dir=data_dir, output=tmp_path / "out", seeds=(0,),
        contrasts=("lora:sensitivity",),
    )  # fmt: skip
    sweep.run(quiet_console())
    assert read_json(tmp_path / "out" / "plan.json")["contrasts"] == [["lora", "sensitivity"]]


def test_a_plan_grows_in_contrasts_with_a_date_and_says_which_had_results(plan, tmp_path, pretend):
    output, content = tmp_path / "out", grid(("lora", "sensitivity"))
    carry_out(plan(content=content, arms=["sensitivity", "lora"]), output)
    first = read_json(output / "plan.json")
    assert first["contrasts"] == [["lora", "sensitivity"]] and first["amended"] == []
    grown = ["lora:sensitivity", "head:lora"]
    carry_out(plan(content=content, arms=ARMS, contrasts=grown), output)
    second = read_json(output / "plan.json")
    assert second["contrasts"] == [["lora", "sensitivity"], ["head", "lora"]]
    (note,) = second["amended"]
    assert note["contrasts"] == [["head", "lora"]] and note["seen"] == [] and note["at"]
    carry_out(plan(content=content, arms=ARMS, contrasts=["sensitivity:head", "sensitivity:lora"]), output)
    third = read_json(output / "plan.json")
    assert third["contrasts"][2:] == [["sensitivity", "head"]]  # a pair is there either way round
    assert third["amended"][1]["seen"] == [["sensitivity", "head"]] and third["amended"][1]["arms"] == []
    carry_out(plan(content=content, arms=ARMS), output)
    assert read_json(output / "plan.json") == third
    read = read_sweep_plan(output)
    assert read.declared[2] == ("sensitivity", "head") and read.seen_contrasts == (("sensitivity", "head"),)


def read_sweep_plan(output):
    """The pretended runs have no results that a report reads: only the plan."""
    from adalora_fast.experiments.report.collect import _read_plan

    return _read_plan(output / "plan.json")


def test_a_plan_without_a_declaration_is_about_its_baseline(plan, tmp_path, pretend):
    """As every plan of before: it grows with its arms, and keeps these pairs when others are added."""
    output = tmp_path / "out"
    carry_out(plan(arms=["sensitivity", "lora"]), output)
    described = read_json(output / "plan.json")
    assert described["contrasts"] is None
    (output / "plan.json").write_text((output / "plan.json").read_text().replace('"contrasts": null,', ""))
    assert "contrasts" not in read_json(output / "plan.json")
    carry_out(plan(arms=ARMS), output)
    assert read_json(output / "plan.json").get("contrasts") is None
    assert read_sweep_plan(output).declared == (("lora", "sensitivity"), ("head", "sensitivity"))
    carry_out(plan(arms=ARMS, contrasts=["sensitivity:lora", "head:lora"]), output)
    described = read_json(output / "plan.json")
    assert described["contrasts"] == [["lora", "sensitivity"], ["head", "sensitivity"], ["head", "lora"]]
    assert described["amended"][-1]["seen"] == [["head", "lora"]]


def test_a_plan_with_broken_contrasts_is_none(plan, tmp_path, pretend):
    output = tmp_path / "out"
    carry_out(plan(contrasts=["lora:sensitivity"]), output)
    path = output / "plan.json"
    path.write_text(path.read_text().replace('"contrasts": [', '"contrasts": [3, ', 1))
    with pytest.raises(ValueError, match="is no plan of a sweep; choose another --output"):
        carry_out(plan(), output)
    with pytest.raises(ValueError, match=r"plan\.json: the contrast 3 is no pair of arms"):
        read_sweep(output)


@pytest.mark.parametrize("name", sorted(path.stem for path in RECIPES.glob("*.json")))
def test_packaged_recipes_declare_few(name):
    plan = make_plan(recipe=name)
    declared = plan.contrasts or default_contrasts(plan.arms, "sensitivity")
    assert 1 <= len(declared) <= 5
