"""AdaLoraCallback: AdaLoRA under the Hugging Face Trainer, no schedule to work out, no call to remember."""

import warnings
from pathlib import Path

import torch
from peft import PeftModel
from peft.tuners.adalora.layer import AdaLoraLayer
from torch import nn
from transformers import TrainerCallback

from adalora_fast.allocator import RankAllocator
from adalora_fast.allocator_state import is_sharded, read_state, write_state
from adalora_fast.integrations.peft import FusedAdaLoraModel, fuse, is_fused
from adalora_fast.integrations.weights import TRAINED

TINIT, TFINAL = 0.1, 0.3  # fractions of the run, where neither the callback nor the config says otherwise


class AdaLoraCallback(TrainerCallback):
    """Fuses the model if need be, fits the schedule to the run, steps the allocator once per optimizer step,
    ends it.

    Put into ``Trainer(callbacks=[AdaLoraCallback()])``. Logs ``adalora/budget`` and the smallest and largest
    rank of a layer; checkpoints carry the allocator (the model's ``save_pretrained`` writes it) and resume
    exactly; a run that stops before the final mask is pruned to the final budget at its end, with a warning.

    Args:
        total_step: ``"auto"`` takes the Trainer's number of optimizer steps and writes it into the config
            (PEFT's config needs some number when it is made); an integer must equal it; None means that the
            config's must.
        tinit, tfinal: steps (int) or fractions of the run (float in [0, 1)). None: the config's own value if
            it is above zero and ``total_step`` is not ``"auto"``, else 0.1 and 0.3 of the run.
        deltaT: steps between two masks; None: the config's.
        score, smoothing, score_gradient, orth_penalty, precision: for :func:`fuse`, if the model is not fused
            yet; on a fused one, a ``score`` that differs from its own is an error.

    Raises:
        ValueError: (at the start of training) a schedule that does not fit the run, naming both numbers.
        TypeError: the Trainer's model is no PEFT AdaLoRA model.
    """

    def __init__(
        self,
        *,
        total_step: int | str | None = "auto",
        tinit: int | float | None = None,
        tfinal: int | float | None = None,
        deltaT: int | None = None,
        score: str | None = None,
        **fuse_options,
    ) -> None:
        if isinstance(total_step, str) and total_step != "auto":
            raise ValueError(f'total_step must be "auto", an integer or None, got {total_step!r}')
        for name, value in (("tinit", tinit), ("tfinal", tfinal)):
            if isinstance(value, float) and not 0.0 <= value < 1.0:
                raise ValueError(
                    f"{name} as a fraction of the run must be in [0, 1), got {value}; steps are integers"
                )
        self.total_step, self.tinit, self.tfinal, self.deltaT = total_step, tinit, tfinal, deltaT
        self.score, self.fuse_options = score, fuse_options

    def on_init_end(self, args, state, control, model=None, **kwargs):
        """Fuse before the Trainer loads a checkpoint, so that the allocator's state is loaded with it."""
        self._allocator(model)

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        """Fit the schedule to the run and tie the allocator to the optimizer."""
        with warnings.catch_warnings():
            if state.global_step > 0:  # the state of the weights that were loaded is read below
                warnings.filterwarnings("ignore", message=TRAINED)
            tuner = self._tuner(model)
        allocator = tuner.require_allocator()
        if getattr(args, "deepspeed_plugin", None) is not None:
            raise ValueError(
                "DeepSpeed keeps gradients (ZeRO-1, ZeRO-2) and parameters (ZeRO-3) in buffers of its own, "
                "where the allocator cannot read them; use DistributedDataParallel or FSDP2"
            )
        resumed = state.global_step > 0
        if not resumed and allocator.t > 0:
            _start_again(allocator)
        if resumed and allocator.t != state.global_step:
            self._load_state(
                allocator, Path(args.output_dir) / f"checkpoint-{state.global_step}", state.global_step
            )
        self._fit_schedule(tuner, state.max_steps)
        if resumed:
            _warn_of_larger_budget(allocator)
        allocator.keep_whole = True  # checkpoints of a run in progress keep whole tensors, to the last
        allocator.is_over = False
        allocator.detach()
        allocator.attach(optimizer, automatic=False)

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        """Where the loss was not the model's own (label smoothing), add γ · ∇R to the clipped gradients."""
        tuner = self._tuner(model)
        weight = tuner.peft_config[tuner.trainable_adapter_name].orth_reg_weight
        if tuner.regularised or weight == 0:
            return
        with torch.enable_grad():
            factors = tuner.rankallocator.factors()
            inputs = [
                factor
                for layer in factors
                for factor in (layer.lora_A, layer.lora_B)
                if factor.grad is not None
            ]
            parts = torch.autograd.grad(weight * tuner.orthogonality_loss(), inputs)
        for factor, part in zip(inputs, parts, strict=True):
            factor.grad.add_(part)

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        """One allocator step, between ``optimizer.step()`` and ``zero_grad()``."""
        self._tuner(model).rankallocator.step(state.global_step)

    def on_log(self, args, state, control, model=None, logs=None, **kwargs):
        """Add the budget and the spread of the ranks to the log entry."""
        allocator = self._allocator(model)
        if allocator is None:
            return
        ranks = allocator.ranks().values()
        figures = {
            "adalora/budget": allocator.budget,
            "adalora/rank_min": min(ranks),
            "adalora/rank_max": max(ranks),
        }
        if logs is not None:
            logs.update(figures)
        if state.log_history:
            state.log_history[-1].update(figures)

    def on_train_end(self, args, state, control, model=None, **kwargs):
        """Make sure of the final budget; from now on checkpoints hold only the triplets that were kept."""
        allocator = self._tuner(model).rankallocator
        allocator.detach()
        if allocator.t == 0 and state.global_step > 0:
            warnings.warn("the training ended and the budget never moved", UserWarning, stacklevel=2)
        allocator.finalize()

    def on_save(self, args, state, control, model=None, **kwargs):
        """Of a sharded adapter the Trainer saves the weights in one process; the state takes all of them."""
        allocator = self._tuner(model).rankallocator
        if is_sharded(allocator):
            write_state(allocator, Path(args.output_dir) / f"checkpoint-{state.global_step}")

    def _allocator(self, model: nn.Module) -> RankAllocator | None:
        """None for a model that is only evaluated (its adapter is for inference, merged or exported)."""
        carries_adapter = any(isinstance(module, AdaLoraLayer) for module in model.modules())
        return self._tuner(model).rankallocator if carries_adapter else None

    def _tuner(self, model: nn.Module) -> FusedAdaLoraModel:
        model = unwrap(model)
        if not is_fused(model):
            fuse(model, self.score or "sensitivity", **self.fuse_options)
        tuner = model.base_model
        if (
            self.score is not None
            and tuner.rankallocator is not None
            and tuner.rankallocator.score.name != self.score
        ):
            raise ValueError(
                f"the callback asks for score {self.score!r}, the model was fused with "
                f"{tuner.rankallocator.score.name!r}; give it to one of them only"
            )
        return tuner

    def _fit_schedule(self, tuner: FusedAdaLoraModel, max_steps: int) -> None:
        config = tuner.peft_config[tuner.trainable_adapter_name]
        asked = config.total_step if self.total_step is None else self.total_step
        if asked != "auto" and asked != max_steps:
            raise ValueError(
                f"total_step is {asked}, but the Trainer will take {max_steps} optimizer steps; "
                f"set total_step={max_steps} "
                'or AdaLoraCallback(total_step="auto")'
            )
        own = asked != "auto"
        schedule = {
            "tinit": _steps(self.tinit, config.tinit if own else 0, TINIT, max_steps),
            "tfinal": _steps(self.tfinal, config.tfinal if own else 0, TFINAL, max_steps),
            "deltaT": config.deltaT if self.deltaT is None else self.deltaT,
            "total_step": max_steps,
        }
        tuner.rankallocator.set_schedule(**schedule)
        for name, value in schedule.items():
            setattr(config, name, value)

    @staticmethod
    def _load_state(allocator, folder: Path, step: int) -> None:
        """For a model that was fused after its weights were loaded."""
        state = read_state(folder)
        if state is None or state["config"]["t"] != step:
            raise ValueError(
                f"the run resumes at step {step}, but the allocator is at {allocator.t} and {folder} has no "
                "state for it; give AdaLoraCallback to the Trainer when it is made"
            )
        allocator.load_state_dict(state)


def _start_again(allocator: RankAllocator) -> None:
    """A second run on one model, or one that begins anew as ``auto_find_batch_size`` makes it."""
    if allocator.is_final and allocator.is_over:
        warnings.warn(
            f"this adapter's allocation is over: it trains on within the {allocator.budget} triplets that it "
            "kept; for a new allocation make a new adapter, or call rankallocator.reset() before train()",
            UserWarning,
            stacklevel=3,
        )
        return
    warnings.warn(
        f"the run starts again at step 0 with all {allocator.total_rank()} triplets; the allocator's "
        f"{allocator.t} steps so far are dropped. To go on with them, call train(resume_from_checkpoint=...)",
        UserWarning,
        stacklevel=3,
    )
    allocator.reset()


def _warn_of_larger_budget(allocator: RankAllocator) -> None:
    kept = sum(allocator.ranks().values())
    if allocator.budget > kept:
        warnings.warn(
            f"the run goes on with another schedule: the budget of step {allocator.t} is {allocator.budget}, "
            f"{kept} triplets had been kept; pruned ones come back",
            UserWarning,
            stacklevel=3,
        )


def _steps(given: int | float | None, configured: int, fraction: float, max_steps: int) -> int:
    if given is None:
        given = configured if configured > 0 else fraction
    return int(given * max_steps) if isinstance(given, float) else given


def unwrap(model: nn.Module | None) -> PeftModel:
    """The PeftModel inside ``torch.compile`` and data-parallel wrappers.

    Raises:
        TypeError: there is none.
    """
    while not isinstance(model, PeftModel):
        inner = getattr(model, "_orig_mod", None) or getattr(model, "module", None)
        if inner is None:
            raise TypeError(
                f"AdaLoraCallback needs a PEFT AdaLoRA model, got {type(model).__name__}; call "
                "get_peft_model first, or use RankAllocator.attach(optimizer)"
            )
        model = inner
    return model
