"""The adapter's kernels on inputs of every layout, with infinities, and with pruned triplets."""

import pytest
import torch

from adalora_fast.ops import adalora_linear
from tests.helpers.kernel_calls import backward, forward
from tests.helpers.kernel_cases import (
    DEVICE,
    FACTORS,
    MEDIUM,
    ON_DEVICE,
    TRAINED,
    WAYS,
    WAYS_AND_DTYPES,
    assert_same,
    exact_case,
    exact_grad,
    planned,
    random_case,
    run,
    triton_backend,
)
from tests.helpers.kernels import poisoned
from tests.helpers.naive import draw_grad, leaves, results, truth

pytestmark = ON_DEVICE


@pytest.fixture(autouse=True)
def kernels_write_all_they_return():
    with triton_backend(), poisoned():
        yield


def _sliced(t):
    wide = torch.full((*t.shape[:-1], t.shape[-1] + 5), float("nan"), dtype=t.dtype, device=t.device)
    wide[..., 2:-3] = t
    return wide[..., 2:-3]


def _every_second_column(t):
    return torch.stack((t, torch.full_like(t, float("nan"))), -1).flatten(-2)[..., ::2]


def _transposed(t):
    return t.transpose(0, 1).contiguous().transpose(0, 1)


LAYOUTS = (_sliced, _every_second_column, _transposed)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("which", ["x", "grad", "weight", *FACTORS])
@pytest.mark.parametrize("way", ["inline", "library"])
def test_any_strides(way, which, layout):
    case = exact_case(33, 20, 17, 3)
    grad = exact_grad(case)
    exact = truth(case, grad)
    if which == "grad":
        grad = layout(grad)
    else:
        case = case._replace(**{which: layout(getattr(case, which))})
    tracked = {name: getattr(case, name).detach().requires_grad_() for name in TRAINED}
    ours = case._replace(**tracked)  # naive.leaves would copy, which may change the strides
    with planned(way, MEDIUM):
        got = results(adalora_linear(*ours), ours, grad)
    assert_same(got, exact)


@pytest.mark.parametrize("way", WAYS)
def test_an_expanded_gradient(way):
    """``sum().backward()`` hands out one number with strides of zero."""
    case = exact_case(33, 24, 17, 3)
    ours = leaves(case)
    with planned(way):
        y = adalora_linear(*ours)
        y.sum().backward()
    exact = truth(case, torch.ones_like(y))
    for name in TRAINED:
        assert torch.equal(getattr(ours, name).grad, exact[name].to(getattr(ours, name).dtype)), name


@pytest.mark.parametrize("way", WAYS)
def test_a_row_of_x_that_is_expanded(way):
    case = exact_case(33, 24, 17, 3)
    case = case._replace(x=case.x[:1].expand(33, -1))
    grad = exact_grad(case)
    with planned(way):
        y, h, S = forward(case)
        dx, _, dA, _, _ = backward(case, grad, h, S)
    exact = truth(case, grad)
    assert_same({"y": y, "x": dx, "lora_A": dA}, {name: exact[name] for name in ("y", "x", "lora_A")})


@pytest.mark.parametrize("shape", [(24,), (1, 24), (3, 11, 24), (2, 1, 3, 24)], ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_any_number_of_dimensions(way, shape):
    case = exact_case(33, 24, 17, 3)
    case = case._replace(x=case.x.flatten()[: torch.Size(shape).numel()].view(shape))
    grad = exact_grad(case)
    with planned(way):
        assert_same(run(adalora_linear, case, grad), truth(case, grad))


@pytest.mark.parametrize("way", WAYS)
def test_the_weight_of_a_conv1d_is_read_as_it_lies(way):
    case = exact_case(33, 24, 17, 3)
    conv = case.weight.t().contiguous()  # GPT-2 stores [in, out]
    grad = exact_grad(case)
    with planned(way):
        assert_same(run(adalora_linear, case._replace(weight=conv.t()), grad), truth(case, grad))


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize(("way", "dtype"), WAYS_AND_DTYPES)
def test_what_is_not_finite_stays_in_its_row(way, dtype, value):
    case = random_case((40, 21), 19, 3, dtype=dtype, factor_dtype=torch.float32)
    grad = draw_grad(case).to(DEVICE)
    others = torch.arange(40, device=DEVICE) != 5
    columns = torch.arange(21, device=DEVICE) != 7
    x = case.x.clone()
    x[5, 7] = value
    with planned(way):
        clean, dirty = run(adalora_linear, case, grad), run(adalora_linear, case._replace(x=x), grad)
        assert torch.equal(dirty["y"][others], clean["y"][others])
        assert not dirty["y"][5].isfinite().any()
        assert torch.equal(dirty["x"], clean["x"]), "dx does not depend on x"
        assert torch.equal(dirty["lora_A"][:, columns], clean["lora_A"][:, columns])
        assert not dirty["lora_A"][:, 7].isfinite().any()
        assert not dirty["lora_E"].isfinite().any() and not dirty["lora_B"].isfinite().any()

        grad[5, 3] = value
        spoilt = run(adalora_linear, case, grad)
    assert torch.equal(spoilt["y"], clean["y"]) and torch.equal(spoilt["x"][others], clean["x"][others])
    assert not spoilt["x"][5].isfinite().any()
    rows = torch.arange(19, device=DEVICE) != 3
    assert torch.equal(spoilt["lora_B"][rows], clean["lora_B"][rows])


@pytest.mark.parametrize("which", ["x", "grad"])
@pytest.mark.parametrize(("way", "dtype"), WAYS_AND_DTYPES)
def test_infinity_stays_infinity(way, dtype, which):
    """Where all is positive an infinite entry makes no NaN: not by the zeros that pad the rank either."""
    case = exact_case(20, 24, 17, 3, dtype=dtype)
    case = case._replace(**{name: torch.ones_like(getattr(case, name)) for name in (*TRAINED, "weight")})
    grad = torch.ones_like(exact_grad(case))
    (case.x if which == "x" else grad)[5, 7] = float("inf")
    exact = truth(case, grad)
    assert not any(value.isnan().any() for value in exact.values())
    with planned(way, MEDIUM):
        assert_same(run(adalora_linear, case, grad), exact)


@pytest.mark.parametrize("way", WAYS)
def test_infinite_factors_spoil_their_triplet_alone(way):
    case = exact_case(33, 24, 17, 3)
    E = case.lora_E.clone()
    E[1] = float("nan")
    grad = exact_grad(case)
    with planned(way):
        clean, dirty = run(adalora_linear, case, grad), run(adalora_linear, case._replace(lora_E=E), grad)
    for name, rows in (("lora_A", dirty["lora_A"]), ("lora_B", dirty["lora_B"].t())):
        want = clean[name] if name == "lora_A" else clean[name].t()
        assert torch.equal(rows[[0, 2]], want[[0, 2]]) and not rows[1].isfinite().any(), name


@pytest.mark.parametrize(("way", "dtype"), WAYS_AND_DTYPES)
def test_pruned_triplets(way, dtype):
    case = random_case((33, 24), 17, 5, dtype=dtype, factor_dtype=torch.float32)
    pruned, kept = [0, 3], [1, 2, 4]
    case.lora_E[pruned] = 0.0
    grad = draw_grad(case).to(DEVICE)
    exact = truth(case, grad)
    with planned(way):
        got = run(adalora_linear, case, grad)
    assert (got["lora_A"][pruned] == 0).all() and (got["lora_B"][:, pruned] == 0).all()
    assert (got["lora_A"][kept] != 0).any() and (got["lora_B"][:, kept] != 0).any()
    assert torch.allclose(got["lora_E"].double(), exact["lora_E"], rtol=0.05), (
        "a pruned triplet may come back"
    )
    assert (got["lora_E"][pruned] != 0).all()


@pytest.mark.parametrize("way", WAYS)
def test_all_triplets_pruned(way):
    case = exact_case(33, 24, 17, 3)
    case.lora_E.zero_()
    grad = exact_grad(case)
    with planned(way):
        assert_same(run(adalora_linear, case, grad), truth(case, grad))
