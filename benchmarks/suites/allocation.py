"""Allocation: scoring all triplets, selecting the budget's and masking; and the selection alone.

PEFT's mask_to_budget does the same three things (and keeps fewer on ties, of which there are none here). Half
of the triplets are kept.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from adalora_fast.ops import allocate_, importance_scores, importance_update_, select_triplets
from adalora_fast.ops.allocation import reference as plain_allocation
from adalora_fast.ops.dispatch import backend
from adalora_fast.ops.dispatch.timing import input_sets
from adalora_fast.ops.importance import ScoreRule, layout_of, reference
from benchmarks.adapters import Model, make_parameters, model_for, peft_allocator
from benchmarks.suites import Case, Contestant, Work

RULE = ScoreRule()
MANY = 65_536
WHOLE = ("peft", "reference", "adalora_fast")
EAGER = "adalora_fast eager"  # with its host time, as PEFT is timed on a GPU, which waits for results
SELECTION = ("reference", "adalora_fast")


def cases(scale: str, device: torch.device) -> list[Case]:
    model = model_for(scale)
    counts = (model.triplets, 600) if scale == "tiny" else (model.triplets, MANY)
    return [_whole(model, device), *(_selection(count, device) for count in counts)]


def _whole(model: Model, device: torch.device) -> Case:
    triplets = model.triplets
    return Case(
        suite="allocation",
        name=f"score, select and mask {triplets} triplets of {model.name}",
        what={
            "work": "whole", "triplets": triplets, "model": model.name, "rank": model.rank,
            "backend": backend.choose("allocation", device.type).backend,
        },
        baseline="peft",
        build=partial(build_whole, model, device),
        contestants=_whole_names(device),
        # two statistics are read, λ is read and written, the mask is written
        moved=8 * (model.entries + triplets) + 8 * triplets + triplets,
    )  # fmt: skip


def _whole_names(device: torch.device) -> tuple[str, ...]:
    return (*WHOLE, EAGER) if device.type == "cuda" else WHOLE


def _selection(triplets: int, device: torch.device) -> Case:
    return Case(
        suite="allocation",
        name=f"select among {triplets} triplets",
        what={
            "work": "select", "triplets": triplets,
            "backend": backend.choose("allocation", device.type).backend,
        },
        baseline="reference",
        build=partial(build_selection, triplets, device),
        contestants=SELECTION,
        moved=5 * triplets,  # scores are read, the mask is written
    )  # fmt: skip


class _Model:
    """A model's parameters and their statistics after one update; each call masks λ by the same scores."""

    def __init__(self, model: Model, device: torch.device, seed: int):
        self.parameters = make_parameters(model, device, seed)
        self.lambdas = self.parameters[1::3]
        self.before = torch.cat([values.detach().flatten() for values in self.lambdas])
        self.kept = model.triplets // 2
        self.budget = torch.tensor(self.kept, device=device)
        self.allocator, self.named = peft_allocator(self.parameters)
        self.allocator.update_ipt(self.named)
        self.statistics = self._updated(importance_update_, self.parameters, torch.float32)

    @torch.no_grad()
    def _updated(self, update: Callable, parameters: list[Tensor], dtype: torch.dtype) -> Tensor:
        size = layout_of(parameters, RULE.score).size
        device = self.budget.device
        statistics = torch.zeros(len(RULE.statistics), size, device=device, dtype=dtype)
        updates = torch.zeros(len(parameters), dtype=torch.int64, device=device)
        grads = [parameter.grad.to(dtype) for parameter in self.parameters]
        update(parameters, grads, statistics, updates, RULE)
        return statistics

    def restore(self) -> None:
        """λ as it was before any mask."""
        with torch.no_grad():
            parts = self.before.split([values.numel() for values in self.lambdas])
            for values, part in zip(self.lambdas, parts, strict=True):
                values.copy_(part.view_as(values))

    def truth(self) -> Tensor:
        """The mask by scores in float64, from λ as it is now."""
        wide = [parameter.detach().double() for parameter in self.parameters]
        statistics = self._updated(reference.update_, wide, torch.float64)
        return best(reference.triplet_scores(wide, statistics, RULE), self.kept)

    @torch.no_grad()
    def ours(self) -> Tensor:
        scores = importance_scores(self.parameters, self.statistics, RULE)
        return allocate_(scores, self.budget, self.lambdas)

    @torch.no_grad()
    def plain(self) -> Tensor:
        scores = reference.triplet_scores(self.parameters, self.statistics, RULE)
        mask = plain_allocation.select(scores, self.budget)
        plain_allocation.apply_mask_(mask, self.lambdas)
        return mask

    def peft(self) -> dict[str, list[bool]]:
        return self.allocator.mask_to_budget(self.named, self.kept)


def best(scores: Tensor, kept: int) -> Tensor:
    """[T] bool: the ``kept`` highest, ties to the lower position."""
    values = scores.tolist()
    order = sorted(range(len(values)), key=lambda i: (-values[i], i))
    mask = torch.zeros(len(values), dtype=torch.bool)
    mask[order[:kept]] = True
    return mask


def build_whole(model: Model, device: torch.device) -> Work:
    sets = input_sets(8 * model.entries) if device.type == "cuda" else 1
    models = [_Model(model, device, seed) for seed in range(sets)]
    calls = {"peft": _Model.peft, "reference": _Model.plain, "adalora_fast": _Model.ours, EAGER: _Model.ours}

    def gate(name: str) -> None:
        """The mask, and λ under it, against scores in float64."""
        one = models[0]
        one.restore()
        truth = one.truth()
        mask = calls[name](one)
        if name == "peft":
            mask = torch.tensor([kept for layer in sorted(mask) for kept in mask[layer]])
        wrong = int((mask.cpu() != truth).sum())
        assert wrong == 0, f"{wrong} of {truth.numel()} triplets are kept or dropped against the truth"
        left = torch.cat([values.detach().flatten() for values in one.lambdas]).cpu()
        assert torch.equal(left, torch.where(truth, one.before.cpu(), 0.0)), "λ is not what the mask leaves"

    def make(name: str) -> Contestant:
        return Contestant(
            [partial(calls[name], one) for one in models], capturable=name not in ("peft", EAGER)
        )

    return Work({name: partial(make, name) for name in _whole_names(device)}, gate)


def build_selection(triplets: int, device: torch.device) -> Work:
    generator = torch.Generator().manual_seed(0)
    sets = input_sets(4 * triplets) if device.type == "cuda" else 1
    scores = [torch.rand(triplets, generator=generator).to(device) for _ in range(sets)]
    budget = torch.tensor(triplets // 2, device=device)
    selects = {"reference": plain_allocation.select, "adalora_fast": select_triplets}

    def gate(name: str) -> None:
        mask, truth = selects[name](scores[0], budget).cpu(), best(scores[0], triplets // 2)
        wrong = int((mask != truth).sum())
        assert wrong == 0, f"{wrong} of {triplets} triplets are kept or dropped against the truth"

    def make(name: str) -> Contestant:
        return Contestant([partial(selects[name], one, budget) for one in scores])

    return Work({name: partial(make, name) for name in SELECTION}, gate)
