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
    done = subprocess.run(
        [sys.executable, "-m", "pyright", "--pythonpath", sys.executable, "user.py"],
        cwd=tmp_path, capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    found = dict(re.findall(r'Type of "(\w+)" is "(.*)"', done.stdout))
    if not found and "error" not in done.stdout:
        pytest.skip(f"pyright did not run: {done.stderr.strip()[-200:]}")
    assert set(found) == set(names), done.stdout
    assert [name for name, kind in found.items() if kind in ("Unknown", "Any")] == []
