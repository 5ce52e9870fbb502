"""The orthogonality regulariser of every adapted layer of a model."""

from collections.abc import Callable

from torch import Tensor, nn

from adalora_fast.distributed.processes import whole
from adalora_fast.ops.orthogonality import orthogonality

from .linear import Factors

# Called in R's backward with what R gets from the loss, and what R adds to the gradients of A and of B.
Note = Callable[[Tensor, list[Tensor]], None]


def adapted_layers(model: nn.Module) -> dict[str, Callable[[], Factors | None]]:
    """Name of every adapted layer in ``named_modules`` order, and a function that returns its factors.

    A layer is adapted if it has a method ``factors()``; one that returns None (no adapter under training) is
    left out.
    """
    layers = {}
    for name, module in model.named_modules():
        find = getattr(module, "factors", None)
        if callable(find) and find() is not None:
            layers[name] = find
    return layers


def nothing_adapted(model: nn.Module) -> str:
    """What to say of a model in which :func:`adapted_layers` finds nothing."""
    if any(hasattr(module, "lora_E") and not hasattr(module, "factors") for module in model.modules()):
        return (
            f"the AdaLoRA layers of {type(model).__name__} are PEFT's own; call fuse(model), which gives "
            "them a rankallocator"
        )
    return f"{type(model).__name__} has no adapted layer; make some with AdaLoraLinear.from_linear"


def orthogonality_loss(model: nn.Module, penalty: str = "fro") -> Tensor:
    """R of all adapted layers of ``model``, to be added to the training loss as γ · R.

    ``fro`` (PEFT): mean over the 2n factors of ‖Q Qᵀ - I‖_F and ‖Pᵀ P - I‖_F. ``squared`` (arXiv 2303.10512,
    eq. 4): Σ_k (‖P_kᵀ P_k - I‖²_F + ‖Q_k Q_kᵀ - I‖²_F). γ is 0.5 by default in PEFT, 0.1 in AdaLoRA's
    scripts.

    Args:
        model: a model with ``AdaLoraLinear`` layers, or a fused PEFT model.
        penalty: ``"fro"`` or ``"squared"``.

    Returns:
        A scalar in at least float32; its gradient reaches lora_A and lora_B in closed form.

    Raises:
        ValueError: no adapted layer, an unknown penalty, or several allocators of which one scores the task's
            gradient alone.
    """
    found = (find() for find in adapted_layers(model).values())
    factors = [of_one for of_one in found if of_one is not None]
    if not factors:
        raise ValueError(nothing_adapted(model))
    given = [module.__dict__.get("rankallocator") for module in model.modules()]
    allocators = list({id(allocator): allocator for allocator in given if allocator is not None}.values())
    if len(allocators) > 1 and any(allocator.score_gradient == "task" for allocator in allocators):
        raise ValueError(
            f"{type(model).__name__} has {len(allocators)} allocators, and score_gradient='task' asks for "
            "the term of each: add up orthogonality_loss() of the adapted models in it"
        )
    note = allocators[0].orthogonality_note if len(allocators) == 1 else None
    value = orthogonality_of(factors, penalty, note)
    for allocator in allocators:
        if allocator.regulariser is not None:
            value = allocator.regulariser.noted(value)  # so that it is not added a second time
    return value


def orthogonality_of(factors: list[Factors], penalty: str, note: Note | None) -> Tensor:
    """R of these layers. ``note`` is called in its backward, for who has to tell the task's gradient from R's
    (:attr:`RankAllocator.orthogonality_note`).
    """
    lora_A, lora_B = [f.lora_A for f in factors], [f.lora_B for f in factors]
    both = whole(lora_A + lora_B)
    value, stacks = orthogonality(both[: len(factors)], both[len(factors) :], penalty)
    if value.requires_grad and note is not None:
        value.register_hook(lambda upstream: note(upstream, stacks))
    return value
