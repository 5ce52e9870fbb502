"""Is a layer nothing but ``x Wᵀ + b``? Whatever else it does is lost where its product is part of an op."""

from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.modules.module import _has_any_global_hook
from torch.nn.utils import prune
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

PLAIN_TENSORS = (nn.Parameter, Tensor)
PLAIN_LINEARS = (nn.Linear, NonDynamicallyQuantizableLinear)

HOOKS = {
    "_forward_hooks": "forward hook",
    "_forward_pre_hooks": "forward pre-hook",
    "_backward_hooks": "backward hook",
    "_backward_pre_hooks": "backward pre-hook",
    "_state_dict_hooks": "state dict hook",
    "_state_dict_pre_hooks": "state dict pre-hook",
    "_load_state_dict_pre_hooks": "load hook",
    "_load_state_dict_post_hooks": "load hook",
}
# Hooks that make the weight anew before every call, and what writes it down for good.
REMEDIES = {
    WeightNorm: "torch.nn.utils.remove_weight_norm(layer)",
    SpectralNorm: "torch.nn.utils.remove_spectral_norm(layer)",
    prune.BasePruningMethod: "torch.nn.utils.prune.remove(layer, 'weight')",
}
_CALLS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


def calls_its_own(module: nn.Module) -> bool:
    """Whether a call of ``module`` runs hooks or a forward of its own, which only a call respects."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def calls_more(module: nn.Module) -> bool:
    """As :func:`calls_its_own`, or whether there are hooks for every module."""
    return calls_its_own(module) or bool(_has_any_global_hook())


def more_than_its_product(linear: nn.Linear) -> str | None:
    """What ``linear`` has that a layer made of its weight and bias would lose, and what to do; None if
    nothing.
    """
    if isinstance(linear, LazyModuleMixin):
        return f"is a {type(linear).__name__} without a weight; run one batch through the model first"
    if is_parametrized(linear):
        names = list(linear.get_submodule("parametrizations")._modules)
        return (
            f"has a parametrized {', '.join(names)}, which it computes anew in every call; call "
            f"torch.nn.utils.parametrize.remove_parametrizations(layer, {names[0]!r}) first"
        )
    for attribute, kind in HOOKS.items():
        for hook in getattr(linear, attribute).values():
            if not _knows_names_only(hook):
                return _about_hook(hook, kind)
    if "forward" in linear.__dict__:
        return (
            "has a forward that was put onto it (as accelerate's device maps do), which would not run; "
            "remove that first"
        )
    if linear._compiled_call_impl is not None:
        return "was compiled by itself; call compile() on the adapted layer instead"
    if type(linear) not in PLAIN_LINEARS:
        return (
            f"is a {type(linear).__qualname__}, whose own behaviour would be lost; adapt it through PEFT, "
            "whose layers call the layer that they adapt (get_peft_model, then fuse)"
        )
    for name in ("weight", "bias"):
        tensor = getattr(linear, name)
        if tensor is not None and type(tensor) not in PLAIN_TENSORS:
            return (
                f"has a {type(tensor).__name__} as its {name}; adapt it before it is sharded or converted, "
                "or through PEFT (get_peft_model, then fuse)"
            )
    return None


def _knows_names_only(hook: object) -> bool:
    """Whether this is a load hook that is given a state dict and no module (parametrizations leave one)."""
    return getattr(hook, "with_module", None) is False


def _about_hook(hook: object, kind: str) -> str:
    for maker, remedy in REMEDIES.items():
        if isinstance(hook, maker):
            return f"makes its weight anew in every call ({type(hook).__name__}); call {remedy} first"
    name = getattr(hook, "__qualname__", type(hook).__qualname__)
    return f"has a {kind} ({name}), which would not run; register it on the adapted layer instead"


def carry_over(source: nn.Module, target: nn.Module, ordinary: nn.Module) -> None:
    """Give ``target`` the attributes, parameters, buffers and submodules that ``source`` has beside those of
    ``ordinary``, a fresh module of its class, and its hooks that translate names in state dicts.

    Raises:
        ValueError: ``target`` has something else under that name.
    """
    for kind in ("_parameters", "_buffers", "_modules", "__dict__"):
        for name in set(getattr(source, kind)) - set(getattr(ordinary, kind)):
            if hasattr(target, name):
                raise ValueError(
                    f"the layer has an attribute {name!r}, which is {type(target).__name__}'s own; rename it "
                    "first"
                )
            getattr(target, kind)[name] = getattr(source, kind)[name]
    target._non_persistent_buffers_set |= source._non_persistent_buffers_set
    loading = source._load_state_dict_pre_hooks
    target._load_state_dict_pre_hooks.update(
        {k: hook for k, hook in loading.items() if _knows_names_only(hook)}
    )


def carry_hooks(source: nn.Module, target: nn.Module, without: object) -> None:
    """Let ``target``'s calls run the hooks that ``source``'s do, apart from the hook ``without``."""
    for attribute in _CALLS:
        hooks = getattr(source, attribute)
        getattr(target, attribute).update({key: hook for key, hook in hooks.items() if hook is not without})
    target._is_full_backward_hook = source._is_full_backward_hook
