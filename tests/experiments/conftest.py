"""What the tests of the experiments share: silence, and no way out."""

import json

import pytest

from adalora_fast.experiments.run.folder import open_run
from adalora_fast.experiments.sweep import sweep
from adalora_fast.experiments.sweep.plan import make_plan
from tests.helpers.offline import no_network  # noqa: F401 - for every test here
from tests.helpers.planning import DEFAULTS, GRID


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
