"""The adapter as one autograd function of ``addmm`` calls, the way Unsloth writes plain LoRA."""

import torch

from benchmarks.peers.layer import Layer, Peer


class UnslothStyle(torch.autograd.Function):
    """The adapter as one function of matrix products: what one writes by hand without kernels of one's own.

    No dropout; the factors are cast to x's type, and ``x Aᵀ`` is computed again in the backward.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, lora_A, lora_E, lora_B, scaling):
        rows = x.view(-1, x.shape[-1])
        y = rows @ weight.t() if bias is None else torch.addmm(bias, rows, weight.t())
        A, B = (lora_A * lora_E).to(x.dtype), lora_B.to(x.dtype)
        y.addmm_(rows @ A.t(), B.t(), alpha=scaling)
        ctx.save_for_backward(rows, weight, lora_A, lora_E, lora_B)
        ctx.scaling = scaling
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, grad):
        rows, weight, lora_A, lora_E, lora_B = ctx.saved_tensors
        dy = grad.reshape(-1, grad.shape[-1])
        A, B = (lora_A * lora_E).to(dy.dtype), lora_B.to(dy.dtype)
        g = dy @ B
        dx = (dy @ weight).addmm_(g, A, alpha=ctx.scaling)
        V = (g.t() @ rows).float() * ctx.scaling
        dB = (dy.t() @ (rows @ A.t())).float() * ctx.scaling
        return dx.view(*grad.shape[:-1], -1), None, None, V * lora_E, (V * lora_A).sum(1, True), dB, None


def unsloth_style(layer: Layer) -> Peer:
    def run(x: torch.Tensor) -> torch.Tensor:
        return UnslothStyle.apply(x, layer.weight, layer.bias, *layer.factors, layer.scaling)

    return Peer(run, layer.factors)
