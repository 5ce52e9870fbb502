"""Recipes: how long, how fast and under which rank budget a task is trained. A recipe is a JSON file.

    {"description": "...", "defaults": {"epochs": 3, ...}, "tasks": {"mrpc": {"learning_rate": 1e-3, ...}}}

Three come with the package: `default` (rank 16 to 8, three epochs), `minilm` (for the packaged encoder) and
`paper` (AdaLoRA's own scripts for DeBERTa-v3-base).
"""

import json
import math
from dataclasses import dataclass, fields
from pathlib import Path

RECIPES = Path(__file__).parent / "recipes"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Settings of a training run that depend on the task.

    `scale` is lora_alpha / init_r, so that a different rank keeps the same step size. `tinit`, `tfinal` and
    `warmup` are optimizer steps if they are integers and fractions of the run if they are below 1.
    `classifier_dropout` of None leaves the model's own.
    """

    epochs: float = 3.0
    learning_rate: float = 1e-3
    batch_size: int = 32
    max_length: int = 128
    weight_decay: float = 0.01
    warmup: int | float = 0.1
    max_grad_norm: float = 1.0
    init_r: int = 16
    target_r: int = 8
    scale: float = 2.0
    tinit: int | float = 0.1
    tfinal: int | float = 0.3
    deltaT: int = 10
    orth_reg_weight: float = 0.1
    beta1: float = 0.85
    beta2: float = 0.85
    classifier_dropout: float | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            _check_number(field.name, getattr(self, field.name))
        if self.target_r > self.init_r:
            raise ValueError(
                f"target_r ({self.target_r}) is larger than init_r ({self.init_r}); raise init_r"
            )


INTEGERS = ("batch_size", "max_length", "init_r", "target_r", "deltaT")
STEPS = ("warmup", "tinit", "tfinal")  # an integer, or a fraction of the run
FROM_ZERO = ("weight_decay", "orth_reg_weight", *STEPS)
PROBABILITIES = ("beta1", "beta2", "classifier_dropout")


def _check_number(name: str, value: object) -> None:
    """ValueError where a setting is no number, or out of its range."""
    if name == "classifier_dropout" and value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isinf(value):
        raise ValueError(f"{name} is {value!r}; it must be a finite number")
    if name in PROBABILITIES:
        if not 0 <= value < 1 or (value == 0 and name != "classifier_dropout"):
            raise ValueError(f"{name} is {value}; it must be between 0 and 1")
    elif name in FROM_ZERO:
        if not value >= 0:
            raise ValueError(f"{name} is {value}; it must not be negative")
        if name in STEPS and isinstance(value, float) and value >= 1:
            raise ValueError(f"{name} is {value}; give steps as an integer, or a fraction of the run below 1")
    elif not value > 0:
        raise ValueError(f"{name} is {value}; it must be greater than 0")
    elif name in INTEGERS and not isinstance(value, int):
        raise ValueError(f"{name} is {value}; it must be an integer")


def recipe_for(model: str) -> str:
    """The recipe of a model for which none is asked for."""
    return "minilm" if model == "minilm" else "default"


def load_recipe(name: str, task: str, **overrides: object) -> Recipe:
    """The recipe `name` (one of the package, or a path to a JSON file) for `task`; overrides that are
    None are ignored.
    """
    path = RECIPES / f"{name}.json"
    if not path.is_file():
        path = Path(name).expanduser()
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in RECIPES.glob("*.json")))
        raise FileNotFoundError(f"no recipe {name!r}; choose {known}, or give the path of a JSON file")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # also where it is not text
        raise ValueError(f"recipe {path} is not JSON ({error}); correct it") from error
    parts = (
        [content, *(content.get(part, {}) for part in ("defaults", "tasks"))]
        if _is_table(content)
        else [content]
    )
    if not all(map(_is_table, parts)) or not _is_table(parts[2].get(task, {})):
        raise ValueError(
            f"recipe {path} must hold objects: defaults, and tasks by name; see the package's own"
        )
    strange = sorted(content.keys() - {"description", "defaults", "tasks"})
    if strange:
        raise ValueError(
            f"recipe {path} has the unknown part {strange[0]!r}; choose description, defaults, tasks"
        )
    values = parts[1] | parts[2].get(task, {})
    unknown = sorted(values.keys() - {field.name for field in fields(Recipe)})
    if unknown:
        known = ", ".join(field.name for field in fields(Recipe))
        raise ValueError(f"recipe {path} has the unknown setting {unknown[0]!r}; choose from {known}")
    return Recipe(**(values | {key: value for key, value in overrides.items() if value is not None}))


def _is_table(value: object) -> bool:
    return isinstance(value, dict)
