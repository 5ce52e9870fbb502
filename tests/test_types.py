"""What a type checker sees of the public names: their types, not Any."""

import json
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import adalora_fast

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(find_spec("pyright") is None, reason="pyright is not installed")


@pytest.mark.slow
def test_no_public_name_is_unknown(tmp_path):
    names = [name for name in adalora_fast.__all__ if not name.startswith("_")]
    lines = [f"from adalora_fast import {', '.join(names)}", *(f"reveal_type({name})" for name in names)]
    (tmp_path / "user.py").write_text("\n".join(lines))
    # An editable installation is found by a hook, which a type checker does not run.
    (tmp_path / "pyrightconfig.json").write_text(json.dumps({"extraPaths": [str(ROOT)]}))
    command = [sys.executable, "-m", "pyright", "--pythonpath", sys.executable, "user.py"]
    try:  # its first run fetches it
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    except subprocess.TimeoutExpired:
        pytest.skip("pyright did not answer in two minutes; run it once by hand: make types")
    found = dict(re.findall(r'Type of "(\w+)" is "(.*)"', done.stdout))
    if not found:
        pytest.skip(f"pyright could not be fetched: {(done.stdout + done.stderr).strip()[-200:]}")
    assert set(found) == set(names), done.stdout
    assert [name for name, kind in found.items() if kind in ("Unknown", "Any")] == []
