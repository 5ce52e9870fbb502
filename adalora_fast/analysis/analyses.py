"""From run folders to tables of numbers and figures: one function for each kind of comparison.

Each returns what it writes as JSON into `output`, beside figures; with `output` of None nothing is written.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from adalora_fast.environment import environment, write_json
from adalora_fast.experiments.runs import RunSettings
from adalora_fast.experiments.squad import QuestionSplit
from adalora_fast.experiments.tasks import Split

from . import plots
from .cka import FEWEST_ROWS, MinibatchCKA, cka_matrix
from .connectivity import describe_path, evaluate_path, grid
from .features import FeatureReader
from .rows import Evaluation, RowSet, read_rows, selection_and_report
from .saved import SavedRun, names_of, open_runs
from .shared import SharedModel
from .soup import ensemble_logits, greedy_soup, uniform_soup
from .soup_files import check_free, save_full, save_lora

ROWS = 512  # as in the study of uniformity
Say = Callable[[str], None]


def analyze_cka(
    folders: Sequence[Path | str],
    *,
    output: Path | None = None,
    rows: int | None = ROWS,
    layer: int = -1,
    layers: bool = False,
    batch_size: int | None = None,
    split: str | None = None,
    cache: Path | None = None,
    model: str | None = None,
    data_dir: Path | None = None,
    say: Say = lambda text: None,
) -> dict[str, Any]:
    """How alike the representations of runs are: linear CKA of every run with every other.

    Writes cka.json, cka.png and .svg, and with `layers` cka-layers.png and .svg.

    Args:
        folders: of finished runs of one task and base model.
        rows: how many texts, always the same ones; None takes all.
        layer: 0 is the embeddings, −1 the last layer.
        layers: also CKA of every layer with every layer, for each pair of runs.
        batch_size: estimate CKA from batches of so many rows, for data of which N × D is too large at once.
        split: of the task; None is the first one that is evaluated.
        cache: folder for representations; None keeps none.
        model, data_dir: in place of those that the runs name.
        say: is told what is being done.

    Raises:
        ValueError, FileNotFoundError: runs that cannot be opened or compared, data that are not there, no
            such layer or split.
    """
    if batch_size is not None and batch_size < FEWEST_ROWS:
        raise ValueError(f"batches of {batch_size} rows are too small; take {FEWEST_ROWS} or more")
    runs, settings = _open(folders, model)
    part = _some(read_rows(settings, split, data_dir), rows)
    _make(output)
    shared = SharedModel.load(settings)
    reader = FeatureReader(
        shared,
        part,
        max_length=settings.recipe.max_length,
        batch_size=2 * settings.recipe.batch_size,
        cache=cache,
    )
    chosen = reader.place(layer)
    wanted = list(range(reader.layers + 1)) if layers else [chosen]
    features = []
    for run, name in zip(runs, names_of(runs), strict=True):
        say(f"representations of {name}")
        (change,) = shared.read([run])
        features.append(reader.read(run, change, wanted))
    own = wanted.index(chosen)
    matrix = _aligned([each[own] for each in features], batch_size)
    result = {
        **_header(runs, settings),
        "rows": {"split": split or runs[0].task.evaluation[0], "rows": len(part), "source": part.source},
        "layer": chosen,
        "batch_size": batch_size,
        "cka": matrix.tolist(),
        **_by_group(runs, matrix),
    }
    if layers:
        say("layers with layers")
        result["layers"] = [
            {"a": a, "b": b, "cka": _aligned(features[a], batch_size, features[b]).tolist()}
            for a, b in combinations(range(len(runs)), 2)
        ]
    if output is not None:
        write_json(output / "cka.json", result)
        plots.cka_figures(result, output)
    return result


def analyze_connectivity(
    folders: Sequence[Path | str],
    *,
    output: Path | None = None,
    points: int = 11,
    rows: int | None = None,
    split: str | None = None,
    model: str | None = None,
    data_dir: Path | None = None,
    say: Say = lambda text: None,
) -> dict[str, Any]:
    """Loss and metrics on the straight paths between runs, every run with every other.

    Writes connectivity.json, convexity-gap.png and .svg, and paths.png and .svg.

    Args:
        folders: of finished runs of one task and base model; their ranks and methods may differ.
        points: evenly spaced on each path, its ends included.
        rows: how many rows of the split, always the same ones; None takes all.
        split, model, data_dir, say: see `analyze_cka`.

    Raises:
        ValueError, FileNotFoundError: see `analyze_cka`; fewer than three points.
    """
    alphas = grid(points)
    runs, settings = _open(folders, model)
    part = _some(read_rows(settings, split, data_dir), rows)
    _make(output)
    shared = SharedModel.load(settings)
    data = RowSet(settings, {"rows": part}, shared.tokenizer, shared.device)
    changes, names = shared.read(runs), names_of(runs)
    ends = []
    for run, name in enumerate(names):
        say(f"evaluating {name}")
        with shared.mixed([changes[run]], [1.0]) as mixed:
            ends.append(data.evaluate(mixed, "rows", name))
    paths, gaps = [], np.zeros((len(runs), len(runs)))
    for a, b in combinations(range(len(runs)), 2):
        say(f"from {names[b]} to {names[a]}")
        path = evaluate_path(shared, changes, (a, b), (ends[a], ends[b]), data, "rows", points)
        paths.append({"a": a, "b": b, **describe_path(path, runs[0].task.metrics[0])})
        gaps[a, b] = gaps[b, a] = paths[-1]["convexity_gap"]
    result = {
        **_header(runs, settings),
        "rows": {"split": split or runs[0].task.evaluation[0], "rows": len(part), "source": part.source},
        "alphas": alphas.tolist(),
        "primary_metric": runs[0].task.metrics[0],
        "ends": [asdict(end) for end in ends],
        "paths": paths,
        "convexity_gap": gaps.tolist(),
        **_by_group(runs, gaps),
    }
    if output is not None:
        write_json(output / "connectivity.json", result)
        plots.connectivity_figures(result, output)
    return result


def make_soup(
    folders: Sequence[Path | str],
    output: Path,
    *,
    recipe: str = "greedy",
    save: str = "lora",
    rank: int | None = None,
    selection: str = "halves",
    split: str | None = None,
    model: str | None = None,
    data_dir: Path | None = None,
    say: Say = lambda text: None,
) -> dict[str, Any]:
    """A soup of runs, beside its best member, the uniform soup and the ensemble of logits.

    Writes soup.json, and into `model/` the soup itself.

    Args:
        folders: of finished runs of one task and base model; their ranks and methods may differ.
        output: a new or empty folder.
        recipe: which soup is saved, greedy or uniform.
        save: lora (a plain LoRA adapter), full (merged into the base), or none.
        rank: the largest rank of the LoRA; None keeps it exact, with the members' ranks added up.
        selection: rows to choose by, see `rows.selection_and_report`.
        split, model, data_dir, say: see `analyze_cka`.

    Raises:
        ValueError, FileNotFoundError: see `analyze_cka`; a fully trained run in a LoRA; a folder in the way.
    """
    for name, value, allowed in (
        ("soup", recipe, ("greedy", "uniform")),
        ("form", save, ("lora", "full", "none")),
    ):
        if value not in allowed:
            raise ValueError(f"unknown {name} {value!r}; choose {', '.join(allowed)}")
    if rank is not None and save != "lora":
        raise ValueError(f"a rank of {rank} is for save = lora, and save is {save}; leave it out")
    if rank is not None and rank < 1:
        raise ValueError(f"the rank is {rank}; choose 1 or more")
    check_free(output)
    runs, settings = _open(folders, model)
    full = next((run for run in runs if run.settings.method == "full"), None)
    if save == "lora" and full is not None:
        raise ValueError(f"{full.path} was trained fully, which no LoRA holds; save the soup as full")
    chosen, reported = selection_and_report(settings, selection, split, data_dir)
    _make(output)
    shared = SharedModel.load(settings)
    data = RowSet(settings, {"selection": chosen, "report": reported}, shared.tokenizer, shared.device)
    changes, names = shared.read(runs), names_of(runs)

    def judged(weights: list[float], part: str) -> Evaluation:
        with shared.mixed(changes, weights) as mixed:
            return data.evaluate(mixed, part)

    outputs, members = {"selection": [], "report": []}, []
    for run, name in enumerate(names):
        say(f"evaluating {name}")
        with shared.mixed([changes[run]], [1.0]) as mixed:
            for part, collected in outputs.items():
                collected.append(data.logits(mixed, part))
        members.append({part: asdict(data.judge(each[-1], part, name)) for part, each in outputs.items()})
    say("stirring")
    greedy = greedy_soup(
        [member["selection"]["loss"] for member in members],
        lambda weights: judged(weights, "selection").loss,
    )
    uniform = uniform_soup(len(runs))
    result = {
        **_header(runs, settings),
        "rows": data.describe(),
        "selection": selection,
        "members": members,
        "best_member": greedy.order[0],
        "greedy": {
            **asdict(greedy),
            **{part: asdict(judged(greedy.weights, part)) for part in outputs},
        },
        "uniform": {"weights": uniform, **{part: asdict(judged(uniform, part)) for part in outputs}},
        "ensemble": {
            part: asdict(data.judge(ensemble_logits(each), part, "the ensemble"))
            for part, each in outputs.items()
        },
        "saved": None,
    }
    write_json(output / "soup.json", result)
    if save != "none":
        weights = greedy.weights if recipe == "greedy" else uniform
        say("saving")
        result["saved"] = {"soup": recipe, "form": save}
        if save == "lora":
            saved = save_lora(shared, changes, weights, settings, output / "model", rank=rank)
            result["saved"] |= asdict(saved)
        else:
            save_full(shared, changes, weights, output / "model")
        write_json(output / "soup.json", result)
    return result


def _open(folders: Sequence[Path | str], model: str | None) -> tuple[list[SavedRun], RunSettings]:
    runs = open_runs(folders)
    settings = runs[0].settings
    return runs, settings if model is None else replace(settings, model=model)


def _some(part: Split | QuestionSplit, rows: int | None) -> Split | QuestionSplit:
    if rows is not None and rows < 2:
        raise ValueError(f"{rows} rows are too few to compare runs on; take 2 or more")
    return part.take(rows)


def _make(output: Path | None) -> None:
    """Before anything slow: a place that cannot be written to is said at once."""
    if output is None:
        return
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise type(error)(
            f"cannot write to {output} ({error.strerror or error}); choose another --output"
        ) from error


def _header(runs: list[SavedRun], settings: RunSettings) -> dict[str, Any]:
    return {
        "task": settings.task,
        "model": settings.model,
        "runs": [
            {
                "name": name,
                "folder": str(run.path),
                "method": run.settings.label,
                "group": group,
                "seed": run.settings.seed,
                "target_r": run.settings.recipe.target_r,
                "primary": run.result.get("primary"),
            }
            for run, name, group in zip(runs, names_of(runs), _groups(runs), strict=True)
        ],
        "environment": environment(),
    }


def _groups(runs: list[SavedRun]) -> list[str]:
    """Runs that differ in their seed alone have one group: the method, with its rank where it has several."""
    ranks: dict[str, set[int]] = {}
    for run in runs:
        ranks.setdefault(run.settings.arm, set()).add(run.settings.recipe.target_r)
    return [
        run.settings.label
        if len(ranks[run.settings.arm]) == 1 or run.settings.method in ("lora", "head", "full")
        else f"{run.settings.label}-r{run.settings.recipe.target_r}"
        for run in runs
    ]


def _by_group(runs: list[SavedRun], matrix: np.ndarray) -> dict[str, Any]:
    """Means over pairs of different runs, by the groups of the two; null where there is no such pair."""
    groups = _groups(runs)
    names = list(dict.fromkeys(groups))

    def mean(first: str, second: str) -> float | None:
        values = [
            matrix[a, b]
            for a in range(len(runs))
            for b in range(len(runs))
            if a != b and groups[a] == first and groups[b] == second
        ]
        return float(np.mean(values)) if values else None

    return {"groups": names, "group_means": [[mean(first, second) for second in names] for first in names]}


def _aligned(Xs: list[np.ndarray], batch_size: int | None, Ys: list[np.ndarray] | None = None) -> np.ndarray:
    """CKA of all with all, from all rows or from batches of them in a fixed random order."""
    if batch_size is None:
        return cka_matrix(Xs, Ys)
    Ys = Xs if Ys is None else Ys
    order = np.random.default_rng(0).permutation(len(Xs[0]))
    estimate = MinibatchCKA()
    # A last batch that is smaller would have more than its share of the mean.
    for start in range(0, max(len(order) - batch_size, 0) + 1, batch_size):
        batch = order[start : start + batch_size]
        estimate.update([X[batch] for X in Xs], [Y[batch] for Y in Ys])
    return estimate.value()
