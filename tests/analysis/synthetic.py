"""Results as the analyses return them, of runs that never were."""

from itertools import combinations

import numpy as np

from adalora_fast.analysis.connectivity import describe_path, grid
from adalora_fast.analysis.groups import group_means
from adalora_fast.analysis.rows import Evaluation

STUDY = (
    *(f"lora-r{rank}" for rank in (1, 2, 4, 8, 16, 32)),
    "full",
    "sensitivity",
    "movement",
    "fisher",
    "gsnr",
)


def made_up(groups=STUDY, seeds=4, *, within=False, precision="bf16"):
    """(cka.json, connectivity.json); `within`: only the pairs of a group."""
    random = np.random.default_rng(0)
    runs = [
        {
            "name": f"{group}-seed{seed}",
            "group": group,
            "seed": seed,
            "metrics": {"validation": {"accuracy": 0.8 + seed / 100, "loss": 0.4 + seed / 10}},
        }
        for group in groups
        for seed in range(seeds)
    ]
    owners = [run["group"] for run in runs]
    places = (
        np.array([[groups.index(owner), 0, 0] for owner in owners]) + random.normal(size=(len(runs), 3)) / 2
    )
    distances = np.linalg.norm(places[:, None] - places[None], axis=-1)
    common = {"task": "mrpc", "model": "minilm", "precision": precision, "runs": runs}
    common["rows"] = {"split": "validation", "rows": 408, "sample": False}
    cka = np.exp(-distances / 8)
    alphas, paths, gaps = grid(5), [], np.full(cka.shape, np.nan)
    for a, b in combinations(range(len(runs)), 2):
        if within and owners[a] != owners[b]:
            continue
        bend = 0.01 * distances[a, b] - 0.02
        losses = [0.4 + 4 * bend * alpha * (1 - alpha) for alpha in alphas]
        points = [Evaluation(loss=loss, metrics={"accuracy": 1 - loss / 2}) for loss in losses]
        paths.append({"a": a, "b": b, **describe_path(points, "accuracy")})
        gaps[a, b] = gaps[b, a] = paths[-1]["convexity_gap"]
    np.fill_diagonal(gaps, 0.0)
    connectivity = {
        **common,
        "alphas": alphas.tolist(),
        "pairs": {"which": "within" if within else "all", "most": None},
        "primary_metric": "accuracy",
        "ends": [{"loss": 0.4, "metrics": {"accuracy": 0.8}}] * len(runs),
        "paths": paths,
        "convexity_gap": [[None if np.isnan(gap) else gap for gap in row] for row in gaps.tolist()],
        **group_means(owners, gaps),
    }
    layers = {"layer": 6, "batch_size": None, "cka": cka.tolist()}
    return {**common, **layers, **group_means(owners, cka)}, connectivity
