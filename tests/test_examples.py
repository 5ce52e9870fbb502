"""Every example runs as it is, and stays short."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted(path for path in (ROOT / "examples").glob("*.py") if path.stem != "tiny")
NEEDS = {"sentence_embeddings": "sentence_transformers", "trl_sft": "trl", "qlora": "bitsandbytes"}


def run(code: list[str], folder: Path) -> str:
    variables = {"PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "examples"))), "MPLBACKEND": "agg"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *code], cwd=folder, env=os.environ | variables,
        capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs(path, tmp_path):
    needed = NEEDS.get(path.stem)
    if needed is not None and find_spec(needed) is None:
        pytest.skip(f"{needed} is not installed; its example says what to install")
    assert run([str(path)], tmp_path)


def test_the_cells_of_the_notebook_run(tmp_path):
    notebook = json.loads((ROOT / "examples" / "adalora.ipynb").read_text(encoding="utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert cells and all(not cell["outputs"] and cell["execution_count"] is None for cell in cells)
    run(["-c", "\n\n".join("".join(cell["source"]) for cell in cells)], tmp_path)


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.stem)
def test_an_example_is_short(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) < 80


def test_the_table_names_every_example():
    table = (ROOT / "examples" / "README.md").read_text(encoding="utf-8")
    names = [path.name for path in (*EXAMPLES, ROOT / "examples" / "adalora.ipynb")]
    assert [name for name in names if f"[{name}]({name})" not in table] == []
