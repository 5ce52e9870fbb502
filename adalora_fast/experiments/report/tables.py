"""Tables as Markdown, CSV and LaTeX, and what goes into the CSV and LaTeX files."""

import csv
import io
from collections.abc import Sequence
from typing import Any

from adalora_fast.integrations.model_card import shown_base

from .beside import Beside, models_of, tables_beside
from .cells import Cell, averages, checkpoint_cell, metric_names, primary_cell
from .collect import Sweep
from .contrasts import AVERAGE, Contrasts, best_of
from .estimates import Estimate
from .power import Variances, smallest_difference
from .published import GLUE_TASKS, PublishedRow

NAMES = {
    "mrpc": "MRPC", "sst2": "SST-2", "cola": "CoLA", "rte": "RTE", "qnli": "QNLI", "qqp": "QQP",
    "wnli": "WNLI", "stsb": "STS-B", "mnli": "MNLI", "squad": "SQuAD", "squad_v2": "SQuAD 2",
    "wmt16_ro_en": "WMT16 En-Ro",
    AVERAGE: "average",
}  # fmt: skip


METRICS = {
    "accuracy": "accuracy", "f1": "F1", "matthews": "Matthews", "pearson": "Pearson", "spearman": "Spearman",
    "pearson_spearman": "Pearson/Spearman", "exact_match": "EM",
    "bleu": "BLEU", "chrf": "chrF",
}  # fmt: skip


def metric_name(metric: str) -> str:
    return METRICS.get(metric, metric.replace("_", " "))


def task_name(task: str) -> str:
    return NAMES.get(task, task)


def task_heading(sweep: Sweep, task: str) -> str:
    """Such as "MRPC accuracy", with a star where a split is a sample of the official data."""
    metric = metric_name(sweep.primary_metric(task))
    star = "*" if sweep.is_sample(task) else ""
    return " ".join(filter(None, (task_name(task), metric))) + star


def markdown(head: Sequence[str], rows: Sequence[Sequence[Any]], *, left: int = 1) -> str:
    """A table whose first `left` columns are texts and whose others are numbers."""
    lines = [head, ["---"] * left + ["---:"] * (len(head) - left), *rows]
    return "\n".join("| " + " | ".join(escape_markdown(str(cell)) for cell in line) + " |" for line in lines)


def escape_markdown(text: str) -> str:
    """Text that stays one cell of a table."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def escape_latex(text: str) -> str:
    """Text that stands for itself in LaTeX."""
    special = {character: f"\\{character}" for character in "&%$#_{}"} | {
        "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$",
        "–": "--", "|": r"\textbar{}", "<": r"$<$", ">": r"$>$", "λ": r"$\lambda$",
    }  # fmt: skip
    return "".join(special.get(character, character) for character in text)


def as_csv(rows: Sequence[dict[str, Any]]) -> str:
    """Every key of the first row is a column; None is empty."""
    file = io.StringIO()
    writer = csv.DictWriter(file, fieldnames=list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def result_rows(sweep: Sweep) -> list[dict[str, Any]]:
    """One row per planned run, complete or not; metrics are fractions, as in result.json."""
    metrics = list(dict.fromkeys(
        f"{split}/{name}" for task in sweep.plan.tasks for split, name in metric_names(sweep, task)
    ))  # fmt: skip
    missing = {(entry.task, entry.arm, entry.seed): entry for entry in sweep.missing}
    rows = []
    for task in sweep.plan.tasks:
        for arm in sweep.plan.arms:
            for seed in sweep.plan.seeds:
                run, gap = sweep.runs.get((task, arm, seed)), missing.get((task, arm, seed))
                result = run.result if run else {}
                own = {
                    f"{s}/{n}": v for s, part in result.get("metrics", {}).items() for n, v in part.items()
                }
                best = result.get("best_epoch") or {}
                rows.append({
                    "task": task, "arm": arm, "seed": seed,
                    "state": "complete" if gap is None else gap.state,
                    "reason": gap.reason if gap else "",
                    "model": result.get("model", sweep.plan.model),
                    **{name: result.get(name) for name in ("sample", "primary_metric", "primary")},
                    **{name: own.get(name) for name in metrics},
                    "best_epoch": best.get("epoch"), "best_primary": best.get("primary"),
                    "learning_rate": (run.settings.get("recipe") or {}).get("learning_rate") if run else None,
                    **{name: result.get(name) for name in (
                        "train_loss", "steps", "trainable_parameters", "total_rank", "train_seconds",
                        "seconds", "resumed",
                    )},
                })  # fmt: skip
    return rows


def table_rows(sweep: Sweep, contrasts: Contrasts) -> list[dict[str, Any]]:
    """One row per arm and task, and per arm for the averages, which have no interval; in points."""

    def row(arm: str, task: str, metric: str, end: Cell, best: Cell | None) -> dict[str, Any]:
        low, high = contrasts.intervals.get((task, arm), (None, None))
        return {
            "arm": arm, "task": task, "metric": metric, "mean": _rounded(end.mean), "std": _rounded(end.std),
            "low_95": _rounded(low), "high_95": _rounded(high),
            "seeds": end.seeds, "planned_seeds": end.planned,
            "best_checkpoint_mean": _rounded(best.mean) if best else None,
            "best_checkpoint_std": _rounded(best.std) if best else None,
        }  # fmt: skip

    rows = []
    for arm in sweep.plan.arms:
        for task in sweep.plan.tasks:
            end, best = primary_cell(sweep, task, arm), checkpoint_cell(sweep, task, arm)
            rows.append(row(arm, task, sweep.primary_metric(task), end, best))
        average = averages(sweep, arm)
        rows.append(row(arm, AVERAGE, "primary", average.here, None))
        for name, value in average.glue.items():
            if value is not None:
                cell = Cell(mean=value, std=None, seeds=average.here.seeds, planned=average.here.planned)
                rows.append(row(arm, f"glue_{name}_columns", "mixed", cell, None))
    return rows


def contrast_rows(contrasts: Contrasts) -> list[dict[str, Any]]:
    """One row per pair of arms and task; a minus b, in points."""
    return [
        {
            "task": contrast.task, "a": contrast.a, "b": contrast.b, "seeds": contrast.seeds,
            "difference": _rounded(contrast.estimate.value),
            "low_95": _rounded(bounds.low), "high_95": _rounded(bounds.high),
            "low_90": _rounded(bounds.low90), "high_90": _rounded(bounds.high90),
            **_error(contrast.estimate),
            "p": _rounded(bounds.p, 6), "declared": int(contrast.is_declared),
            "holm_p": _rounded(contrast.holm_p, 6), "verdict": contrast.verdict,
        }
        for contrast in contrasts.all
        for bounds in [contrast.estimate.bounds]
    ]  # fmt: skip


def published_rows(sweep: Sweep) -> list[dict[str, Any]]:
    """One row per published number of `tables_beside`, in points, with ours of the arm that corresponds to
    it: empty where the plan has no such arm, or its runs are not complete.
    """
    rows = []
    for beside in tables_beside(sweep):
        for row in beside.rows:
            own = beside.own.get(row.arm, {})
            found = [
                ((c.task, c.split, c.metric), [c.task], row.values[c.key], own.get(c.key))
                for c in beside.columns
                if c.key in row.values
            ]
            if beside.averages and row.average is not None:
                place = (f"glue_{beside.table.convention}_columns", "", "mixed")
                found.append((place, list(GLUE_TASKS), row.average, beside.averages.get(row.arm)))
            rows += [
                {
                    "table": beside.table.key, "source": beside.table.source, "model": beside.table.model,
                    "method": row.label, "task": task, "split": split, "metric": metric,
                    "published": published,
                    "our_arm": row.arm if row.arm in sweep.plan.arms else None,
                    "our_mean": _rounded(cell.mean) if cell else None,
                    "our_std": _rounded(cell.std) if cell else None,
                    "our_seeds": cell.seeds if cell else None,
                    "caveat": caveat(sweep, beside, tasks) if cell else None,
                }
                for (task, split, metric), tasks, published, cell in found
            ]  # fmt: skip
    return rows


def caveat(sweep: Sweep, beside: Beside, tasks: Sequence[str]) -> str:
    """What keeps our numbers of these tasks from being compared with the published ones; "" if nothing."""
    return ", ".join(
        words
        for words, holds in (
            ("other model", not beside.same_model),
            ("sample", any(map(sweep.is_sample, tasks))),
        )
        if holds
    )


def sample_warning(sweep: Sweep) -> str:
    samples = ", ".join(task_name(task) for task in sweep.plan.tasks if sweep.is_sample(task))
    return f"{samples}: trained or evaluated on a sample here, on all of the data there." if samples else ""


def model_warning(sweep: Sweep, beside: Beside) -> str:
    if beside.same_model:
        return ""
    return (
        f"The published numbers that follow are of {beside.table.model}, these are of "
        f"{', '.join(map(shown_base, models_of(sweep)))}: they do not measure the same thing."
    )


def _error(estimate: Estimate) -> dict[str, Any]:
    """Standard error, its degrees of freedom, and the variances that it is made of: in points, of one seed,
    of one example, and of what is left of one example of one seed; the smallest difference with 80 % power.
    """
    found = estimate.spread
    variances = Variances.of(found)
    parts = ("seeds", "examples", "rest")
    return {
        "standard_error": _rounded(float(found.square) ** 0.5, 6),
        "freedom": _rounded(float(found.freedom), 2),
        "examples": found.examples,
        **{f"variance_{part}": variances and _rounded(getattr(variances, part), 6) for part in parts},
        "smallest_seen": variances and _rounded(smallest_difference(variances, found.seeds, found.examples)),
    }


def _rounded(value: float | None, digits: int = 4) -> float | None:
    return None if value is None else round(value, digits) + 0.0  # + 0.0: no "-0.0"


def winners(sweep: Sweep, contrasts: Contrasts) -> dict[str, list[str]]:
    """By task (and "average"): the best arm, or all arms that tie for it; of complete cells only, and none
    where there are not two of them.
    """
    found = {}
    cells = {task: {a: primary_cell(sweep, task, a) for a in sweep.plan.arms} for task in sweep.plan.tasks}
    if len(sweep.plan.tasks) > 1:
        cells[AVERAGE] = {arm: averages(sweep, arm).here for arm in sweep.plan.arms}
    for task, own in cells.items():
        means = {arm: cell.mean for arm, cell in own.items() if cell.is_whole and cell.mean is not None}
        found[task] = best_of(contrasts, task, means) if len(means) > 1 else []
    return found


def average_heading(sweep: Sweep) -> str:
    """What the average over the sweep's own tasks is called; never the name of a published one."""
    glue = sum(task in GLUE_TASKS for task in sweep.plan.tasks)
    return f"average over the {len(sweep.plan.tasks)} tasks here" + (
        f" ({glue} of GLUE's {len(GLUE_TASKS)})" if glue else ""
    )


def latex(sweep: Sweep, contrasts: Contrasts) -> str:
    """The results table, published rows below ours, as a fragment for \\input; it needs booktabs."""
    best, several = winners(sweep, contrasts), len(sweep.plan.tasks) > 1
    head = [
        "arm",
        *(task_heading(sweep, task) for task in sweep.plan.tasks),
        *([AVERAGE] if several else []),
    ]
    lines = [
        f"% {escape_markdown(sweep.plan.name)}: mean ± standard deviation over seeds, in points. "
        "Needs \\usepackage{booktabs}.",
        f"\\begin{{tabular}}{{l{'r' * (len(head) - 1)}}}",
        "\\toprule",
        " & ".join(map(escape_latex, head)) + " \\\\",
        "\\midrule",
    ]
    for arm in sweep.plan.arms:
        cells = {task: primary_cell(sweep, task, arm) for task in sweep.plan.tasks}
        if several:
            cells[AVERAGE] = averages(sweep, arm).here
        row = [escape_latex(arm)]
        for task, cell in cells.items():
            text = escape_latex(cell.text())
            row.append(f"\\textbf{{{text}}}" if best[task] == [arm] else text)
        lines.append(" & ".join(row) + " \\\\")
    lines += _published_lines(sweep, len(head))
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}", ""])


def _published_lines(sweep: Sweep, width: int) -> list[str]:
    """Below a rule, every source's numbers of the table's columns, and what keeps them from being compared.
    No published average is of the tasks here.
    """
    lines = []
    for beside in tables_beside(sweep):
        table, rows = beside.table, []
        for row in beside.rows:
            values = [_published_primary(sweep, beside, row, task) for task in sweep.plan.tasks]
            if any(value is not None for value in values):
                cells = ["--" if value is None else f"{value:.2f}" for value in values]
                cells += ["--"] * (width - 1 - len(cells))
                rows.append(" & ".join([escape_latex(row.label), *cells]) + " \\\\")
        if not rows:
            continue
        why = caveat(sweep, beside, [column.task for column in beside.columns])
        title = table.title.partition(" (")[0] + ", published" + (f"; ours: {why}" if why else "")
        source = f"{table.title}. Source: {table.source}; seeds: {table.seeds}. {table.notes}"
        words = (source, sample_warning(sweep), model_warning(sweep, beside))
        lines += [
            "\\midrule",
            *(f"% {text}" for text in words if text),
            f"\\multicolumn{{{width}}}{{l}}{{\\emph{{{escape_latex(title)}}}}} \\\\",
            *rows,
        ]
    return lines


def _published_primary(sweep: Sweep, beside: Beside, row: PublishedRow, task: str) -> float | None:
    """The published number that our primary metric corresponds to: for MNLI the mean of both parts."""
    keys = [c.key for c in beside.columns if (c.task, c.metric) == (task, sweep.primary_metric(task))]
    values = [row.values[key] for key in keys if key in row.values]
    return sum(values) / len(values) if values and len(values) == len(keys) else None
