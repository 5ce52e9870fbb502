"""What the tests of the experiments share: a tiny encoder, a tiny task, silence, and no way out."""

import json
from pathlib import Path

import pytest

from adalora_fast.experiments import sweep
from adalora_fast.experiments.runs import open_run
from adalora_fast.experiments.sweep import make_plan
from tests.experiments.offline import no_network  # noqa: F401 - for every test here
from tests.experiments.planning import DEFAULTS, GRID
from tests.experiments.tiny import save_encoder, write_sst2


@pytest.fixture(scope="session")
def encoder(tmp_path_factory) -> Path:
    """Folder of a two-layer BERT with a tokenizer."""
    return save_encoder(tmp_path_factory.mktemp("encoder") / "bert")


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory) -> Path:
    """Folder with a tiny SST-2."""
    return write_sst2(tmp_path_factory.mktemp("data"))


@pytest.fixture
def recipe(tmp_path):
    def write(**content):
        path = tmp_path / "mine.json"
        path.write_text(json.dumps({"model": "tiny", "defaults": DEFAULTS, "grid": GRID} | content))
        return str(path)

    return write


@pytest.fixture
def plan(recipe, encoder, data_dir):
    def make(*, content=None, **options):
        return make_plan(
            recipe=recipe(**(content or {})), **({"model": str(encoder), "data_dir": data_dir} | options)
        )

    return make


@pytest.fixture
def pretend(monkeypatch):
    """Instead of training: a result at once, or what `pretend.does[arm]` does. Keeps what was run."""

    def start(settings, path, progress):
        pretend.ran.append(f"{settings.arm}-{settings.seed}-{settings.recipe.learning_rate:g}")
        folder = open_run(path, settings)
        with folder.locked():
            folder.start()
            primary = pretend.does.get(settings.arm, lambda settings: 0.5)(settings)
            folder.finish({"primary": primary})

    start.ran, start.does = [], {}
    pretend = start
    monkeypatch.setattr(sweep, "start_run", start)
    return start
