"""The ``torch.library`` namespace ``adalora_fast`` and the two lines every op needs to enter it."""

import contextlib
from collections.abc import Callable

import torch

NAMESPACE = "adalora_fast"
_library = torch.library.Library(NAMESPACE, "DEF")


# The compiler leaves an op with this tag out of its CUDA graphs.
NO_CUDA_GRAPH = tuple(tag for tag in (getattr(torch.Tag, "cudagraph_unsafe", None),) if tag is not None)


def define(
    schema: str, *, fake: Callable, tags: tuple[torch.Tag, ...] = ()
) -> Callable[[Callable], Callable]:
    """Register the decorated function as the op with this ``schema``, for every device, with ``fake`` for
    tracing.
    """
    name = schema.partition("(")[0]

    def decorate(function: Callable) -> Callable:
        _library.define(schema, tags=(torch.Tag.pt2_compliant_tag, *tags))
        _library.impl(name, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
        return function

    return decorate


def define_gradient(name: str, backward: Callable, setup_context: Callable | None = None) -> None:
    """Register the gradient of op ``name`` (see ``torch.library.register_autograd``)."""
    torch.library.register_autograd(
        f"{NAMESPACE}::{name}", backward, setup_context=setup_context, lib=_library
    )


# Devices without autocast, asked for once: Dynamo of PyTorch 2.11 cannot trace the question. A device that is
# missing here is an error where its autocast is asked for, never a silent no.
_WITHOUT_AUTOCAST = frozenset(
    name for name in ("meta", "lazy", "vulkan") if not torch.amp.is_autocast_available(name)
)


def autocast_is_on(device_type: str) -> bool:
    """Whether an autocast region is active for the device (there is none for some, such as meta)."""
    return device_type not in _WITHOUT_AUTOCAST and torch.is_autocast_enabled(device_type)


def without_autocast(device_type: str) -> contextlib.AbstractContextManager:
    """The op's caller chose the types; autocast must not choose again inside."""
    if autocast_is_on(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()


def no_second_order(name: str) -> RuntimeError:
    """What is said where the gradient of a gradient is asked for."""
    return RuntimeError(f"{name} has no second derivative; call backward without create_graph=True")


def refuse_second_order(name: str) -> None:
    """Make a derivative of the backward op ``name`` an error instead of a silent zero."""

    def backward(ctx, *grads):
        raise no_second_order(f"{NAMESPACE}::{name}")

    define_gradient(name, backward)
