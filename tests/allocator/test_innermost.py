"""``innermost``: the optimizer that changes the weights, whatever is around it."""

import pytest
import torch
from torch import nn

from adalora_fast.allocator.attachment import chain_of, innermost


@pytest.fixture
def inside():
    return torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)


def around(name, base=object, initialised=False):
    """A class of wrappers that keep their optimizer under ``name``."""

    class Around(base):
        def __init__(self, optimizer):
            if initialised:
                super().__init__(optimizer.param_groups, {})
            setattr(self, name, optimizer)

        def step(self, closure=None):
            getattr(self, name).step()

    return Around


def test_an_optimizer_is_its_own(inside):
    assert innermost(inside) is inside and chain_of(inside) == [inside]


@pytest.mark.parametrize("name", ["optimizer", "base_optimizer", "_base_optimizer", "_optimizer", "base"])
@pytest.mark.parametrize("kind", ["plain", "an Optimizer", "an Optimizer without __init__"])
def test_wrappers(inside, name, kind):
    base = object if kind == "plain" else torch.optim.Optimizer
    wrap = around(name, base, initialised=kind == "an Optimizer")
    outer = wrap(wrap(inside))
    assert innermost(outer) is inside
    assert [type(part) for part in chain_of(outer)] == [wrap, wrap, torch.optim.SGD]


def test_accelerate(inside):
    accelerate = pytest.importorskip("accelerate.optimizer")
    wrapped = accelerate.AcceleratedOptimizer.__new__(accelerate.AcceleratedOptimizer)
    wrapped.optimizer = inside  # __init__ wants a process state
    assert innermost(wrapped) is inside


def test_a_wrapper_of_torch_whose_step_calls_no_hooks(inside):
    """As PostLocalSGDOptimizer."""
    assert innermost(around("optim", torch.optim.Optimizer)(inside)) is inside


def test_a_wrapper_that_holds_a_part_of_the_parameters_inside(inside):
    """As ZeroRedundancyOptimizer: its own step calls hooks, after all parameters are there."""
    outer = around("optim", torch.optim.Optimizer, initialised=True)(inside)
    assert innermost(outer) is outer


def test_something_else_under_such_a_name(inside):
    inside.base = "sgd"
    inside.optimizer = None
    assert innermost(inside) is inside


def test_a_wrapper_around_itself(inside):
    inside.optimizer = inside
    assert innermost(inside) is inside


@pytest.mark.parametrize("thing", [None, object(), nn.Linear(3, 3), [1]], ids=lambda t: type(t).__name__)
def test_no_optimizer(thing):
    with pytest.raises(ValueError, match=r"is no torch optimizer; call allocator.step\(\) by hand"):
        innermost(thing)


def test_an_optimizer_whose_hooks_never_run():
    class Bare(torch.optim.Optimizer):
        def __init__(self, params):
            self.param_groups = [{"params": list(params)}]

        def step(self):
            pass

    with pytest.raises(ValueError, match=r"Bare calls no step hooks .* attach the optimizer inside it"):
        innermost(Bare(nn.Linear(2, 2).parameters()))
