"""The report's tables of results: end of training, best checkpoint, published numbers, contrasts."""

from collections import Counter
from itertools import groupby

from .beside import Beside, tables_beside
from .cells import (
    Cell,
    averages,
    checkpoint_cell,
    metric_cell,
    metric_names,
    primary_cell,
)
from .contrasts import AVERAGE, Contrast, Contrasts
from .published import CONVENTIONS
from .statistics import DIFFERS
from .sweep import NULLS, Run, Sweep
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

CLUSTERED = ("mnli", "qnli", "squad", "squad_v2")  # several examples about one premise or passage
NEAR = 5  # points above the majority class within which a task counts as not learnt
FOLDED = 12  # rows from which a table is folded away


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
        "number of arms; the corrected comparisons are below)."
    )
    if several:
        note += " The average is over complete rows only, and no published average is comparable with it."
    parts = [markdown(head, rows), note, intervals(sweep, contrasts), _chance(sweep), _ties(best)]
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
        f"Percentiles of the same {contrasts.replicates:,} bootstrap replicates as the contrasts' below, of "
        "each arm's mean: seeds drawn with replacement, and one resample of the development set that all "
        "share. "
    )
    if seeds != {1}:
        text += (
            "K seeds cannot be resampled to more than they are, so with few seeds these intervals are too "
            "narrow. "
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


def _chance(sweep: Sweep) -> str:
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


def _ties(best: dict[str, list[str]]) -> str:
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


def how_compared(sweep: Sweep, contrasts: Contrasts) -> str:
    """The method of the contrasts in words, with the warnings that the numbers of seeds call for."""
    seeds = min((contrast.seeds for contrast in contrasts.all), default=len(sweep.plan.seeds))
    margin = sweep.plan.margin
    pairs = len(sweep.plan.arms) * (len(sweep.plan.arms) - 1) // 2
    text = (
        "Differences are in points of the primary metric at the end of training. Seeds are paired: the same "
        "initial head and order of the data; only seeds that both arms have enter. Intervals and p are the "
        "wider and the larger of two methods. (1) A hierarchical paired bootstrap with "
        f"{contrasts.replicates:,} replicates: each draws seeds with replacement, and one resample of the "
        "development set that all arms and seeds of the replicate share (all runs are evaluated on the same "
        "examples, so seeds and examples are crossed). (2) Student's t, because a few seeds cannot be "
        "resampled to more than they are: the seeds' variance is the pair's own or that of all pairs pooled, "
        "whichever is larger, and the examples' variance is the bootstrap's. contrasts.csv has both. For the "
        "average over tasks the bootstrap draws each task on its own, and t takes each seed's average; it "
        "speaks of these tasks, not of others. p is two-sided; Holm's correction is over the (up to) "
        f"{pairs} pairs of a task, and over those of the average. Verdicts: *differs* where Holm's p < "
        f"{DIFFERS:g}; *equivalent within ±{margin:g}* where the 90 % interval, which is then given, lies "
        "inside (two one-sided tests at 5 %, not corrected for their number); otherwise *not decided*: too "
        "few data, or too spread ones, to say either; not that the arms are alike."
    )
    if sweep.plan.tuning is None:
        text += (
            "\n\nLearning rates were not tuned per arm: all arms of a task have one setting, but for what "
            "the recipe says of an arm itself (learning rate or scale). An arm that needs another rate loses "
            "by that, and one that has a setting of its own may gain by it."
        )
    clustered = [task_name(task) for task in sweep.plan.tasks if task in CLUSTERED]
    if clustered:
        text += (
            "\n\nExamples about one passage or premise are taken as independent, which they are not quite: "
            f"intervals on {', '.join(clustered)} are somewhat too narrow."
        )
    if seeds == 1:
        text += (
            "\n\n**One seed: the intervals hold the chance of the examples only, not that of the training, "
            "and nothing is decided.**"
        )
    elif seeds < 5:
        text += (
            f"\n\n**{seeds} seeds are few: the seeds' variance is known only as far as all arms have about "
            "the same, and only large differences can be told from chance.**"
        )
    return text


def pairwise(sweep: Sweep, contrasts: Contrasts) -> str:
    """Everything against the baseline, then all pairs, folded where they are many."""
    baseline = sweep.plan.baseline
    tasks = [task for task in (*sweep.plan.tasks, AVERAGE) if contrasts.of(task)]
    parts = [how_compared(sweep, contrasts)]
    if not tasks:
        parts.append("There is nothing to compare yet: no two arms have a complete run of the same seed.")
        return "\n\n".join(parts)
    if baseline in sweep.plan.arms:
        against = [c for task in tasks for c in contrasts.of(task) if c.b == baseline]
        parts += [f"Against {baseline}:", contrast_table(against), _count(against, baseline)]
    everything = contrast_table([contrast for task in tasks for contrast in contrasts.of(task)])
    if len(contrasts.all) >= FOLDED:
        parts.append(
            f"<details><summary>All {len(contrasts.all)} pairs</summary>\n\n{everything}\n\n</details>"
        )
    else:
        parts += ["All pairs:", everything]
    return "\n\n".join(filter(None, parts))


def against_nulls(sweep: Sweep, contrasts: Contrasts) -> str:
    """Every score minus what does not look at importance: uniform ranks, random triplets, plain LoRA."""
    every = (*NULLS, "lora")
    rivals = [arm for arm in every if arm in sweep.plan.arms]
    if not rivals or not sweep.plan.scores:
        return "The plan has no uniform, random or lora arm to set the scores against."
    found, rows = [], []
    for task in (*sweep.plan.tasks, AVERAGE):
        for score in sweep.plan.scores:
            own = [contrasts.between(task, score, rival) for rival in rivals]
            if any(own):
                rows.append((task_name(task), score, *("–" if c is None else _brief(c) for c in own)))
                found += [contrast for contrast in own if contrast is not None]
    if not found:
        return "There is nothing to compare yet."
    parts = [
        "Score minus rival in points, its 95 % interval, and the verdict as above.",
        markdown(("task", "score", *(f"− {rival}" for rival in rivals)), rows, left=2),
    ]
    parts += [_count([c for c in found if c.b == rival], rival) for rival in rivals]
    absent = [arm for arm in every if arm not in rivals]
    if absent:
        parts.append(f"Not in the plan: {', '.join(absent)}.")
    return "\n\n".join(parts)


def _brief(contrast: Contrast) -> str:
    e = contrast.estimate
    return f"{signed(e.value)} ({signed(e.bounds.low)} to {signed(e.bounds.high)}): {_verdict(contrast)}"


def _verdict(contrast: Contrast) -> str:
    """With the 90 % interval where it says that two arms are alike."""
    e = contrast.estimate
    if contrast.verdict in ("differs", "not decided"):
        return contrast.verdict
    return f"{contrast.verdict} (90 %: {signed(e.bounds.low90)} to {signed(e.bounds.high90)})"


def signed(value: float) -> str:
    """Two decimals with a sign, and none for what rounds to zero."""
    text = f"{value:+.2f}"
    return "0.00" if float(text) == 0 else text


def contrast_table(found: list[Contrast]) -> str:
    rows = []
    for contrast in found:
        e = contrast.estimate
        rows.append((
            task_name(contrast.task), f"{contrast.a} − {contrast.b}", _verdict(contrast), contrast.seeds,
            signed(e.value), f"{signed(e.bounds.low)} to {signed(e.bounds.high)}",
            probability(e.bounds.p), probability(contrast.holm_p),
        ))  # fmt: skip
    head = ("task", "arms", "verdict", "seeds", "difference", "95 % interval", "p", "Holm's p")
    return markdown(head, rows, left=3)


def probability(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def _count(found: list[Contrast], rival: str) -> str:
    """How many of these differences went which way, in one sentence."""
    if not found:
        return f"Nothing is complete enough to be set against {rival}."
    kinds = Counter(
        ("better" if c.estimate.value > 0 else "worse")
        if c.verdict.startswith("differs")
        else c.verdict.split()[0]
        for c in found
    )
    words = {
        "better": f"better than {rival}",
        "worse": f"worse than {rival}",
        "equivalent": "equivalent within the margin",
        "not": "not decided",
    }
    counted = ", ".join(f"{kinds[kind]} {text}" for kind, text in words.items() if kinds[kind])
    return f"Of {len(found)} differences from {rival} (tasks and average): {counted}."
