"""AdaLoRA, fast and correct: drop-in for PEFT, with the importance score of your choice."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what _WHERE hands out, for editors and type checkers
    from adalora_fast.allocator.allocator import RankAllocator
    from adalora_fast.allocator.join import JoinableAllocator
    from adalora_fast.allocator.scores import register_score
    from adalora_fast.integrations.compaction import compact
    from adalora_fast.integrations.export import to_lora
    from adalora_fast.integrations.official import import_official
    from adalora_fast.integrations.peft import fuse
    from adalora_fast.integrations.serving import servable
    from adalora_fast.integrations.trainer import AdaLoraCallback
    from adalora_fast.nn.linear import AdaLoraLinear
    from adalora_fast.nn.orthogonality import orthogonality_loss

__version__ = "0.1.0"
__all__ = [
    "AdaLoraCallback",
    "AdaLoraLinear",
    "JoinableAllocator",
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
    "AdaLoraLinear": "nn.linear",
    "JoinableAllocator": "allocator.join",
    "RankAllocator": "allocator.allocator",
    "compact": "integrations.compaction",
    "fuse": "integrations.peft",
    "import_official": "integrations.official",
    "orthogonality_loss": "nn.orthogonality",
    "register_score": "allocator.scores",
    "servable": "integrations.serving",
    "to_lora": "integrations.export",
}


def __getattr__(name: str) -> Any:
    """torch, PEFT and transformers are imported when something that needs them is asked for."""
    if name in _WHERE:
        return getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
