"""Silence, and no way out: for the tests of everything that could ask a hub."""

import os

# read when the hub's client is imported
os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"

import socket
import sys

import pytest


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Nothing is fetched, and libraries draw no bars into what a test reads."""

    def refuse(self, address):
        raise AssertionError(f"a test connects to {address}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    if "huggingface_hub" in sys.modules:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    if "datasets" in sys.modules:
        monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    if "transformers" in sys.modules:  # imported by an earlier test, so that the variables come too late
        monkeypatch.setattr("transformers.utils.logging._tqdm_active", False)
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "error")
    monkeypatch.delenv("ADALORA_FAST_DATA", raising=False)
