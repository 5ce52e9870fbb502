"""Every command of these tests runs in a folder of its own, without a network."""

import json

import pytest

from adalora_fast import exits
from tests.commands.calling import SETTINGS
from tests.helpers.offline import no_network  # noqa: F401 - for every test here
from tests.helpers.tiny import save_encoder, write_sst2


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a tiny model (bert), data (data) and a recipe (recipe.json)."""
    root = tmp_path_factory.mktemp("place")
    save_encoder(root / "bert")
    write_sst2(root / "data")
    (root / "recipe.json").write_text(json.dumps({"defaults": SETTINGS}))
    return root


@pytest.fixture(autouse=True)
def here(place, tmp_path, monkeypatch):
    """Where the commands run."""
    for name in ("bert", "data", "recipe.json"):
        (tmp_path / name).symlink_to(place / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(exits.warnings, "filterwarnings", lambda *arguments, **options: None)
    return tmp_path
