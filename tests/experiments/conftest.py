"""What the tests of the experiments share: a tiny encoder, a tiny task, and silence."""

from pathlib import Path

import pytest

from tests.experiments.tiny import save_encoder, write_sst2


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Nothing is fetched, and libraries do not draw bars into what a test reads."""
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_HUB_DISABLE_PROGRESS_BARS"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "error")
    monkeypatch.delenv("ADALORA_FAST_DATA", raising=False)


@pytest.fixture(scope="session")
def encoder(tmp_path_factory) -> Path:
    """Folder of a two-layer BERT with a tokenizer."""
    return save_encoder(tmp_path_factory.mktemp("encoder") / "bert")


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory) -> Path:
    """Folder with a tiny SST-2."""
    return write_sst2(tmp_path_factory.mktemp("data"))
