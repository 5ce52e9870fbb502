"""AdaLoraCallback: AdaLoRA under the Hugging Face Trainer, no schedule to work out, no call to remember."""

import warnings
from pathlib import Path

from peft import PeftModel
from peft.tuners.adalora.layer import AdaLoraLayer
from torch import nn
from transformers import Trainer, TrainerCallback

from adalora_fast.allocator.allocator import RankAllocator

from .figures import RankHistograms, figures_of, is_training_log
from .fused import FusedAdaLoraModel, is_fused
from .locate import peft_models, unwrapped
from .peft import fuse
from .run_folders import checkpoint_folder, complete, read_allocator
from .weights import TRAINED

TINIT, TFINAL = 0.1, 0.3  # fractions of the run, where neither the callback nor the config says otherwise


class AdaLoraCallback(TrainerCallback):
    """Fuses the model if need be, fits the schedule to the run, steps the allocator once per optimizer step,
    ends it.

    Put into ``Trainer(callbacks=[AdaLoraCallback()])``, or ``AdaLoraCallback().install(trainer)`` if
    TensorBoard, W&B or another reporter shall see its figures: ``adalora/budget``, ``adalora/rank_min``,
    ``_mean`` and ``_max`` over the layers, ``adalora/churn`` (the share of the kept triplets that came back
    with the last mask), ``adalora/orthogonality`` (R), in training logs. The Trainer's
    model may be any that :func:`fuse` takes; of several adapted models in it each keeps a budget of its own.
    γ ∇R reaches the gradients once per optimizer step whoever builds the loss
    (`allocator/regulariser.py`). Checkpoints carry the allocator (the model's ``save_pretrained`` writes
    it) and resume exactly; a run that stops before the final mask is pruned to the final budget at its end,
    with a warning.

    Args:
        total_step: ``"auto"`` takes the Trainer's number of optimizer steps and writes it into the config
            (PEFT's config needs some number when it is made); an integer must equal it; None means that the
            config's must.
        tinit, tfinal: steps (int) or fractions of the run (float in [0, 1)). None: the config's own value if
            it is above zero and ``total_step`` is not ``"auto"``, else 0.1 and 0.3 of the run.
        deltaT: steps between two masks; None: the config's.
        score, smoothing, score_gradient, weights, triplet, hysteresis, remember, orth_penalty, precision:
            for :func:`fuse`, if the model is not fused yet; on a fused one, a ``score`` that differs from its
            own is an error.

    Raises:
        ValueError: (at the start of training) a schedule that does not fit the run, naming both numbers.
        TypeError: there is no AdaLoRA in the Trainer's model.
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
        self._trained: list[FusedAdaLoraModel] = []  # from the beginning of the training on
        self._histograms: RankHistograms | None = None  # once installed

    def install(self, trainer: Trainer) -> "AdaLoraCallback":
        """Give the callback to ``trainer``, before its reporters, so that they see ``adalora/*``.

        The Trainer calls reporters (``report_to``: TensorBoard, W&B, MLflow, trackio) before the callbacks
        that it is given, with the log as it is then. ``AdaLoraCallback().install(trainer)`` takes the place
        of ``callbacks=[AdaLoraCallback()]``; a callback that the trainer has already is moved.

        Returns:
            The callback itself.

        Raises:
            ValueError: the trainer has another AdaLoraCallback.
        """
        callbacks = trainer.callback_handler.callbacks
        if any(isinstance(each, AdaLoraCallback) and each is not self for each in callbacks):
            raise ValueError(
                "this trainer has another AdaLoraCallback; call install on that one, or leave it out"
            )
        if self in callbacks:
            callbacks.remove(self)
        else:
            self.on_init_end(trainer.args, trainer.state, trainer.control, model=trainer.model)
        callbacks.insert(0, self)
        self._histograms = RankHistograms(callbacks)
        return self

    def on_init_end(self, args, state, control, model=None, **kwargs):
        """Fuse before the Trainer loads a checkpoint, so that the allocator's state is loaded with it."""
        if any(isinstance(module, AdaLoraLayer) for module in model.modules()):
            self._tuners(model)  # without such layers the model is there to be evaluated: merged, or exported

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        """Fit the schedule to the run and tie the allocator to the optimizer."""
        if getattr(args, "deepspeed_plugin", None) is not None:
            raise ValueError(
                "DeepSpeed keeps gradients (ZeRO-1, ZeRO-2) and parameters (ZeRO-3) in buffers of its own, "
                "where the allocator cannot read them; use DistributedDataParallel or FSDP2"
            )
        with warnings.catch_warnings():
            if state.global_step > 0:  # the state of the weights that were loaded is read below
                warnings.filterwarnings("ignore", message=TRAINED)
            self._trained = self._tuners(model)
        for tuner in self._trained:
            allocator, resumed = tuner.require_allocator(), state.global_step > 0
            if not resumed and allocator.t > 0:
                _start_again(allocator)
            if resumed and allocator.t != state.global_step:
                self._load_state(model, tuner, checkpoint_folder(args, state), state.global_step)
            self._fit_schedule(tuner, state.max_steps)
            if resumed:
                _warn_of_larger_budget(allocator)
            allocator.keep_whole = True  # checkpoints of a run in progress keep whole tensors, to the last
            allocator.is_over = False
            allocator.detach()
            allocator.attach(optimizer, automatic=False)
            tuner.regulariser.act_once(getattr(optimizer, "scaler", None))
        self._greet_reporters(args)

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        """One allocator step, between ``optimizer.step()`` and ``zero_grad()``."""
        for allocator in self._allocators():
            allocator.step(state.global_step)
            allocator.regulariser.forget()  # also if a GradScaler skipped the optimizer's step

    def on_log(self, args, state, control, model=None, logs=None, **kwargs):
        """Add budget, ranks and R to a training log; what ``evaluate()`` returns stays as it is."""
        if not self._trained or not is_training_log(logs):
            return
        ranks = self._ranks()
        figures = figures_of(self._allocators(), ranks)
        logs.update(figures)
        if state.log_history:
            state.log_history[-1].update(figures)
        if self._histograms is not None and self._histograms.is_due(state.global_step):
            self._histograms.write(ranks, state.global_step, state.max_steps)

    def on_train_end(self, args, state, control, model=None, **kwargs):
        """Make sure of the final budget; from now on checkpoints hold only the triplets that were kept."""
        for tuner in self._trained:
            allocator = tuner.rankallocator
            allocator.detach()
            if allocator.t == 0 and state.global_step > 0:
                warnings.warn("the training ended and the budget never moved", UserWarning, stacklevel=2)
            best = getattr(state, "best_model_checkpoint", None)
            best = best if getattr(args, "load_best_model_at_end", False) else None
            if best is not None and not isinstance(unwrapped(model), PeftModel):
                self._follow_best(model, tuner, best)
            allocator.regulariser.act_on_request()
            allocator.finalize()
        if self._histograms is not None:
            self._histograms.write(self._ranks(), state.global_step, state.max_steps)

    def on_save(self, args, state, control, model=None, **kwargs):
        """Add the allocators' state where the Trainer did not save it with the weights."""
        complete(model, checkpoint_folder(args, state), getattr(args, "should_save", True))

    def _allocators(self) -> list[RankAllocator]:
        return [tuner.rankallocator for tuner in self._trained]

    def _ranks(self) -> list[int]:
        """Of every layer of every adapted model; waits for the device."""
        return [rank for allocator in self._allocators() for rank in allocator.ranks().values()]

    def _tuners(self, model: nn.Module) -> list[FusedAdaLoraModel]:
        """Those of all adapted models in ``model`` that are trained; fused here if they are not yet.

        Raises:
            TypeError: there is none.
        """
        found = peft_models(model)
        if not found or not all(is_fused(each) for each in found.values()):
            fuse(model if found else unwrap(model), self.score or "sensitivity", **self.fuse_options)
            found = peft_models(model)
        tuners = [each.base_model for each in found.values()]
        for tuner in tuners:
            if (
                self.score is not None
                and tuner.rankallocator is not None
                and tuner.rankallocator.score.name != self.score
            ):
                raise ValueError(
                    f"the callback asks for score {self.score!r}, the model was fused with "
                    f"{tuner.rankallocator.score.name!r}; give it to one of them only"
                )
        return [tuner for tuner in tuners if tuner.rankallocator is not None] or tuners[:1]

    def _greet_reporters(self, args) -> None:
        if self._histograms is not None:
            self._histograms.start()
        elif getattr(args, "report_to", None):
            warnings.warn(
                f"report_to={args.report_to} is called before this callback and does not see adalora/*; "
                "use AdaLoraCallback().install(trainer) in place of callbacks=[AdaLoraCallback()]",
                UserWarning,
                stacklevel=3,
            )

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
    def _load_state(model: nn.Module, tuner: FusedAdaLoraModel, folder: Path, step: int) -> None:
        """For a model that the Trainer loads without its allocator, or that was fused after it was loaded."""
        allocator, state = tuner.rankallocator, read_allocator(model, tuner, folder)
        if state is None or state["config"]["t"] != step:
            raise ValueError(
                f"the run resumes at step {step}, but the allocator is at {allocator.t} and {folder} has no "
                "state for it; give AdaLoraCallback to the Trainer when it is made, and leave the checkpoint "
                "in the run's output_dir"
            )
        allocator.load_state_dict(state)

    @staticmethod
    def _follow_best(model: nn.Module, tuner: FusedAdaLoraModel, folder: str) -> None:
        """The Trainer has loaded the best weights; the allocator goes back to where they were saved."""
        state = read_allocator(model, tuner, folder)
        if state is None:
            warnings.warn(
                f"{folder} has no state of the allocator for the best weights; they get the last mask",
                UserWarning,
                stacklevel=3,
            )
        else:
            tuner.rankallocator.load_state_dict(state)


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
