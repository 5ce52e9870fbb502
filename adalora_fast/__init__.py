"""AdaLoRA, fast and correct: drop-in for PEFT, with the importance score of your choice."""

from importlib import import_module

__version__ = "0.1.0"
__all__ = [
    "AdaLoraCallback",
    "AdaLoraLinear",
    "RankAllocator",
    "compact",
    "fuse",
    "import_official",
    "orthogonality_loss",
    "register_score",
    "servable",
    "to_lora",
]
_WHERE = {
    "AdaLoraCallback": "integrations.trainer",
    "AdaLoraLinear": "nn",
    "RankAllocator": "allocator.allocator",
    "compact": "integrations.compaction",
    "fuse": "integrations.peft",
    "import_official": "integrations.official",
    "orthogonality_loss": "nn",
    "register_score": "allocator.scores",
    "servable": "integrations.serving",
    "to_lora": "integrations.export",
}


def __getattr__(name: str):
    """torch, PEFT and transformers are imported when something that needs them is asked for."""
    if name in _WHERE:
        return getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
