"""From run folders to tables of numbers and figures: CKA, and the loss on the paths between runs.

Each function returns what it writes as JSON into `output`, beside a report in Markdown and figures; with
`output` of None nothing is written. Runs come in the order of `groups.in_order`, whatever order the folders
have.
"""

from collections.abc import Sequence
from dataclasses import asdict
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from adalora_fast.environment import write_json, write_text

from . import plots
from .cka import FEWEST_ROWS, MinibatchCKA, cka_matrix
from .common import data_of, header, make_folder, of_split, open_in_order, some_of
from .connectivity import describe_path, grid
from .evaluations import Evaluations, hash_of_rows, mixture_of
from .features import FeatureReader
from .groups import group_means, groups_of, pairs_of
from .progress import AnalysisProgress, Silent
from .report import cka_report, connectivity_report
from .rows import Evaluation, read_rows
from .saved import names_of
from .shared import SharedModel, check_precision

ROWS = 512  # as in the study of uniformity


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
    precision: str = "fp32",
    progress: AnalysisProgress | None = None,
) -> dict[str, Any]:
    """How alike the representations of runs are: linear CKA of every run with every other.

    Writes cka.json and cka.md, cka.png and .svg, and with `layers` cka-layers.png and .svg.

    Args:
        folders: of finished runs of one task and base model.
        rows: how many texts, always the same ones; None takes all.
        layer: 0 is the embeddings, −1 the last layer.
        layers: also CKA of every layer with every layer, for each pair of runs.
        batch_size: estimate CKA from batches of so many rows, for data of which N × D is too large at once.
        split: of the task; None is the first one that is evaluated.
        cache: folder for representations; None keeps none.
        model, data_dir: in place of those that the runs name.
        precision: fp32, or bf16 for matrix products of bfloat16 numbers.
        progress: shows how far it is; None shows nothing.

    Raises:
        ValueError, FileNotFoundError: runs that cannot be opened or compared, data that are not there, no
            such layer or split.
    """
    if batch_size is not None and batch_size < FEWEST_ROWS:
        raise ValueError(f"batches of {batch_size} rows are too small; take {FEWEST_ROWS} or more")
    check_precision(precision)
    progress = progress or Silent()
    runs, settings = open_in_order(folders, model)
    part = some_of(read_rows(settings, split, data_dir), rows)
    make_folder(output)
    shared = SharedModel.load(settings, precision=precision)
    reader = FeatureReader(
        shared, part, task=runs[0].task, max_length=settings.recipe.max_length, cache=cache
    )
    chosen = reader.place(layer)
    wanted = list(range(reader.layers + 1)) if layers else [chosen]
    features = []
    with progress.steps("representations", len(runs)) as advance:
        for run in runs:
            (change,) = shared.read([run])
            features.append(reader.read(run, change, wanted))
            advance()
    own = wanted.index(chosen)
    matrix = _aligned([each[own] for each in features], batch_size)
    result = {
        **header(runs, settings, precision),
        "rows": of_split(part, split, runs[0].task),
        "layer": chosen,
        "batch_size": batch_size,
        "cka": matrix.tolist(),
        **group_means(groups_of(runs), matrix),
    }
    if layers:
        result["layers"] = []
        pairs = list(combinations(range(len(runs)), 2))
        with progress.steps("layers with layers", len(pairs)) as advance:
            for a, b in pairs:
                alignment = _aligned(features[a], batch_size, features[b])
                result["layers"].append({"a": a, "b": b, "cka": alignment.tolist()})
                advance()
    if output is not None:
        write_json(output / "cka.json", result)
        write_text(output / "cka.md", cka_report(result))
        plots.cka_figures(result, output)
    return result


def analyze_connectivity(
    folders: Sequence[Path | str],
    *,
    output: Path | None = None,
    points: int = 11,
    pairs: str = "all",
    most_pairs: int | None = None,
    rows: int | None = None,
    split: str | None = None,
    model: str | None = None,
    data_dir: Path | None = None,
    precision: str = "fp32",
    generate: bool = False,
    progress: AnalysisProgress | None = None,
) -> dict[str, Any]:
    """Loss and metrics on the straight paths between runs.

    Writes connectivity.json and connectivity.md, convexity-gap.png and .svg, and paths.png and .svg; and
    connectivity.jsonl as it goes, from which an interrupted comparison goes on, also with more runs, pairs or
    points.

    Args:
        folders: of finished runs of one task and base model; their ranks and methods may differ.
        points: evenly spaced on each path, its ends included.
        pairs, most_pairs: which runs to compare, see `groups.pairs_of`.
        rows: how many rows of the split, always the same ones; None takes all.
        split, model, data_dir, precision, progress: see `analyze_cka`.
        generate: of translations also BLEU and chrF at every point; without it, token accuracy alone.

    Raises:
        ValueError, FileNotFoundError: see `analyze_cka`; fewer than three points; no pairs.
        BlockingIOError: another process writes into `output`.
    """
    alphas = grid(points)
    check_precision(precision)
    progress = progress or Silent()
    runs, settings = open_in_order(folders, model)
    compared = pairs_of(runs, pairs, most_pairs)
    part = some_of(read_rows(settings, split, data_dir), rows)
    make_folder(output)
    shared = SharedModel.load(settings, precision=precision)
    data = data_of(settings, {"rows": part}, shared, generate)
    changes, names = shared.read(runs), names_of(runs)
    prints = [run.fingerprint() for run in runs]
    # Every path as the weights of its two runs, from b (α = 0) to a; a run by itself is its own mixture.
    wanted = {
        mixture_of([prints[run]], [1.0]): ([run], [1.0])
        for run in sorted({run for pair in compared for run in pair})
    }
    for a, b in compared:
        for alpha in alphas[1:-1]:
            weights = [alpha, 1 - alpha]
            wanted.setdefault(mixture_of([prints[a], prints[b]], weights), ([a, b], weights))
    file = None if output is None else output / "connectivity.jsonl"
    with Evaluations(file, hash_of_rows(shared, part, settings, generate)) as done:
        missing = {mixture: parts for mixture, parts in wanted.items() if mixture not in done}
        _say_what_is_kept(progress, done, len(wanted) - len(missing), len(wanted))
        with progress.steps("paths", len(missing)) as advance:
            for mixture, (places, weights) in missing.items():
                with shared.mixed([changes[place] for place in places], weights) as mixed:
                    what = " and ".join(names[place] for place in places)
                    done.add(mixture, data.evaluate(mixed, "rows", what))
                advance()

        def between(a: int, b: int, alpha: float) -> Evaluation:
            return done.get(mixture_of([prints[a], prints[b]], [alpha, 1 - alpha]))

        described, gaps = [], np.full((len(runs), len(runs)), np.nan)
        for a, b in compared:
            path = [between(a, b, alpha) for alpha in alphas]
            described.append({"a": a, "b": b, **describe_path(path, data.primary_metric)})
            gaps[a, b] = gaps[b, a] = described[-1]["convexity_gap"]
        ends = {run: done.get(mixture_of([prints[run]], [1.0])) for pair in compared for run in pair}
    np.fill_diagonal(gaps, 0.0)
    result = {
        **header(runs, settings, precision),
        "rows": of_split(part, split, runs[0].task),
        "alphas": alphas.tolist(),
        "pairs": {"which": pairs, "most": most_pairs},
        "primary_metric": data.primary_metric,
        "ends": [asdict(ends[run]) if run in ends else None for run in range(len(runs))],
        "paths": described,
        "convexity_gap": [[None if np.isnan(gap) else gap for gap in row] for row in gaps.tolist()],
        **group_means(groups_of(runs), gaps),
    }
    if output is not None:
        write_json(output / "connectivity.json", result)
        write_text(output / "connectivity.md", connectivity_report(result))
        plots.connectivity_figures(result, output)
    return result


def _say_what_is_kept(progress: AnalysisProgress, done: Evaluations, found: int, wanted: int) -> None:
    if found:
        progress.say(f"{found} of {wanted} evaluations are in {done.path} from before")
    if done.others:
        progress.say(f"{done.others} lines of {done.path} are of other rows or settings and are left alone")
    if done.damaged:
        progress.say(f"{done.damaged} lines of {done.path} are damaged and are left alone")


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
