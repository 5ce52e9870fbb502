"""Which runs belong together, their order, and the pairs that are compared."""

import json
from dataclasses import asdict, dataclass, replace

import numpy as np
import pytest

from adalora_fast.analysis.groups import group_means, groups_of, in_order, pairs_of
from adalora_fast.analysis.saved import names_of, open_runs
from adalora_fast.experiments.settings.recipes import Recipe
from adalora_fast.experiments.settings.settings import RunSettings


@dataclass(frozen=True, kw_only=True)
class Run:
    """As much of a SavedRun as groups look at."""

    settings: RunSettings
    path: str = ""

    def fingerprint(self) -> str:
        return repr(self.settings)


def run(method="adalora", seed=0, r=8, **options):
    recipe = Recipe(target_r=r, init_r=max(16, r), **options.pop("recipe", {}))
    return Run(
        settings=RunSettings(task="sst2", model="m", method=method, seed=seed, recipe=recipe, **options)
    )


def test_runs_that_differ_in_the_seed_alone_are_a_group():
    runs = [run("lora"), run("lora", seed=1), run("lora", r=4), run("full"), run(score="fisher")]
    assert groups_of(runs) == ["lora-r8", "lora-r8", "lora-r4", "full", "fisher"]
    elsewhere = replace(runs[1].settings, data_dir="there", attention="eager", compile=True)
    assert groups_of([runs[0], Run(settings=elsewhere)]) == ["lora-r8", "lora-r8"]


def test_a_run_of_before_a_setting_existed_is_of_the_same_group():
    """Its config.json has no `adapters`, that of a later run has an empty list."""
    written = json.loads(json.dumps(asdict(run("lora").settings)))
    assert written["adapters"] == []
    later = RunSettings(**written | {"recipe": Recipe(**written["recipe"]), "seed": 1})
    assert groups_of([run("lora"), Run(settings=later)]) == ["lora-r8", "lora-r8"]


def test_what_else_tells_groups_apart():
    assert groups_of([run(r=4), run(r=8, seed=1)]) == ["sensitivity-r4", "sensitivity-r8"]
    rates = [run("full", recipe={"learning_rate": rate}) for rate in (1e-3, 1e-4, 1e-4)]
    assert groups_of(rates) == [f"full learning_rate={rate}" for rate in (0.001, 0.0001, 0.0001)]
    both = [run(r=4), run(r=8), run(r=8, recipe={"epochs": 5.0})]
    assert groups_of(both) == ["sensitivity-r4", "sensitivity-r8 epochs=3.0", "sensitivity-r8 epochs=5.0"]


def test_arms_with_a_variant():
    """The arm lora-r4 of a recipe is LoRA of rank 4 under another name."""
    variants = [run("lora", r=r, variant=f"r{r}", seed=seed) for r in (16, 2, 4) for seed in (1, 0)]
    ordered = in_order([*variants, run("lora", r=4, seed=2)])
    assert groups_of(ordered) == ["lora-r2"] * 2 + ["lora-r4"] * 3 + ["lora-r16"] * 2
    assert [each.settings.seed for each in ordered] == [0, 1, 0, 1, 2, 0, 1]
    assert groups_of([run(variant="slow"), run()]) == ["sensitivity-slow", "sensitivity"]


def test_order():
    asked = [
        run("head"), run("bitfit"), run("peft"), run(score="gsnr"), run(score="fisher", smoothing="sum"),
        run(score="fisher"), run(score="movement"), run(score="sensitivity"), run("full"), run("lora", r=32),
        run("lora", r=2),
    ]  # fmt: skip
    assert in_order(asked) == asked[::-1]
    assert in_order(asked[::-1]) == in_order(asked)


def test_names_have_ranks(runs):
    assert names_of(in_order(open_runs([runs["lora-4"], runs["full"], runs["lora-2"]]))) == [
        "lora-r2-seed0",
        "lora-r4-seed1",
        "full-seed0",
    ]


def test_pairs():
    runs = [run("lora", seed=0), run("lora", seed=1), run("lora", seed=2), run("full"), run("full", seed=1)]
    within = [(0, 1), (0, 2), (1, 2), (3, 4)]
    assert pairs_of(runs, "within") == within and len(pairs_of(runs)) == 10
    assert pairs_of(runs, "between") == [pair for pair in pairs_of(runs) if pair not in within]
    few = pairs_of(runs, "all", 2)
    assert len([pair for pair in few if pair in within]) == 3 and len(few) == 5 and (3, 4) in few
    # The lot is of the runs, not of their places.
    backwards = pairs_of(runs[::-1], "all", 2)
    assert sorted((4 - b, 4 - a) for a, b in backwards) == few
    for options, match in (
        (("some",), "unknown pairs 'some'; choose all, within, between"),
        (("all", 0), "0 pairs of two groups"),
    ):
        with pytest.raises(ValueError, match=match):
            pairs_of(runs, *options)
    with pytest.raises(ValueError, match="no pairs of runs within the groups lora-r8, full"):
        pairs_of([runs[0], runs[3]], "within")


def test_means_are_over_what_was_computed():
    n = np.nan
    matrix = np.array([[9, 1, n, 3], [1, 9, 2, n], [n, 2, 9, n], [3, n, n, 9]], dtype=float)
    found = group_means(["a", "a", "b", "c"], matrix)
    assert found["groups"] == ["a", "b", "c"]
    assert found["group_means"] == [[1, 2, 3], [2, None, None], [3, None, None]]
    assert found["group_pairs"] == [[1, 1, 1], [1, 0, 0], [1, 0, 0]]
