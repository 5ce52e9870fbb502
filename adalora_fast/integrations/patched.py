"""``forward`` methods that were set on a module itself, in a copy of its model.

A copy of a module has the same function as its ``forward``. Where that function holds the original module
(in a closure, as TRL's fused head holds the original ``forward``), the copy would silently compute with the
original's layers.
"""

import functools
from collections.abc import Callable
from types import FunctionType, MethodType

from torch import nn


def with_own_forwards(copied: nn.Module, original: nn.Module) -> nn.Module:
    """``copied`` itself, without the ``forward`` that TRL's trainers set, as it calls the original's.

    Raises:
        ValueError: another ``forward`` that was set on a module calls the original's.
    """
    originals = {id(module) for module in original.modules()}
    for name, module in copied.named_modules():
        forward = module.__dict__.get("forward")
        if forward is None or not _reaches(forward, originals):
            continue
        function = getattr(forward, "__func__", forward)
        if not _is_trl(function) or not all(_is_class_s(held, module) for held in _held(function)):
            raise ValueError(
                f"{name or type(module).__name__} has a forward of its own, which calls the model it was "
                "made for; undo that first (del module.forward), or save the adapter and use export_folder"
            )
        del module.forward
    return copied


def _is_trl(function: Callable) -> bool:
    return getattr(function, "__globals__", {}).get("__name__", "").split(".")[0] == "trl"


def _is_class_s(held: object, module: nn.Module) -> bool:
    """Whether this is no other forward than the class's."""
    return not isinstance(held, MethodType) or held.__func__ is type(module).forward


def _held(function: Callable) -> list[object]:
    """What a function, method or partial keeps, or calls by a name of its file."""
    if isinstance(function, MethodType):
        return [function.__self__, function.__func__]
    if isinstance(function, functools.partial):
        return [function.func, *function.args, *function.keywords.values()]
    if isinstance(function, FunctionType):
        named = [function.__globals__.get(name) for name in function.__code__.co_names]
        methods = [value for value in named if isinstance(value, (MethodType, nn.Module))]
        return [*methods, *(cell.cell_contents for cell in function.__closure__ or ())]
    return []


def _reaches(held: object, originals: set[int], depth: int = 8) -> bool:
    if id(held) in originals:
        return True
    return depth > 0 and any(_reaches(inner, originals, depth - 1) for inner in _held(held))
