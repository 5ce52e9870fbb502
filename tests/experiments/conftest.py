"""What the tests of the experiments share: a tiny encoder, a tiny task, silence, and no way out."""

from pathlib import Path

import pytest

from tests.experiments.offline import no_network  # noqa: F401 - for every test here
from tests.experiments.tiny import save_encoder, write_sst2


@pytest.fixture(scope="session")
def encoder(tmp_path_factory) -> Path:
    """Folder of a two-layer BERT with a tokenizer."""
    return save_encoder(tmp_path_factory.mktemp("encoder") / "bert")


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory) -> Path:
    """Folder with a tiny SST-2."""
    return write_sst2(tmp_path_factory.mktemp("data"))
