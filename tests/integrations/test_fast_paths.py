"""Code of PyTorch that reads a layer's weight instead of calling it: evaluation equals training, or it is
said."""

import copy
import warnings

import pytest
import torch
from peft import AdaLoraConfig, get_peft_model
from torch import nn

from adalora_fast import AdaLoraLinear, RankAllocator, fuse, to_lora

KINDS = ("native", "fused", "with a base of its own")
SCHEDULE = {"target_r": 1, "total_step": 20, "tinit": 2, "tfinal": 4}


class Own(nn.Linear):
    """A base without a fused form."""


class Encoder(nn.Module):
    def __init__(self, norm_first=False, linear=nn.Linear):
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True, norm_first=norm_first)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first)
        for layer in self.encoder.layers:
            layer.linear1 = linear(16, 32)

    def forward(self, x, padding=None):
        return self.encoder(x, src_key_padding_mask=padding)


def adapted(kind, only_last=False, allocated=True, **options):
    """The encoder with trained-looking adapters in its feed-forward layers (``only_last``: of the last)."""
    torch.manual_seed(0)
    model = Encoder(**options, linear=Own if kind == KINDS[2] else nn.Linear)
    model.double().requires_grad_(False)
    numbers = (1,) if only_last else (0, 1)
    if kind == "native":
        for layer in (model.encoder.layers[number] for number in numbers):
            layer.linear1 = AdaLoraLinear.from_linear(layer.linear1, 2)
            layer.linear2 = AdaLoraLinear.from_linear(layer.linear2, 2)
        if allocated:
            RankAllocator(model, **SCHEDULE)
    else:
        targets = rf".*layers\.({'|'.join(map(str, numbers))})\.linear[12]"
        model = fuse(get_peft_model(model, AdaLoraConfig(**SCHEDULE, init_r=2, target_modules=targets)))
        assert len(model.base_model.unfused) == (len(numbers) if kind == KINDS[2] else 0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter)
    return model


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("only_last", [False, True])
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_of_an_encoder_is_its_training(kind, padded, norm_first, only_last, grad):
    """Without dropout the two must be the same numbers: PyTorch's kernel does not leave the adapter out."""
    model = adapted(kind, only_last, norm_first=norm_first)
    x, padding = torch.randn(3, 5, 16, dtype=torch.float64), torch.zeros(3, 5, dtype=torch.bool)
    padding[0, 3:] = padding[2, 1:] = padded
    with torch.set_grad_enabled(grad):
        trained = model.train()(x, padding if padded else None)
        evaluated = model.eval()(x, padding if padded else None)
    kept = ~padding  # nobody reads what is put out at padding
    torch.testing.assert_close(evaluated[kept], trained[kept], rtol=1e-9, atol=1e-9)
    for name, parameter in model.named_parameters():
        if "lora_E" in name:
            nn.init.zeros_(parameter)
    assert not torch.allclose(model(x, padding if padded else None)[kept], evaluated[kept], atol=1e-3)


@pytest.mark.parametrize("only_last", [False, True])
def test_an_encoder_that_no_allocator_has_seen_takes_nested_tensors(only_last):
    """Inference alone: PyTorch packs the sequences, and the adapted layers work on what it packs."""
    model = adapted("native", only_last, allocated=False)
    x, padding = torch.randn(3, 5, 16, dtype=torch.float64), torch.zeros(3, 5, dtype=torch.bool)
    padding[0, 3:] = padding[2, 1:] = True
    assert model.encoder.use_nested_tensor
    with torch.no_grad():
        trained, evaluated = model.train()(x, padding), model.eval()(x, padding)
    torch.testing.assert_close(evaluated[~padding], trained[~padding], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_of_the_model_evaluates_as_the_model(kind):
    model = adapted(kind).eval()
    x = torch.randn(3, 5, 16, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(copy.deepcopy(model)(x), model(x))


def test_other_layers_keep_the_fast_path():
    """The encoder layers without an adapter are left as they are, and a merged model is PyTorch's again."""
    model = adapted("fused", only_last=True).eval()
    first, last = model.base_model.model.encoder.layers
    hooks = [
        [len(module._forward_pre_hooks) for module in layer.modules() if module._forward_pre_hooks]
        for layer in (first, last)
    ]
    assert hooks == [[], [1, 1]]
    x = torch.randn(3, 5, 16, dtype=torch.float64)
    with torch.no_grad():
        expected = model(x)
        merged = model.merge_and_unload()
        torch.testing.assert_close(merged(x), expected, rtol=1e-9, atol=1e-9)
    assert not any(module._forward_pre_hooks for module in merged.modules())


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.last = nn.MultiheadAttention(16, 4), nn.Linear(16, 16)

    def forward(self, x):
        return self.last(self.attention(x, x, x)[0])


@pytest.mark.parametrize("kind", ["native", "fused"])
def test_what_multihead_attention_never_calls_is_named(kind):
    said = r"1 adapted layers do nothing .*: .*attention\.out_proj"
    model = Attention()
    if kind == "native":
        model.attention.out_proj = AdaLoraLinear.from_linear(model.attention.out_proj, 2)
        model.last = AdaLoraLinear.from_linear(model.last, 2)
        with pytest.warns(UserWarning, match=said):
            RankAllocator(model, **SCHEDULE)
        adapter = model.attention.out_proj.lora_E
    else:
        model = get_peft_model(
            model, AdaLoraConfig(**SCHEDULE, init_r=2, target_modules=["out_proj", "last"])
        )
        with pytest.warns(UserWarning, match=said):
            fuse(model)
        adapter = model.base_model.model.attention.out_proj.lora_E["default"]
    model(torch.randn(2, 3, 16)).sum().backward()
    assert adapter.grad is None, "it is called now: the warning can go"


def test_an_ordinary_model_is_not_warned_of():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        RankAllocator(nn.Sequential(AdaLoraLinear(4, 4, 2)), **SCHEDULE)


@pytest.mark.parametrize("padded", [False, True])
def test_the_exported_adapter_is_evaluated_as_the_model_it_came_from(padded):
    """PEFT's LoRA layers are left out by the fast path as well."""
    model = adapted("fused").eval()
    x, padding = torch.randn(3, 5, 16, dtype=torch.float64), torch.zeros(3, 5, dtype=torch.bool)
    padding[0, 3:] = padded
    mask = padding if padded else None
    with torch.no_grad():
        expected, found = model(x, mask), to_lora(model).eval()(x, mask)
    torch.testing.assert_close(found[~padding], expected[~padding], rtol=1e-9, atol=1e-9)
