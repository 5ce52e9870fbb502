"""``compact``: after the final mask, take the pruned triplets out of the layers and the optimizer's state."""

import itertools
from dataclasses import dataclass, replace

import torch
from peft import PeftModel
from torch import Tensor, nn

from adalora_fast.allocator.allocator import RankAllocator
from adalora_fast.allocator.attachment import chain_of, is_watch
from adalora_fast.nn import AdaLoraLinear, Factors

from .fused import is_fused
from .layers import set_factors
from .locate import is_wrapper, the_peft_model


@dataclass(frozen=True)
class _Cut:
    """One factor: the parameter, its smaller successor, and where the rank stands."""

    old: nn.Parameter
    kept: Tensor
    dim: int

    def of(self, tensor: Tensor) -> Tensor:
        """The kept triplets of a tensor of the parameter's shape."""
        return tensor.detach().index_select(self.dim, self.kept.to(tensor.device))

    def new(self) -> nn.Parameter:
        """The smaller parameter, with its gradient."""
        parameter = nn.Parameter(self.of(self.old), requires_grad=self.old.requires_grad)
        if self.old.grad is not None:
            parameter.grad = self.of(self.old.grad)
        return parameter


def compact(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> dict[str, int]:
    """Remove the pruned triplets from a model in training; the training goes on as before, on less.

    Every factor becomes a new, smaller parameter: A [r, in] → [k, in], E [r, 1] → [k, 1], B [out, r] →
    [out, k], with k the layer's kept triplets; the scale α / (ranknum + 1e-5) stays. The optimizer's groups
    and state follow, an attached allocator stays attached. A layer with k = 0 costs what its base costs.

    Without dropout and regulariser, further steps are those of masked training up to rounding: a pruned
    triplet has λ = 0 and gives nothing to the output or to the gradients of others. The orthogonality term
    is then that of the kept triplets alone, and so are norms for clipping.

    Args:
        model: a fused PEFT model, a module with one in it, or one of :class:`adalora_fast.AdaLoraLinear`
            layers with a :class:`adalora_fast.RankAllocator`.
        optimizer: the one that trains it (of wrappers, the ones inside follow too); None if none does.

    Returns:
        Name of every layer and its rank.

    Raises:
        TypeError: the model has no allocator of this package.
        ValueError: the final mask has not been made, an optimizer is attached but not given, or its state
            has tensors that do not have their parameter's shape (8-bit and factored ones). Nothing was
            changed then.
    """
    if not is_wrapper(model):
        inside = the_peft_model(model, "compact")
        model = model if inside is None else inside
    allocator, root = _allocator_of(model)
    if not allocator.is_final:
        raise ValueError(
            f"the final mask has not been made (step {allocator.t}, it is made at "
            f"{allocator.schedule.final_step}); train on, or call rankallocator.finalize()"
        )
    pattern = allocator.rank_pattern()
    layers = zip(allocator.layer_names, allocator.factors(), strict=True)
    cuts = {name: _cuts(factors, pattern[name], name) for name, factors in layers}
    optimizers = [] if optimizer is None else chain_of(optimizer)
    flat = [cut for layer in cuts.values() for cut in layer]
    _check_optimizer(optimizers, flat, allocator)
    if is_fused(model):
        config = model.peft_config[model.base_model.trainable_adapter_name]
        config.rank_pattern = config.rank_pattern or model.base_model.peft_rank_pattern()
    successors = {}
    for name, layer in cuts.items():
        factors = Factors(*(cut.new() for cut in layer))
        successors |= {id(cut.old): (cut, new) for cut, new in zip(layer, factors, strict=True)}
        module = root.get_submodule(name)
        if isinstance(module, AdaLoraLinear):
            module.set_factors(factors)
        else:
            set_factors(module, model.base_model.trainable_adapter_name, factors)
    for each in optimizers:
        _follow(each, successors)
    allocator.rebind(finished=True, at=replace(allocator.snapshot().position, is_over=True))
    if is_fused(model):
        model.base_model.remember_versions()
    return allocator.ranks()


def _allocator_of(model: nn.Module) -> tuple[RankAllocator, nn.Module]:
    """The allocator, and the module below which its layers have their names."""
    if isinstance(model, PeftModel):
        if not is_fused(model):
            raise TypeError("compact needs a fused model; call fuse(model) before the training")
        return model.base_model.require_allocator(), model.base_model.model
    allocator = model.__dict__.get("rankallocator")
    if not isinstance(allocator, RankAllocator):
        raise TypeError(
            f"compact needs a fused PEFT model or one with a RankAllocator, got {type(model).__name__}; take "
            "the model out of its wrappers, and wrap it again afterwards"
        )
    if type(allocator) is not RankAllocator:
        raise TypeError("a capturable allocator keeps its tensors in their places; compact needs another one")
    return allocator, model


def _cuts(factors: Factors, kept: list[bool], layer: str) -> list[_Cut]:
    indices = torch.tensor(kept).nonzero().flatten()
    for kind, factor in factors._asdict().items():
        if type(factor) is not nn.Parameter or type(factor.data) is not Tensor:
            raise ValueError(
                f"{layer}.{kind} is a {type(factor.data).__name__}; compact before the model is sharded"
            )
        others = [hook for hook in (factor._post_accumulate_grad_hooks or {}).values() if not is_watch(hook)]
        if factor._backward_hooks or others:
            raise ValueError(
                f"{layer}.{kind} carries hooks, which a new parameter would lose; remove them first"
            )
    return [_Cut(factor, indices, dim) for factor, dim in zip(factors, (0, 0, 1), strict=True)]


def _check_optimizer(optimizers: list, cuts: list[_Cut], allocator: RankAllocator) -> None:
    """Everything in the optimizer and its wrappers can follow.

    Raises:
        ValueError: it cannot, or the optimizer is the wrong one.
    """
    if not optimizers:
        if allocator.is_attached:
            raise ValueError(
                "an optimizer is attached to the allocator; give it to compact(model, optimizer) too"
            )
        return
    optimizer = optimizers[-1]
    kind = type(optimizer).__name__
    if not isinstance(getattr(optimizer, "param_groups", None), list):
        raise ValueError(f"{kind} has no param_groups; give the torch optimizer that trains the adapter")
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if not any(id(cut.old) in held for cut in cuts):
        raise ValueError(f"this {kind} holds none of the adapter's parameters; give the one that trains them")
    for cut, each in itertools.product(cuts, optimizers):
        for name, value in getattr(each, "state", {}).get(cut.old, {}).items():
            if isinstance(value, Tensor):
                same = value.shape == cut.old.shape and value.is_floating_point()
                fits = same or value.numel() == 1
            else:
                fits = value is None or isinstance(value, (bool, int, float))
            if not fits:
                shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(
                    f"{type(each).__name__} keeps {name} {shape} for a parameter {tuple(cut.old.shape)}, "
                    "which cannot be cut with it; train on masked, or with an optimizer such as AdamW or SGD"
                )


def _follow(optimizer: torch.optim.Optimizer, successors: dict[int, tuple[_Cut, nn.Parameter]]) -> None:
    for group in getattr(optimizer, "param_groups", []):
        group["params"] = [
            successors[id(parameter)][1] if id(parameter) in successors else parameter
            for parameter in group["params"]
        ]
    state = getattr(optimizer, "state", {})
    for cut, new in successors.values():
        if cut.old in state:
            state[new] = {
                name: cut.of(value) if isinstance(value, Tensor) and value.shape == cut.old.shape else value
                for name, value in state.pop(cut.old).items()
            }
