"""The suites of single operators, walked at tiny sizes on a CPU, and their peers."""

import importlib
import sys
from dataclasses import replace
from types import ModuleType

import pytest
import torch

from adalora_fast.environment import environment
from adalora_fast.ops.dispatch import backend
from benchmarks import peers
from benchmarks.measure import measure
from benchmarks.peers import extra
from benchmarks.report.results import Results, Row, read
from benchmarks.roofline import Ceilings
from benchmarks.suites import SCALES, Case, adapter, allocation, importance, orthogonality
from tests.helpers.backends import force

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SUITES = {
    "adapter": adapter,
    "importance": importance,
    "orthogonality": orthogonality,
    "allocation": allocation,
}
CEILINGS = Ceilings(bandwidth=1e10, flops={"float32": 1e11, "float16": 1e11, "bfloat16": 1e11})


@pytest.fixture
def forced():
    """Chooses a backend for the test."""
    yield force
    force("auto")


def first_case(suite: str, part: str = "") -> Case:
    return next(case for case in SUITES[suite].cases("tiny", CPU) if part in case.name)


def rows_of(case: Case) -> dict[str, Row]:
    return {row.contestant: row for row in measure(case, CEILINGS, CPU, rounds=2)}


@pytest.mark.parametrize("suite", SUITES)
def test_everybody_passes_the_gate_and_is_measured(suite, tmp_path):
    results = Results(device="cpu", environment=environment(), scale="tiny")
    for case in SUITES[suite].cases("tiny", CPU):
        rows = rows_of(case)
        assert tuple(rows) == case.contestants
        missing = {name for name, row in rows.items() if row.missing}
        pefts_own = suite != "importance" or case.what["score"] == "sensitivity"
        assert missing == (set() if pefts_own else {"peft"}), {n: rows[n].missing for n in missing}
        assert rows[case.baseline].ratio == 1.0
        assert all(row.floor > 0 and row.achieved > 0 for row in rows.values() if row.value)
        results.rows += rows.values()
    results.write(tmp_path / "results.json")
    assert read(tmp_path / "results.json") == results


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled here, not interpreted")
@pytest.mark.parametrize(
    ("suite", "part"),
    [("adapter", "step"), ("importance", "sensitivity"), ("orthogonality", ""), ("allocation", "score")],
)
def test_kernels_in_the_interpreter(forced, suite, part):
    forced("triton")
    case = first_case(suite, part)
    assert case.what["backend"] == "triton"
    assert rows_of(case)["adalora_fast"].value > 0


@pytest.mark.parametrize("suite", SUITES)
def test_plain_pytorch_is_measured_as_ours_where_nothing_faster_is(forced, suite):
    forced("reference")
    case = first_case(suite)
    assert case.what["backend"] == "reference"
    assert rows_of(case)["adalora_fast"].value > 0


@pytest.mark.parametrize("device", [CPU, CUDA], ids=str)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("suite", SUITES)
def test_cases_are_listed_without_building_them(suite, scale, device):
    cases = SUITES[suite].cases(scale, device)
    assert cases and len({case.name for case in cases}) == len(cases)
    for case in cases:
        assert (
            case.suite == suite and case.baseline in case.contestants and "adalora_fast" in case.contestants
        )
        assert case.moved > 0 and case.unit == "seconds"


def test_the_goals_come_first_on_a_gpu():
    cases = adapter.cases("full", CUDA)
    assert [case.name for case in cases[:2]] == [
        "768x768 r16 bfloat16 forward",
        "768x768 r16 bfloat16 step",
    ]
    assert [case.what["goal"] for case in cases] == [True] * 8 + [False] * (len(cases) - 8)
    sizes = {(case.what["inner"], case.what["outer"]) for case in cases}
    assert {(4096, 14336), (8192, 2048), (384, 1536), (1024, 4096)} <= sizes
    assert {case.what["rank"] for case in cases} == {4, 8, 16, 32, 64}
    assert {case.what["dtype"] for case in cases} == {"bfloat16", "float16", "float32"}
    assert len(cases) < 120


def draw(bias: bool = True) -> tuple[peers.Layer, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    layer = peers.Layer.draw(24, 40, 3, torch.float32, CPU, bias=bias)
    return layer, torch.randn(2, 10, 24), torch.randn(2, 10, 40)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", [name for name in peers.PEERS if name != "peft compiled"])
def test_every_peer_computes_the_formula(name, bias):
    layer, x, dy = draw(bias)
    if name in extra.INSTALLED:
        pytest.skip("runs on a GPU")
    peer = peers.PEERS[name](layer)
    found = peers.errors(peer, x, dy, peers.truth(layer, x, dy, peer.form))
    assert list(found) == list(peers.FORMS[peer.form]) and max(found.values()) < 1e-6
    assert len(peer.trained) == len(found) - 2


@pytest.mark.parametrize("name", ["plain pytorch", "peft", "peft lora", "adalora_fast"])
def test_dropout_is_on(name):
    layer, x, _ = draw()
    dropped = peers.PEERS[name](replace(layer, dropout_p=0.5))
    with torch.no_grad():
        assert not torch.equal(dropped(x), dropped(x))


def test_peft_compiled_says_why_it_is_missing_on_a_cpu():
    layer, *_ = draw()
    with pytest.raises(RuntimeError, match="for a GPU only"):
        peers.PEERS["peft compiled"](layer)


class LoRA_W(torch.autograd.Function):
    """Unsloth's function by its documentation: no bias, input [batch, length, in]."""

    @staticmethod
    def forward(ctx, X, W, W_quant, A, B, S):
        assert W_quant is None
        ctx.save_for_backward(X, W, A, B)
        ctx.scale = S
        return X @ W.t() + (X @ A.t()) @ B.t() * S

    @staticmethod
    def backward(ctx, dY):
        X, W, A, B = ctx.saved_tensors
        batch, length, width = X.shape
        dY, X = dY.reshape(-1, dY.shape[-1]), X.reshape(-1, width)
        dX = dY @ W + (dY @ B) @ A * ctx.scale
        dA, dB = (dY @ B).t() @ X * ctx.scale, dY.t() @ (X @ A.t()) * ctx.scale
        return dX.view(batch, length, width), None, None, dA, dB, None


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dimensions", [2, 3])
def test_unsloth_is_called_as_it_asks(monkeypatch, bias, dimensions):
    module = ModuleType("unsloth.kernels.fast_lora")
    module.LoRA_W = LoRA_W
    for name in ("unsloth", "unsloth.kernels"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    layer, x, dy = draw(bias)
    if dimensions == 2:
        x, dy = x[0], dy[0]
    peer = extra.unsloth(layer)
    assert max(peers.errors(peer, x, dy, peers.truth(layer, x, dy, "lora")).values()) < 1e-6


def test_an_unsloth_that_is_something_else_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "unsloth", None)
    monkeypatch.setitem(peers.PEERS, "unsloth", extra.unsloth)
    row = rows_of(first_case("adapter"))["unsloth"]
    assert row.value is None and "unsloth" in row.missing


def test_a_wrong_peer_is_missing(monkeypatch):
    def wrong(layer: peers.Layer) -> peers.Peer:
        return peers.PEERS["plain pytorch"](replace(layer, scaling=0.51))

    monkeypatch.setitem(peers.PEERS, "wrong", wrong)
    case = first_case("adapter")
    assert case.contestants[-1] == "wrong"
    rows = rows_of(case)
    assert rows["wrong"].missing.startswith("AssertionError: the relative error of y is")
    assert [name for name, row in rows.items() if row.missing] == ["wrong"]


def nothing(*arguments, **options) -> None:
    """Changes none of its arguments."""


@pytest.mark.parametrize(
    ("suite", "part", "target", "replacement"),
    [
        ("importance", "sensitivity", "importance_update_", nothing),
        ("importance", "gsnr", "importance_update_", nothing),
        ("orthogonality", "", "orthogonality", lambda A, B: (sum(one.sum() for one in (*A, *B)), [])),
        ("allocation", "score", "allocate_", lambda scores, budget, lambdas: scores > scores.median()),
        ("allocation", "select among", "select_triplets", lambda scores, budget: scores > scores.max()),
    ],
)
def test_wrong_results_of_ours_are_missing(monkeypatch, suite, part, target, replacement):
    monkeypatch.setattr(importlib.import_module(f"benchmarks.suites.{suite}"), target, replacement)
    row = rows_of(first_case(suite, part))["adalora_fast"]
    assert row.value is None and row.missing.startswith("AssertionError")


def test_backends_are_named_for_the_device():
    for suite, module in SUITES.items():
        for case in module.cases("tiny", CPU):
            assert case.what["backend"] == backend.choose(suite, "cpu").backend
