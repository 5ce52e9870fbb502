"""How the adapter's own work grows: with the number of layers, with the rank, with the tokens.

``bookkeeping`` is what the allocator does in one optimizer step, importance and allocation, on adapter
parameters without a model, in the middle of the schedule. ``layer`` is one adapted layer, forward and
backward, as in the suite ``adapter``. All layers are square.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from adalora_fast import RankAllocator
from adalora_fast.nn import Factors
from adalora_fast.ops.dispatch.timing import input_sets
from benchmarks.adapters import Model, make_parameters, peft_allocator
from benchmarks.roofline import name_of
from benchmarks.suites import SCALES, Case, Contestant, Work, adapter

STEP, TOTAL_STEP = 25_000, 100_000
BYTES_PER_ENTRY = 24  # weight and gradient read, two statistics read and written
MOST_SETS = 8  # of bookkeeping's inputs, which PEFT's loop takes long to pass over
LAYER_CONTESTANTS = ("frozen", "peft", "adalora_fast")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The values that a scale gives to what is varied, and the sizes of the rest."""

    layers: tuple[int, ...]
    ranks: tuple[int, ...]
    tokens: tuple[int, ...]
    many: int = 72  # layers where the rank varies
    narrow: int = 256  # width where their number varies
    wide: int = 768  # width of everything else
    rank: int = 16
    usual: int | None = None  # tokens where a layer's rank varies; None: as many as the device likes


PLANS = {
    "full": Plan(layers=(1, 12, 72, 200, 500), ranks=(4, 8, 16, 32, 64), tokens=(64, 256, 1024, 4096)),
    "quick": Plan(layers=(1, 72), ranks=(4, 16), tokens=(64, 1024)),
    "tiny": Plan(layers=(1, 3), ranks=(2, 4), tokens=(4, 8), many=2, narrow=16, wide=16, rank=4, usual=8),
}


def cases(scale: str, device: torch.device) -> list[Case]:
    """First the allocator's work by layers and by rank, then a layer's by tokens and by rank."""
    if scale not in PLANS:
        raise ValueError(f"scale {scale!r} is none of {', '.join(SCALES)}")
    plan, cuda = PLANS[scale], device.type == "cuda"
    spec = adapter.Spec(
        inner=plan.wide, outer=plan.wide, rank=plan.rank, backward=True, model="square",
        tokens=plan.usual or (4096 if cuda else 1024), dtype=torch.bfloat16 if cuda else torch.float32,
    )  # fmt: skip
    return [
        *(_bookkeeping("layers", layers, plan.narrow, plan.rank, device) for layers in plan.layers),
        *(_bookkeeping("rank", plan.many, plan.wide, rank, device) for rank in plan.ranks),
        *(_layer("tokens", replace(spec, tokens=tokens), device) for tokens in plan.tokens),
        *(_layer("rank", replace(spec, rank=rank), device) for rank in plan.ranks),
    ]


def _bookkeeping(varies: str, layers: int, width: int, rank: int, device: torch.device) -> Case:
    model = Model("square", ((width, width),) * layers, rank)
    return Case(
        suite="growth",
        name=f"bookkeeping by {varies}: {layers} layers {width}x{width} r{rank}",
        what={
            "part": "bookkeeping", "varies": varies, "layers": layers, "width": width, "rank": rank,
            "dtype": "float32",
        },
        baseline="peft",
        build=partial(_build_bookkeeping, model, device),
        contestants=tuple(ALLOCATORS),
        moved=float(_moved(model)),
    )  # fmt: skip


def _layer(varies: str, spec: adapter.Spec, device: torch.device) -> Case:
    moved, operations = adapter.floor(spec)
    return Case(
        suite="growth",
        name=f"layer by {varies}: {spec.inner}x{spec.outer} r{spec.rank} {spec.tokens} tokens",
        what={
            "part": "layer", "varies": varies, "tokens": spec.tokens, "width": spec.inner,
            "rank": spec.rank, "dtype": name_of(spec.dtype),
        },
        baseline="frozen",
        build=partial(_build_layer, spec, device),
        contestants=LAYER_CONTESTANTS,
        moved=moved,
        operations=operations,
        dtype=spec.dtype,
    )  # fmt: skip


def _build_layer(spec: adapter.Spec, device: torch.device) -> Work:
    work = adapter.build(spec, device)
    return replace(work, contestants={name: work.contestants[name] for name in LAYER_CONTESTANTS})


def _moved(model: Model) -> int:
    return BYTES_PER_ENTRY * (model.entries + model.triplets)


def step_ours(model: Model, parameters: list[Tensor]) -> Callable[[], None]:
    """The allocator's step."""
    factors = [Factors(*parameters[i : i + 3]) for i in range(0, len(parameters), 3)]
    layers = {f"layer{number:05}": partial(factors.__getitem__, number) for number in range(len(factors))}
    allocator = RankAllocator(nn.Module(), target_r=model.rank // 2, total_step=TOTAL_STEP, layers=layers)
    return partial(allocator.step, STEP)


def step_peft(model: Model, parameters: list[Tensor]) -> Callable[[], None]:
    """PEFT's two parts of the same, with the same budget."""
    allocator, named = peft_allocator(parameters)
    budget = kept(model)

    def step() -> None:
        allocator.update_ipt(named)
        allocator.mask_to_budget(named, budget)

    return step


def kept(model: Model) -> int:
    """The triplets that stay at ``STEP``, by the schedule."""
    target = model.rank // 2 * len(model.shapes)
    return int((model.triplets - target) * (1 - STEP / TOTAL_STEP) ** 3 + target)


ALLOCATORS: dict[str, Callable[[Model, list[Tensor]], Callable[[], None]]] = {
    "peft": step_peft,
    "adalora_fast": step_ours,
}


def lambdas_after(name: str, model: Model, device: torch.device, steps: int = 2) -> Tensor:
    """All λ after the first steps."""
    parameters = make_parameters(model, device)
    step = ALLOCATORS[name](model, parameters)
    for _ in range(steps):
        step()
    return torch.cat([parameter.detach().flatten() for parameter in parameters[1::3]])


def _build_bookkeeping(model: Model, device: torch.device) -> Work:
    sets = min(MOST_SETS, input_sets(_moved(model))) if device.type == "cuda" else 1

    def make(name: str) -> Contestant:
        calls = [ALLOCATORS[name](model, make_parameters(model, device, seed)) for seed in range(sets)]
        return Contestant(calls, capturable=False)  # PEFT waits for the device, ours counts on the host

    def gate(name: str) -> None:
        found, budget = lambdas_after(name, model, device), kept(model)
        assert int((found != 0).sum()) == budget, f"{name} does not keep {budget} triplets"
        assert torch.equal(found, lambdas_after("peft", model, device)), f"{name} prunes others than PEFT"

    return Work({name: partial(make, name) for name in ALLOCATORS}, gate)
