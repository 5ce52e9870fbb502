"""vmap, jvp, grad, higher derivatives, ``torch.jit.trace`` and nested tensors: the op, and layers made of it,
compute there what they compute elsewhere.
"""

import io
import warnings

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from peft import AdaLoraConfig, get_peft_model
from torch import nn
from torch.func import functional_call, grad, hessian, jacfwd, jvp, vjp, vmap

from adalora_fast import AdaLoraLinear, fuse
from adalora_fast.ops import adalora_delta_, adalora_linear
from adalora_fast.ops.orthogonality import orthogonality

LAYERS = ("native", "fused", "onto the base")
M, K, N, R = 4, 6, 5, 3
SCALING = 1.7


def layer_of(kind):
    """A float64 layer whose adapter shows; ``onto the base`` calls its base because of a hook."""
    torch.manual_seed(0)
    if kind == "native":
        layer = AdaLoraLinear.from_linear(nn.Linear(K, N), R)
    else:
        config = AdaLoraConfig(init_r=R, target_r=1, total_step=9, target_modules=["0"])
        layer = fuse(get_peft_model(nn.Sequential(nn.Linear(K, N)), config)).base_model.model[0]
        if kind == "onto the base":
            layer.base_layer.register_forward_hook(lambda module, inputs, output: None)
    for name, parameter in layer.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter)
    return layer.double().eval()


def factors_of(layer):
    return {name: p.detach() for name, p in layer.named_parameters() if p.requires_grad}


def draw(*shape, seed=1):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def loss(layer, factors, x):
    return functional_call(layer, factors, (x,)).sin().sum()


def gradients(layer, x):
    """Those of ``loss``, from an ordinary backward."""
    layer.zero_grad()
    layer(x).sin().sum().backward()
    return {name: p.grad.clone() for name, p in layer.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("recorded", [True, False])
def test_vmap_over_the_input(kind, recorded):
    layer, x = layer_of(kind), draw(2, M, K)
    with torch.set_grad_enabled(recorded):
        torch.testing.assert_close(vmap(layer)(x), layer(x))
        torch.testing.assert_close(vmap(layer, in_dims=1, out_dims=1)(x), layer(x))


@pytest.mark.parametrize("kind", LAYERS)
def test_vmap_over_adapters(kind):
    """An ensemble: the same base, several adapters."""
    layer, x = layer_of(kind), draw(M, K)
    factors = factors_of(layer)
    several = {name: torch.stack([factor, 2 * factor, -factor]) for name, factor in factors.items()}
    found = vmap(lambda own: functional_call(layer, own, (x,)))(several)
    for number, scale in enumerate((1, 2, -1)):
        own = {name: scale * factor for name, factor in factors.items()}
        torch.testing.assert_close(found[number], functional_call(layer, own, (x,)))


@pytest.mark.parametrize("kind", LAYERS)
def test_grad_and_per_sample_gradients(kind):
    layer, x = layer_of(kind), draw(M, K)
    factors = factors_of(layer)
    found = grad(loss, argnums=1)(layer, factors, x)
    for name, expected in gradients(layer, x).items():
        torch.testing.assert_close(found[name], expected)
    each = vmap(lambda own, one: grad(loss, argnums=1)(layer, own, one), (None, 0))(factors, x)
    for number in range(M):
        for name, expected in gradients(layer, x[number]).items():
            torch.testing.assert_close(each[name][number], expected)


@pytest.mark.parametrize("kind", LAYERS)
def test_forward_mode(kind):
    """jvp and dual numbers agree with the transposed product of an ordinary backward."""
    layer, x, tangent = layer_of(kind), draw(M, K), draw(M, K, seed=2)
    y, forward = jvp(layer, (x,), (tangent,))
    torch.testing.assert_close(y, layer(x))
    torch.testing.assert_close(forward, layer(x + tangent) - layer(x))  # it is linear in x
    with forward_ad.dual_level():
        found = forward_ad.unpack_dual(layer(forward_ad.make_dual(x, tangent))).tangent
    torch.testing.assert_close(found, forward)
    cotangent = draw(M, N, seed=3)
    torch.testing.assert_close((vjp(layer, x)[1](cotangent)[0] * tangent).sum(), (forward * cotangent).sum())
    factors = factors_of(layer)
    found, expected = jacfwd(loss, argnums=1)(layer, factors, x), gradients(layer, x)
    assert all(torch.allclose(found[name], expected[name]) for name in factors)


@pytest.mark.parametrize("kind", LAYERS)
def test_second_derivatives(kind):
    layer, x = layer_of(kind), draw(M, K)
    factors = factors_of(layer)
    name = next(name for name in factors if "lora_E" in name)
    found = hessian(lambda own: loss(layer, {**factors, name: own}, x))(factors[name]).reshape(R, R)
    step = 1e-5
    for i in range(R):
        shift = torch.zeros(R, 1, dtype=torch.float64)
        shift[i] = step
        sides = [
            grad(lambda own: loss(layer, {**factors, name: own}, x))(factors[name] + sign * shift)
            for sign in (1, -1)
        ]
        difference = (sides[0] - sides[1]).flatten() / (2 * step)
        torch.testing.assert_close(found[i], difference, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", LAYERS)
def test_a_trace_is_saved_and_runs_without_the_package(kind):
    layer, x = layer_of(kind).requires_grad_(False), draw(M, K)
    with warnings.catch_warnings():
        warnings.simplefilter("error", torch.jit.TracerWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        traced = torch.jit.trace(layer, x)
        buffer = io.BytesIO()
        torch.jit.save(traced, buffer)
        buffer.seek(0)
        loaded = torch.jit.load(buffer)
    assert "adalora_fast::" not in str(loaded.inlined_graph) and "PythonOp" not in str(loaded.inlined_graph)
    other = draw(2, M, K, seed=4)  # another shape than it was traced with
    torch.testing.assert_close(loaded(other), layer(other))


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=str)
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors(kind, layout):
    layer = layer_of(kind)
    sequences = [draw(length, K, seed=length) for length in (2, 4, 1)]
    found = layer(torch.nested.nested_tensor(sequences, layout=layout))
    for one, sequence in zip(found.unbind(), sequences, strict=True):
        torch.testing.assert_close(one, layer(sequence))
    found = layer(torch.nested.nested_tensor(sequences, layout=layout))
    sum(one.sin().sum() for one in found.unbind()).backward()
    expected = gradients(layer_of(kind), torch.cat(sequences))
    for name, parameter in layer.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, expected[name])


def test_a_compiled_transform():
    layer, x = layer_of("native"), draw(2, M, K)
    torch.compiler.reset()
    compiled = torch.compile(vmap(layer), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x))


def make(dtype):
    inputs = [
        draw(*shape, seed=seed) for seed, shape in enumerate(((M, K), (N, K), (N,), (R, K), (R, 1), (N, R)))
    ]
    return [tensor.to(dtype) for tensor in inputs[:3]] + [tensor.float() for tensor in inputs[3:]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("precision", ["default", "highest"])
@pytest.mark.parametrize("autocast", [False, True])
def test_types_are_the_ops(dtype, precision, autocast):
    x, weight, bias, *factors = make(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        base = F.linear(x, weight, bias)
        for op in (
            lambda x, base: adalora_linear(x, weight, bias, *factors, SCALING, precision=precision),
            lambda x, base: adalora_delta_(base, x, *factors, SCALING, precision=precision),
        ):
            expected, found = op(x, base), vmap(op)(x, base)
            assert found.dtype == expected.dtype
            rounding = 2**-8 if found.dtype == torch.bfloat16 else 2**-22
            assert (found - expected).abs().max() <= 4 * rounding * expected.abs().max()


def test_dropout_under_vmap_is_pytorchs():
    x, weight, bias, *factors = make(torch.float32)

    def op(x):
        return adalora_linear(x, weight, bias, *factors, SCALING, 0.5, True)

    with pytest.raises(RuntimeError, match="randomness"):
        vmap(op)(x)
    same = vmap(op, randomness="same")(x[:1].expand(3, K))
    different = vmap(op, randomness="different")(x[:1].expand(3, K))
    assert torch.equal(same[0], same[1]) and not torch.equal(different[0], different[1])
    x, weight, bias, *factors = make(torch.float64)
    torch.testing.assert_close(  # nothing is left of the adapter at 1
        vmap(lambda x: adalora_linear(x, weight, bias, *[f.double() for f in factors], SCALING, 1.0, True),
             randomness="same")(x),
        F.linear(x, weight, bias),
    )  # fmt: skip


def test_what_does_not_fit_is_refused_there_too():
    x, weight, bias, *factors = make(torch.float32)
    with pytest.raises(ValueError, match=r"lora_A .* do not fit"):
        vmap(lambda x: adalora_linear(x, weight, bias, factors[0], factors[1][:1], factors[2], SCALING))(x)


@pytest.mark.parametrize("penalty", ["fro", "squared"])
def test_the_orthogonality_term(penalty):
    A, B = draw(R, K).requires_grad_(), draw(N, R).requires_grad_()

    def value(A, B):
        return orthogonality([A], [B], penalty)[0]

    value(A, B).backward()
    found = grad(value, argnums=(0, 1))(A.detach(), B.detach())
    torch.testing.assert_close(found, (A.grad, B.grad))
    several = torch.stack([A.detach(), 2 * A.detach()])
    expected = torch.stack([value(one, B.detach()) for one in several])
    torch.testing.assert_close(vmap(value, (0, None))(several, B.detach()), expected)
    tangent = draw(R, K, seed=5)
    forward = jvp(lambda A: value(A, B.detach()), (A.detach(),), (tangent,))[1]
    torch.testing.assert_close(forward, (A.grad * tangent).sum())
