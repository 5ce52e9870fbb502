"""The plan of a sweep: what is decided before anything runs, and how it may grow."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from adalora_fast.environment import environment, write_json, writing_to
from adalora_fast.experiments.data.tasks import get_task
from adalora_fast.experiments.methods.bottleneck import check_bottlenecks
from adalora_fast.experiments.run.folder import RunFolder, alone_in, first_difference, open_run
from adalora_fast.experiments.run.single import whole_folder, whole_path
from adalora_fast.experiments.settings.arms import parse_arm
from adalora_fast.experiments.settings.files import failure_of, read_json
from adalora_fast.experiments.settings.recipes import GRID, model_of, read_recipe, recipe_of
from adalora_fast.experiments.settings.settings import RunSettings

from .learning_rates import Tuning, diverged
from .plan_contrasts import (
    Pair,
    added_contrasts,
    default_contrasts,
    parse_contrasts,
    read_contrasts,
)

BASELINE = "sensitivity"
MARGIN = 0.3  # points within which two arms count as equivalent
WORDS = ("name", "description", "primary", "contrasts")  # what decides no run


@dataclass(frozen=True, kw_only=True)
class Planned:
    """One run of a sweep and where it goes."""

    settings: RunSettings
    path: Path

    @property
    def name(self) -> str:
        return f"{self.path.parent.name}/{self.path.name}"

    @property
    def failure(self) -> Path:
        return failure_of(self.path)

    @property
    def folder(self) -> RunFolder:
        return open_run(self.path, self.settings)

    @property
    def is_settled(self) -> bool:
        """Complete, or a run of the tuning that diverged: what it has to say of its rate is said."""
        return self.folder.is_complete or (self.settings.held_out > 0 and diverged(self.path))


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a sweep runs. `overrides` go into the recipe of every task, `options` into the settings.
    `contrasts` of None: none are declared, and the report compares every other arm with the baseline.
    """

    name: str
    content: dict[str, Any]
    model: str
    tasks: tuple[str, ...]
    arms: tuple[str, ...]
    seeds: tuple[int, ...]
    contrasts: tuple[Pair, ...] | None = None
    tuning: Tuning | None = None
    data_dir: str | None = None
    overrides: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)

    def settings(self, task: str, arm: str, seed: int, **overrides: Any) -> RunSettings:
        return RunSettings(
            task=task,
            model=self.model,
            data_dir=self.data_dir,
            seed=seed,
            recipe=recipe_of(self.content, self.name, task, arm, **(self.overrides | overrides)),
            **parse_arm(arm),
            **self.options,
        )

    def runs(self, output: Path, rates: dict[str, dict[str, float]] | None = None) -> list[Planned]:
        """Every run, seed after seed, so that an unfinished sweep has whole comparisons. `rates` gives the
        learning rate that was chosen for [task][arm]; where there is none, there is no run.
        """
        planned = []
        for task in self.tasks:
            for seed in self.seeds:
                for arm in self.arms:
                    if rates is not None and arm not in rates[task]:
                        continue
                    own = {"learning_rate": rates[task][arm]} if rates is not None else {}
                    settings = self.settings(task, arm, seed, **own)
                    planned.append(Planned(settings=settings, path=output / task / f"{arm}-seed{seed}"))
        return planned

    def tuning_runs(self, output: Path) -> list[Planned]:
        """Every learning rate of the grid for every arm, on held-out training data."""
        if self.tuning is None:
            return []
        return [
            Planned(
                settings=replace(
                    self.settings(task, arm, seed, learning_rate=rate), held_out=self.tuning.held_out
                ),
                path=output / "tuning" / task / f"{arm}-lr{rate:g}-seed{seed}",
            )
            for task in self.tasks
            for seed in self.tuning.seeds
            for arm in self.arms
            for rate in self.tuning.rates(arm)
        ]

    def described(self) -> dict[str, Any]:
        """plan.json."""
        return {
            "name": self.name,
            "description": self.content.get("description", ""),
            "model": self.model,
            "tasks": list(self.tasks),
            "arms": list(self.arms),
            "seeds": list(self.seeds),
            "baseline": BASELINE,
            "contrasts": None if self.contrasts is None else [list(pair) for pair in self.contrasts],
            "equivalence_margin": MARGIN,
            "primary": {task: get_task(task).metrics[0] for task in self.tasks},
            "tuning": None if self.tuning is None else asdict(self.tuning),
            "overrides": self.overrides,
            "options": self.options,
            "recipe": self.content,
        }


def make_plan(
    *,
    recipe: str,
    model: str | None = None,
    tasks: Iterable[str] = (),
    arms: Iterable[str] = (),
    seeds: Iterable[int] = (),
    contrasts: Iterable[str] = (),
    tune: bool = False,
    data_dir: Path | None = None,
    overrides: dict[str, Any] | None = None,
    options: dict[str, Any] | None = None,
) -> Plan:
    """The recipe's grid, with what is given in place of its own part. Of the recipe's contrasts those of
    planned arms; `contrasts` are pairs such as "fisher:lora".

    Raises:
        ValueError: an unknown task, arm or setting, a grid without one of its parts, the same entry twice, a
            contrast of what is no planned arm.
    """
    content = read_recipe(recipe)
    grid = content.get("grid", {})
    arms = list(arms) or grid.get("arms", ())
    asked = [RunSettings(task="", model="", **parse_arm(arm)) for arm in arms]
    if any(settings.method == "fusion" for settings in asked):
        raise ValueError(
            "fusion starts from runs that are finished, so it is no arm of a sweep; train houlsby runs, then "
            "adalora-fast train --method fusion --adapters RUN RUN"
        )
    arms = [settings.arm for settings in asked]  # "fisher+task+sum" is one, too
    parts = {
        name: tuple(given) or tuple(grid.get(name, ())) for name, given in zip(GRID, (tasks, arms, seeds))
    }
    for name, values in parts.items():
        if not values:
            raise ValueError(f"recipe {recipe} has no {name} in its grid; give --{name}")
        if len(set(values)) < len(values):
            raise ValueError(f"the {name} {', '.join(map(str, values))} name one twice; give each once")
    if not all(isinstance(seed, int) and not isinstance(seed, bool) for seed in parts["seeds"]):
        raise ValueError(f"seeds {parts['seeds']!r} are not all integers; correct them")
    model = model or model_of(content, recipe)
    for name in overrides or {}:
        settings = content.get("arms", {})
        own = [
            arm
            for arm in parts["arms"]
            if name in settings.get(arm.partition("-")[0], {}) | settings.get(arm, {})
        ]
        if own:
            raise ValueError(
                f"cannot set {name} for all: recipe {recipe} has its own for the arm {own[0]}; "
                "change it in a recipe of your own"
            )
    plan = Plan(
        name=Path(recipe).stem,
        content=content,
        model=whole_path(model),
        contrasts=parse_contrasts(contrasts, parts["arms"]) or _contrasts_of(grid, parts["arms"], recipe),
        tuning=Tuning.of(content.get("tuning")) if tune else None,
        data_dir=whole_folder(data_dir),
        overrides=overrides or {},
        options=options or {},
        **parts,
    )
    for task in plan.tasks:
        get_task(task)
        for arm in plan.arms:
            check_bottlenecks(plan.settings(task, arm, plan.seeds[0]))
    return plan


def _contrasts_of(grid: dict[str, Any], arms: tuple[str, ...], recipe: str) -> tuple[Pair, ...] | None:
    """Those of a recipe's grid whose arms are planned; None where that leaves none."""
    if grid.get("contrasts") is None:
        return None
    known = [RunSettings(task="", model="", **parse_arm(arm)).arm for arm in grid.get("arms", ())]
    try:
        declared = read_contrasts(grid["contrasts"], [*known, *arms])
    except ValueError as error:
        raise ValueError(f"recipe {recipe}: {error}") from None
    return tuple(pair for pair in declared if set(pair) <= set(arms)) or None


def write_plan(plan: Plan, output: Path) -> None:
    """Write plan.json before anything runs. One that is there already may grow by tasks, arms, seeds and
    contrasts, which is noted with the date; of contrasts also which of them had results. The recipe may grow
    with it, by the settings of a new arm or task; what it says of a run that was planned already may not
    change, nor may anything else.
    """
    with writing_to(output):
        output.mkdir(parents=True, exist_ok=True)
        with alone_in(output):
            _write_plan(plan.described(), output)


def _write_plan(described: dict[str, Any], output: Path) -> None:
    path = output / "plan.json"
    if not path.is_file():
        write_json(path, described | {"environment": environment(), "amended": []})
        return
    described = json.loads(json.dumps(described))
    try:
        before = read_json(path)
        same = {name: before[name] for name in described if name != "contrasts"}
        declared = _declared(before)
        decided = _deciding(same, same)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{path} is no plan of a sweep; choose another --output") from None
    difference = first_difference(decided, _deciding(described, same))
    if difference is not None:
        raise ValueError(f"{output} holds a sweep with {difference}; choose another --output")
    added = {name: [value for value in described[name] if value not in same[name]] for name in GRID}
    pairs = added_contrasts(declared, described["contrasts"] or ())
    if any(added.values()) or pairs:
        grown = {name: same[name] + added[name] for name in GRID}
        note = {"at": datetime.now(UTC).isoformat(timespec="seconds"), **added}
        if pairs:
            grown["contrasts"] = [list(pair) for pair in (*declared, *pairs)]
            note |= {
                "contrasts": pairs,
                "seen": [pair for pair in pairs if _has_results(output, same, *pair)],
            }
        grown |= {name: described[name] for name in ("description", "recipe", "tuning")}
        primary = same["primary"] | described["primary"]
        write_json(path, before | grown | {"primary": primary, "amended": [*before.get("amended", []), note]})


def _declared(plan: dict[str, Any]) -> list[Pair]:
    """The contrasts of a plan.json that is there: where it names none, every other arm against the baseline
    (the first arm, where the baseline is not planned).
    """
    if plan.get("contrasts") is not None:
        return [tuple(pair) for pair in read_contrasts(plan["contrasts"], plan["arms"])]
    return list(default_contrasts(plan["arms"], plan["baseline"]))


def _has_results(output: Path, plan: dict[str, Any], a: str, b: str) -> bool:
    """Whether both arms have a complete run of one task and seed."""
    return any(
        all((output / task / f"{arm}-seed{seed}" / "result.json").is_file() for arm in (a, b))
        for task in plan["tasks"]
        for seed in plan["seeds"]
    )


def _deciding(plan: dict[str, Any], planned: dict[str, Any]) -> dict[str, Any]:
    """What of plan.json decides the runs that are `planned`: of its recipe and its tuning, what they say of
    these tasks and arms.
    """
    tasks, arms, recipe = planned["tasks"], planned["arms"], plan["recipe"]
    tuning = None if plan["tuning"] is None else Tuning.of(plan["tuning"])
    return {name: value for name, value in plan.items() if name not in (*GRID, *WORDS)} | {
        "recipe": {
            task: {arm: asdict(recipe_of(recipe, plan["name"], task, arm)) for arm in arms} for task in tasks
        },
        "tuning": tuning
        and {
            "learning_rates": {arm: tuning.rates(arm) for arm in arms},
            "seeds": tuning.seeds,
            "held_out": tuning.held_out,
        },
    }
