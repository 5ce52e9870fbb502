"""Peers that take part where they are installed.

Unsloth: its ``LoRA_W``, the function behind an attention's output projection. Importing Unsloth changes parts
of transformers and PEFT for the whole process, so it is imported when a case first measures it. (Liger has no
LoRA layer: its kernels are norms, activations, embeddings and losses.)
"""

from importlib.util import find_spec

from torch import Tensor

from benchmarks.peers.layer import Layer, Peer, folded


def unsloth(layer: Layer) -> Peer:
    """Unsloth's LoRA_W, signature (X [batch, length, in], W, W_quant, A, B, S), with lora_E * lora_A as A.

    It has neither a bias, which is added as an operation of its own, nor dropout.

    Raises:
        ImportError, TypeError: it is not what is described here.
    """
    from unsloth.kernels.fast_lora import LoRA_W

    A, B = folded(layer), layer.lora_B

    def run(x: Tensor) -> Tensor:
        y = LoRA_W.apply(x if x.dim() == 3 else x[None], layer.weight, None, A, B, layer.scaling)
        y = y.view(*x.shape[:-1], -1)
        return y if layer.bias is None else y + layer.bias

    return Peer(run, (A, B), "lora")


INSTALLED = {"unsloth": unsloth} if find_spec("unsloth") is not None else {}
