"""What one adapted layer is compared with: the frozen layer, PEFT, functions of matrix products, and ours.

Every peer is made from one :class:`Layer`, so all compute with the same numbers; a benchmark's gate compares
each with the formula in float64 before it is timed.
"""

from collections.abc import Callable

from benchmarks.peers.extra import INSTALLED
from benchmarks.peers.layer import FORMS, Layer, Peer, errors, truth
from benchmarks.peers.peft_layers import peft, peft_compiled, peft_lora
from benchmarks.peers.plain import frozen, ours, plain
from benchmarks.peers.unsloth_style import unsloth_style

__all__ = ["FORMS", "NO_DROPOUT", "PEERS", "Layer", "Peer", "errors", "truth"]

PEERS: dict[str, Callable[[Layer], Peer]] = {
    "frozen": frozen,
    "adalora_fast": ours,
    "peft": peft,
    "peft compiled": peft_compiled,
    "peft lora": peft_lora,
    "unsloth style": unsloth_style,
    "plain pytorch": plain,
    **INSTALLED,
}
NO_DROPOUT = ("unsloth style", "unsloth")  # they have none
