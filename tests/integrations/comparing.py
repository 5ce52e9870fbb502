"""The same short run with PEFT's layers and with the fused ones, in float64, and what both must agree in."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext

import pytest
import torch
from peft import PeftModel

from adalora_fast import fuse
from tests.helpers.models import awake, batch, trainable, trained_weights
from tests.helpers.parity_runs import singular_values

SHORT = {"total_step": 16, "tinit": 2, "tfinal": 4}


def awake_and_fused(build: Callable[[], PeftModel]) -> Iterator[PeftModel]:
    """PEFT's model and its fused twin, in float64, with an adapter that shows."""
    yield awake(build()).double()
    yield fuse(awake(build()).double())


def short_run(
    model: PeftModel,
    *,
    accumulate: int = 1,
    scaler: torch.amp.GradScaler | None = None,
    clip: float | None = None,
    context: Callable = nullcontext,
    start: int = 0,
    stop: int = SHORT["total_step"],
    called: Callable | None = None,
) -> tuple[list[float], list[list[bool]]]:
    """PEFT's loop with plain gradient descent: the loss and the pruned triplets of every step.

    ``called`` is what is called instead of the model (its compiled form).
    """
    optimizer = torch.optim.SGD(trainable(model), lr=0.02)
    scaler = scaler or torch.amp.GradScaler("cpu", enabled=False)
    losses, pruned = [], []
    called = model if called is None else called
    model.train()
    torch.manual_seed(11)
    for step in range(start, stop):
        for part in range(accumulate):
            with context():
                loss = called(**batch(step * accumulate + part)).loss / accumulate
            scaler.scale(loss).backward()
        if clip is not None:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(trainable(model), clip)
        scaler.step(optimizer)
        scaler.update()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
        losses.append(loss.item())
        pruned.append((singular_values(model) == 0).tolist())
    return losses, pruned


def assert_same_run(build: Callable[[], PeftModel], **options) -> PeftModel:
    """Same losses, same triplets pruned at every step, same weights; returns the fused model."""
    peft, ours = awake_and_fused(build)
    expected, pruned = short_run(peft, **options)
    losses, found = short_run(ours, **options)
    assert losses == pytest.approx(expected, abs=2e-6)  # transformers computes some parts in float32
    assert found == pruned
    half = len(pruned[-1]) // 2
    assert sum(pruned[-1]) == half and any(0 < sum(step) < half for step in pruned)  # worth comparing
    weights = trained_weights(peft)
    assert weights.keys() == trained_weights(ours).keys()
    for name, weight in trained_weights(ours).items():
        torch.testing.assert_close(weight, weights[name], rtol=0, atol=1e-9, msg=name)
    return ours
