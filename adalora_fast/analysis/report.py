"""Comparisons in words: Markdown from what the JSON files hold, beside the numbers of a published study."""

import json
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from adalora_fast.experiments.data.tasks import TASKS
from adalora_fast.experiments.report.tables import escape_markdown, markdown, metric_name, task_name
from adalora_fast.integrations.model_card import shown_base

Result = Mapping[str, Any]
STUDY = Path(__file__).with_name("uniformity.json")
PRECISIONS = {"fp32": "float32", "bf16": "bfloat16 matrix products (autocast) with float32 weights"}
NOTHING = "–"
KINDS = ("same group, other seed", "other group, same seed", "other group, other seed")
SEEDS = (
    "Runs of one seed began with the same head and saw the data in one order; a group has no two of them, so "
    "it compares with pairs of other groups and other seeds."
)


def cka_report(result: Result) -> str:
    """cka.md from cka.json."""
    head, values = _own_scores(result)
    within, others = _sides(result)
    rows = [
        [group, count, *cells, within[place], others[place]]
        for place, (group, count, cells) in enumerate(_by_group(result, head, values))
    ]
    runs = result["runs"]
    kinds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for a, b in combinations(range(len(runs)), 2):
        kinds[_kind(runs[a], runs[b])].append(result["cka"][a][b])
    estimate = f", estimated from batches of {result['batch_size']}" if result["batch_size"] else ""
    translates = result["task"] in TASKS and TASKS[result["task"]].kind == "translation"
    of = " of the decoder under the given translation" if translates else ""
    text = [
        f"# Linear CKA of {len(result['runs'])} runs on {task_name(result['task'])}",
        f"{_setting(result)} Layer {result['layer']}{of}, means over a text's own tokens{estimate}.",
        markdown(["pairs of", "pairs", "CKA"], [[kind, len(v), _mean(v, 4)] for kind, v in kinds.items()]),
        markdown(["group", "runs", *head, "CKA within the group", "CKA to other groups"], rows),
        f"{_own_words(result)} CKA is the mean over pairs of different runs, with their number. {SEEDS}",
        _matrix(result),
        _study("CKA"),
    ]
    return "\n\n".join(text) + "\n"


def connectivity_report(result: Result) -> str:
    """connectivity.md from connectivity.json."""
    head, values = _own_scores(result)
    within, others = _sides(result)
    rows = [
        [group, count, *cells, within[place], others[place]]
        for place, (group, count, cells) in enumerate(_by_group(result, head, values))
    ]
    runs, paths = result["runs"], result["paths"]
    keys = ("convexity_gap", "height", "loss_barrier")
    kinds: dict[str, list[Result]] = {kind: [] for kind in KINDS}
    for path in paths:
        kinds[_kind(runs[path["a"]], runs[path["b"]])].append(path)
    sides = [
        [
            kind,
            len(chosen),
            *(_mean([path[key] for path in chosen], 4) for key in keys),
            _mean([100 * path["error_barrier"] for path in chosen], 2),
        ]
        for kind, chosen in kinds.items()
    ]
    text = [
        f"# Paths between {len(runs)} runs on {task_name(result['task'])}",
        f"{_setting(result)} {len(result['alphas'])} points on each path; pairs of runs: {_pairs(result)}.",
        _worst_gap(runs, paths),
        markdown(
            ["pairs of", "paths", "convexity gap", "height", "loss barrier", "error barrier, points"], sides
        ),
        markdown(["group", "runs", *head, "gap within the group", "gap to other groups"], rows),
        f"{_own_words(result)} The other columns are means over paths, with their number. Gap and height are "
        "not below 0 by their definition; a barrier compares with the mean of both ends, so it is above 0 "
        f"wherever these differ. {SEEDS}",
        _matrix(result),
        _ends(result),
        _study(None),
    ]
    return "\n\n".join(text) + "\n"


def soup_report(result: Result) -> str:
    """soup.md from soup.json."""
    best = result["best_member"]
    names = [escape_markdown(run["name"]) for run in result["runs"]]
    metrics = list(result["members"][best]["report"]["metrics"])

    def cells(of: Result) -> list[str]:
        found = []
        for part in ("selection", "report"):
            found.append(f"{of[part]['loss']:.4f}")
            found += [f"{100 * of[part]['metrics'][metric]:.2f}" for metric in metrics]
        return found

    columns = [
        f"{what} ({part})"
        for part in ("selection", "report")
        for what in ("loss", *map(metric_name, metrics))
    ]
    candidates = [
        (f"best member ({names[best]})", result["members"][best]),
        ("greedy soup", result["greedy"]),
        *([("averaging soup", result["averaging"])] if "averaging" in result else []),
        ("uniform soup", result["uniform"]),
        *([("ensemble of logits", result["ensemble"])] if result["ensemble"] is not None else []),
    ]
    greedy = result["greedy"]["weights"]
    order = sorted(
        range(len(names)), key=lambda run: (-greedy[run], result["members"][run]["selection"]["loss"])
    )
    parts = result["rows"]
    head, values = _own_scores(result)
    text = [
        f"# Soup of {len(names)} runs on {task_name(result['task'])}",
        f"{_model(result)}, computed in {PRECISIONS[result['precision']]}. Chosen by "
        f"the loss on {_rows(parts['selection'])}, reported on {_rows(parts['report'], 'others')}"
        f"{_sample(parts['report'])} "
        f"(selection: {result['selection']}).",
        markdown(["", *columns], [[name, *cells(of)] for name, of in candidates]),
        markdown(
            ["member", "greedy weight", *columns],
            [[names[run], f"{greedy[run]:.4g}", *cells(result["members"][run])] for run in order],
        ),
        "Metrics in points. The greedy soup's loss on the selection rows is never above its best member's, "
        "by its recipe; on the reported rows it may be.",
        "What a soup may be compared with: on the reported rows, the best member (one model as well, at the "
        "same cost) and the ensemble of logits (its rival, which computes all members for every row; "
        "translations have none). The selection rows have chosen "
        "the soup and the best member, so what they say of either is too good. The published soup below is "
        "of another model, chosen and reported on other rows: its gain over its own best member can be set "
        "beside the gain here, its numbers cannot.",
        *(
            [markdown(["group", "runs", *head], _own_rows(result, head, values)), _own_words(result)]
            if head
            else []
        ),
        _study("soup"),
    ]
    if result["saved"] is not None:
        text.insert(4, _saved(result["saved"]))
    return "\n\n".join(text) + "\n"


@cache
def study() -> dict[str, Any]:
    """The published numbers that the reports quote."""
    return json.loads(STUDY.read_text(encoding="utf-8"))


def _setting(result: Result) -> str:
    rows = result["rows"]
    return (
        f"{_model(result)}, {rows['rows']} rows of {rows['split']}{_sample(rows)}, "
        f"computed in {PRECISIONS[result['precision']]}."
    )


def _worst_gap(runs: Sequence[Result], paths: Sequence[Result]) -> str:
    worst = max(paths, key=lambda path: path["convexity_gap"])
    if worst["convexity_gap"] == 0:
        return "No path has a convexity gap: at the points computed, the loss along each path is convex."
    ends = " and ".join(escape_markdown(runs[worst[end]]["name"]) for end in "ab")
    return f"Largest convexity gap: {worst['convexity_gap']:.2g}, between {ends}."


def _model(result: Result) -> str:
    return f"Model {escape_markdown(shown_base(result['model']))}"


def _rows(part: Result, noun: str = "rows") -> str:
    """Such as "204 rows of validation"; results of earlier versions do not say which split it was."""
    return f"{part['rows']} {noun}" + (f" of {part['split']}" if "split" in part else "")


def _own_scores(result: Result) -> tuple[list[str], list[list[float | None]]]:
    """Column headings, and what each run wrote of itself: the same on every page about these runs, whatever
    rows they are compared on. Of a task with several splits, every one has columns.
    """
    runs = result["runs"]
    splits = list(dict.fromkeys(split for run in runs for split in run.get("metrics", {})))
    head: list[str] = []
    values: list[list[float | None]] = [[] for _ in runs]
    for split in splits:
        names, own = _scores([run["metrics"].get(split, {}) for run in runs])
        head += [f"{name} ({split})" for name in names] if len(splits) > 1 else names
        values = [[*before, *more] for before, more in zip(values, own, strict=True)]
    return head, values


def _own_rows(
    result: Result, head: Sequence[str], values: Sequence[Sequence[float | None]]
) -> list[list[Any]]:
    """Rows of a table of these columns, a group each."""
    groups = {"groups": list(dict.fromkeys(run["group"] for run in result["runs"]))}
    return [[group, count, *cells] for group, count, cells in _by_group({**result, **groups}, head, values)]


def _own_words(result: Result) -> str:
    """What the columns of `_own_scores` are, and the rows that they were taken on."""
    counts: dict[str, set[int]] = {}
    for run in result["runs"]:
        for split in run.get("metrics", {}):
            counts.setdefault(split, set()).update(
                {run["rows"][split]} if split in run.get("rows", {}) else set()
            )
    places = [
        (f"{' or '.join(map(str, sorted(found)))} rows of {split}" if found else split)
        for split, found in counts.items()
    ]
    return (
        f"Loss and metrics of the runs are those that each of them wrote of itself (result.json), on "
        f"{' and '.join(places)}, as mean ± standard deviation over its seeds, metrics in points; PEFT's "
        "AdaLoRA includes its orthogonality term in its loss."
    )


def _ends(result: Result) -> str:
    """The runs as they were computed here, which is what the measures of the paths are made of."""
    own = [{} if end is None else {"loss": end["loss"], **end["metrics"]} for end in result["ends"]]
    head, values = _scores(own)
    return (
        f"The same runs as ends of the paths, computed again on {_rows(result['rows'])} in "
        f"{PRECISIONS[result['precision']]}:\n\n"
        + markdown(["ends of paths", "runs", *head], _own_rows(result, head, values))
    )


def _sample(rows: Result) -> str:
    return " (a sample of the official data)" if rows["sample"] else ""


def _scores(own: Sequence[Mapping[str, float]]) -> tuple[list[str], list[list[float | None]]]:
    """Column headings, and each run's values of them; metrics in points."""
    metrics = list(dict.fromkeys(name for scores in own for name in scores if name != "loss"))
    values = [
        [scores.get("loss"), *(None if (v := scores.get(name)) is None else 100 * v for name in metrics)]
        for scores in own
    ]
    return ["loss", *map(metric_name, metrics)], values


def _by_group(
    result: Result, head: Sequence[str], values: Sequence[Sequence[float | None]]
) -> list[tuple[str, int, list[str]]]:
    """(group, how many runs, its columns as mean ± standard deviation)."""
    digits = [3 if name.startswith("loss") else 2 for name in head]
    found = []
    for group in result["groups"]:
        own = [scores for run, scores in zip(result["runs"], values, strict=True) if run["group"] == group]
        columns = list(zip(*own, strict=True))
        cells = [_mean(column, place, spread=True) for place, column in zip(digits, columns, strict=True)]
        found.append((group, len(own), cells))
    return found


def _sides(result: Result) -> tuple[list[str], list[str]]:
    """For each group: the mean over pairs within it, and over pairs of it with others."""
    within, others = [], []
    for place, (means, counts) in enumerate(zip(result["group_means"], result["group_pairs"], strict=True)):
        within.append(_weighted([means[place]], [counts[place]]))
        rest = [other for other in range(len(means)) if other != place]
        others.append(_weighted([means[other] for other in rest], [counts[other] for other in rest]))
    return within, others


def _weighted(means: Sequence[float | None], counts: Sequence[int]) -> str:
    known = [(mean, count) for mean, count in zip(means, counts, strict=True) if mean is not None]
    if not known:
        return NOTHING
    total = sum(count for _, count in known)
    return f"{sum(mean * count for mean, count in known) / total:.4f} ({total})"


def _mean(values: Sequence[float | None], digits: int, *, spread: bool = False) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return NOTHING
    text = f"{np.mean(known):.{digits}f}"
    return f"{text} ± {np.std(known, ddof=1):.{digits}f}" if spread and len(known) > 1 else text


def _matrix(result: Result) -> str:
    """Group means as a table; a group with itself is other seeds of it."""
    rows = [
        [group, *(NOTHING if mean is None else f"{mean:.4f}" for mean in means)]
        for group, means in zip(result["groups"], result["group_means"], strict=True)
    ]
    return markdown(["mean over pairs", *result["groups"]], rows)


def _kind(a: Result, b: Result) -> str:
    """What two runs have in common."""
    if a["group"] == b["group"]:
        return KINDS[0]
    return KINDS[1] if a["seed"] == b["seed"] else KINDS[2]


def _pairs(result: Result) -> str:
    pairs = result["pairs"]
    which = {"all": "all", "within": "of one group", "between": "of two groups"}[pairs["which"]]
    return which if pairs["most"] is None else f"{which}, at most {pairs['most']} of every two groups, by lot"


def _saved(saved: Mapping[str, Any]) -> str:
    if saved["form"] == "full":
        return f"Saved: the {saved['soup']} soup, merged into a full model."
    ranks = saved["ranks"].values()
    return (
        f"Saved: the {saved['soup']} soup as LoRA with ranks {min(ranks)} to {max(ranks)}; cutting lost "
        f"{100 * saved['error']:.2f} % of ΔW (Frobenius norm)."
    )


def _study(part: str | None) -> str:
    """The study's own numbers: of its groups, with or without their CKA, or of its soup."""
    published = study()
    rows = published["soup" if part == "soup" else "groups"]
    columns = {"loss": "loss", "accuracy": "accuracy", "f1": "F1"} | ({"cka": "CKA"} if part == "CKA" else {})
    digits = {"loss": 3, "cka": 3}
    table = [[row["label"], *(f"{row[key]:.{digits.get(key, 1)}f}" for key in columns)] for row in rows]
    return (
        "## For comparison: another model and another task\n\n"
        f"{published['task']} with {published['model']}, from {published['source']}. These numbers are not "
        f"of the runs above, and do not compare with them one by one. {published['notes']}\n\n"
        + markdown(["", *columns.values()], table)
    )
