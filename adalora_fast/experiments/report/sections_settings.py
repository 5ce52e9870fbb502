"""The report's tables of settings: what decided the runs of every task, and how every arm took its scores."""

from collections.abc import Iterator
from dataclasses import asdict, fields
from typing import Any

from adalora_fast.experiments.data.tasks import TASKS
from adalora_fast.experiments.settings.recipes import Recipe, recipe_of
from adalora_fast.experiments.settings.settings import LOW_RANK, NULLS, OTHER_METHODS

from .collect import Sweep, distinct
from .tables import markdown, task_name

ALLOCATING = ("adalora", "peft")
# Settings that play a role for some methods or kinds of task only.
METHODS = {
    **dict.fromkeys(("target_r", "scale", "matrices", "adapter_dropout"), LOW_RANK),
    **dict.fromkeys(("init_r", "tinit", "tfinal", "deltaT", "orth_reg_weight", "beta1", "beta2"), ALLOCATING),
    "bottleneck": ("houlsby", "fusion"),
    "virtual_tokens": ("prompt", "prefix", "p_tuning"),
}
KINDS = {
    **dict.fromkeys(("stride", "n_best", "max_answer_length"), "question_answering"),
    "beams": "translation",
}


def settings(sweep: Sweep) -> str:
    """Every setting that decided a run, by task, as the runs had it; of a task without a run as the plan says
    it. What an older run does not name had the default.
    """
    tasks = sweep.plan.tasks
    recipes = {task: list(_recipes(sweep, task)) for task in tasks}
    rows = []
    for field in fields(Recipe):
        cells = [_values(recipes[task], task, field.name) for task in tasks]
        if any(cells):
            rows.append((field.name, *(cell or "–" for cell in cells)))
    words = (
        "Settings, as the runs had them (several values: they differ between runs; –, or no line: it decided "
        "nothing, or was left as the model and the data have it):"
    )
    return f"{words}\n\n{markdown(('setting', *map(task_name, tasks)), rows)}"


def scores(sweep: Sweep) -> str:
    """Score, smoothing and gradient of the arms that allocate by a score; "" without a run of one."""
    rows = []
    for arm in sweep.plan.arms:
        runs = [run.settings for run in sweep.runs.values() if run.arm == arm and "score" in run.settings]
        if runs and _method(arm) in ALLOCATING and arm.partition("-")[0] not in NULLS:
            rows.append((
                arm,
                distinct(run["score"] for run in runs),
                distinct(run.get("smoothing") or _own_smoothing(run["score"]) for run in runs),
                distinct(run.get("score_gradient", "total") for run in runs),
            ))  # fmt: skip
    if not rows:
        return ""
    words = (
        "How the arms scored (gradient: *total* is with the orthogonality term, as in PEFT, *task* without "
        "it):"
    )
    return f"{words}\n\n{markdown(('arm', 'score', 'smoothing', 'gradient'), rows, left=4)}"


def _recipes(sweep: Sweep, task: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(method, recipe) of every run of the task, of every planned arm where there is none."""
    known = [run for run in sweep.task_runs(task) if run.settings.get("recipe")]
    for run in known:
        yield _method(run.arm), asdict(Recipe()) | run.settings["recipe"]
    if not known:
        plan = sweep.plan
        for arm in plan.arms:
            yield _method(arm), asdict(recipe_of(plan.recipe, plan.name, task, arm, **plan.overrides))


def _method(arm: str) -> str:
    name = arm.partition("-")[0]
    return name if name in OTHER_METHODS else "adalora"


def _values(recipes: list[tuple[str, dict[str, Any]]], task: str, name: str) -> str:
    """The distinct values of a setting among the runs that it decides; "" where it decides none."""
    kind = TASKS[task].kind if task in TASKS else ""
    if KINDS.get(name, kind) != kind:
        return ""
    values = [recipe[name] for method, recipe in recipes if method in METHODS.get(name, (method,))]
    if name == "matrices":
        values = ["all" if value is None else " + ".join(value) for value in values]
    return distinct(value for value in values if value is not None and value is not False)


def _own_smoothing(score: str) -> str:
    """The score's default; a registered score may be unknown here."""
    from adalora_fast.allocator.scores import get_score, score_names  # loads torch

    return f"{get_score(score).smoothing} (its own)" if score in score_names() else "its own"
