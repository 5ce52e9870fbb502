"""For all tests: without a GPU, Triton kernels run in its interpreter, which must be asked for before they
are imported; and a tiny encoder with a tiny task.
"""

import os
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session")
def encoder(tmp_path_factory) -> Path:
    """Folder of a two-layer BERT with a tokenizer."""
    from tests.helpers.tiny import save_encoder

    return save_encoder(tmp_path_factory.mktemp("encoder") / "bert")


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory) -> Path:
    """Folder with a tiny SST-2."""
    from tests.helpers.tiny import write_sst2

    return write_sst2(tmp_path_factory.mktemp("data"))
