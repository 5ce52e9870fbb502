"""The report's tables of results: end of training, best checkpoint, published numbers."""

from itertools import groupby

from .beside import Beside, tables_beside
from .cells import Cell, averages, checkpoint_cell, metric_cell, metric_names, primary_cell
from .collect import Run, Sweep
from .contrasts import AVERAGE, Contrasts
from .published import CONVENTIONS
from .tables import (
    average_heading,
    markdown,
    metric_name,
    model_warning,
    sample_warning,
    task_heading,
    task_name,
    winners,
)

NEAR = 5  # points above the majority class within which a task counts as not learnt


def results(sweep: Sweep, contrasts: Contrasts) -> str:
    """Arm × task at the end of training; who is best, or that it is a tie; every metric; GLUE averages."""
    best, tasks = winners(sweep, contrasts), sweep.plan.tasks
    several = len(tasks) > 1
    head = ["arm", *(task_heading(sweep, task) for task in tasks)]
    head += [average_heading(sweep)] if several else []
    rows = []
    for arm in sweep.plan.arms:
        cells = {task: primary_cell(sweep, task, arm) for task in tasks}
        if several:
            cells[AVERAGE] = averages(sweep, arm).here
        rows.append([
            arm,
            *(f"**{c.text()}**" if best[t] == [arm] else c.text() for t, c in cells.items()),
        ])  # fmt: skip
    note = (
        f"At the end of training, in points: mean ± standard deviation (n − 1) over {len(sweep.plan.seeds)} "
        "seed(s). Bold: the 95 % interval of the lead over every other arm excludes 0 (not corrected for the "
        "number of arms, and no verdict: those are below)."
    )
    if several:
        note += " The average is over complete rows only, and no published average is comparable with it."
    parts = [markdown(head, rows), note, intervals(sweep, contrasts), chance(sweep), ties(best)]
    parts += [_glue(sweep), _details(sweep)]
    return "\n\n".join(filter(None, parts))


def intervals(sweep: Sweep, contrasts: Contrasts) -> str:
    """The 95 % interval of every arm's own mean, folded away, with what it is and what it is not."""
    if not contrasts.intervals:
        return ""
    rows = []
    for arm in sweep.plan.arms:
        own = [contrasts.intervals.get((task, arm)) for task in sweep.plan.tasks]
        rows.append([arm, *("–" if each is None else f"{each[0]:.2f} to {each[1]:.2f}" for each in own)])
    table = markdown(["arm", *(task_heading(sweep, task) for task in sweep.plan.tasks)], rows)
    seeds = {len(sweep.of(task, arm)) for task, arm in contrasts.intervals}
    text = (
        "By t with the same standard error as the contrasts below, of each arm's mean: seeds and the rows of "
        "the development set have their chance. "
    )
    if 1 in seeds:
        text += (
            "**Of a single seed the interval holds the chance of the examples alone, not that of the "
            "training.** "
        )
    text += (
        "Arms share seeds and examples: whether two of them differ is for the contrasts to say, not for the "
        "overlap of their intervals."
    )
    title = "95 % interval of each arm's own mean"
    return f"<details><summary>{title}</summary>\n\n{table}\n\n{text}\n\n</details>"


def chance(sweep: Sweep) -> str:
    """What the majority class alone gives, on which tasks no arm is far from it, and which arms ended there
    on a task that others learnt.
    """
    found = {task: value for task in sweep.plan.tasks if (value := _majority(sweep, task)) is not None}
    if not found:
        return ""
    near = [task for task, value in found.items() if _best(sweep, task) < value + NEAR]
    text = "The majority class alone gives " + ", ".join(f"{task_name(t)} {v:.2f}" for t, v in found.items())
    if near:
        text += (
            f". **No arm is {NEAR} points above it on {', '.join(map(task_name, near))}: near chance, so "
            "comparisons there say nothing about the arms**"
        )
    collapsed = [
        f"{arm} on {task_name(task)} ({count} of {len(sweep.of(task, arm))} runs)"
        for task, value in found.items()
        if task not in near
        for arm in sweep.plan.arms
        if (count := sum(abs(run.points - value) < 0.01 for run in sweep.of(task, arm).values()))
    ]
    if collapsed:
        text += (
            f". **Collapsed to it where other arms learnt the task: {', '.join(collapsed)}; what is said of "
            "them there, and on the average, is about their settings (often a learning rate too high) and "
            "not about the method**"
        )
    return text + "."


def _best(sweep: Sweep, task: str) -> float:
    means = [primary_cell(sweep, task, arm).mean for arm in sweep.plan.arms]
    return max((mean for mean in means if mean is not None), default=float("inf"))


def _majority(sweep: Sweep, task: str) -> float | None:
    """The primary metric of the most frequent label, in points; None where the runs do not say."""
    metric = sweep.primary_metric(task)
    if metric == "matthews":
        return 0.0
    for run in sweep.task_runs(task) if metric == "accuracy" else ():
        splits = [(run.result.get("splits") or {}).get(name) or {} for name in run.result["metrics"]]
        counts = [list((split.get("label_counts") or {}).values()) for split in splits]
        if counts and all(counts):
            return sum(100 * max(own) / sum(own) for own in counts) / len(counts)
    return None


def ties(best: dict[str, list[str]]) -> str:
    """Of `winners`: the tasks on which no arm leads beyond chance, and the arms that share the lead there."""
    lines = [
        f"- {task_name(task)}: {arms[0]}, and {', '.join(arms[1:])}."
        for task, arms in best.items()
        if len(arms) > 1
    ]
    if not lines:
        return ""
    return "\n".join(
        [
            "No arm leads beyond chance here: the highest mean, and the arms that the 95 % interval (not "
            "corrected) does not tell apart from it, which is not to say that they are alike:",
            "",
            *lines,
        ]
    )


def _glue(sweep: Sweep) -> str:
    rows = []
    for arm in sweep.plan.arms:
        values = averages(sweep, arm).glue
        if all(value is not None for value in values.values()):
            rows.append((arm, *(f"{values[name]:.2f}" for name in CONVENTIONS)))
    if not rows:
        return ""
    head = ("arm", "nine columns (MNLI m and mm apart, QQP accuracy)", "eight columns (MNLI one, QQP acc/F1)")
    return (
        "GLUE averages, in both conventions that are in use; they are not comparable with each other:\n\n"
        + markdown(head, rows)
    )


def _details(sweep: Sweep) -> str:
    head, columns = ["arm"], []
    for task in sweep.plan.tasks:
        names = metric_names(sweep, task)
        if len(names) > 1:
            for split, name in names:
                part = split.removeprefix("validation").strip("_")
                head.append(" ".join(filter(None, (task_name(task), part, metric_name(name)))))
                columns.append((task, split, name))
    if not columns:
        return ""
    rows = [
        [arm, *(metric_cell(sweep, task, arm, split, name).text() for task, split, name in columns)]
        for arm in sweep.plan.arms
    ]
    return "Every metric of the tasks that have several:\n\n" + markdown(head, rows)


def checkpoints(sweep: Sweep) -> str:
    """The best epoch by the development set itself, as papers report it."""
    rows = [
        [arm, *(checkpoint_cell(sweep, task, arm).text() for task in sweep.plan.tasks)]
        for arm in sweep.plan.arms
    ]
    if not any(checkpoint_cell(sweep, t, a).seeds for t in sweep.plan.tasks for a in sweep.plan.arms):
        return "No run recorded its epochs."
    note = (
        "Each run's best epoch is chosen on the same development set on which it is then reported, which "
        "flatters every arm; papers often report this. Before the final mask an AdaLoRA model also holds "
        "more than its final budget. The contrasts below are of the end of training."
    )
    ends = [_ends_best(run) for run in sweep.runs.values()]
    if all(ends):
        note += (
            " Every run is best at its last epoch: this table repeats the one above, nothing is flattered, "
            "and training may have been too short for all or some arms."
        )
    head = ["arm", *(task_heading(sweep, task) for task in sweep.plan.tasks)]
    return f"{markdown(head, rows)}\n\n{note}"


def _ends_best(run: Run) -> bool:
    best = run.result.get("best_epoch")
    return not best or 100 * best["primary"] <= run.points


def beside_published(sweep: Sweep) -> str:
    """This sweep's rows below the published ones, with what makes them incomparable; numbers of the same
    model come first.
    """
    shown = tables_beside(sweep)
    if not shown:
        return "No published table has the tasks of this sweep and those of its arms whose runs are complete."
    parts = [_bold(sample_warning(sweep))]
    for _, group in groupby(shown, key=lambda beside: beside.table.model):
        tables = list(group)
        parts.append(_bold(model_warning(sweep, tables[0])))
        parts += [_published_part(sweep, beside) for beside in tables]
    return "\n\n".join(filter(None, parts))


def _bold(text: str) -> str:
    return f"**{text}**" if text else ""


def _published_part(sweep: Sweep, beside: Beside) -> str:
    table, columns, averaged = beside.table, beside.columns, beside.averages
    rows = []
    for row in beside.rows:
        cells = [_number(row.values.get(column.key)) for column in columns]
        rows.append([row.label, "published", *cells, *([_number(row.average)] if averaged else [])])
    for arm, own in beside.own.items():
        cells = [_mean(own.get(column.key)) for column in columns]
        rows.append([arm, "here", *cells, *([_mean(averaged.get(arm))] if averaged else [])])
    stars = [column.heading + ("*" if sweep.is_sample(column.task) else "") for column in columns]
    head = ["method", "", *stars, *([f"average ({table.convention} columns)"] if averaged else [])]
    words = f"{table.title}. Source: {table.source}; seeds: {table.seeds}. {table.notes}"
    return f"{words}\n\n{markdown(head, rows, left=2)}"


def _mean(cell: Cell | None) -> str:
    return _number(cell.mean if cell else None)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"
