"""The report's words about what was run, what is missing, and how to make it again."""

import shlex
from dataclasses import asdict
from datetime import datetime
from typing import Any

from adalora_fast.experiments.settings.recipes import GRID, recipe_of
from adalora_fast.experiments.sweep.learning_rates import Tuning
from adalora_fast.integrations.model_card import shown_base

from .collect import Plan, Run, Sweep, commands_of, distinct, output_of
from .sections_settings import scores, settings
from .tables import markdown, task_name

STATES = ("failed", "unfinished", "not started")  # what needs a look comes first
SAMPLE = "Trained or evaluated on a sample of the official data: not comparable with published numbers."
FEW = 8  # runs that are named one by one


def what_was_run(sweep: Sweep) -> str:
    """Plan, model, dates, machine and versions; the recipe of every task as its runs had it; tuning."""
    plan = sweep.plan
    parts = [plan.description] if plan.description else []
    parts += [warning] if (warning := changed_warning(plan)) else []
    parts.append(markdown(("", ""), run_facts(sweep), left=2))
    if any(sweep.is_sample(task) for task in plan.tasks):
        parts.append(f"\\* {SAMPLE}")
    parts.append(_data(sweep))
    parts += [settings(sweep), scores(sweep)]
    if plan.tuning:
        parts.append(_tuning(sweep))
    parts += [
        f"The plan grew on {entry.get('at', 'an unknown date')} by "
        + "; ".join(
            f"{name} {', '.join(map(_added, entry[name]))}"
            for name in (*GRID, "contrasts")
            if entry.get(name)
        )
        + "."
        for entry in plan.amended
    ]
    parts.append(_beside_the_plan(sweep))
    return "\n\n".join(filter(None, parts))


def run_facts(sweep: Sweep) -> list[tuple[str, str]]:
    """(what, its value): plan, model, dates, commits, machines and versions."""
    plan, runs = sweep.plan, list(sweep.runs.values())
    planned = len(plan.tasks) * len(plan.arms) * len(plan.seeds)
    places = [run.environment for run in runs] or [plan.environment]
    started = sorted(place["started"] for place in places if isinstance(place.get("started"), str))
    return [
        ("model", distinct(shown_base(run.result["model"]) for run in runs) or shown_base(plan.model)),
        ("arms", ", ".join(plan.arms)),
        ("tasks", ", ".join(task_name(t) + ("*" if sweep.is_sample(t) else "") for t in plan.tasks)),
        ("seeds", ", ".join(map(str, plan.seeds))),
        ("runs", f"{len(runs)} of {planned} complete"),
        (
            "started",
            started[0] + (f" to {started[-1]}" if started[-1] != started[0] else "") if started else "–",
        ),
        ("commit", distinct(p.get("commit") or "unknown" for p in places)),
        ("machine", distinct(map(machine_of, places))),
        ("base weights", distinct(run.settings.get("dtype", "float32") for run in runs) or "–"),
        ("versions", distinct(map(versions_of, places))),
    ]


def changed_warning(plan: Plan) -> str:
    """What of the recipe's description the plan's overrides make untrue; "" if nothing."""
    changes = changed_from_the_recipe(plan)
    changed = ", ".join(f"{name} = {value}" for name, value in changes.items())
    return f"**Changed from the recipe, whatever is said of it above: {changed}.**" if changes else ""


def _added(value: Any) -> str:
    """A task, arm or seed; a contrast is a pair of arms."""
    return " − ".join(value) if isinstance(value, list) else str(value)


def changed_from_the_recipe(plan: Plan) -> dict[str, Any]:
    """The overrides of the plan that differ from what its recipe says of a planned task and arm."""
    changed: set[str] = set()
    for task in plan.tasks:
        for arm in plan.arms:
            try:
                before = asdict(recipe_of(plan.recipe, plan.name, task, arm))
                after = asdict(recipe_of(plan.recipe, plan.name, task, arm, **plan.overrides))
            except ValueError:  # the recipe alone is not valid, so every override may be what makes it so
                return plan.overrides
            changed |= {name for name in before if before[name] != after[name]}
    return {name: value for name, value in plan.overrides.items() if name in changed}


def _beside_the_plan(sweep: Sweep) -> str:
    """What of the recipe's grid was not planned, and which runs are older than the plan."""
    plan, lines = sweep.plan, []
    left = {
        name: [v for v in (plan.recipe.get("grid") or {}).get(name) or [] if v not in getattr(plan, name)]
        for name in GRID
    }
    if any(left.values()):
        absent = "; ".join(f"{name} {', '.join(map(str, values))}" for name, values in left.items() if values)
        lines.append(f"Of the recipe's grid, the plan leaves out: {absent}.")
    written = plan.environment.get("started")
    older = [
        f"{run.task}/{run.folder.name}"
        for run in sweep.runs.values()
        if isinstance(written, str)
        and isinstance(run.environment.get("started"), str)
        and datetime.fromisoformat(run.environment["started"]) < datetime.fromisoformat(written)
    ]
    if older:
        which = (
            ", ".join(sorted(older)) if len(older) <= FEW else f"{len(older)} of the {len(sweep.runs)} runs"
        )
        lines.append(f"Begun before plan.json was written ({written}), so not planned by it: {which}.")
    return "\n\n".join(lines)


def machine_of(environment: dict[str, Any]) -> str:
    """Its graphics processors, or else its processor and the threads in use."""
    machine = environment.get("machine") or {}
    gpus = ", ".join(machine.get("gpus") or [])
    threads = f", {machine['threads']} thread(s)" if machine.get("threads") and not gpus else ""
    return (gpus or machine.get("processor") or "unknown") + threads


def versions_of(environment: dict[str, Any]) -> str:
    """Such as "python 3.11.7 torch 2.13.0"; "unknown" where none were written."""
    versions = environment.get("versions") or {}
    names = ("python", "torch", "transformers", "peft", "adalora_fast")
    return " ".join(f"{name} {versions[name]}" for name in names if name in versions) or "unknown"


def _data(sweep: Sweep) -> str:
    rows = []
    for task in sweep.plan.tasks:
        splits: dict[str, list[dict]] = {}
        for run in sweep.task_runs(task):
            for name, split in (run.result.get("splits") or {}).items():
                splits.setdefault(name, []).append(split)
        for name, found in splits.items():
            counts = distinct(f"{split.get('rows', 0):,}" for split in found)
            kind = "a sample" if any(split.get("sample") for split in found) else "whole"
            rows.append((task_name(task), name, kind, counts))
    return "Data:\n\n" + markdown(("task", "split", "", "rows"), rows, left=3) if rows else ""


def _tuning(sweep: Sweep) -> str:
    tuning, chosen = Tuning.of(sweep.plan.tuning), sweep.tuned or {}
    own = {arm: tuning.rates(arm) for arm in sweep.plan.arms}
    others = [f"{_listed(rates)} for {arm}" for arm, rates in own.items() if rates != tuning.learning_rates]
    lines = [
        f"Every arm's learning rate was chosen from {_listed(tuning.learning_rates)}"
        + (f" ({'; '.join(others)})" if others else "")
        + f" on {tuning.held_out:.0%} of the training data, which was held out, with "
        f"{len(tuning.seeds)} seed(s); the development set had no part in it."
    ]
    if not chosen:
        return lines[0] + " tuned.json is not there yet."
    rows = [(arm, *(_chosen(chosen, task, arm) for task in sweep.plan.tasks)) for arm in sweep.plan.arms]
    lines.append(markdown(("arm", *map(task_name, sweep.plan.tasks)), rows))
    edges = [
        f"{arm} on {task_name(task)}"
        for task in sweep.plan.tasks
        for arm in sweep.plan.arms
        if len(own[arm]) > 1 and _rate(chosen, task, arm) in (min(own[arm]), max(own[arm]))
    ]
    if edges:
        lines.append(
            "The choice lies at an end of the list, so a better one may lie beyond, for "
            + ", ".join(edges)
            + "."
        )
    return "\n\n".join(lines)


def _listed(rates: tuple[float, ...]) -> str:
    return ", ".join(f"{rate:g}" for rate in rates)


def _rate(chosen: dict[str, Any], task: str, arm: str) -> float | None:
    return ((chosen.get(task) or {}).get(arm) or {}).get("learning_rate")


def _chosen(chosen: dict[str, Any], task: str, arm: str) -> str:
    rate = _rate(chosen, task, arm)
    return "–" if rate is None else f"{rate:g}"


def what_is_missing(sweep: Sweep, remarks: tuple[str, ...]) -> str:
    """Failed, unfinished and absent runs with their reason; what was found and not used."""
    parts = []
    if sweep.missing:
        seeds: dict[tuple[str, ...], list[int]] = {}
        for entry in sorted(sweep.missing, key=lambda entry: STATES.index(entry.state)):
            key = (task_name(entry.task), entry.arm, entry.state, entry.reason or "–")
            seeds.setdefault(key, []).append(entry.seed)
        rows = [(*key[:2], ", ".join(map(str, own)), *key[2:]) for key, own in seeds.items()]
        parts.append(
            f"{len(sweep.missing)} planned run(s) are missing. Means are over the seeds that are there, "
            "marked with their number; averages over tasks are given for arms without a missing run only."
        )
        parts.append(markdown(("task", "arm", "seeds", "state", "reason"), rows, left=5))
    else:
        parts.append("Nothing: every planned run is complete.")
    if sweep.unplanned:
        parts.append(
            f"Complete runs that the plan does not name, and that are left out: {', '.join(sweep.unplanned)}."
        )
    parts.extend(remark + "." for remark in remarks)
    return "\n\n".join(parts)


def costs(sweep: Sweep) -> str:
    """Trained parameters, total rank and time per arm and task; time is of the machine named above."""
    rows = []
    for task in sweep.plan.tasks:
        for arm in sweep.plan.arms:
            runs = list(sweep.of(task, arm).values())
            if runs:
                rows.append((
                    task_name(task), arm,
                    *(_values(runs, name) for name in ("trainable_parameters", "total_rank", "steps")),
                    _mean(runs, "train_seconds"), _mean(runs, "seconds"),
                ))  # fmt: skip
    head = ("task", "arm", "parameters trained", "total rank", "steps", "training, s", "whole run, s")
    note = (
        "Seconds are means over seeds, with the evaluations and checkpoints of every epoch and the reading "
        "of ranks for the log, and beside whatever else the machine did: they are no benchmark of the arms"
    )
    resumed = [run for run in sweep.runs.values() if run.result.get("resumed")]
    left_out = sum(not _has_all_seconds(run) for run in resumed)
    if len(resumed) > left_out:
        note += f"; {len(resumed) - left_out} run(s) were resumed, and their seconds are those of all parts"
    if left_out:
        note += f"; {left_out} run(s) were resumed, and their seconds, those of the last part, are left out"
    return markdown(head, rows, left=2) + f"\n\n{note}." if rows else "No run is complete."


def _values(runs: list[Run], key: str) -> str:
    values = dict.fromkeys(run.result.get(key) for run in runs)
    return ", ".join("–" if not value else f"{value:,}" for value in values)


def _mean(runs: list[Run], key: str) -> str:
    values = [run.result[key] for run in runs if _has_all_seconds(run)]
    return f"{sum(values) / len(values):,.0f}" if values else "–"


def _has_all_seconds(run: Run) -> bool:
    """False for a resumed run of a version that wrote down the seconds of the last part alone."""
    return not run.result.get("resumed") or "part_seconds" in run.result


def commands(sweep: Sweep) -> str:
    lines = commands_of(sweep)
    own = f"adalora-fast report {shlex.quote(output_of(sweep))}"
    return "```bash\n" + "\n".join([*lines, own]) + "\n```"
