"""Loading an encoder with a head: every family and kind, what is kept of a checkpoint, the options."""

import importlib.util
import logging
import os
import warnings

import pytest
import torch
from peft import AdaLoraConfig, TaskType, get_peft_model
from safetensors.torch import load_file, save_file
from transformers.utils import logging as library_logging

from adalora_fast import fuse
from adalora_fast.experiments.models.encoders import load_model
from adalora_fast.experiments.models.families import FAMILIES, adapted_modules, family_of, locate_matrix
from adalora_fast.experiments.models.packages import MINILM_PACKAGE
from tests.helpers.deberta import needs_sentencepiece, save_deberta
from tests.helpers.tiny import LAYERS, changed_encoder, save_encoder

FAMILIES = {name: family for name, family in FAMILIES.items() if family.head}  # mBART: test_translation.py
KINDS = ("classification", "regression", "question_answering")
HEADED = ("classification", "question_answering")  # a regression has the module of a classification
LABELS = ("no", "maybe", "yes")
HEADS = {  # modules outside of the adapters that are trained
    "bert": {"bert.pooler", "classifier"},
    "electra": {"classifier"},
    "roberta": {"classifier"},
    "xlm-roberta": {"classifier"},
    "deberta-v2": {"pooler", "classifier"},
    "distilbert": {"pre_classifier", "classifier"},
    "modernbert": {"head", "classifier"},
}
ANSWER_HEADS = {family: {"qa_outputs"} for family in FAMILIES} | {"modernbert": {"head", "classifier"}}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A saved encoder of every family."""
    root = tmp_path_factory.mktemp("families")
    return {family: save_encoder(root / family, model_type=family) for family in FAMILIES}


@pytest.fixture(scope="module")
def deberta(tmp_path_factory):
    return save_deberta(tmp_path_factory.mktemp("hub") / "deberta-v3-base")


def load(folder, kind="classification", **options):
    torch.manual_seed(3)
    labels = LABELS if kind == "classification" else ()
    return load_model(str(folder), kind=kind, **({"labels": labels} | options))


def batch(tokenizer, kind):
    inputs = tokenizer(["moon bread the", "a star"], ["old soup", "warm"], padding=True, return_tensors="pt")
    targets = {
        "classification": {"labels": torch.tensor([0, 2])},
        "regression": {"labels": torch.tensor([0.5, 4.0])},
        "question_answering": {
            "start_positions": torch.tensor([1, 2]),
            "end_positions": torch.tensor([2, 2]),
        },
    }[kind]
    return {**inputs, **targets}


def adapted(model, kind):
    model = get_peft_model(
        model,
        AdaLoraConfig(
            task_type=TaskType.QUESTION_ANS if kind == "question_answering" else TaskType.SEQ_CLS,
            init_r=3,
            target_r=2,
            total_step=100,
            target_modules=adapted_modules(model, None),
            modules_to_save=family_of(model).head_for(kind),
        ),
    )
    for name, parameter in model.named_parameters():
        if ".ranknum." in name:  # PEFT lets it be trained where it casts adapters to float32
            parameter.requires_grad_(False)
    return model


def head_of(model, family, kind):
    heads = (ANSWER_HEADS if kind == "question_answering" else HEADS)[family]
    return {n: p for n, p in model.named_parameters() if any(n.startswith(f"{head}.") for head in heads)}


@pytest.mark.parametrize(
    ("family", "kind", "dtype"),
    [
        *(
            (family, kind, dtype)
            for family in FAMILIES
            for kind in HEADED
            for dtype in ("float32", "bfloat16")
        ),
        ("deberta-v2", "regression", "float32"),
        ("deberta-v2", "regression", "float16"),
        ("modernbert", "question_answering", "float16"),
    ],
)
def test_adapters_and_head_are_trained_and_nothing_else(folders, family, kind, dtype):
    model, tokenizer = load(folders[family], kind, dtype=dtype)
    head = {f"base_model.model.{name}": p.shape for name, p in head_of(model, family, kind).items()}
    assert {p.dtype for p in model.parameters()} == {getattr(torch, dtype), torch.float32}
    model = adapted(model, kind)
    fuse(model)
    ranks = model.base_model.rankallocator.ranks()
    places = [(layer, name) for layer in range(LAYERS) for name in FAMILIES[family].matrices]
    assert [locate_matrix(name) for name in ranks] == places
    assert not any(head in name for name in ranks for head in ("pooler", "classifier", "qa_outputs", "head"))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    outside = {name: p for name, p in trained.items() if "lora_" not in name}
    saved = {name.replace(".modules_to_save.default", ""): p.shape for name, p in outside.items()}
    assert saved == head
    assert len(trained) - len(outside) == 3 * len(places)  # A, B and the singular values of each

    outputs = model(**batch(tokenizer, kind))
    logits = outputs.start_logits if kind == "question_answering" else outputs.logits
    assert outputs.loss.dtype == logits.dtype == torch.float32 and outputs.loss.isfinite()
    outputs.loss.backward()
    for name, parameter in trained.items():
        assert parameter.dtype == torch.float32, name
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    idle = {name for name, parameter in outside.items() if not parameter.grad.any()}
    # an answer's bias is the same for all tokens, so that the loss does not see it
    last = f"base_model.model.{family_of(model).head_for(kind)[-1]}.modules_to_save.default.bias"
    assert idle <= ({last} if kind == "question_answering" else set())


@pytest.mark.parametrize("kind", HEADED)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_narrow_encoder_keeps_its_head_and_its_answers(folders, family, kind):
    wide, tokenizer = load(folders[family], kind)
    narrow, _ = load(folders[family], kind, dtype="bfloat16")
    head = head_of(wide, family, kind)
    for name, parameter in narrow.named_parameters():
        expected = wide.get_parameter(name)
        assert torch.equal(parameter, expected if name in head else expected.bfloat16()), name
    inputs = batch(tokenizer, kind)
    values = [model.eval()(**inputs)[1].detach() for model in (wide, narrow)]
    torch.testing.assert_close(values[1], values[0], rtol=0.05, atol=0.05)
    assert values[0].abs().max() > 0


def test_compiling_sees_one_graph(folders):
    model, tokenizer = load(folders["deberta-v2"], dtype="bfloat16", dropout=0.0, classifier_dropout=0.0)
    model = adapted(model, "classification")
    fuse(model)
    inputs = batch(tokenizer, "classification")
    compiled = torch.compile(
        model, backend="eager", fullgraph=True
    )  # tracing only; no C++ compiler is needed
    torch.testing.assert_close(compiled(**inputs).loss, model(**inputs).loss)


def test_a_checkpoint_in_half_precision_is_trained_in_float32(folders, tmp_path):
    folder = changed_encoder(folders["bert"], tmp_path / "half", dtype="float16")
    weights = load_file(folder / "model.safetensors")
    save_file({name: w.half() for name, w in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    model, _ = load(folder)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    name = "encoder.layer.1.output.dense.weight"
    assert torch.equal(model.bert.get_parameter(name), weights[name].half().float())


def test_labels_and_the_kind_of_head(folders):
    config = load(folders["bert"])[0].config
    assert (config.num_labels, config.problem_type) == (3, "single_label_classification")
    assert [config.id2label[code] for code in range(3)] == list(LABELS) and config.label2id["yes"] == 2
    config = load(folders["bert"], "regression")[0].config
    assert (config.num_labels, config.problem_type) == (1, "regression")
    assert load(folders["bert"], "question_answering")[0].qa_outputs.out_features == 2


def probabilities(model, head):
    """Dropout probabilities by where they are: in the encoder, or in and before the head."""
    model_of_head = {"classifier.dropout", "dropout", "drop", "qa_dropout"}
    found = {name: m.p for name, m in model.named_modules() if isinstance(m, torch.nn.Dropout)}
    found |= {
        f"{name} attention": module.attention_dropout
        for name, module in model.named_modules()
        if isinstance(getattr(module, "attention_dropout", None), float)
    }
    return {name: p for name, p in found.items() if (name in model_of_head) == head}


@pytest.mark.parametrize("kind", HEADED)
@pytest.mark.parametrize("family", FAMILIES)
def test_dropout(folders, family, kind):
    own, _ = load(folders[family], kind)
    encoder, before_head = probabilities(own, head=False), probabilities(own, head=True)
    encoder.pop("pooler.dropout", None)  # DeBERTa's pooler has a setting of its own
    assert encoder and 0.25 not in encoder.values()
    other, _ = load(folders[family], kind, dropout=0.25)
    assert {probabilities(other, head=False)[name] for name in encoder} == {0.25}
    assert probabilities(other, head=True) == before_head

    if kind == "question_answering" and family not in ("distilbert", "modernbert"):
        with pytest.raises(
            ValueError, match=rf"classifier_dropout is 0\.45, but a {family} model has no drop"
        ):
            load(folders[family], kind, classifier_dropout=0.45)
        return
    other, _ = load(folders[family], kind, classifier_dropout=0.45)
    assert set(probabilities(other, head=True).values()) == {0.45}
    kept = probabilities(other, head=False)
    assert {name: kept[name] for name in encoder} == encoder


@pytest.mark.parametrize("family", FAMILIES)
def test_attention(folders, family):
    eager, tokenizer = load(folders[family], attention="eager")
    assert eager.config._attn_implementation == "eager"
    inputs = batch(tokenizer, "classification")
    if family == "deberta-v2":
        with pytest.raises(
            ValueError, match=r"type 'deberta-v2' cannot use attention 'sdpa' here; choose eager$"
        ):
            load(folders[family], attention="sdpa")
        default, _ = load(folders[family])
        assert default.config._attn_implementation == "eager"
        return
    fused, _ = load(folders[family], attention="sdpa")
    assert fused.config._attn_implementation == "sdpa"
    torch.testing.assert_close(fused.eval()(**inputs).logits, eager.eval()(**inputs).logits)


@pytest.mark.parametrize("options", [{}, {"attention": "eager"}, {"dtype": "float16"}])
def test_the_head_depends_on_the_seed_alone(folders, options):
    from transformers import AutoModelForSequenceClassification

    model, _ = load(folders["bert"], **options)
    torch.manual_seed(3)
    plain = AutoModelForSequenceClassification.from_pretrained(
        folders["bert"], num_labels=3, local_files_only=True
    )
    assert torch.equal(model.classifier.weight, plain.classifier.weight)


@pytest.fixture(scope="module")
def finetuned(folders, tmp_path_factory):
    """A classifier of three classes, saved whole."""
    folder = tmp_path_factory.mktemp("finetuned") / "bert"
    model, tokenizer = load(folders["bert"])
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_head_of_another_size_starts_anew(finetuned):
    saved = load_file(finetuned / "model.safetensors")
    with pytest.warns(UserWarning) as said:
        model, _ = load(finetuned, labels=("no", "yes"))
    assert [str(w.message) for w in said] == [
        f"the checkpoint of model '{finetuned}' has a head of another size; at random starts: classifier"
    ]
    assert model.classifier.weight.shape[0] == 2 and model.classifier.weight.std() > 0
    for name in saved.keys() - {"classifier.weight", "classifier.bias"}:
        assert torch.equal(model.get_parameter(name), saved[name]), name


@pytest.mark.parametrize("kind", ["classification", "question_answering"])
def test_what_fits_of_a_checkpoint_is_kept(finetuned, kind):
    saved = load_file(finetuned / "model.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, _ = load(finetuned, kind)
    common = saved.keys() & dict(model.named_parameters()).keys()
    assert ("classifier.weight" in common) == (kind == "classification")
    assert all(torch.equal(model.get_parameter(name), saved[name]) for name in common)


def test_libraries_are_silent_and_left_as_they_were(finetuned, capfd, monkeypatch):
    heard = []

    class Listener(logging.Handler):
        def emit(self, record):
            heard.append(record.getMessage())

    listener = Listener()
    library_logging.add_handler(listener)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_PROGRESS_BARS", None)
    before = library_logging.get_verbosity(), library_logging.is_progress_bar_enabled()
    library_logging.set_verbosity_info()
    library_logging.enable_progress_bar()
    monkeypatch.setenv("DISABLE_SAFETENSORS_CONVERSION", "maybe")
    try:
        with pytest.warns(UserWarning, match="another size"):
            load(finetuned, labels=("no", "yes"))
        assert library_logging.get_verbosity() == logging.INFO and library_logging.is_progress_bar_enabled()
        assert os.environ["DISABLE_SAFETENSORS_CONVERSION"] == "maybe"
    finally:
        library_logging.remove_handler(listener)
        library_logging.set_verbosity(before[0])
        if not before[1]:
            library_logging.disable_progress_bar()
    assert capfd.readouterr() == ("", "") and heard == []


@pytest.mark.skipif(
    importlib.util.find_spec(MINILM_PACKAGE) is None, reason=f"{MINILM_PACKAGE} is not installed"
)
def test_the_packaged_model():
    model, tokenizer = load("minilm", "question_answering", dropout=0.0)
    model = adapted(model, "question_answering")
    adapters = [name for name, module in model.named_modules() if hasattr(module, "ranknum")]
    assert len({locate_matrix(name) for name in adapters}) == 36
    assert not any(module.p for module in model.modules() if isinstance(module, torch.nn.Dropout))
    assert model(**batch(tokenizer, "question_answering")).loss.isfinite()


@needs_sentencepiece
@pytest.mark.parametrize("kind", KINDS)
def test_deberta_v3_as_it_is_on_the_hub(deberta, kind):
    model, tokenizer = load(deberta, kind)
    assert model.config.pos_att_type == ["p2c", "c2p"] and model.config.share_att_key
    assert {p.dtype for p in model.parameters()} == {torch.float32}  # the file has float16
    saved = torch.load(deberta / "pytorch_model.bin", weights_only=True)
    encoder = {name for name, _ in model.named_parameters() if name.startswith("deberta.")}
    assert encoder and encoder <= saved.keys()
    assert all(torch.equal(model.get_parameter(name), saved[name].float()) for name in encoder)
    assert tokenizer.convert_tokens_to_ids(["[PAD]", "[CLS]", "[SEP]", "[UNK]"]) == [0, 1, 2, 3]
    model = adapted(model, kind)
    assert sum(hasattr(module, "lora_A") for module in model.base_model.model.modules()) == 6 * LAYERS
    loss = model(**batch(tokenizer, kind)).loss
    loss.backward()
    assert loss.isfinite()


@needs_sentencepiece
def test_offsets_of_deberta_v3_are_places_in_the_text(deberta):
    _, tokenizer = load(deberta, "question_answering")
    text = " The  old moon's  orbit, \tnear (ümlaut) 1/2 comets… ends. "
    encoded = tokenizer("Which moon?", text, return_offsets_mapping=True)
    sequences, covered = encoded.sequence_ids(), set()
    for token, sequence, (start, end) in zip(
        encoded.tokens(), sequences, encoded["offset_mapping"], strict=True
    ):
        if sequence == 1:
            piece = text[start:end].strip()
            assert token == "[UNK]" or token.replace("▁", "") == piece
            covered.update(range(start, end))
    spaces = {place for place, letter in enumerate(text) if letter.isspace()}
    assert covered | spaces == set(range(len(text)))
