"""What the environment of another PyTorch gets, and the copy that is tested there."""

import tomllib

import pytest

from tests.helpers import compat

PROJECT = tomllib.loads((compat.ROOT / "pyproject.toml").read_text())["project"]


@pytest.mark.parametrize(("torch", "numpy"), [("2.11.0", "numpy<2.4"), ("2.13.0", "numpy>=2")])
def test_pytorch_chooses_its_triton_and_an_old_triton_its_numpy(torch, numpy):
    needed = compat.requirements(PROJECT, torch)
    assert needed[:2] == [f"torch=={torch}", numpy]
    names = [compat.name_of(one) for one in needed]
    assert len(names) == len(set(names)) and "triton" not in names
    assert {"peft", "transformers", "pytest", "hypothesis", "bitsandbytes"} <= set(names)


def test_no_pin_is_left_of_what_pytorch_chooses():
    pins = compat.constraints((compat.ROOT / "constraints.txt").read_text()).splitlines()
    names = {compat.name_of(line) for line in pins}
    assert len(names) > 50 and not names & set(compat.CHOSEN_BY_TORCH)


def test_the_copy_has_no_builds_and_no_older_files(tmp_path):
    (tmp_path / "adalora_fast").mkdir()
    for name in ("adalora_fast/_C.abi3.so", "gone.py"):
        (tmp_path / name).write_text("older")
    compat.copy_tree(tmp_path)
    assert (tmp_path / "adalora_fast/__init__.py").exists() and (
        tmp_path / "tests/helpers/compat.py"
    ).exists()
    assert not (tmp_path / "gone.py").exists() and not list(tmp_path.rglob("*.so"))


def test_the_tests_exist():
    assert all((compat.ROOT / name).is_dir() for name in compat.TESTS)
