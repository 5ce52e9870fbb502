"""A note in the backward of the orthogonality term: somebody is asked what the term does there."""

import itertools
import weakref
from typing import Protocol

import torch
from torch import Tensor

from adalora_fast.ops.dispatch.library import NO_CUDA_GRAPH, define
from adalora_fast.ops.dispatch.transforms import is_transformed


class Listener(Protocol):
    """Who is asked."""

    def acts(self, grad: Tensor, own: bool) -> Tensor:
        """The term's backward runs with ``grad`` from the loss; returns what goes on in place of it."""


_numbers = itertools.count(1)
_listeners: "weakref.WeakValueDictionary[int, Listener]" = weakref.WeakValueDictionary()


def enlist(listener: Listener) -> int:
    """The number under which ``listener`` is asked for as long as it lives."""
    number = next(_numbers)
    _listeners[number] = listener
    return number


@define(
    "orthogonality_acts(Tensor grad, int number, bool own) -> Tensor",
    fake=lambda grad, number, own: torch.empty_like(grad),
    tags=NO_CUDA_GRAPH,
)
def _orthogonality_acts(grad, number, own):
    # An op, so that a compiled backward asks at every step instead of once.
    listener = _listeners.get(number)
    return grad.clone() if listener is None else listener.acts(grad, own)


class _Noted(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value: Tensor, number: int, own: bool) -> Tensor:
        ctx.number, ctx.own = number, own
        return value.view_as(value)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return torch.ops.adalora_fast.orthogonality_acts(grad, ctx.number, ctx.own), None, None


def noted(value: Tensor, number: int, own: bool) -> Tensor:
    """``value``, in whose backward the listener of this ``number`` is asked.

    Args:
        value: R or γ · R, a scalar.
        number: from :func:`enlist`.
        own: the term is the model's own, and not one that the user added to a loss.

    Nobody is asked under ``torch.func``, whose gradients do not go to ``.grad``.
    """
    if not value.requires_grad or is_transformed(value):
        return value
    return _Noted.apply(value, number, own)
