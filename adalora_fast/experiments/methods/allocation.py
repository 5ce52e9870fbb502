"""Where the rank budget is moved while the Trainer trains, and what came of it."""

from typing import Any

from torch import nn
from transformers import TrainerCallback

from adalora_fast.allocator.schedule import BudgetSchedule
from adalora_fast.experiments.settings.settings import RunSettings


def training_callbacks(settings: RunSettings) -> list[TrainerCallback]:
    """What moves the rank budget while the Trainer trains; empty where there is none."""
    recipe = settings.recipe
    schedule = {"tinit": recipe.tinit, "tfinal": recipe.tfinal, "deltaT": recipe.deltaT}
    if settings.method == "adalora":
        from adalora_fast.integrations.trainer import AdaLoraCallback

        return [AdaLoraCallback(**schedule)]
    return [PeftAllocation(**schedule)] if settings.method == "peft" else []


def check_schedule(settings: RunSettings, total_step: int) -> None:
    """ValueError where the budget cannot be moved in a run of so many steps, or not in this precision."""
    recipe = settings.recipe
    if settings.method not in ("adalora", "peft"):
        return
    if settings.method == "peft":
        _check_precision(recipe.precision == "fp16")
    tinit, tfinal = (_in_steps(steps, total_step) for steps in (recipe.tinit, recipe.tfinal))
    BudgetSchedule(
        initial=recipe.init_r,
        target=recipe.target_r,
        tinit=tinit,
        tfinal=tfinal,
        deltaT=recipe.deltaT,
        total_step=total_step,
    )


def _check_precision(fp16: bool) -> None:
    if fp16:
        raise ValueError(
            "PEFT's own AdaLoRA keeps an fp16 overflow in its statistics for good; use precision=bf16"
        )


def _in_steps(steps: int | float, total_step: int) -> int:
    """A fraction of the run in steps; an integer is steps already."""
    return int(steps * total_step) if isinstance(steps, float) else steps


class PeftAllocation(TrainerCallback):
    """The control: PEFT's own allocator, called where it has to be, with the schedule fitted to the run."""

    def __init__(self, *, tinit: int | float, tfinal: int | float, deltaT: int) -> None:
        self.tinit, self.tfinal, self.deltaT = tinit, tfinal, deltaT

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        tuner = model.base_model
        config = tuner.peft_config[tuner.trainable_adapter_name]
        _check_precision(args.fp16)
        config.tinit, config.tfinal = (
            _in_steps(steps, state.max_steps) for steps in (self.tinit, self.tfinal)
        )
        config.deltaT, config.total_step = self.deltaT, state.max_steps
        BudgetSchedule(  # refuses a schedule that does not fit, in one line, as for the other arms
            initial=config.init_r,
            target=config.target_r,
            tinit=config.tinit,
            tfinal=config.tfinal,
            deltaT=self.deltaT,
            total_step=state.max_steps,
        )
        tuner.rankallocator.set_total_step(state.max_steps)

    def on_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        model.base_model.update_and_allocate(state.global_step)


def ranks_of(model: nn.Module, settings: RunSettings) -> dict[str, int]:
    """Rank of every adapted matrix by its module name; empty where nothing is adapted."""
    if settings.method == "adalora":
        return {name: int(rank) for name, rank in model.base_model.rankallocator.ranks().items()}
    if settings.method == "peft":
        tuner = model.base_model
        pattern = tuner.peft_config[tuner.trainable_adapter_name].rank_pattern
        if pattern is None:
            raise RuntimeError(
                f"{settings.label}: PEFT's allocator never made its final mask; train for longer"
            )
        return {name.partition(".lora_E")[0]: sum(kept) for name, kept in pattern.items()}
    if settings.method == "lora":
        modules = model.base_model.model.named_modules()
        return {name: layer.r["default"] for name, layer in modules if hasattr(layer, "lora_A")}
    return {}


def check_budget(ranks: dict[str, int], settings: RunSettings) -> int:
    """The total rank; RuntimeError where it is not exactly target_r per adapted matrix. (PEFT's own allocator
    may prune more: every triplet whose score equals the last one's.)
    """
    total, budget = sum(ranks.values()), settings.recipe.target_r * len(ranks)
    if total > budget or (total < budget and settings.method != "peft"):
        raise RuntimeError(
            f"{settings.label}: the total rank is {total}, the budget is {budget}; the allocation is wrong"
        )
    return total
