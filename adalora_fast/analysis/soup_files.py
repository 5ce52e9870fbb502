"""Saving a mixture of runs: as a plain LoRA adapter, exactly or cut to a rank, or merged into a full model.

Exactly, ΔW = Σ_i w_i B_i A_i is a LoRA whose factors are those of all members one after the other: their
ranks add up. At a given rank k it is the nearest matrix of that rank (Eckart and Young), from the singular
values of ΔW = U S Vᵀ; what is lost is given as √(Σ_{j>k} S_j² / Σ_j S_j²), for each matrix and together.
"""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from adalora_fast.environment import writing_to
from adalora_fast.experiments.data.tasks import get_task
from adalora_fast.experiments.models.families import family_of, is_of_head
from adalora_fast.experiments.models.loading import TASK_TYPES
from adalora_fast.experiments.models.packages import resolve_model
from adalora_fast.experiments.settings.quiet import without_model_bars
from adalora_fast.experiments.settings.settings import RunSettings
from adalora_fast.integrations.checkpoints import move_files
from adalora_fast.integrations.files import PREFIX, WEIGHTS
from adalora_fast.integrations.plain_lora import convert, exact_pattern

from .changes import Factors, RunChange, concatenated, mixture, used
from .shared import SharedModel


@dataclass(frozen=True, kw_only=True)
class SavedLora:
    """The rank of every matrix, and the relative Frobenius error of cutting them: together and each."""

    ranks: dict[str, int]
    error: float
    errors: dict[str, float]


def save_lora(
    shared: SharedModel,
    changes: Sequence[RunChange],
    weights: Sequence[float],
    settings: RunSettings,
    folder: Path,
    *,
    rank: int | None = None,
) -> SavedLora:
    """Write Σ_i w_i θ_i as a plain LoRA adapter with its head, and with the biases of the base where a run
    trained those, which PEFT loads onto the runs' base model.

    Args:
        rank: the largest rank of a matrix; None is exact.

    Raises:
        ValueError: a member was trained fully, a rank below 1, no adapted matrix, or `folder` is not empty.
    """
    changes, weights = used(changes, weights)
    check_free(folder)
    if rank is not None and rank < 1:
        raise ValueError(f"the rank is {rank}; choose 1 or more")
    task = get_task(settings.task)
    head = family_of(shared.model).head_for(task.kind)
    names = list(dict.fromkeys(name for change in changes for name in change.tensors))
    biases = [name for name in names if not is_of_head(name, head)]
    if not all(name.endswith(".bias") for name in biases):
        raise ValueError("a fully trained run is in this mixture, which no LoRA holds; give --save full")
    modules = list(dict.fromkeys(name for change in changes for name in change.factors))
    if not modules:
        raise ValueError("no run in this mixture has adapted a matrix; give --save full")
    parameters = dict(shared.model.named_parameters())
    tensors = {
        f"{PREFIX}{_in_peft(name, modules)}": mixture(name, parameters[name].data, changes, weights)
        .cpu()
        .contiguous()
        for name in names
    }
    lost, total, errors = 0.0, 0.0, {}
    for module in modules:
        factors, squares = _cut(concatenated(module, changes, weights), rank)
        errors[module] = (squares[0] / squares[1]) ** 0.5 if squares[1] else 0.0
        lost, total = lost + squares[0], total + squares[1]
        # LoRA's scale is 1 where a triplet's λ and the layer's c are.
        ones = factors.A.new_ones(factors.rank, 1)
        for kind, tensor in (("lora_A", factors.A), ("lora_E", ones), ("lora_B", factors.B)):
            tensors[f"{PREFIX}{module}.{kind}"] = tensor.cpu()
    adapter = {
        "task_type": TASK_TYPES.get(task.kind, "SEQ_CLS"),
        "base_model_name_or_path": resolve_model(settings.model),
        # A trained bias has another name in a module that PEFT wraps, so it may wrap no others.
        "target_modules": exact_pattern(modules),
        "modules_to_save": head,
        "bias": "all" if biases else "none",
    }
    plain = convert(tensors, adapter, dict.fromkeys(modules, 1.0))
    with _written_whole(folder) as place:
        save_file(plain.tensors, place / WEIGHTS, metadata={"format": "pt"})
        replace(plain.config, inference_mode=True).save_pretrained(place)
    return SavedLora(ranks=plain.ranks, error=(lost / total) ** 0.5 if total else 0.0, errors=errors)


def _in_peft(name: str, modules: Sequence[str]) -> str:
    """A bias's name, which is another in a module that PEFT adapts."""
    module, _, bias = name.rpartition(".")
    return f"{module}.base_layer.{bias}" if module in modules else name


def save_full(
    shared: SharedModel, changes: Sequence[RunChange], weights: Sequence[float], folder: Path
) -> None:
    """Write Σ_i w_i θ_i as a full model with its tokenizer, which transformers loads; ValueError where
    `folder` is not empty.
    """
    check_free(folder)
    with _written_whole(folder) as place, shared.mixed(changes, weights) as model:
        with without_model_bars():
            model.save_pretrained(place)
        shared.tokenizer.save_pretrained(place)


def check_free(folder: Path) -> None:
    """ValueError where something is in the way of a new folder."""
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise ValueError(f"{folder} is not an empty folder; choose another --output")


@contextmanager
def _written_whole(folder: Path) -> Iterator[Path]:
    """A place in `folder` for files, which take their names when all of them are written."""
    with writing_to(folder):
        folder.mkdir(parents=True, exist_ok=True)
        draft = tempfile.TemporaryDirectory(dir=folder, prefix=".saving-")
    with draft as name:
        yield Path(name)
        move_files(Path(name), folder)


def _cut(factors: Factors, rank: int | None) -> tuple[Factors, tuple[float, float]]:
    """The factors of the nearest matrix of this rank, and (what was lost, all there was) of ‖ΔW‖²_F."""
    if rank is None:
        return factors, (0.0, 0.0)
    left, U, S, V, right = _decomposed(factors)
    squares = S.square()
    root = S[:rank].sqrt()
    A = root[:, None] * (V[:, :rank].T @ right.T)
    B = (left @ U[:, :rank]) * root
    cut = Factors(A=A.to(factors.A.dtype).contiguous(), B=B.to(factors.B.dtype).contiguous())
    return cut, (float(squares[rank:].sum()), float(squares.sum()))


def _decomposed(factors: Factors) -> tuple[Tensor, ...]:
    """B A = left (U S Vᵀ) rightᵀ in float64, from the small core of two QR decompositions."""
    left, core_left = torch.linalg.qr(factors.B.double())
    right, core_right = torch.linalg.qr(factors.A.double().T)
    U, S, Vt = torch.linalg.svd(core_left @ core_right.T, full_matrices=False)
    return left, U, S, Vt.T, right
