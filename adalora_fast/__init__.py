"""AdaLoRA, fast and correct: drop-in for PEFT, with the importance score of your choice."""

from importlib import import_module

__version__ = "0.1.0"
__all__ = [
    "AdaLoraCallback",
    "AdaLoraLinear",
    "RankAllocator",
    "fuse",
    "orthogonality_loss",
    "register_score",
]
_WHERE = {
    "AdaLoraCallback": "integrations.trainer",
    "AdaLoraLinear": "nn",
    "RankAllocator": "allocator",
    "fuse": "integrations.peft",
    "orthogonality_loss": "nn",
    "register_score": "scores",
}


def __getattr__(name: str):
    """torch, PEFT and transformers are imported when something that needs them is asked for."""
    if name in _WHERE:
        return getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
