"""Whole training runs whose bookkeeping is Triton's: the reference's masks, in a handful of launches."""

import pytest
import torch

from adalora_fast.ops.dispatch import backend
from tests.helpers.kernels import DEVICE, ON_DEVICE, counted, needs_triton
from tests.helpers.small_model import (
    SCHEDULE,
    backward,
    kept,
    make_allocator,
    make_model,
    make_optimizer,
    parameters_of,
)
from tests.helpers.tolerances import assert_accurate

pytestmark = [needs_triton, pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")]
BOOKKEEPING = ("importance", "orthogonality", "allocation")


@pytest.fixture
def use(monkeypatch):
    """A function that makes one backend the only one for the bookkeeping (the adapter stays as it is)."""
    monkeypatch.setattr(backend, "_implementations", dict(backend._implementations))

    def only(name):
        for op in BOOKKEEPING:
            for other in backend.BACKENDS:
                found = backend._implementations.get((op, other))
                if found is not None:
                    refusal = (lambda device: None) if other == name else (lambda device: "not in this test")
                    backend.register(op, other, found.functions, refusal)

    yield only
    monkeypatch.undo()
    backend.choose.cache_clear()
    backend.kernel.cache_clear()


def run(score, counts=None, **options):
    """(masks of every step, parameters at the end)."""
    model = make_model(dtype=torch.float32).to(DEVICE)
    optimizer, allocator = make_optimizer(model), make_allocator(model, score=score, **options)
    masks = []
    for t in range(SCHEDULE["total_step"]):
        with counted() as names:
            backward(model, t)
            optimizer.step()
            allocator.step()
        optimizer.zero_grad()
        masks.append(kept(allocator))
        if counts is not None:
            counts.append(names)
    return masks, [p.detach().cpu() for p in parameters_of(model)]


@pytest.mark.parametrize("score", [pytest.param(score, marks=ON_DEVICE) for score in ("sensitivity", "gsnr")])
def test_a_run_equals_the_references(use, score):
    use("reference")
    masks, parameters = run(score)
    use("triton")
    counts = []
    others, theirs = run(score, counts)
    assert masks == others
    for got, want in zip(theirs, parameters, strict=True):
        assert_accurate(got, want.double(), torch.float32, factor=20)
    assert len({tuple(mask) for mask in masks}) > 2, "the budget never moved"
    orthogonality, update = ["gram_kernel", "gradient_kernel"], ["flag_kernel", "update_kernel"]
    allocate = ["triplet_kernel", "select_kernel", "zero_kernel"]
    seen = set()
    for launched in counts:
        names = [
            name for name in launched if name in {*orthogonality, *update, *allocate}
        ]  # not the adapter's
        assert names[:2] == orthogonality
        assert names[2:] in (update, update + allocate, allocate, ["zero_kernel"])
        seen.add(tuple(names))
    assert {(*orthogonality, *update, *allocate), (*orthogonality, "zero_kernel")} <= seen


def test_a_graph_capture_is_refused_until_it_is_proven():
    with pytest.raises(
        NotImplementedError, match=r"capturable=True needs a measured run.*use capturable=False"
    ) as e:
        make_allocator(make_model(), capturable=True)
    assert "\n" not in str(e.value)


def test_importing_the_package_does_not_import_triton():
    import subprocess
    import sys

    code = "import sys, adalora_fast; sys.exit('triton' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
