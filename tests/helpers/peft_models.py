"""What several of these tests need: errors in one line, runs by hand, and comparisons."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from tests.helpers.models import batch, trainable, trained_weights


@contextmanager
def one_line(kind: type[Exception], *pieces: object) -> Iterator[None]:
    """The block raises exactly ``kind`` with a message of one line that has every one of ``pieces`` in it."""
    with pytest.raises(kind) as caught:
        yield
    message = str(caught.value)
    assert caught.type is kind, f"{caught.type.__name__}: {message}"
    assert message and "\n" not in message, message
    for piece in pieces:
        assert str(piece) in message, f"{piece!r} is not in: {message}"


@contextmanager
def no_warning() -> Iterator[None]:
    """A UserWarning inside the block is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


def steps(model: PeftModel, optimizer: torch.optim.Optimizer, start: int, stop: int) -> list[float]:
    """Training steps ``start`` to ``stop`` in PEFT's order; returns the losses."""
    model.train()
    losses = []
    for step in range(start, stop):
        loss = model(**batch(step % 8)).loss
        loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def adamw(model: PeftModel) -> torch.optim.AdamW:
    return torch.optim.AdamW(trainable(model), lr=2e-2)


def trained(model: PeftModel, stop: int) -> PeftModel:
    """``model`` after its first ``stop`` steps."""
    steps(model, adamw(model), 0, stop)
    return model


@torch.no_grad()
def logits(model: PeftModel) -> Tensor:
    """What the model computes in evaluation."""
    was_training = model.training
    inputs = batch(99)
    result = model.eval()(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    model.train(was_training)
    return result


def same_weights(left: PeftModel, right: PeftModel) -> bool:
    """Whether all that is trained is equal, bit for bit."""
    a, b = trained_weights(left), trained_weights(right)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def same_state(left: dict, right: dict) -> bool:
    """Whether two allocator states are equal, bit for bit."""
    return (
        left["config"] == right["config"]
        and left["tensors"].keys() == right["tensors"].keys()
        and all(torch.equal(left["tensors"][name], right["tensors"][name]) for name in left["tensors"])
    )
