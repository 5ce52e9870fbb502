"""What a sweep left in its folder: the plan, every run of it that is complete, and why the others are not."""

import json
import shlex
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from adalora_fast.experiments.settings.files import failure_of, read_object, working_of
from adalora_fast.experiments.settings.settings import NULLS, OTHER_METHODS
from adalora_fast.experiments.sweep.plan_contrasts import default_contrasts, read_contrasts

RESULT_KEYS = (
    "task", "model", "arm", "seed", "sample", "primary_metric", "primary", "metrics", "trainable_parameters",
    "total_rank", "train_seconds", "seconds",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Plan:
    """plan.json: what was to be run. `margin` is in points; `amended` says what was added later, and when.
    `contrasts` of None: the plan declares none.
    """

    name: str
    model: str
    tasks: tuple[str, ...]
    arms: tuple[str, ...]
    seeds: tuple[int, ...]
    description: str = ""
    baseline: str = "sensitivity"
    margin: float = 0.3
    contrasts: tuple[tuple[str, str], ...] | None = None
    recipe: dict[str, Any] = field(default_factory=dict)
    overrides: dict[str, Any] = field(default_factory=dict)
    tuning: dict[str, Any] | None = None
    environment: dict[str, Any] = field(default_factory=dict)
    amended: tuple[dict[str, Any], ...] = ()

    @property
    def ordered_arms(self) -> tuple[str, ...]:
        """The baseline, where there is one, before the others."""
        return tuple(sorted(self.arms, key=lambda arm: arm != self.baseline))

    @property
    def declared(self) -> tuple[tuple[str, str], ...]:
        """The pairs of arms on which there are verdicts: those of the plan, or every other arm against the
        baseline (the first arm, where the baseline is not planned).
        """
        if self.contrasts is not None:
            return self.contrasts
        return default_contrasts(self.arms, self.baseline)

    @property
    def seen_contrasts(self) -> tuple[tuple[str, str], ...]:
        """Those that were declared when runs of both arms were complete."""
        return tuple((a, b) for entry in self.amended for a, b in entry.get("seen") or ())

    @property
    def scores(self) -> tuple[str, ...]:
        """The arms that allocate by an importance score."""
        return tuple(arm for arm in self.arms if arm.partition("-")[0] not in (*NULLS, *OTHER_METHODS))


@dataclass(frozen=True, kw_only=True)
class Run:
    """A complete run: its folder, and what stands in result.json and config.json."""

    folder: Path
    result: dict[str, Any]
    settings: dict[str, Any]
    environment: dict[str, Any]

    @property
    def task(self) -> str:
        return self.result["task"]

    @property
    def arm(self) -> str:
        return self.result["arm"]

    @property
    def seed(self) -> int:
        return self.result["seed"]

    @property
    def points(self) -> float:
        """The primary metric in points."""
        return 100 * self.result["primary"]

    @cached_property
    def ranks(self) -> dict[str, int]:
        """Final rank of every adapted matrix; empty where nothing has ranks or ranks.json is absent."""
        return self._ranks_file.get("ranks", {})

    @property
    def init_r(self) -> int:
        return self._ranks_file.get("init_r", 0)

    @cached_property
    def _ranks_file(self) -> dict[str, Any]:
        path = self.folder / "ranks.json"
        if not path.is_file():
            return {}
        saved = read_object(path)
        if not isinstance(saved.get("ranks"), dict) or not isinstance(saved.get("init_r"), int):
            raise ValueError(f"{path} has no ranks and init_r: it is no file of a run; delete it")
        return saved


@dataclass(frozen=True, kw_only=True)
class Missing:
    """A planned run that is not complete. `state` is failed, unfinished or not started."""

    task: str
    arm: str
    seed: int
    state: str
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """A sweep folder, read: `unplanned` are complete runs that the plan does not name, `before` the verdicts
    of a method that reports had earlier.
    """

    folder: Path
    plan: Plan
    runs: dict[tuple[str, str, int], Run]
    missing: tuple[Missing, ...]
    unplanned: tuple[str, ...]
    tuned: dict[str, Any] | None
    before: dict[str, Any] | None = None

    def of(self, task: str, arm: str) -> dict[int, Run]:
        """The complete runs of one cell by seed, in the plan's order."""
        found = ((seed, self.runs.get((task, arm, seed))) for seed in self.plan.seeds)
        return {seed: run for seed, run in found if run is not None}

    def is_whole(self, task: str, arm: str) -> bool:
        """Whether every planned seed of the cell is complete."""
        return len(self.of(task, arm)) == len(self.plan.seeds)

    def whole_arms(self) -> tuple[str, ...]:
        """The arms whose every task and seed is complete: the only ones that are averaged over tasks."""
        return tuple(a for a in self.plan.ordered_arms if all(self.is_whole(t, a) for t in self.plan.tasks))

    def task_runs(self, task: str) -> list[Run]:
        return [run for arm in self.plan.ordered_arms for run in self.of(task, arm).values()]

    def is_sample(self, task: str) -> bool:
        return any(run.result["sample"] for run in self.task_runs(task))

    def primary_metric(self, task: str) -> str:
        """By what the task's runs are compared; "" where there are none yet."""
        runs = self.task_runs(task)
        return runs[0].result["primary_metric"] if runs else ""


def read_sweep(folder: Path) -> Sweep:
    """Read OUT/plan.json and every run folder OUT/<task>/<arm>-seed<seed>.

    FileNotFoundError where there is no plan; ValueError naming the file that is not what it should be.
    """
    folder = Path(folder).expanduser()
    if not (folder / "plan.json").is_file():
        raise FileNotFoundError(f"no plan.json in {folder}; give the output folder of a sweep")
    plan = _read_plan(folder / "plan.json")
    runs, missing = {}, []
    for task in plan.tasks:
        for arm in plan.arms:
            for seed in plan.seeds:
                place = folder / task / f"{arm}-seed{seed}"
                if (place / "result.json").is_file():
                    runs[task, arm, seed] = _read_run(place, task, arm, seed)
                else:
                    state, reason = _why_missing(place)
                    missing.append(Missing(task=task, arm=arm, seed=seed, state=state, reason=reason))
        metrics = {run.result["primary_metric"] for key, run in runs.items() if key[0] == task}
        if len(metrics) > 1:
            raise ValueError(
                f"{folder / task} has runs compared by {' and by '.join(sorted(metrics))}; "
                "keep the runs of one kind only"
            )
    tuned = read_object(folder / "tuned.json") if (folder / "tuned.json").is_file() else None
    return Sweep(
        folder=folder, plan=plan, runs=runs, missing=tuple(missing), tuned=tuned,
        unplanned=_unplanned(folder, plan), before=_verdicts_before(folder / "verdicts-before.json"),
    )  # fmt: skip


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file with one per line, [] where there is no file; ValueError with the bad line."""
    if not path.is_file():
        return []
    lines = []
    for number, text in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        try:
            line = json.loads(text)
        except ValueError as error:
            raise ValueError(f"{path} line {number} is not JSON ({error}); delete that line") from error
        if not isinstance(line, dict) or not isinstance(line.get("step"), int):
            raise ValueError(f"{path} line {number} is no object with a step; delete that line")
        lines.append(line)
    return lines


def commands_of(sweep: Sweep) -> list[str]:
    """The distinct command lines of the plan and its runs, in that order."""
    places = [sweep.plan.environment, *(run.environment for run in sweep.runs.values())]
    found = [place["command"] for place in places if isinstance(place.get("command"), list)]
    lines = (shlex.join(map(str, words)) for words in found if words)
    return list(dict.fromkeys(line.replace("__main__.py", "python -m adalora_fast", 1) for line in lines))


def output_of(sweep: Sweep) -> str:
    """Where the sweep's command put it, as it was typed."""
    for line in commands_of(sweep):
        words = shlex.split(line)
        for place, word in enumerate(words):
            if word == "--output" and place + 1 < len(words):
                return words[place + 1]
            if word.startswith("--output="):
                return word.removeprefix("--output=")
    return f"runs/{sweep.plan.name}"


def distinct(values: Iterable[Any]) -> str:
    """One value, or the distinct ones in the order in which they come."""
    return ", ".join(
        dict.fromkeys(f"{value:g}" if isinstance(value, float) else str(value) for value in values)
    )


def _read_plan(path: Path) -> Plan:
    content = read_object(path)
    lists = {"tasks": str, "arms": str, "seeds": int}
    for name, kind in lists.items():
        value = content.get(name)
        if not isinstance(value, list) or not value or not all(type(entry) is kind for entry in value):
            raise ValueError(
                f"{path}: {name} is {value!r}, not a list of {kind.__name__}; it is no sweep's plan"
            )
        if len(set(value)) < len(value):
            raise ValueError(f"{path}: {name} names something twice ({value}); a plan names everything once")
    if not all(isinstance(content.get(name), str) for name in ("name", "model")):
        raise ValueError(f"{path} has no name and model; it is no sweep's plan")
    margin = content.get("equivalence_margin", 0.3)
    if isinstance(margin, bool) or not isinstance(margin, int | float) or not 0 < margin < 100:
        raise ValueError(f"{path}: equivalence_margin is {margin!r}; give points above 0, such as 0.3")
    contrasts = content.get("contrasts")
    if contrasts is not None:
        try:
            contrasts = read_contrasts(contrasts, content["arms"])
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    return Plan(
        name=content["name"],
        model=content["model"],
        **{name: tuple(content[name]) for name in lists},
        description=content.get("description") or "",
        baseline=content.get("baseline") or "sensitivity",
        margin=float(margin),
        contrasts=contrasts,
        recipe=content.get("recipe") or {},
        overrides=content.get("overrides") or {},
        tuning=content.get("tuning"),
        environment=content.get("environment") or {},
        amended=tuple(content.get("amended") or ()),
    )


def _read_run(place: Path, task: str, arm: str, seed: int) -> Run:
    path = place / "result.json"
    result = read_object(path)
    absent = [key for key in RESULT_KEYS if key not in result]
    if absent:
        raise ValueError(f"{path} has no {absent[0]!r}: it is no result of a run; delete its folder")
    named = (result["task"], result["arm"], result["seed"])
    if named != (task, arm, seed):
        raise ValueError(
            f"{path} is of {named[0]} {named[1]} seed {named[2]}, which its folder does not say; move it back"
        )
    primary = result["primary"]
    if isinstance(primary, bool) or not isinstance(primary, int | float) or not -1 <= primary <= 1:
        raise ValueError(f"{path}: primary is {primary!r}, not a fraction; run it again")
    return run_of(place, result)


def run_of(place: Path, result: dict[str, Any]) -> Run:
    """The run in a folder, whose result.json is read already."""
    config = read_object(place / "config.json") if (place / "config.json").is_file() else {}
    return Run(
        folder=place,
        result=result,
        settings=config.get("settings") or {},
        environment=config.get("environment") or {},
    )


def _verdicts_before(path: Path) -> dict[str, Any] | None:
    """{"method": words, "verdicts": [{"task", "a", "b", "holm_p", "verdict"}, ...]}; None without a file."""
    if not path.is_file():
        return None
    content = read_object(path)
    kinds = {"task": str, "a": str, "b": str, "holm_p": int | float, "verdict": str}
    entries = content.get("verdicts")
    whole = isinstance(content.get("method"), str) and isinstance(entries, list) and all(
        isinstance(entry, dict) and all(isinstance(entry.get(k), kind) for k, kind in kinds.items())
        for entry in entries
    )  # fmt: skip
    if not whole:
        raise ValueError(f"{path} holds no method and verdicts of an earlier report; restore or delete it")
    return content


def _why_missing(place: Path) -> tuple[str, str]:
    failed = failure_of(place)
    if failed.is_file():
        reason = str(read_object(failed).get("error") or "no reason was written")
        return "failed", " ".join(reason.split())
    if working_of(place).is_dir():
        return "unfinished", "it was begun and is not complete; the sweep's command resumes it"
    if place.is_dir():
        return "unfinished", "its folder has no result.json"
    return "not started", ""


def _unplanned(folder: Path, plan: Plan) -> tuple[str, ...]:
    planned = {f"{t}/{a}-seed{s}" for t in plan.tasks for a in plan.arms for s in plan.seeds}
    found = (path.parent.relative_to(folder).as_posix() for path in folder.glob("*/*/result.json"))
    return tuple(sorted(
        name for name in found if name not in planned and not name.startswith("tuning/") and "/." not in name
    ))  # fmt: skip
