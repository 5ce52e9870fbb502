"""Tiny models on quantised bases: bitsandbytes' 8-bit and 4-bit linears."""

import copy
import importlib.metadata

import pytest
import torch
from peft import PeftModel
from torch import nn

from tests.helpers.models import LLAMA_LINEARS, adapt, awake, batch, llama

KINDS = ("int8", "nf4", "fp4")


def _missing() -> str | None:
    """Why these tests cannot run here."""
    try:
        version = importlib.metadata.version("bitsandbytes")
    except importlib.metadata.PackageNotFoundError:
        return "bitsandbytes is not installed; pip install 'bitsandbytes>=0.50'"
    if tuple(map(int, version.split(".")[:2])) < (0, 50):
        return f"bitsandbytes {version} has no FP4 on CPUs; pip install 'bitsandbytes>=0.50'"
    return None


needs_bitsandbytes = pytest.mark.skipif(_missing() is not None, reason=str(_missing()))


def quantised_linear(linear: nn.Linear, kind: str) -> nn.Linear:
    """``linear`` as bitsandbytes stores it; 4-bit weights with double quantisation."""
    import bitsandbytes as bnb

    sizes = linear.in_features, linear.out_features, linear.bias is not None
    data = linear.weight.data.clone()
    if kind == "int8":
        new = bnb.nn.Linear8bitLt(*sizes, has_fp16_weights=False, threshold=6.0)
        new.weight = bnb.nn.Int8Params(data, requires_grad=False, has_fp16_weights=False)
    else:
        new = bnb.nn.Linear4bit(*sizes, compute_dtype=linear.weight.dtype, quant_type=kind)
        new.weight = bnb.nn.Params4bit(data, requires_grad=False, quant_type=kind, compress_statistics=True)
    new.bias = copy.deepcopy(linear.bias)
    return new.requires_grad_(False).to("cpu")  # the move is what quantises


def quantised(model: nn.Module, kind: str) -> nn.Module:
    """``model`` with every adaptable linear quantised and transformers' mark of that."""
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and name.rpartition(".")[2] in LLAMA_LINEARS:
            model.set_submodule(name, quantised_linear(module, kind))
    model.is_loaded_in_8bit, model.is_loaded_in_4bit = kind == "int8", kind != "int8"
    return model


def adapted_quantised(kind: str, dtype: torch.dtype = torch.float32, **overrides) -> PeftModel:
    """A tiny Llama on a quantised base, adapted; the same arguments give the same weights."""
    return adapt(quantised(llama(width=64).to(dtype), kind), LLAMA_LINEARS, **overrides)


def small(model: PeftModel) -> PeftModel:
    """Adapters that show, and are small enough for half precision."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.mul_(0.25)
    return model


def awake_quantised(kind: str, dtype: torch.dtype = torch.float32, **overrides) -> PeftModel:
    """The same with an adapter that is not zero."""
    return small(awake(adapted_quantised(kind, dtype, **overrides)))


@torch.no_grad()
def smooth_logits(model: PeftModel) -> torch.Tensor:
    """What the model computes in training mode: in evaluation these bases round their input to 8 or 16 bits
    on some CPUs, which turns the smallest difference into a large one.
    """
    return model.train()(input_ids=batch(99)["input_ids"]).logits
