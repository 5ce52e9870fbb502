"""What the tests of the experiments share: a tiny encoder, a tiny task, silence, and no way out."""

import os

os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = (
    "1"  # read when the hub's client is imported
)

import socket
import sys
from pathlib import Path

import pytest

from tests.experiments.tiny import save_encoder, write_sst2


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Nothing is fetched, and libraries draw no bars into what a test reads."""

    def refuse(self, address):
        raise AssertionError(f"a test connects to {address}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    if "huggingface_hub" in sys.modules:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
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
