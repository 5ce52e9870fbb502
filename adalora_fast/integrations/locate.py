"""Where the AdaLoRA adapters of a model are, whatever the model looks like from outside.

Three shapes are found, alone or several in one model, below any module, ``torch.compile`` and data-parallel
wrappers:

- a ``PeftModel`` (``get_peft_model``, ``PeftModel.from_pretrained``);
- a model that carries the layers itself (``add_adapter`` of transformers and diffusers,
  ``inject_adapter_in_model``). PEFT makes a tuner for it and throws it away, so that nothing holds an
  allocator; here it gets a **handle**: a ``PeftModel`` over the same modules, which is no part of the model's
  module tree. What this package does with a ``PeftModel`` it does with the handle.
- a fused model of the second kind, whose handle is its attribute ``adalora``.
"""

from collections.abc import Iterator

from peft import AdaLoraConfig, PeftModel
from peft.tuners.adalora import AdaLoraModel
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from .layers import adapter_layers

HANDLE = "adalora"  # attribute of a fused model that carries its adapter layers itself
WRAPPERS = ("_orig_mod", "module")  # what torch.compile and data-parallel wrappers call the model


def peft_models(model: nn.Module) -> dict[str, PeftModel]:
    """Every ``PeftModel`` with AdaLoRA in ``model``, and the handle of every model that carries such layers
    itself, by module name (``""`` is ``model``; wrappers do not count). Names do not depend on wrapping.
    """
    return dict(_found(model, "", set())) if isinstance(model, nn.Module) else {}


def tuners(model: nn.Module) -> list[AdaLoraModel]:
    """The tuner of every adapted model in ``model``: it has ``peft_config``, ``rankallocator`` and, once
    fused, ``orth_penalty``, ``precision``, ``make_allocator``.
    """
    return [found.base_model for found in peft_models(model).values()]


def the_peft_model(model: nn.Module, call: str) -> PeftModel | None:
    """The one adapted model in ``model``, or None.

    Raises:
        ValueError: there are several; the message says what to do instead of ``call``.
    """
    found = peft_models(model)
    if len(found) > 1:
        raise ValueError(
            f"{type(model).__name__} has {len(found)} AdaLoRA models in it ({', '.join(found)}); use {call} "
            f"on each of them: {call}(model.get_submodule({next(iter(found))!r}))"
        )
    return next(iter(found.values()), None)


def carries_adapters(model: nn.Module) -> bool:
    """Whether AdaLoRA was put into the modules of ``model`` itself, without a ``PeftModel`` around it."""
    if isinstance(model, (PeftModel, BaseTuner)):
        return False
    configs = model.__dict__.get("peft_config")
    return isinstance(configs, dict) and any(isinstance(c, AdaLoraConfig) for c in configs.values())


def _found(module: nn.Module, name: str, seen: set[int]) -> Iterator[tuple[str, PeftModel]]:
    if id(module) in seen:
        return
    seen.add(id(module))
    if isinstance(module.__dict__.get(HANDLE), PeftModel):
        yield name, module.__dict__[HANDLE]
    elif isinstance(module, PeftModel):
        if isinstance(module.base_model, AdaLoraModel):
            yield name, module
    elif carries_adapters(module):
        yield name, handle_for(module)
    elif not isinstance(module, BaseTuner):
        for child_name, child in module.named_children():
            part = "" if is_wrapper(module) and child_name in WRAPPERS else child_name
            yield from _found(child, ".".join(filter(None, (name, part))), seen)


def is_wrapper(module: nn.Module) -> bool:
    """Whether it is ``torch.compile``'s or a data-parallel one."""
    is_library = type(module).__module__.partition(".")[0] in ("torch", "accelerate")
    return is_library and any(name in WRAPPERS for name, _ in module.named_children())


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside ``torch.compile`` and data-parallel wrappers."""
    while is_wrapper(model):
        model = next(child for name, child in model.named_children() if name in WRAPPERS)
    return model


def handle_for(model: nn.Module) -> PeftModel:
    """A ``PeftModel`` over a model that carries its adapter layers itself. Nothing of ``model`` changes.

    Raises:
        TypeError: it has adapters of other kinds too.
    """
    others = [n for n, config in model.peft_config.items() if not isinstance(config, AdaLoraConfig)]
    if others:
        kind = type(model.peft_config[others[0]]).__name__
        raise TypeError(
            f"adapter {others[0]!r} of {type(model).__name__} has a {kind}; AdaLoRA works beside its own "
            f"kind only: delete_adapter({others[0]!r}), or merge it into the base first"
        )
    layers = adapter_layers(model)
    active = next((layer.active_adapters for layer in layers.values()), list(model.peft_config))
    tuner = AdaLoraModel.__new__(AdaLoraModel)
    nn.Module.__init__(tuner)
    tuner.model, tuner.peft_config = model, model.peft_config
    tuner.active_adapter = list(active)
    tuner.targeted_module_names, tuner.targeted_parameter_names = list(layers), []
    trained = next((n for n, config in model.peft_config.items() if not config.inference_mode), None)
    if trained is not None:
        tuner.trainable_adapter_name, tuner.rankallocator = trained, None
    handle = PeftModel.__new__(PeftModel)
    nn.Module.__init__(handle)
    handle.base_model = tuner
    handle.active_adapter, handle.peft_type = active[0], model.peft_config[active[0]].peft_type
    handle.special_peft_forward_args = {"adapter_names", "alora_offsets"}
    handle._is_prompt_learning, handle._peft_config, handle._adapters_disabled = False, None, False
    return handle
