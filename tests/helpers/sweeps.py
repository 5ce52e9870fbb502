"""Sweep folders with known answers, written as training runs write them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from adalora_fast.experiments.data.tasks import TASKS
from adalora_fast.experiments.metrics import METRICS
from adalora_fast.experiments.models.families import FAMILIES

INIT_R, TARGET_R = 4, 2
ENVIRONMENT = {
    "started": "2026-01-02T03:04:05+00:00",
    "commit": "0123456789abcdef",
    "versions": {"python": "3.11.7", "torch": "2.13.0"},
    "machine": {"processor": "A Processor", "threads": 1, "gpus": []},
    "command": ["adalora-fast", "sweep", "--recipe", "tiny"],
}
Predict = Callable[[np.random.Generator, np.ndarray, str, int], np.ndarray]


def agreeing(rates: dict[str, float]) -> Predict:
    """Predictions that are right with the arm's probability; the same examples are hard for every arm."""

    def predict(generator: np.random.Generator, labels: np.ndarray, arm: str, seed: int) -> np.ndarray:
        ease = np.random.default_rng(1).random(len(labels))
        moved = np.random.default_rng([2, seed]).random(len(labels)) < 0.02  # seeds differ a little
        right = (ease < rates[arm]) ^ moved
        return np.where(right, labels, 1 - labels)

    return predict


def write_plan(
    folder: Path, *, tasks: list[str], arms: list[str], seeds: list[int], **changes: Any
) -> dict[str, Any]:
    plan = {
        "name": "tiny",
        "description": "A sweep for tests.",
        "model": "minilm",
        "tasks": tasks,
        "arms": arms,
        "seeds": seeds,
        "baseline": "sensitivity",
        "equivalence_margin": 0.3,
        "primary": {task: TASKS[task].metrics[0] for task in tasks},
        "recipe": {"defaults": {"epochs": 3, "learning_rate": 1e-3}},
        "tuning": None,
        "environment": ENVIRONMENT,
    } | changes
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "plan.json").write_text(json.dumps(plan))
    return plan


def rank_map(arm: str, seed: int, layers: int = 2) -> dict[str, int]:
    """Final ranks that sum to the budget; each score has a taste of its own, seeds differ a little."""
    suffixes = FAMILIES["bert"].matrices.values()
    names = [f"bert.encoder.layer.{i}.{suffix}" for i in range(layers) for suffix in suffixes]
    if arm in ("full", "head"):
        return {}
    if arm in ("lora", "uniform"):
        return dict.fromkeys(names, TARGET_R)
    taste = (
        np.zeros(len(names)) if arm == "random" else np.random.default_rng(len(arm)).normal(size=len(names))
    )
    scores = taste[:, None] + np.random.default_rng([seed, len(arm)]).normal(size=(len(names), INIT_R)) / 2
    kept = scores >= np.sort(scores.ravel())[-TARGET_R * len(names)]
    return dict(zip(names, kept.sum(axis=1).tolist(), strict=True))


def write_run(
    folder: Path,
    task: str,
    arm: str,
    seed: int,
    predict: Predict,
    *,
    rows: int = 400,
    layers: int = 2,
    steps: int = 40,
    model: str = "minilm",
    sample: bool = False,
    predictions: bool = True,
    recipe: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """One complete run folder; its result.json agrees with its predictions. Returns the result."""
    place = folder / task / f"{arm}-seed{seed}"
    place.mkdir(parents=True)
    kind, arrays, metrics = TASKS[task], {}, {}
    for number, split in enumerate(kind.evaluation):
        generator = np.random.default_rng([3, number])
        if task.startswith("squad"):
            f1 = predict(generator, np.ones(rows), arm, seed).astype(np.float32)
            exact = (f1 >= 1).astype(np.float32)
            arrays |= {f"{split}/f1": f1, f"{split}/exact_match": exact}
            metrics[split] = {"f1": float(f1.mean()), "exact_match": float(exact.mean())}
            continue
        labels = (
            generator.random(rows).astype(np.float32) if not kind.labels else generator.integers(0, 2, rows)
        )
        predicted = predict(generator, labels, arm, seed)
        arrays |= {f"{split}/labels": labels, f"{split}/predictions": predicted.astype(labels.dtype)}
        metrics[split] = {
            name: METRICS[name](labels, predicted.astype(labels.dtype)) for name in kind.metrics
        }
        metrics[split]["loss"] = 0.5
    primary = float(np.mean([values[kind.metrics[0]] for values in metrics.values()]))
    ranks = rank_map(arm, seed, layers)
    result = {
        "task": task, "model": model, "arm": arm, "method": arm, "seed": seed, "sample": sample,
        "splits": {split: {"rows": rows, "source": "x", "sample": sample} for split in kind.evaluation},
        "primary_metric": kind.metrics[0], "primary": primary, "metrics": metrics,
        "best_epoch": {"epoch": 2.0, "primary": primary + 0.01}, "train_loss": 0.4, "steps": steps,
        "trainable_parameters": 12345, "total_rank": sum(ranks.values()), "train_seconds": 10.0,
        "seconds": 12.5, "resumed": False,
    }  # fmt: skip
    write_json(place / "result.json", result)
    settings = {
        "task": task,
        "seed": seed,
        "dtype": "float32",
        "score": arm.partition("+")[0],
        "smoothing": None,
        "score_gradient": "task" if arm.endswith("+task") else "total",
        "recipe": {"epochs": 3, "learning_rate": 0.001} | (recipe or {}),
    }
    write_json(place / "config.json", {"settings": settings, "environment": ENVIRONMENT})
    write_json(place / "ranks.json", {"init_r": INIT_R, "ranks": ranks})
    if predictions:
        save_file(arrays, place / "predictions.safetensors")
    write_logs(place, result, list(ranks.values()) if arm not in ("lora", "peft") else [])
    return result


def write_logs(place: Path, result: dict[str, Any], ranks: list[int]) -> None:
    """Losses every 4 steps, three evaluations; budget and scores where ranks are allocated."""
    lines, allocation = [], []
    steps, total = result["steps"], len(ranks) * INIT_R
    for step in range(4, steps + 1, 4):
        lines.append({"step": step, "loss": 1 / step, "learning_rate": 1e-3})
        left = 1 - min(1.0, max(0.0, (step / steps - 0.1) / 0.6))
        middle = 10.0 ** (-4 - result["seed"] / 10) * (1 + step / steps)
        scores = {"p10": middle / 30, "p50": middle, "p90": middle * 20, "lowest_kept": middle * (1.1 - left)}
        if result["arm"] == "movement":
            scores["p10"] = -middle
        allocation.append({
            "step": step, "budget": int(total / 2 * (1 + left**3)), "ranks": ranks,
            "scores": None if step == 4 else scores,
        })  # fmt: skip
    for part in (0.4, 0.7, 1.0):
        for split, values in result["metrics"].items():
            value = values[result["primary_metric"]] * (0.8 + 0.2 * part)
            lines.append({"step": int(steps * part), f"eval_{split}_{result['primary_metric']}": value})
    lines.sort(key=lambda line: line["step"])
    (place / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if ranks:
        (place / "allocation.jsonl").write_text("".join(json.dumps(line) + "\n" for line in allocation))


def write_sweep(
    folder: Path,
    rates: dict[str, float],
    *,
    tasks: list[str],
    seeds: list[int],
    plan: dict | None = None,
    **run: Any,
) -> Path:
    """Every run of a grid whose arms are right with these probabilities."""
    write_plan(folder, tasks=tasks, arms=list(rates), seeds=seeds, **(plan or {}))
    for task in tasks:
        for arm in rates:
            for seed in seeds:
                write_run(folder, task, arm, seed, agreeing(rates), **run)
    return folder


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content))
