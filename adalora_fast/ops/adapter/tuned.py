"""Measured plans, kept in JSON files: ``tuned/<gpu>.json`` beside this file, and in the folder that
``ADALORA_FAST_TUNED`` names, which wins. ``python -m adalora_fast.ops.adapter.tuning`` makes such a file.
"""

import json
import os
from dataclasses import asdict
from functools import cache
from pathlib import Path

import torch

from .costs import WAYS, OuterPlan, Plan, Problem, Tile

VARIABLE = "ADALORA_FAST_TUNED"
SHIPPED = Path(__file__).with_name("tuned")
FORMAT = 1

Choices = dict[tuple[str, Problem], Plan | OuterPlan]


def file_name(gpu: str) -> str:
    """``"NVIDIA H200"`` → ``"nvidia-h200.json"``."""
    return "-".join("".join(c if c.isalnum() else " " for c in gpu.lower()).split()) + ".json"


def folders() -> list[Path]:
    """Where stored plans are looked for; later ones win."""
    own = os.environ.get(VARIABLE, "").strip()
    return [SHIPPED, Path(own)] if own else [SHIPPED]


def encode(kind: str, problem: Problem, plan: Plan | OuterPlan, seconds: float) -> dict:
    """One measured choice as JSON; ``kind`` is "change" (of one direction) or "factors" (dA, dE and dB)."""
    return {"kind": kind, "problem": asdict(problem), "plan": asdict(plan), "seconds": seconds}


def _tile(value: dict | None) -> Tile | None:
    return None if value is None else Tile(**value)


def _decode(entry: dict) -> tuple[tuple[str, Problem], Plan | OuterPlan]:
    kind, plan, problem = entry["kind"], entry["plan"], Problem(**entry["problem"])
    if kind == "factors":
        return (kind, problem), OuterPlan(tile=_tile(plan["tile"]), parts=plan["parts"])
    if kind != "change" or plan["way"] not in WAYS:
        raise ValueError(f"kind {kind!r} with way {plan.get('way')!r} is not known")
    tiles = {name: _tile(plan[name]) for name in ("matmul", "project", "update")}
    return (kind, problem), Plan(way=plan["way"], **tiles)


def read(path: Path) -> Choices:
    """The choices of one file.

    Raises:
        ValueError: it is no such file, naming it and what is wrong.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']!r} is not {FORMAT}")
        return dict(_decode(entry) for entry in content["choices"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}".replace("\n", " ")
        raise ValueError(f"{path} holds no tuned plans ({reason}); delete it or tune again") from None


@cache
def _choices(gpu: str, places: tuple[Path, ...]) -> Choices:
    found: Choices = {}
    for folder in places:
        if (path := folder / file_name(gpu)).exists():
            found |= read(path)
    return found


@cache
def _gpu_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device)


def stored(gpu: str) -> Choices:
    """Every stored choice for a GPU."""
    return _choices(gpu, tuple(folders()))


def plan_of(problem: Problem, device: torch.device) -> Plan | None:
    """The stored plan of a problem on a CUDA device."""
    return stored(_gpu_name(device)).get(("change", problem))


def outer_plan_of(problem: Problem, device: torch.device) -> OuterPlan | None:
    """The stored plan of the factors' gradients on a CUDA device."""
    return stored(_gpu_name(device)).get(("factors", problem))


def write(path: Path, entries: list[dict], environment: dict) -> None:
    """Store choices, those already in the file kept where they are not measured again."""
    from adalora_fast.environment import write_json

    key = ("kind", "problem")
    kept = json.loads(path.read_text(encoding="utf-8"))["choices"] if path.exists() else []
    new = {json.dumps([entry[k] for k in key], sort_keys=True) for entry in entries}
    kept = [entry for entry in kept if json.dumps([entry[k] for k in key], sort_keys=True) not in new]
    write_json(path, {"format": FORMAT, "environment": environment, "choices": kept + entries})
