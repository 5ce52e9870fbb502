"""The nulls: scores that look at no weight and no gradient, in the same start and schedule as the others.

uniform   the same number of triplets in every matrix
random    by lot; `redraw` says how much of the lottery is drawn again between two masks (0: drawn once)
dealt     the ranks that another arm's run has found: in their places, or `shuffled` over matrices of one size
"""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from adalora_fast.allocator.scores import Score, register_score, score_names
from adalora_fast.experiments.settings.settings import RunSettings

NO_RANKS = "dealt deals the ranks of another run; name its arm, for instance ranks_from=sensitivity"
Signal = Callable[[Tensor, Tensor, dict[str, Tensor]], Tensor]


def register_nulls() -> None:
    """Make them known as scores: `uniform`, `random` drawn once, and `dealt`, which wants ranks."""
    known = score_names()
    if "uniform" not in known:
        register_score("uniform", uniform, source="the same rank in every matrix, in SVD form")
    if "random" not in known:
        register_score("random", by_lot, source="triplets kept by lot")
    if "dealt" not in known:
        register_score("dealt", without_ranks, source="the ranks of another run")


def score_of(settings: RunSettings, model: nn.Module, found: dict[str, int] | None) -> str | Score:
    """What `fuse` takes as the score of a run: its name, or a null with the recipe's numbers in it.

    Args:
        settings: of the run.
        model: the PEFT model, before it is fused.
        found: the ranks that are dealt.
    """
    register_nulls()
    recipe = settings.recipe
    if settings.score == "random" and recipe.redraw:
        share = 1 - (1 - recipe.redraw) ** (1 / recipe.deltaT)  # a step's, so that a mask's is `redraw`
        return Score(name="random", smoothing="none", source="by lot", function=lottery(share))
    if settings.score == "dealt" and found is not None:
        ranks = shuffled(found, sizes_of(model), settings.seed) if recipe.shuffled else found
        return Score(
            name="dealt", smoothing="none", source="another run", function=dealt(list(ranks.values()))
        )
    return settings.score


def uniform(w: Tensor, g: Tensor, state: dict[str, Tensor]) -> Tensor:
    """I = −i for λ_i, 0 for P and Q: whatever the budget, ranks differ by one at most, and the masks only
    grow.

    w is [matrices, r, 1] for λ.
    """
    if w.shape[-1] != 1:
        return torch.zeros_like(w)
    return -torch.arange(w.shape[1], dtype=w.dtype, device=w.device).view(1, -1, 1).expand(w.shape)


def by_lot(w: Tensor, g: Tensor, state: dict[str, Tensor]) -> Tensor:
    """I = a number in [0, 1) for λ_i, drawn once from the run's seed, 0 for P and Q."""
    if w.shape[-1] != 1:
        return torch.zeros_like(w)
    if "lot" not in state:
        state["lot"] = _draw(w, torch.initial_seed())
    return state["lot"].to(w.dtype)


def lottery(share: float) -> Signal:
    """`by_lot`, in which every step draws the numbers of a `share` of the triplets again."""

    def redrawn(w: Tensor, g: Tensor, state: dict[str, Tensor]) -> Tensor:
        lots = by_lot(w, g, state)
        if w.shape[-1] != 1:
            return lots
        step = int(state.get("step", torch.zeros((), dtype=torch.int64))) + 1
        state["step"] = torch.tensor(step)
        seed = torch.initial_seed() + 2 * step  # a run that resumes at this step draws the same
        state["lot"] = torch.where(_draw(w, seed + 1) < share, _draw(w, seed), state["lot"])
        return state["lot"].to(w.dtype)

    return redrawn


def _draw(w: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed % 2**63)
    return torch.rand(w.shape, generator=generator).to(w.device)


def dealt(ranks: list[int]) -> Signal:
    """I of λ_i of a matrix that gets rank r: r − i, 0 for P and Q. At the final budget Σ r exactly those with
    i < r are kept; before, what lies beyond goes first where it lies furthest.
    """

    def in_order(w: Tensor, g: Tensor, state: dict[str, Tensor]) -> Tensor:
        if w.shape[-1] != 1:
            return torch.zeros_like(w)
        if len(ranks) != len(w):
            raise ValueError(
                f"{len(ranks)} ranks are dealt to {len(w)} matrices; take a run of the same matrices"
            )
        number = torch.arange(w.shape[1], dtype=w.dtype, device=w.device)
        given = torch.tensor(ranks, dtype=w.dtype, device=w.device)
        beyond = given.view(-1, 1) - number - 0.5  # above zero where i < r
        inside = torch.where(beyond > 0, 1.0 + w.shape[1], 0.0)
        return (beyond + inside).unsqueeze(2)

    return in_order


def without_ranks(w: Tensor, g: Tensor, state: dict[str, Tensor]) -> Tensor:
    """What `dealt` is where no run was named."""
    raise ValueError(NO_RANKS)


def check_null(settings: RunSettings) -> None:
    """ValueError where `dealt` has nothing to deal."""
    if settings.method == "adalora" and settings.score == "dealt" and settings.recipe.ranks_from is None:
        raise ValueError(NO_RANKS)


def read_ranks(settings: RunSettings, run: Path) -> dict[str, int] | None:
    """The ranks that a run of `dealt` deals: those of the finished run of the arm `ranks_from` with the same
    seed, beside it. None for other scores.

    Raises:
        ValueError: no arm is named, or its run is not finished or keeps another number of triplets.
    """
    if settings.method != "adalora" or settings.score != "dealt":
        return None
    check_null(settings)
    arm = settings.recipe.ranks_from
    file = run.parent / f"{arm}-seed{settings.seed}" / "ranks.json"
    if not file.is_file():
        raise ValueError(
            f"{run.name} deals the ranks of {file.parent}, which is not finished; run that first"
        )
    found = json.loads(file.read_text(encoding="utf-8"))
    ranks = {name: int(rank) for name, rank in found["ranks"].items()}
    budget = settings.recipe.target_r * len(ranks)
    if sum(ranks.values()) != budget or found["init_r"] != settings.recipe.init_r:
        raise ValueError(
            f"{file} has {sum(ranks.values())} triplets from rank {found['init_r']}, and {run.name} goes "
            f"from rank {settings.recipe.init_r} to {budget} triplets; deal those of a run with its settings"
        )
    return ranks


def sizes_of(model: nn.Module) -> dict[str, int]:
    """Parameters of one triplet of every adapted matrix, d1 + d2 + 1."""
    from adalora_fast.integrations.layers import adapter_layers

    return {
        name: sum(factor["default"].numel() for factor in (layer.lora_A, layer.lora_E, layer.lora_B))
        // layer.lora_E["default"].shape[0]
        for name, layer in adapter_layers(model.base_model.model).items()
    }


def shuffled(ranks: dict[str, int], sizes: dict[str, int], seed: int) -> dict[str, int]:
    """The same ranks, dealt by lot to matrices whose triplets are equally large: the adapter has as many
    parameters as before.
    """
    generator = torch.Generator().manual_seed(seed)
    result = dict(ranks)
    for size in sorted(set(sizes.values())):
        names = [name for name in ranks if sizes[name] == size]
        order = torch.randperm(len(names), generator=generator).tolist()
        result.update({name: ranks[names[i]] for name, i in zip(names, order, strict=True)})
    return result
