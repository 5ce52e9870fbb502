"""Which implementation runs, why the others do not, and the one environment variable."""

from types import SimpleNamespace

import pytest
import torch

from adalora_fast.ops import adalora_linear, select_triplets
from adalora_fast.ops.dispatch import backend
from tests.helpers.naive import make_case


@pytest.fixture(autouse=True)
def restored(monkeypatch):
    """Every test begins and ends with the package's own registrations and no override."""
    monkeypatch.delenv(backend.VARIABLE, raising=False)
    monkeypatch.setattr(backend, "_implementations", dict(backend._implementations))
    backend.choose.cache_clear()
    backend.kernel.cache_clear()
    yield
    backend.choose.cache_clear()
    backend.kernel.cache_clear()


def override(monkeypatch, value):
    monkeypatch.setenv(backend.VARIABLE, value)
    backend.choose.cache_clear()
    backend.kernel.cache_clear()


@pytest.mark.parametrize("op", backend.OPS)
@pytest.mark.parametrize("device_type", ["cpu", "cuda", "meta"])
def test_something_runs_everywhere_and_the_rest_say_why_not(op, device_type):
    choice = backend.choose(op, device_type)
    assert choice.backend in backend.BACKENDS
    assert set(choice.reasons) == set(backend.BACKENDS) - {choice.backend}
    assert all(
        isinstance(reason, str) and reason and "\n" not in reason for reason in choice.reasons.values()
    )


@pytest.mark.parametrize("op", backend.OPS)
@pytest.mark.parametrize("value", ["reference", " Reference ", "REFERENCE"])
def test_override(monkeypatch, op, value):
    override(monkeypatch, value)
    choice = backend.choose(op, "cpu")
    assert choice.backend == "reference"
    assert all("ADALORA_FAST_BACKEND=" in r or "no" in r for r in choice.reasons.values())


@pytest.mark.parametrize("value", ["auto", "", " ", "AUTO"])
def test_no_override(monkeypatch, value):
    plain = backend.choose("adapter", "cpu")
    override(monkeypatch, value)
    assert backend.choose("adapter", "cpu") == plain


@pytest.mark.parametrize("value", ["tritron", "gpu", "reference,cpu", "0"])
def test_unknown_backend(monkeypatch, value):
    override(monkeypatch, value)
    with pytest.raises(ValueError, match=f"ADALORA_FAST_BACKEND='{value}' is not one of .*'auto'") as error:
        adalora_linear(*make_case())
    assert "\n" not in str(error.value)


def test_a_backend_that_cannot_run_here(monkeypatch):
    backend.register(
        "adapter", "triton", SimpleNamespace(), lambda device_type: f"no Triton on {device_type}"
    )
    override(monkeypatch, "triton")
    with pytest.raises(ValueError, match="triton cannot run adapter on cpu: no Triton on cpu; use auto"):
        adalora_linear(*make_case())


def test_a_backend_that_does_not_exist_for_an_op(monkeypatch):
    backend._implementations.pop(("allocation", "cuda"), None)
    override(monkeypatch, "cuda")
    with pytest.raises(
        ValueError, match=r"cuda cannot run allocation on cpu: .*no cuda implementation of allocation"
    ):
        select_triplets(torch.randn(3), torch.tensor(1))


def test_a_registered_implementation_runs_and_is_preferred():
    called = []

    def select(scores, budget):
        called.append(scores.device.type)
        return torch.ones_like(scores, dtype=torch.bool)

    before = select_triplets(torch.tensor([1.0, 2.0]), torch.tensor(1))
    backend.register("allocation", "cpu", SimpleNamespace(select=select))
    after = select_triplets(torch.tensor([1.0, 2.0]), torch.tensor(1))
    assert before.tolist() == [False, True] and after.tolist() == [True, True] and called == ["cpu"]
    assert backend.choose("allocation", "cpu").reasons["reference"] == "cpu is preferred"
    assert backend.choose("orthogonality", "cpu").backend != "none"


def test_a_refusal_falls_through_to_the_next(monkeypatch):
    for name in ("cuda", "triton", "cpu"):
        backend.register(
            "adapter", name, SimpleNamespace(), lambda device_type, name=name: f"{name}: not today"
        )
    choice = backend.choose("adapter", "cpu")
    assert choice.backend == "reference"
    assert choice.reasons == {name: f"{name}: not today" for name in ("cuda", "triton", "cpu")}


def test_order_of_preference():
    for name in backend.BACKENDS:
        backend.register("adapter", name, SimpleNamespace(name=name))
    assert backend.BACKENDS == ("triton", "cuda", "cpu", "reference")
    assert backend.kernel("adapter", "cuda").name == "triton"
    backend.register("adapter", "triton", SimpleNamespace(name="triton"), lambda device_type: "too old")
    assert backend.kernel("adapter", "cuda").name == "cuda"


@pytest.mark.parametrize(("op", "name"), [("attention", "cpu"), ("adapter", "tpu"), ("", "")])
def test_only_known_ops_and_backends_register(op, name):
    with pytest.raises(ValueError, match=r"cannot register .* ops: .* backends: "):
        backend.register(op, name, SimpleNamespace())
