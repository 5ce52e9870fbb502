"""The weights of a fused model that somebody else wrote: averages, an optimizer's copies, earlier runs."""

import warnings

from adalora_fast.allocator.allocator import RankAllocator
from adalora_fast.allocator.state import is_sharded

TRAINED = "these adapter weights were trained before"


def keep_pruned(tuner) -> None:
    """After the final mask: zero the triplets that an average of weights or an optimizer's copy brought
    back, so that what is evaluated is what is saved.
    """
    allocator: RankAllocator | None = tuner.rankallocator
    if allocator is None or not allocator.is_final:
        return
    returned = 0 if is_sharded(allocator) else allocator.count_returned()
    allocator.apply_mask()
    if returned and not tuner._warned_returned:
        tuner._warned_returned = True
        warnings.warn(
            f"{returned} pruned triplets had come back (an average of weights or an optimizer's copy of them "
            "was loaded) and are zeroed again; weights of another run need load_adapter(), which knows their "
            "mask",
            UserWarning,
            stacklevel=4,
        )


def check_before_saving(tuner) -> None:
    """:func:`keep_pruned`, and a word if this is a copy of a model that went on without it."""
    keep_pruned(tuner)
    if tuner.rankallocator.is_stale_copy():
        warnings.warn(
            f"this is a copy of a model from step {tuner.rankallocator.t}, with new weights and no allocator "
            "step since; for an average of the trained model call that model's "
            "rankallocator.apply_mask(copy) first",
            UserWarning,
            stacklevel=5,
        )


def warn_of_trained(allocator: RankAllocator, adapter: str) -> None:
    """Say that the allocator knows nothing of weights that were trained before."""
    if any(not values.is_meta and values.any() for values in allocator.lambdas()):
        warnings.warn(
            f"{TRAINED}, and the allocator starts at step 0 with empty "
            f"statistics{' and no remembered λ' if allocator.remember else ''}; to go on with a checkpoint's "
            "run, call "
            f"model.load_adapter(folder, {adapter!r}, is_trainable=True) now, which reads its state",
            UserWarning,
            stacklevel=5,
        )
