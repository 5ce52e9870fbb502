"""γ ∇R once per optimizer step in several processes, also if it acts in some of them only.

λ is zero, so that lora_A and lora_B have R's gradient alone.
"""

import copy

import pytest
import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy

from adalora_fast import JoinableAllocator, fuse, orthogonality_loss
from tests.distributed.test_peft_models import CONFIG, full, share, wrapped
from tests.helpers.models import adapted, trainable

GAMMA = 0.5


def own(model, inputs):
    """The loss that the model returns."""
    return model(**inputs).loss


def other(model, inputs):
    """A loss from the logits; the model sees no labels."""
    inputs = dict(inputs)
    labels = inputs.pop("labels")
    return cross_entropy(model(**inputs).logits, labels)


def discarded(model, inputs):
    """A loss from the logits, although the model saw the labels."""
    return cross_entropy(model(**inputs).logits, inputs["labels"])


def wanted(inner) -> torch.Tensor:
    alone = copy.deepcopy(inner)
    (GAMMA * orthogonality_loss(alone)).backward()
    return torch.cat([factor.grad.flatten() for factor in sides(alone)])


def sides(inner) -> list[torch.Tensor]:
    factors = inner.base_model.rankallocator.factors()
    return [factor for layer in factors for factor in (layer.lora_A, layer.lora_B)]


def share_of_r(
    kind: str,
    losses,
    once: bool,
    micro_batches: int = 1,
    clip: float | None = None,
    weight: float = 1.0,
    scale: float | None = None,
    fused: bool = False,
):
    """How many times γ ∇R the gradients hold when the optimizer has stepped."""
    loss = losses[dist.get_rank() if dist.is_initialized() else 0]
    inner = fuse(adapted("bert", **{**CONFIG, "orth_reg_weight": GAMMA}).double()).train()
    expected = wanted(inner)
    model = wrapped(kind, inner)
    allocator = inner.base_model.rankallocator
    optimizer = torch.optim.Adam(trainable(inner), lr=0.0, fused=fused)
    allocator.attach(optimizer, automatic=False)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
    if once:
        allocator.regulariser.act_once(scaler)
    for i in range(micro_batches):
        if kind == "replicated":
            model.require_backward_grad_sync = i == micro_batches - 1
        scaler.scale(weight * loss(model, share(i))).backward()
    if clip is not None:
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(trainable(inner), clip)
    scaler.step(optimizer)
    found = torch.cat([full(factor.grad).flatten() for factor in sides(inner)])
    times = (found.dot(expected) / expected.dot(expected)).item()
    torch.testing.assert_close(found, times * expected, rtol=1e-9, atol=1e-12)
    return times


MIXED = {
    "all own": (own, own),
    "none": (other, other),
    "one of two": (own, other),
    "the other of two": (other, own),
    "one discards it": (own, discarded),
}


@pytest.mark.parametrize("kind", ["replicated", "sharded by layer"])
@pytest.mark.parametrize("losses", MIXED)
def test_processes_that_differ(pair, kind, losses):
    assert pair.run(share_of_r, kind, MIXED[losses], True) == pytest.approx([1, 1], rel=1e-9)


@pytest.mark.parametrize("kind", ["replicated", "sharded by layer"])
@pytest.mark.parametrize("losses", ["all own", "none"])
def test_accumulation_in_losses_multiplied_by_the_processes(pair, kind, losses):
    """As the Trainer does with ``num_items_in_batch``: a sum over four micro-batches, times two processes."""
    found = pair.run(share_of_r, kind, MIXED[losses], True, micro_batches=4, weight=2.0)
    assert found == pytest.approx([1, 1], rel=1e-9)


@pytest.mark.parametrize("losses", ["none", "one discards it"])
def test_what_is_missing_comes_after_clipping(pair, losses):
    found = pair.run(share_of_r, "replicated", MIXED[losses], True, clip=1e-3)
    assert found == pytest.approx([1, 1] if losses == "none" else [0.5, 0.5], rel=0.05)


@pytest.mark.parametrize("losses", ["all own", "none", "one of two"])
@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_loss_scaling(pair, losses, fused):
    found = pair.run(
        share_of_r, "replicated", MIXED[losses], True, micro_batches=2, scale=1024.0, fused=fused
    )
    assert found == pytest.approx([1, 1], rel=1e-9)


@pytest.mark.parametrize("losses", ["all own", "none"])
def test_under_attach_alone(pair, losses):
    assert pair.run(share_of_r, "replicated", MIXED[losses], False) == pytest.approx([1, 1], rel=1e-9)


def uneven_run() -> list[float]:
    """The second process has half as many batches; nobody waits for the other's question."""
    from torch.distributed.algorithms.join import Join

    inner = fuse(adapted("bert", **{**CONFIG, "orth_reg_weight": GAMMA}).double()).train()
    model = wrapped("replicated", inner)
    allocator = inner.base_model.rankallocator
    optimizer = torch.optim.AdamW(trainable(inner), lr=1e-2)
    allocator.attach(optimizer)
    with Join([model, JoinableAllocator(allocator)]):
        for t in range(4 if dist.get_rank() == 0 else 2):
            other(model, share(t)).backward()
            optimizer.step()
            optimizer.zero_grad()
    return [allocator.t, allocator._mask.tolist()]


def test_processes_that_run_out_of_data(pair):
    first, second = pair.run(uneven_run)
    assert first == second and first[0] == 4
