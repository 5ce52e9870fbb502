"""Every input that `load_model` refuses, each with one line that says what to do."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from adalora_fast.experiments.models import encoders
from adalora_fast.experiments.models.encoders import load_model
from adalora_fast.experiments.models.families import FAMILIES, Family
from tests.helpers.tiny import changed_encoder, save_encoder

LABELS = ("no", "maybe", "yes")


def load(folder, kind="classification", **options):
    labels = LABELS if kind == "classification" else ()
    return load_model(str(folder), kind=kind, **({"labels": labels} | options))


@pytest.mark.parametrize("option", ["dropout", "classifier_dropout"])
@pytest.mark.parametrize("value", [-0.1, 1.0, float("nan")])
def test_a_dropout_that_is_no_probability(encoder, option, value):
    with pytest.raises(ValueError, match=rf"^{option} is {value}; it must be between 0 and 1"):
        load(encoder, **{option: value})


def test_attention_that_is_not_installed(encoder, monkeypatch):
    monkeypatch.setattr("transformers.modeling_utils.is_flash_attn_2_available", lambda: False, raising=False)
    if torch.cuda.is_available():
        pytest.skip("flash attention may work here")
    with pytest.raises(
        ValueError, match="cannot use attention 'flash_attention_2' here; choose eager or sdpa"
    ):
        load(encoder, attention="flash_attention_2")


def test_weights_of_another_configuration(encoder, tmp_path):
    folder = changed_encoder(encoder, tmp_path / "wide", intermediate_size=80)
    with pytest.raises(
        ValueError,
        match=r"^bert\.encoder\.layer\.0\.\S+ of model '\S+' is \[64\] in the checkpoint and \[80\] by",
    ):
        load(folder)


@pytest.mark.parametrize("what", ["more layers", "renamed"])
def test_an_encoder_that_the_checkpoint_does_not_have(encoder, tmp_path, what):
    layers = 3 if what == "more layers" else 2
    folder = changed_encoder(encoder, tmp_path / "other", num_hidden_layers=layers)
    if what == "renamed":
        weights = load_file(folder / "model.safetensors")
        renamed = {f"student.{name}": value for name, value in weights.items()}
        save_file(renamed, folder / "model.safetensors", {"format": "pt"})
    count = 16 if what == "more layers" else 37
    with pytest.raises(
        ValueError, match=rf"lacks {count} tensors of the encoder, one of them bert\.\S+; give a"
    ):
        load(folder)


@pytest.mark.parametrize(
    ("values", "error"),
    [
        (
            {"model_type": "gpt2"},
            "of type 'gpt2' is not for classification here; choose one of type bert, .*, or another text enc",
        ),
        ({"model_type": "no-such-thing"}, r"cannot be read \(.* type `no-such-thing` but .*\); give an"),
        ({"model_type": None}, r"config\.json names no model_type; give a folder"),
        ({"hidden_size": "wide"}, r"the configuration of model '\S+' cannot be read \(.+\); give another"),
        ({"hidden_act": "none such"}, r"of type 'bert' cannot have a head for classification \(.+\); give"),
    ],
)
def test_configurations_that_are_refused(encoder, tmp_path, values, error):
    with pytest.raises(ValueError, match=error) as refused:
        load(changed_encoder(encoder, tmp_path / "folder", **values))
    assert "\n" not in str(refused.value)


def test_a_type_without_a_head_for_answers(encoder, monkeypatch, tmp_path):
    monkeypatch.setitem(FAMILIES, "layoutlm", Family(matrices={}, head=("classifier",)))
    folder = changed_encoder(encoder, tmp_path / "folder", model_type="layoutlm")
    with pytest.raises(
        ValueError,
        match=r"of type 'layoutlm' cannot have a head for question_answering \(.+\); give another m",
    ) as refused:
        load(folder, "question_answering")
    assert "\n" not in str(refused.value)


def test_code_in_a_folder_is_not_run(encoder, tmp_path):
    folder = changed_encoder(encoder, tmp_path / "folder", auto_map={"AutoConfig": "code.Config"})
    (folder / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    load(folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("change", ["none", "cut short", "no safetensors"])
def test_weights_that_cannot_be_read(encoder, tmp_path, change):
    folder = changed_encoder(encoder, tmp_path / "folder")
    weights = folder / "model.safetensors"
    if change == "none":
        weights.unlink()
        with pytest.raises(
            FileNotFoundError, match=r"no readable weights in \S+; give a folder with a model\.s"
        ):
            load(folder)
        return
    weights.write_bytes(weights.read_bytes()[:1000] if change == "cut short" else b"weights")
    with pytest.raises(
        ValueError, match=r"the weights of model '\S+' cannot be read \(.+\); copy them again"
    ):
        load(folder)


def without_tokenizer(folder):
    for file in folder.iterdir():
        if file.name not in ("config.json", "model.safetensors"):
            file.unlink()
    return folder


@pytest.mark.parametrize("family", [name for name, family in FAMILIES.items() if family.head])
def test_a_folder_without_a_tokenizer(tmp_path, family):
    folder = without_tokenizer(save_encoder(tmp_path / "folder", model_type=family))
    with pytest.raises(
        (ValueError, FileNotFoundError), match=r"without a vocabulary; save|the tokenizer .* copy its files"
    ):
        load(folder)


def test_a_tokenizer_that_cannot_be_read(tmp_path, monkeypatch):
    folder = without_tokenizer(save_encoder(tmp_path / "folder", model_type="deberta-v2"))
    (folder / "spm.model").write_bytes(b"not a SentencePiece model")
    monkeypatch.setattr(encoders, "_is_installed", lambda package: True)
    with pytest.raises(
        ValueError, match=r"the tokenizer of model '\S+' cannot be read \(.+\); copy its files"
    ):
        load(folder)
    monkeypatch.setattr(encoders, "_is_installed", lambda package: package != "google.protobuf")
    with pytest.raises(
        ValueError, match=r"without sentencepiece and protobuf; install them with: pip install '"
    ):
        load(folder)


def test_a_tokenizer_of_another_model(encoder, tmp_path):
    folder = changed_encoder(encoder, tmp_path / "folder", vocab_size=9)
    weights = load_file(folder / "model.safetensors")
    name = "embeddings.word_embeddings.weight"
    save_file(weights | {name: weights[name][:9].clone()}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        ValueError, match=r"has the token id 22, the model only 9 embeddings; give a model with "
    ):
        load(folder)


def test_question_answering_needs_places_in_the_text(encoder, monkeypatch):
    from transformers import AutoTokenizer

    slow = AutoTokenizer.from_pretrained(encoder)
    monkeypatch.setattr(type(slow), "is_fast", False)
    with pytest.raises(
        ValueError, match="does not say where in the text a token is, as question answering nee"
    ):
        load(encoder, "question_answering")
    load(encoder)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (
            {"kind": "generation"},
            "unknown kind 'generation'; choose one of classification, regression, quest",
        ),
        ({"labels": ("one",)}, r"a classification into \('one',\) needs at least two labels; name them"),
        ({"kind": "regression", "labels": LABELS}, "regression has no classes, but labels are"),
        ({"dtype": "int8"}, "unknown dtype 'int8'; choose one of float32, bfloat16, float16"),
        ({"attention": "fast"}, "unknown attention 'fast'; choose one of eager, sdpa, flash_attention_2"),
    ],
)
def test_options_that_do_not_exist(encoder, options, error):
    with pytest.raises(ValueError, match=error):
        load(encoder, **options)


@pytest.mark.parametrize("name", ["nobody/nothing", "microsoft/deberta-v3-base"])
def test_a_name_out_of_reach(name, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        FileNotFoundError, match=f"model '{name}' is not reachable; give --model minilm or the"
    ):
        load(name)
