"""Finished runs of every method on the tiny task, trained once."""

from dataclasses import replace
from pathlib import Path

import pytest

from tests.helpers.offline import no_network  # noqa: F401 - for every test here
from tests.helpers.tiny import RECIPE
from tests.helpers.training_runs import settings, train

METHODS = {
    "adalora-0": {"method": "adalora"},
    "adalora-1": {"method": "adalora", "seed": 1, "score": "fisher"},
    "peft": {"method": "peft"},
    "lora-2": {"method": "lora"},
    "lora-4": {"method": "lora", "seed": 1, "recipe": replace(RECIPE, target_r=4)},
    "full": {"method": "full", "recipe": replace(RECIPE, learning_rate=5e-4)},
    "head": {"method": "head"},
    "bitfit": {"method": "bitfit"},
    "lora-biases": {"method": "lora", "recipe": replace(RECIPE, train_biases=True)},
    "query-value-biases": {
        "method": "lora",
        "recipe": replace(RECIPE, matrices=("query", "value"), train_biases=True),
    },
    "adalora-biases": {"method": "adalora", "recipe": replace(RECIPE, train_biases=True)},
}


@pytest.fixture(scope="session")
def runs(tmp_path_factory, encoder, data_dir) -> dict[str, Path]:
    """Run folders by name."""
    folder = tmp_path_factory.mktemp("runs")
    for name, options in METHODS.items():
        train(settings(encoder, data_dir, **options), folder / name, resumable=False)
    return {name: folder / name for name in METHODS}


@pytest.fixture(scope="session")
def held_out_runs(tmp_path_factory, encoder, data_dir) -> list[Path]:
    """Two runs that left a quarter of the training data alone."""
    folder = tmp_path_factory.mktemp("held")
    for seed in (0, 1):
        run = settings(encoder, data_dir, method="lora", seed=seed, held_out=0.25)
        train(run, folder / str(seed), resumable=False)
    return [folder / "0", folder / "1"]
