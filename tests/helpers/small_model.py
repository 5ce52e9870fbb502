"""A small model of AdaLoraLinear layers and deterministic training steps, for hand-written loops."""

import torch
from torch import nn

from adalora_fast import AdaLoraLinear, RankAllocator, orthogonality_loss

RANKS = (4, 3, 5)
SCHEDULE = {"total_step": 12, "tinit": 2, "tfinal": 3, "deltaT": 2, "target_total_rank": 5}


def make_model(ranks=RANKS, dtype=torch.float64, seed=0, bias=True):
    """A three-layer perceptron; factors large enough that everything matters."""
    torch.manual_seed(seed)
    sizes = [(6, 8), (8, 7), (7, 4)]
    layers = [AdaLoraLinear(k, n, r, dtype=dtype, bias=bias) for (k, n), r in zip(sizes, ranks, strict=True)]
    for layer in layers:
        for factor in layer.factors():
            nn.init.normal_(factor, std=0.5)
    return nn.Sequential(layers[0], nn.Tanh(), layers[1], nn.Tanh(), layers[2])


def make_optimizer(model, kind=torch.optim.AdamW, **options):
    options = {"lr": 1e-2, **options}
    return kind([p for p in model.parameters() if p.requires_grad], **options)


def make_allocator(model, **options):
    return RankAllocator(model, **{**SCHEDULE, **options})


def task_loss(model, t, part=0):
    """A regression whose data depend on the step alone."""
    generator = torch.Generator().manual_seed(1000 + 10 * t + part)
    like = next(model.parameters())
    x, y = (torch.randn(9, n, generator=generator, dtype=torch.float64).to(like) for n in (6, 4))
    return (model(x) - y).square().mean()


def backward(model, t, gamma=0.1):
    loss = task_loss(model, t)
    (loss + gamma * orthogonality_loss(model) if gamma else loss).backward()


def train(model, optimizer, allocator, steps, gamma=0.1):
    """The loop of the documentation, for the steps given."""
    for t in steps:
        backward(model, t, gamma)
        optimizer.step()
        allocator.step()
        optimizer.zero_grad()


def layers_of(model):
    return [module for module in model.modules() if isinstance(module, AdaLoraLinear)]


def parameters_of(model):
    """A_0, E_0, B_0, A_1, ..."""
    return [factor for layer in layers_of(model) for factor in layer.factors()]


def lambdas(model):
    return torch.cat([layer.lora_E.detach().flatten() for layer in layers_of(model)])


def kept(allocator):
    """The mask over all triplets, as a list."""
    return [keep for pattern in allocator.rank_pattern().values() for keep in pattern]


def snapshot(model, allocator):
    """Everything a later step depends on, as tensors and plain values."""
    tensors = [p.detach().clone() for p in model.parameters()]
    state = allocator.state_dict()
    return tensors, dict(state["config"]), {name: t.clone() for name, t in state["tensors"].items()}


def same(first, second):
    """Whether two snapshots are equal bit for bit (NaN equals NaN)."""

    def equal(a, b):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.nan_to_num(7e7), b.nan_to_num(7e7))

    return (
        all(equal(a, b) for a, b in zip(first[0], second[0], strict=True))
        and first[1] == second[1]
        and first[2].keys() == second[2].keys()
        and all(equal(first[2][name], second[2][name]) for name in first[2])
    )
