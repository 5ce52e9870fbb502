"""One adapted layer, forward and forward with backward ("step"), against its peers.

Sizes are those of real models: DeBERTa-v3-base and 3072x3072, which the project's goals name, first in
bfloat16 at r = 16, then other ranks, dropout and types, then the layers of other models. Every contestant
passes the gate, the formula in float64 without dropout, before it is timed.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch

from adalora_fast.ops.adapter.costs import Problem, factor_launches, launches
from adalora_fast.ops.dispatch import backend
from adalora_fast.ops.dispatch.timing import input_sets
from benchmarks import peers
from benchmarks.roofline import name_of
from benchmarks.suites import Case, Contestant, Work

TOKENS = 4096
GOALS = ((768, 768), (768, 3072), (3072, 768), (3072, 3072))
OTHERS = {  # model → (has biases, its adapted linears)
    "llama-3.2-1b": (False, ((2048, 2048), (2048, 512), (2048, 8192), (8192, 2048))),
    "llama-8b": (False, ((4096, 4096), (4096, 1024), (4096, 14336), (14336, 4096))),
    "deberta-v3-large": (True, ((1024, 1024), (1024, 4096), (4096, 1024))),
    "minilm": (True, ((384, 384), (384, 1536), (1536, 384))),
}
CPU_SHAPES = ((768, 768), (768, 3072), (384, 384), (384, 1536))
GATE = {
    "cuda": {torch.float32: 2e-3, torch.float16: 1e-2, torch.bfloat16: 3e-2},
    "cpu": {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 3e-2},
}


@dataclass(frozen=True, kw_only=True)
class Spec:
    """A layer, what it computes in, and whether backward is part of it."""

    inner: int
    outer: int
    rank: int = 16
    dtype: torch.dtype = torch.bfloat16
    dropout: float = 0.0
    backward: bool = False
    tokens: int = TOKENS
    model: str = "deberta-v3-base"
    bias: bool = True
    goal: bool = False  # whether the project's goals speak of it

    @property
    def name(self) -> str:
        words = [f"{self.inner}x{self.outer} r{self.rank} {name_of(self.dtype)}"]
        if not self.bias:
            words.append("no bias")
        if self.tokens != TOKENS:
            words.append(f"{self.tokens} tokens")
        if self.dropout:
            words.append(f"dropout {self.dropout}")
        return " ".join((*words, "step" if self.backward else "forward"))


def cases(scale: str, device: torch.device) -> list[Case]:
    """The most important ones first; those of the goals have ``what["goal"]``."""
    listed = {"tiny": _tiny, "quick": _quick, "full": _full}[scale](device.type == "cuda")
    return [_case(spec, device) for spec in listed]


def _both(shapes: tuple[tuple[int, int], ...], **options) -> Iterator[Spec]:
    """Forward and step of every shape."""
    for inner, outer in shapes:
        for backward in (False, True):
            yield Spec(inner=inner, outer=outer, backward=backward, **options)


def _tiny(cuda: bool) -> Iterator[Spec]:
    options = {"rank": 4, "dtype": torch.float32, "tokens": 32, "model": "tiny"}
    yield from _both(((48, 32),), goal=True, **options)
    yield Spec(inner=32, outer=48, backward=True, dropout=0.1, bias=False, **options)


def _quick(cuda: bool) -> Iterator[Spec]:
    options = {} if cuda else {"dtype": torch.float32, "tokens": 64}
    return _both(GOALS, goal=True, **options)


def _full(cuda: bool) -> Iterator[Spec]:
    if not cuda:
        first, others = CPU_SHAPES[:2], CPU_SHAPES[2:]
        yield from _both(first, dtype=torch.float32, tokens=256, goal=True)
        yield from _both(others, dtype=torch.float32, tokens=256)
        for tokens in (512, 1024):
            yield from _both(CPU_SHAPES, dtype=torch.float32, tokens=tokens)
        for rank in (4, 64):
            yield from _both(CPU_SHAPES, dtype=torch.float32, tokens=256, rank=rank)
        return
    yield from _both(GOALS, goal=True)
    yield from _both(GOALS, dropout=0.1)
    for rank in (8, 64, 4, 32):
        yield from _both(GOALS, rank=rank)
    for dtype in (torch.float16, torch.float32):
        yield from _both(GOALS, dtype=dtype)
    for model, (bias, shapes) in OTHERS.items():
        yield from _both(shapes, model=model, bias=bias)


def _names(spec: Spec) -> tuple[str, ...]:
    """Who takes part; a compiler's minutes are spent on the plain cases alone."""
    without = peers.NO_DROPOUT if spec.dropout else ()
    if spec.rank != 16 or spec.dropout:
        without += ("peft compiled",)
    return tuple(name for name in peers.PEERS if name not in without)


def _case(spec: Spec, device: torch.device) -> Case:
    moved, operations = floor(spec)
    return Case(
        suite="adapter",
        name=spec.name,
        what={
            "inner": spec.inner, "outer": spec.outer, "rank": spec.rank, "dtype": name_of(spec.dtype),
            "dropout": spec.dropout, "pass": "step" if spec.backward else "forward", "tokens": spec.tokens,
            "model": spec.model, "bias": spec.bias, "goal": spec.goal,
            "backend": backend.choose("adapter", device.type).backend,
        },
        baseline="frozen",
        build=partial(build, spec, device),
        contestants=_names(spec),
        moved=moved,
        operations=operations,
        dtype=spec.dtype,
    )  # fmt: skip


def floor(spec: Spec) -> tuple[float, float]:
    """Bytes that the frozen layer and a fused adapter must move, and operations that they must do."""
    padded = max(16, 1 << (spec.rank - 1).bit_length())
    size = spec.dtype.itemsize
    sizes = {"rows": spec.tokens, "rank": padded, "size": size, "product_size": size}
    forward = Problem(backward=False, inner=spec.inner, outer=spec.outer, **sizes)
    back = Problem(backward=True, inner=spec.outer, outer=spec.inner, **sizes)
    made = launches(forward, "inline", spec.outer)
    if spec.backward:
        made += launches(back, "inline", spec.inner) + factor_launches(back, 1)
    return sum(one.bytes for one in made), sum(one.flops for one in made)


def build(spec: Spec, device: torch.device) -> Work:
    """Layers and inputs, which all contestants share; as many as the cache of a GPU cannot hold."""
    torch.compiler.reset()  # of another case's variants
    torch.manual_seed(0)
    size = spec.dtype.itemsize
    bytes_each = size * (spec.tokens * (spec.inner + spec.outer) + spec.inner * spec.outer)
    sets = input_sets(bytes_each) if device.type == "cuda" else 1
    layers = [
        peers.Layer.draw(
            spec.inner, spec.outer, spec.rank, spec.dtype, device, spec.dropout, bias=spec.bias
        )
        for _ in range(sets)
    ]  # fmt: skip
    xs, dys = (
        [torch.randn(spec.tokens, width, device=device).to(spec.dtype) for _ in range(sets)]
        for width in (spec.inner, spec.outer)
    )
    for x in xs:
        x.requires_grad_(spec.backward)
    exact: dict[str, list[torch.Tensor]] = {}

    def gate(name: str) -> None:
        layer = replace(layers[0], dropout_p=0.0)
        peer = peers.PEERS[name](layer)
        if peer.form not in exact:
            exact[peer.form] = peers.truth(layer, xs[0], dys[0], peer.form)
        allowed = GATE[device.type][spec.dtype]
        for what, error in peers.errors(peer, xs[0], dys[0], exact[peer.form]).items():
            assert error <= allowed, f"the relative error of {what} is {error:.2g}, allowed is {allowed:g}"

    def make(name: str) -> Contestant:
        made = [peers.PEERS[name](layer) for layer in layers]
        call = _step if spec.backward else _forward
        return Contestant([partial(call, *arguments) for arguments in zip(made, xs, dys, strict=True)])

    contestants: dict[str, Callable[[], Contestant]] = {name: partial(make, name) for name in _names(spec)}
    return Work(contestants, gate)


@torch.no_grad()
def _forward(peer: peers.Peer, x: torch.Tensor, dy: torch.Tensor) -> torch.Tensor:
    return peer(x)


def _step(peer: peers.Peer, x: torch.Tensor, dy: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(peer(x), [x, *peer.trained], dy)
