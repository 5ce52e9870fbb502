"""Every op as ``torch.library`` sees it (schema, fake, autograd, tracing) and under ``torch.compile``."""

import pytest
import torch

from adalora_fast import AdaLoraLinear
from adalora_fast.ops import (
    adalora_linear,
    apply_mask_,
    importance_scores,
    importance_update_,
    orthogonality,
    select_triplets,
)
from adalora_fast.ops.dispatch.library import autocast_is_on
from tests.helpers.naive import leaves, make_case, onto_linear
from tests.helpers.scoring import SCORES, make_buffers, make_parameters

OPS = torch.ops.adalora_fast
NAMES = {
    "adapter_linear",
    "adapter_delta",
    "adapter_delta_",
    "adapter_backward",
    "importance_update_",
    "importance_scores",
    "orthogonality",
    "orthogonality_acts",
    "allocation_select",
    "allocation_apply_mask_",
    "allocation_allocate_",
}
ALL_CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def adapter(recorded=True, shape=(2, 7, 5), r=3, dtype=torch.float32, **options):
    case = make_case(shape, 6, r, dtype=dtype, **options)
    return leaves(case) if recorded else case


@pytest.mark.parametrize("highest", [False, True])
@pytest.mark.parametrize("shape", [(7, 5), (2, 7, 5), (5,)], ids=str)
@pytest.mark.parametrize(("r", "bias"), [(3, True), (1, False), (0, True)])
def test_adapter_linear(shape, r, bias, highest):
    c = adapter(shape=shape, r=r, bias=bias)
    torch.library.opcheck(OPS.adapter_linear, (c.x, None, c.weight, c.bias, *c.factors, 0.5, highest))


def test_adapter_linear_with_a_dropped_input_and_a_half_base():
    c = adapter()
    dropped = (c.x * 2).detach().requires_grad_()
    torch.library.opcheck(OPS.adapter_linear, (c.x, dropped, c.weight, c.bias, *c.factors, 0.5, False))
    half = adapter(dtype=torch.bfloat16, factor_dtype=torch.float32)
    for highest in (False, True):
        arguments = (half.x, None, half.weight, half.bias, *half.factors, 0.5, highest)
        torch.library.opcheck(OPS.adapter_linear, arguments, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("shape", [(7, 5), (2, 7, 5)], ids=str)
@pytest.mark.parametrize("recorded", [True, False])
def test_adapter_delta(shape, recorded):
    c = adapter(recorded, shape=shape)
    result = torch.randn(*shape[:-1], 6, requires_grad=recorded)
    torch.library.opcheck(OPS.adapter_delta, (result, c.x, *c.factors, 0.5, False))


@pytest.mark.parametrize("highest", [False, True])
def test_adapter_delta_in_place(highest):
    c = adapter(False)
    torch.library.opcheck(OPS.adapter_delta_, (torch.randn(2, 7, 6), c.x, *c.factors, 0.5, highest))


@pytest.mark.parametrize("needs", [(True,) * 5, (True, False, False, True, False), (False,) * 5], ids=str)
@pytest.mark.parametrize("shared", [True, False])
def test_adapter_backward(needs, shared):
    c = adapter(False)
    needs = (needs[0], needs[1] and not shared, *needs[2:])
    h, S = torch.randn(14, 3), torch.randn(3, 5)
    arguments = (torch.randn(2, 7, 6), c.x, h, S, c.weight, *c.factors, 0.5, shared, *needs)
    torch.library.opcheck(OPS.adapter_backward, arguments)


@pytest.mark.parametrize("score", SCORES)
def test_importance(score):
    parameters = make_parameters(dtype=torch.float32)
    statistics, updates = make_buffers(parameters, score, "ema", torch.float32)
    grads = [None if i == 2 else p.flip(0).clone() for i, p in enumerate(parameters)]
    torch.library.opcheck(
        OPS.importance_update_,
        (parameters, grads, statistics, updates, score, "ema", 0.9, 0.9, torch.tensor(True)),
        test_utils=ALL_CHECKS,
    )
    torch.library.opcheck(OPS.importance_scores, (parameters, statistics + 1, score, "ema"))


@pytest.mark.parametrize("penalty", ["fro", "squared"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_orthogonality(penalty, dtype):
    parameters = [p.to(dtype).requires_grad_() for p in make_parameters()]
    torch.library.opcheck(OPS.orthogonality, (parameters[0::3], parameters[2::3], penalty, True))
    detached = [p.detach() for p in parameters]
    torch.library.opcheck(OPS.orthogonality, (detached[0::3], detached[2::3], penalty, False))


def test_what_the_backward_of_the_term_asks():
    torch.library.opcheck(OPS.orthogonality_acts, (torch.tensor(2.0), 0, True))  # nobody has number 0


def test_allocation():
    torch.library.opcheck(OPS.allocation_select, (torch.randn(8), torch.tensor(3)))
    lambdas = [torch.randn(3, 1), torch.randn(2, 1)]
    torch.library.opcheck(OPS.allocation_apply_mask_, (torch.rand(5) > 0.5, lambdas))
    torch.library.opcheck(OPS.allocation_allocate_, (torch.randn(5), torch.tensor(3), lambdas))


def test_every_registered_op_is_checked_here():
    registered = {name.split("::")[1].split(".")[0] for name in torch._C._dispatch_get_all_op_names()
                  if name.startswith("adalora_fast::")}  # fmt: skip
    assert registered == NAMES


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def compiled(function):
    return torch.compile(function, fullgraph=True, backend="aot_eager")


def gradients_of(function, case):
    ours = leaves(case)
    y = function(*ours)
    (y.float() ** 2).sum().backward()
    return [y.detach(), ours.x.grad, *(factor.grad for factor in ours.factors)]


@pytest.mark.parametrize("function", [adalora_linear, onto_linear])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("precision", ["default", "highest"])
def test_adapter_compiled_equals_eager(function, dtype, precision):
    case = make_case((2, 7, 5), 6, 3, dtype=dtype, factor_dtype=torch.float32)

    def run(*inputs):
        return function(*inputs, precision=precision)

    for got, want in zip(gradients_of(compiled(run), case), gradients_of(run, case), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("function", [adalora_linear, onto_linear])
def test_adapter_compiled_without_gradients(function):
    case = make_case((2, 7, 5), 6, 3)
    with torch.no_grad():
        assert torch.equal(compiled(function)(*case), function(*case))


def test_delta_compiled_keeps_the_rules_of_writing():
    case = make_case((7, 5), 6, 3)
    whole = torch.randn(14, 6, dtype=torch.float64)
    before = whole.clone()

    def on_view(whole, x, lora_A, lora_E, lora_B):
        from adalora_fast.ops import adalora_delta_

        return adalora_delta_(whole[:7], x, lora_A, lora_E, lora_B, 0.5)

    with torch.no_grad():
        out = compiled(on_view)(whole, case.x, *case.factors)
    assert torch.equal(whole, before)
    assert torch.allclose(out, on_view(whole, case.x, *case.factors))


def test_adapter_compiled_over_changing_sizes():
    function = torch.compile(adalora_linear, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (7, 9, 12, 1):
        case = make_case((rows, 5), 6, 3)
        for got, want in zip(gradients_of(function, case), gradients_of(adalora_linear, case), strict=True):
            assert torch.equal(got, want)


def test_importance_compiled_equals_eager():
    results = []
    for wrap in (lambda f: f, compiled):
        parameters = make_parameters()
        statistics, updates = make_buffers(parameters, "sensitivity", "ema_uncertainty")

        def step(parameters, grads, statistics, updates):
            importance_update_(parameters, grads, statistics, updates)
            return importance_scores(parameters, statistics)

        step = wrap(step)
        for t in range(3):
            scores = step(parameters, [p.flip(0) * (t + 1) for p in parameters], statistics, updates)
        results.append((scores, statistics, updates))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("penalty", ["fro", "squared"])
def test_orthogonality_compiled_equals_eager(penalty):
    results = []
    for wrap in (lambda f: f, compiled):
        parameters = [p.requires_grad_() for p in make_parameters()]
        function = wrap(lambda A, B: orthogonality(A, B, penalty)[0] * 0.5)
        value = function(parameters[0::3], parameters[2::3])
        value.backward()
        results.append([value.detach(), *(p.grad for p in parameters if p.grad is not None)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_allocation_compiled_equals_eager():
    results = []
    for wrap in (lambda f: f, compiled):
        values = [torch.ones(3, 1), torch.ones(2, 1)]

        def allocate(scores, budget, values):
            mask = select_triplets(scores, budget)
            apply_mask_(mask, values)
            return mask

        mask = wrap(allocate)(torch.tensor([1.0, 5.0, 2.0, 2.0, 7.0]), torch.tensor(3), values)
        results.append([mask, *values])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_layer_compiled_equals_eager(training, dropout):
    results = []
    for wrap in (lambda f: f, compiled):
        torch.manual_seed(0)
        layer = AdaLoraLinear(5, 6, 3, dropout=dropout).train(training)
        torch.nn.init.normal_(layer.lora_E)
        x = torch.randn(4, 5, requires_grad=True)
        function = wrap(layer)
        torch.manual_seed(1)
        y = function(x)
        y.square().sum().backward()
        results.append([y.detach(), x.grad, *(factor.grad for factor in layer.factors())])
    for got, want in zip(*results, strict=True):
        assert torch.equal(got, want)


def test_autocast_is_asked_for_as_every_dynamo_can_trace_it(monkeypatch):
    """PyTorch 2.11 cannot trace torch.amp.is_autocast_available, which therefore is asked at import alone."""
    monkeypatch.setattr(torch.amp, "is_autocast_available", lambda device: pytest.fail("it was asked"))
    assert not autocast_is_on("cpu") and not autocast_is_on("cuda") and not autocast_is_on("meta")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert autocast_is_on("cpu") and not autocast_is_on("meta")
