"""Recipes: how long, how fast and under which rank budget a task is trained. A recipe is a JSON file.

    {"description": "...", "model": "...", "defaults": {"epochs": 3, ...},
     "tasks": {"mrpc": {"learning_rate": 1e-3, ...}},
     "arms": {"lora": {"scale": 2.0}, ...},
     "grid": {"tasks": ["mrpc", ...], "arms": ["sensitivity", "lora", ...], "seeds": [0, 1, 2]},
     "tuning": {"learning_rates": [5e-4, ...], "seeds": [0, 1], "held_out": 0.1}}

What an arm says goes before what a task says, and that before the defaults; an arm with a variant (lora-r4)
has first what its arm (lora) says. A default `matrices` is for the arms that adapt any. `grid` is what a
sweep runs; with `tuning`, every arm's learning rate is first chosen on a part of the training data that is
held out. With the package come those of the score study (`study-table1`, `study-table2`), of AdaLoRA's own
scripts (`adalora-glue`, `adalora-squad`), of other studies (`thesis-*`, `survey-*`) and for the packaged
encoder (`minilm-*`); each describes itself.
"""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

RECIPES = Path(__file__).parent / "recipes"
GRID = ("tasks", "arms", "seeds")  # of a sweep; a plan may grow in these


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Settings of a training run that depend on the task.

    `scale` is lora_alpha / init_r, so that a different rank keeps the same step size. `tinit`, `tfinal` and
    `warmup` are optimizer steps if they are integers and fractions of the run if they are below 1.
    `classifier_dropout` and `dropout` (the encoder's, hidden and attention) of None leave the model's own.
    `train_rows` and `evaluation_rows` take that many rows of each split, always the same ones. `stride`,
    `n_best` and `max_answer_length` (in tokens) are for question answering, `beams` for translation.

    `matrices` of None adapts all that `models.FAMILIES` lists; `adapter_dropout` is before the low-rank
    product. `bottleneck` is the width of a Houlsby adapter, `virtual_tokens` the length of a prompt or
    prefix. `train_biases` also trains every bias of the base (BitFit), whatever the method.

    `weights`, `triplet`, `hysteresis` and `remember` are those of `RankAllocator`, `orth_penalty` is that of
    `fuse`. Of the nulls (`nulls`), `redraw` is the share of the lottery that is drawn again between two
    masks, `ranks_from` the arm whose ranks are dealt, and `shuffled` deals them to other matrices.
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
    dropout: float | None = None
    precision: str = "fp32"
    train_rows: int | None = None
    evaluation_rows: int | None = None
    stride: int = 128
    n_best: int = 20
    max_answer_length: int = 30
    beams: int = 5
    matrices: tuple[str, ...] | None = None
    adapter_dropout: float = 0.0
    bottleneck: int = 64
    virtual_tokens: int = 20
    train_biases: bool = False
    orth_penalty: str = "fro"
    weights: str = "after"
    triplet: str = "full"
    hysteresis: float = 0.0
    remember: bool = False
    redraw: float = 0.0
    ranks_from: str | None = None
    shuffled: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.matrices, list):
            object.__setattr__(self, "matrices", tuple(self.matrices))
        if self.matrices is not None and not (
            isinstance(self.matrices, tuple)
            and self.matrices
            and all(isinstance(name, str) for name in self.matrices)
        ):
            raise ValueError(f'matrices is {self.matrices!r}; give a list of names, such as ["query"]')
        for name in FLAGS:
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be true or false")
        for name, allowed in CHOICES.items():
            if (value := getattr(self, name)) not in allowed:
                raise ValueError(f"unknown {name} {value!r}; choose one of {', '.join(allowed)}")
        if self.ranks_from is not None and not isinstance(self.ranks_from, str):
            raise ValueError(f"ranks_from is {self.ranks_from!r}; give the name of an arm")
        for field in fields(self):
            if field.name in ("matrices", "ranks_from", *FLAGS, *CHOICES):
                continue
            _check_number(field.name, getattr(self, field.name))
        if self.target_r > self.init_r:
            raise ValueError(
                f"target_r ({self.target_r}) is larger than init_r ({self.init_r}); raise init_r"
            )


FLAGS = ("train_biases", "remember", "shuffled")
CHOICES = {"orth_penalty": ("fro", "squared"), "weights": ("after", "before"), "triplet": ("full", "lambda")}
PRECISIONS = ("fp32", "bf16", "fp16")  # mixed precision: weights stay float32
OPTIONAL = ("classifier_dropout", "dropout", "train_rows", "evaluation_rows")
INTEGERS = (
    "batch_size", "max_length", "init_r", "target_r", "deltaT", "train_rows", "evaluation_rows", "stride",
    "n_best", "max_answer_length", "beams", "bottleneck", "virtual_tokens",
)  # fmt: skip
STEPS = ("warmup", "tinit", "tfinal")  # an integer, or a fraction of the run
FROM_ZERO = ("weight_decay", "orth_reg_weight", "hysteresis", *STEPS)
MAY_BE_ZERO = ("classifier_dropout", "dropout", "adapter_dropout")
PROBABILITIES = ("beta1", "beta2", *MAY_BE_ZERO)


def _check_number(name: str, value: object) -> None:
    """ValueError where a setting is no number, or out of its range."""
    if name in OPTIONAL and value is None:
        return
    if name == "precision":
        if value not in PRECISIONS:
            raise ValueError(f"unknown precision {value!r}; choose one of {', '.join(PRECISIONS)}")
        return
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isinf(value):
        raise ValueError(f"{name} is {value!r}; it must be a finite number")
    if name == "redraw":
        if not 0 <= value <= 1:
            raise ValueError(f"redraw is {value}; it is a share, from 0 to 1")
    elif name in PROBABILITIES:
        if not 0 <= value < 1 or (value == 0 and name not in MAY_BE_ZERO):
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


WITHOUT_MATRICES = (  # methods that adapt none
    "full", "head", "bitfit", "houlsby", "fusion", "prompt", "prefix", "p_tuning", "ia3",
)  # fmt: skip
PARTS = ("description", "model", "defaults", "tasks", "arms", "grid", "tuning")


def recipe_for(model: str | None, task: str) -> str:
    """The recipe where none is asked for."""
    if task == "wmt16_ro_en":
        return "thesis-enro"
    squad = task in ("squad", "squad_v2")
    if model == "minilm":
        return "minilm-squad" if squad else "minilm-glue"
    return "study-table2" if squad else "study-table1"


def model_of(content: dict[str, Any], name: str) -> str:
    """The model that a recipe is for; ValueError where it names none."""
    model = content.get("model")
    if not isinstance(model, str) or not model:
        raise ValueError(f"recipe {name} names no model; give --model")
    return model


def load_recipe(name: str, task: str, arm: str = "sensitivity", **overrides: object) -> Recipe:
    """The recipe `name` (one of the package, or a path to a JSON file) for a task and an arm, with
    `overrides` in place of its own settings.
    """
    return recipe_of(read_recipe(name), name, task, arm, **overrides)


def recipe_of(content: dict[str, Any], name: str, task: str, arm: str, **overrides: object) -> Recipe:
    """The settings for a task and an arm in what `read_recipe` returned."""
    arms = content.get("arms", {})
    way, _, variant = arm.partition("-")
    if variant and arm not in arms:
        raise ValueError(f"recipe {name} has no settings for the arm {arm}; write them under its arms")
    common = content.get("defaults", {}) | content.get("tasks", {}).get(task, {})
    if way in WITHOUT_MATRICES:
        common.pop("matrices", None)  # meant for the arms that can use it
    parts = [common, arms.get(way, {}), arms.get(arm, {}), overrides]
    values = {key: value for part in parts for key, value in part.items()}
    unknown = sorted(values.keys() - {field.name for field in fields(Recipe)})
    if unknown:
        known = ", ".join(field.name for field in fields(Recipe))
        raise ValueError(f"recipe {name} has the unknown setting {unknown[0]!r}; choose from {known}")
    return Recipe(**values)


def read_recipe(name: str) -> dict[str, Any]:
    """The content of a recipe file: an object of objects with known parts, its settings not yet checked."""
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
    tables = [content]
    if isinstance(content, dict):
        strange = sorted(content.keys() - set(PARTS))
        if strange:
            raise ValueError(f"recipe {path} has the unknown part {strange[0]!r}; choose {', '.join(PARTS)}")
        tables += [content.get(part, {}) for part in ("tasks", "arms", "defaults", "grid", "tuning")]
    if not all(isinstance(table, dict) for table in tables):
        raise ValueError(
            f"recipe {path} must hold objects: defaults, tasks and arms by name, grid, tuning; "
            "see the package's own"
        )
    if not all(isinstance(settings, dict) for table in tables[1:3] for settings in table.values()):
        raise ValueError(
            f"recipe {path} must hold objects under tasks and arms, one for each name; see the package's own"
        )
    for name, kind in (("tasks", str), ("arms", str), ("seeds", int)):
        values = content.get("grid", {}).get(name, [])
        if not isinstance(values, list) or not all(isinstance(value, kind) for value in values):
            wanted = "integers" if kind is int else "names"
            raise ValueError(f"recipe {path}: {name} of the grid is {values!r}; give a list of {wanted}")
    return content


def parse_overrides(texts: Iterable[str]) -> dict[str, Any]:
    """{"epochs": 5, ...} of "epochs=5", ...: numbers are numbers, null is None.

    Raises:
        ValueError: no such setting, or nothing after the equals sign.
    """
    known = {field.name for field in fields(Recipe)}
    overrides: dict[str, Any] = {}
    for text in texts:
        name, _, value = text.partition("=")
        if name not in known or not value:
            raise ValueError(
                f"cannot set {text!r}; write <setting>=<value> with one of {', '.join(sorted(known))}"
            )
        try:
            overrides[name] = json.loads(value)
        except ValueError:
            overrides[name] = value
    return overrides
