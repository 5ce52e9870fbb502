"""report.md: every section in order, from the numbers only."""

from collections.abc import Sequence

from .collect import Sweep
from .contrasts import Contrasts
from .sections_contrasts import against_nulls, pairwise, verdicts_that_changed, what_could_be_seen
from .sections_masks import masks
from .sections_ranks import rank_across_tasks, rank_agreement, rank_stability
from .sections_results import beside_published, checkpoints, results
from .sections_run import commands, costs, what_is_missing, what_was_run
from .tables import escape_markdown

MARK = "<!-- made by adalora-fast report; a later report replaces this file -->"
FILES = (
    "Files beside this one: results.csv (one row per planned run; metrics as fractions), table.csv and "
    "table.tex (arm × task, in points), contrasts.csv (all pairs, in points), published.csv (published "
    "numbers and ours, in points; where there are any), and the figures as PNG and SVG."
)


def document(
    sweep: Sweep, contrasts: Contrasts, figures: dict[str, Sequence[tuple[str, str]]], remarks: Sequence[str]
) -> str:
    """The whole report. `figures` are (file name, what it shows) by the section that they close: results,
    contrasts, curves, churn, ranks or agreement.
    """
    sections = (
        ("What was run", what_was_run(sweep), ""),
        ("Results", results(sweep, contrasts), ""),
        ("Best development checkpoint", checkpoints(sweep), ""),
        ("Beside published numbers", beside_published(sweep), ""),
        ("Pairwise contrasts", pairwise(sweep, contrasts), "contrasts"),
        ("What this sweep could have seen", what_could_be_seen(sweep, contrasts), ""),
        ("Verdicts that changed", verdicts_that_changed(sweep, contrasts), ""),
        ("Scores against uniform, random and plain LoRA", against_nulls(sweep, contrasts), ""),
        ("Training", "Budget, development metric and importance scores by step." if figures["curves"]
         else "No run logged its steps.", "curves"),
        ("Masks: churn, and what scores are made of", masks(sweep), "churn"),
        ("Where rank goes: stability over seeds", rank_stability(sweep), "ranks"),
        ("Where rank goes: agreement between tasks", rank_across_tasks(sweep), ""),
        ("Where rank goes: agreement between arms", rank_agreement(sweep), "agreement"),
        ("Parameters and time", costs(sweep), ""),
        ("Missing runs and remarks", what_is_missing(sweep, (*contrasts.remarks, *remarks)), ""),
        ("How to make it again", f"{commands(sweep)}\n\n{FILES}", ""),
    )  # fmt: skip
    parts = [MARK, f"# {escape_markdown(sweep.plan.name)}"]
    for title, text, figure in sections:
        if not text:
            continue
        parts += [f"## {title}", text]
        parts += [f"![{escape_markdown(words)}]({name})" for name, words in figures.get(figure, ())]
    return "\n\n".join(parts) + "\n"
