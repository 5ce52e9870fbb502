"""RunSettings: everything that decides what a run computes, checked when it is made."""

from dataclasses import dataclass, field

from .recipes import WITHOUT_MATRICES, Recipe

LOW_RANK = ("adalora", "peft", "lora")
METHODS = (*LOW_RANK, *WITHOUT_MATRICES)
OTHER_METHODS = tuple(method for method in METHODS if method != "adalora")
NULLS = ("uniform", "random", "dealt")  # scores that look at nothing
DTYPES = ("float32", "bfloat16", "float16", "nf4")
VIRTUAL = ("prompt", "prefix", "p_tuning", "ia3")  # virtual tokens and scales
ON_FOUR_BITS = (*LOW_RANK, *VIRTUAL)


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """Everything that decides what a run computes. Two runs with equal settings are the same run.

    `method` is adalora (here, with any score), or one of those that `adapters.adapt` explains. `variant`
    names settings that the recipe has for it alone ("r4" of the arm "lora-r4"). `adapters` are the run
    folders that fusion starts from. `smoothing` of None is the score's own default. `held_out` above zero
    evaluates on that part of the training data, which is then not trained on, instead of the development
    set. `dtype` is that of the frozen weights (nf4: four bits, as QLoRA has them); `attention` (None: what is
    fastest here) and `compile` are for speed. `record_scores` writes every triplet's score at every mask into
    allocation.jsonl.
    """

    task: str
    model: str
    method: str = "adalora"
    score: str = "sensitivity"
    smoothing: str | None = None
    score_gradient: str = "total"
    variant: str = ""
    adapters: tuple[str, ...] = ()
    seed: int = 0
    held_out: float = 0.0
    data_dir: str | None = None
    dtype: str = "float32"
    attention: str | None = None
    compile: bool = False
    record_scores: bool = False
    recipe: Recipe = field(default_factory=Recipe)

    def __post_init__(self) -> None:
        object.__setattr__(self, "adapters", tuple(self.adapters))  # JSON has lists
        _require("method", self.method, METHODS)
        _require("score_gradient", self.score_gradient, ("total", "task"))
        _require("dtype", self.dtype, DTYPES)
        if self.method == "full" and self.dtype != "float32":
            raise ValueError(
                f"dtype {self.dtype!r} is for frozen weights, and full trains all; use --set precision=bf16"
            )
        if self.dtype == "nf4" and self.method not in ON_FOUR_BITS:
            raise ValueError(
                f"{self.method} cannot train on weights of four bits; choose another dtype than nf4, or a "
                f"method of {', '.join(ON_FOUR_BITS)}"
            )
        trains_biases = self.method == "bitfit" or self.recipe.train_biases
        if trains_biases and self.dtype != "float32":
            raise ValueError(
                f"biases of {self.dtype} weights cannot be trained; leave out --dtype, or bitfit and "
                "train_biases, and for speed use --set precision=bf16"
            )
        if self.method not in LOW_RANK and self.recipe.matrices is not None:
            raise ValueError(
                f"matrices is {list(self.recipe.matrices)}, but {self.method} adapts none; leave it out, or "
                f"choose a method of {', '.join(LOW_RANK)}"
            )
        if not isinstance(self.seed, int) or isinstance(self.seed, bool) or not 0 <= self.seed < 2**32:
            raise ValueError(f"seed {self.seed!r} is not an integer from 0 to {2**32 - 1}; choose another")
        if not 0 <= self.held_out < 1:
            raise ValueError(
                f"held_out is {self.held_out}; it must be a fraction of the training data below 1"
            )

    @property
    def arm(self) -> str:
        """The short name under which sweeps know this way to train; `arms.parse_arm` reads it."""
        name = self.method
        if name == "adalora":
            gradient = "task" if self.score_gradient == "task" else None
            name = "+".join(filter(None, [self.score, self.smoothing, gradient]))
        return f"{name}-{self.variant}" if self.variant else name

    @property
    def label(self) -> str:
        """A short name for tables and folders."""
        known = {"lora": f"lora-r{self.recipe.target_r}", "head": "head-only", "peft": "peft-adalora"}
        return known.get(self.arm, self.arm)


def _require(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"unknown {name} {value!r}; choose one of {', '.join(allowed)}")
