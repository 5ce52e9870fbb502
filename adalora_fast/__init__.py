"""AdaLoRA, fast and correct: drop-in for PEFT, with the importance score of your choice."""

from adalora_fast.allocator import RankAllocator
from adalora_fast.nn import AdaLoraLinear, orthogonality_loss
from adalora_fast.scores import register_score

__version__ = "0.1.0"
__all__ = [
    "AdaLoraCallback",
    "AdaLoraLinear",
    "RankAllocator",
    "fuse",
    "orthogonality_loss",
    "register_score",
]
_LAZY = {"fuse": "adalora_fast.integrations.peft", "AdaLoraCallback": "adalora_fast.integrations.trainer"}


def __getattr__(name: str):
    """PEFT and transformers are imported when something that needs them is asked for."""
    if name in _LAZY:
        from importlib import import_module

        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
