"""Prompts, prefixes, scales and biases on tiny encoders: what is trained, saved, refused, and where it is."""

from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForQuestionAnswering, AutoModelForSequenceClassification

from adalora_fast.experiments.data.tasks import TASKS
from adalora_fast.experiments.methods.adapters import adapt, save_adapter
from adalora_fast.experiments.methods.allocation import ranks_of
from adalora_fast.experiments.models.families import FAMILIES, locate_matrix, position_limit
from adalora_fast.experiments.settings.recipes import Recipe
from adalora_fast.experiments.settings.settings import VIRTUAL, RunSettings
from tests.experiments.run.test_resume import interrupt
from tests.helpers.tiny import LAYERS, RECIPE, encoder_config, write_sst2
from tests.helpers.training_runs import files, read, settings, train

KINDS = {"classification": "sst2", "regression": "stsb", "question_answering": "squad"}
ENCODERS = ("bert", "roberta", "electra", "deberta-v2", "distilbert", "modernbert")
REFUSED = {("prefix", family) for family in ("deberta-v2", "distilbert", "modernbert")} | {
    ("ia3", "modernbert")
}
N = 5
SHORT = replace(RECIPE, virtual_tokens=N)
IDS = torch.tensor([[2, 7, 8, 9, 10, 11, 3], [2, 12, 8, 13, 3, 0, 0]])
MASK = (IDS != 0).long()


def asked(method, kind="classification", recipe=SHORT, **options):
    return RunSettings(task=KINDS[kind], model="tiny", method=method, recipe=recipe, **options)


def encoder_with_head(family, kind):
    torch.manual_seed(0)
    config = encoder_config(family)
    config.num_labels = 1 if kind == "regression" else 2
    if kind == "regression":
        config.problem_type = "regression"
    if kind == "question_answering":
        return AutoModelForQuestionAnswering.from_config(config)
    return AutoModelForSequenceClassification.from_config(config)


def adapted(family, method, kind="classification", recipe=SHORT, seed=1, **options):
    model = encoder_with_head(family, kind)
    torch.manual_seed(seed)
    return adapt(model, asked(method, kind, recipe, **options), TASKS[KINDS[kind]])


def labels(kind):
    if kind == "question_answering":
        return {"start_positions": torch.tensor([1, 2]), "end_positions": torch.tensor([3, 2])}
    return {"labels": torch.tensor([0.5, -1.0]) if kind == "regression" else torch.tensor([1, 0])}


def outputs(model, **options):
    with torch.no_grad():
        given = model.eval()(input_ids=IDS, attention_mask=MASK, **options)
    return torch.stack([given.start_logits, given.end_logits]) if "start_logits" in given else given.logits


def trained(model):
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def in_head(name, family, kind):
    return bool(set(FAMILIES[family].head_for(kind)).intersection(name.split(".")))


def move(model):
    """Every trained tensor to numbers of its own."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in trained(model).values():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


CASES = [
    (family, method, kind)
    for method in VIRTUAL
    for family in ENCODERS
    for kind in KINDS
    if (method, family) not in REFUSED
    and (kind == "classification" or family == "bert" or (kind, method) == ("question_answering", "prompt"))
]


@pytest.mark.parametrize(("family", "method", "kind"), CASES)
def test_what_is_trained_and_that_it_comes_back(family, method, kind, tmp_path):
    model = adapted(family, method, kind)
    own = {name for name in trained(model) if not in_head(name, family, kind)}
    assert own and all("prompt_encoder" in name or "ia3_l" in name for name in own)
    head = encoder_with_head(family, kind).named_parameters()
    assert sum(p.numel() for name, p in trained(model).items() if name not in own) == sum(
        p.numel() for name, p in head if in_head(name, family, kind)
    )
    model.train()(input_ids=IDS, attention_mask=MASK, **labels(kind)).loss.backward()
    for name, parameter in trained(model).items():
        assert parameter.dtype == torch.float32 and parameter.grad is not None, name
    assert all(p.grad is None for name, p in model.named_parameters() if name not in trained(model))
    run = asked(method, kind)
    before = outputs(move(model))
    save_adapter(model, run, tmp_path / "adapter")
    again = adapted(family, method, kind, seed=2)
    assert not torch.equal(outputs(again), before)
    again.load_adapter(tmp_path / "adapter", "default", is_trainable=True)
    assert torch.equal(outputs(again), before)
    plain = PeftModel.from_pretrained(encoder_with_head(family, kind), tmp_path / "adapter")
    extra = N if kind == "question_answering" and method in ("prompt", "p_tuning") else 0
    torch.testing.assert_close(outputs(plain)[..., extra:], before, rtol=0, atol=1e-6)


@pytest.mark.parametrize("method", ["prompt", "p_tuning", "prefix"])
def test_answers_are_counted_from_the_first_token_of_the_text(method):
    """Also in the loss: it is that of the labels at their places in what is returned."""
    model = move(adapted("bert", method, "question_answering")).eval()
    given = model(input_ids=IDS, attention_mask=MASK, **labels("question_answering"))
    assert given.start_logits.shape == given.end_logits.shape == IDS.shape
    expected = [
        torch.nn.functional.cross_entropy(getattr(given, f"{end}_logits"), places)
        for end, places in (("start", torch.tensor([1, 2])), ("end", torch.tensor([3, 2])))
    ]
    assert given.loss.item() == pytest.approx(sum(expected).item() / 2)
    # a token has its own logits: what changes with the last token of the text is not that of an other one
    shorter = model(input_ids=IDS[1:, :5], attention_mask=MASK[1:, :5])
    torch.testing.assert_close(given.start_logits[1, :5], shorter.start_logits[0])
    hidden = model.base_model.bert(input_ids=IDS) if method == "prefix" else None
    assert hidden is None or hidden.last_hidden_state.shape[1] == IDS.shape[1]


def test_virtual_tokens_have_the_places_of_real_ones():
    """A prompt of the embeddings of five words is as if they stood there; the head sees the text alone."""
    model = adapted("bert", "prompt", "question_answering")
    words = torch.tensor([6, 9, 14, 15, 16])
    base = encoder_with_head("bert", "question_answering").eval()
    with torch.no_grad():
        model.prompt_encoder["default"].embedding.weight.copy_(base.bert.embeddings.word_embeddings(words))
        longer = base(
            input_ids=torch.cat([words.expand(2, -1), IDS], 1),
            attention_mask=torch.cat([torch.ones(2, N), MASK], 1),
        )
    torch.testing.assert_close(outputs(model)[0], longer.start_logits[:, N:])


@pytest.mark.parametrize("family", [family for family in ENCODERS if family != "modernbert"])
def test_scales_are_those_of_keys_values_and_inner_activations(family):
    """The same as rows of the matrices of keys and values, and columns of the second feed-forward one."""
    model = move(adapted(family, "ia3"))
    layers = {
        name: layer for name, layer in model.base_model.model.named_modules() if hasattr(layer, "ia3_l")
    }
    places = [locate_matrix(name) for name in layers]
    assert set(places) == {(i, name) for i in range(LAYERS) for name in ("key", "value", "output")}
    assert len(places) == 3 * LAYERS
    base = encoder_with_head(family, "classification")
    with torch.no_grad():
        for (name, layer), (_, matrix) in zip(layers.items(), places, strict=True):
            scale, linear = layer.ia3_l["default"].flatten(), base.get_submodule(name)
            if matrix == "output":
                linear.weight.mul_(scale)
                assert len(scale) == linear.in_features
            else:
                linear.weight.mul_(scale[:, None])
                linear.bias.mul_(scale)
        for name, parameter in base.named_parameters():
            if in_head(name, family, "classification"):
                path = name.rpartition(".")[0]
                head = next(
                    part for part in path.split(".") if part in FAMILIES[family].head_for("classification")
                )
                wrapped = name.replace(f"{head}.", f"{head}.modules_to_save.default.", 1)
                parameter.copy_(model.base_model.model.get_parameter(wrapped))
    torch.testing.assert_close(outputs(model), outputs(base), rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ENCODERS)
def test_as_many_tokens_as_there_are_positions(family):
    limit = position_limit(encoder_with_head(family, "classification"))
    assert limit == {"roberta": 39, "modernbert": None, "deberta-v2": None}.get(family, 40)
    length = (limit or 60) - N
    model = adapted(family, "prompt", recipe=replace(SHORT, max_length=length)).eval()
    model(input_ids=torch.full((1, length), 7), attention_mask=torch.ones(1, length))
    if ("prefix", family) not in REFUSED:
        model = adapted(family, "prefix", recipe=replace(SHORT, max_length=length)).eval()
        model(input_ids=torch.full((1, length), 7), attention_mask=torch.ones(1, length))
    if limit is None:
        return
    for method in ("prompt", "prefix", "p_tuning"):
        if (method, family) not in REFUSED:
            with pytest.raises(
                ValueError, match=f"{method}: max_length {length + 1} and 5 virtual tokens are"
            ) as one:
                adapted(family, method, recipe=replace(SHORT, max_length=length + 1))
            assert "\n" not in str(one.value) and family in str(one.value)
    adapted(family, "ia3", recipe=replace(SHORT, max_length=length + 1))  # which adds no tokens


@pytest.mark.parametrize(("method", "family"), sorted(REFUSED))
def test_what_peft_cannot_do_is_refused(method, family):
    with pytest.raises(ValueError, match=f"{family} encoder .*; use (prompt|lora) or") as one:
        adapted(family, method)
    assert method in str(one.value) and "\n" not in str(one.value)


@pytest.mark.parametrize("method", VIRTUAL)
def test_no_matrices_for_what_adapts_none(method):
    with pytest.raises(ValueError, match=rf"matrices is \['query'\], but {method} adapts none"):
        asked(method, recipe=replace(SHORT, matrices=("query",)))


BIASES = [family for family in ENCODERS if family != "modernbert"]


@pytest.mark.parametrize("family", BIASES)
@pytest.mark.parametrize("kind", KINDS)
def test_bitfit_trains_every_bias_and_the_head(family, kind):
    model = adapted(family, "bitfit", kind)
    expected = {
        name
        for name, _ in encoder_with_head(family, kind).named_parameters()
        if name.endswith("bias") or in_head(name, family, kind)
    }
    assert set(trained(model)) == expected
    assert sum("LayerNorm.bias" in name or "layer_norm.bias" in name for name in expected) >= 2 * LAYERS


@pytest.mark.parametrize("method", ["lora", "adalora", "peft", "head", "houlsby", *VIRTUAL])
def test_biases_beside_another_method(method, tmp_path):
    """In a place where `load_adapter` finds them again, or in trained.safetensors."""
    recipe = replace(SHORT, train_biases=True)
    without, model = adapted("bert", method), adapted("bert", method, recipe=recipe)
    added = set(trained(model)) - set(trained(without))
    names = {
        name
        for name, _ in encoder_with_head("bert", "classification").named_parameters()
        if name.endswith("bias") and not in_head(name, "bert", "classification")
    }
    bare = {
        name.replace("base_layer.", "").removeprefix("base_model.").removeprefix("model.") for name in added
    }
    assert bare == names and set(trained(without)) < set(trained(model))
    before = outputs(move(model))
    save_adapter(model, asked(method, recipe=recipe), tmp_path / "adapter")
    again = adapted("bert", method, recipe=recipe, seed=2)
    if isinstance(again, PeftModel):
        again.load_adapter(tmp_path / "adapter", "default", is_trainable=True)
    else:
        (file,) = (tmp_path / "adapter").iterdir()
        again.load_state_dict(load_file(file), strict=False)
    torch.testing.assert_close(outputs(again), before, rtol=0, atol=0)


def test_all_is_trained_already():
    recipe = replace(SHORT, train_biases=True)
    assert set(trained(adapted("modernbert", "full", recipe=recipe))) == set(
        trained(adapted("modernbert", "full"))
    )


@pytest.mark.parametrize(
    "options", [{"method": "bitfit"}, {"method": "ia3", "recipe": Recipe(train_biases=True)}]
)
def test_biases_that_cannot_be_trained(options):
    with pytest.raises(ValueError, match="modernbert encoder has no biases"):
        adapted("modernbert", **({"recipe": SHORT} | options))
    for dtype in ("bfloat16", "float16", "nf4"):
        if dtype == "nf4" and options["method"] == "bitfit":
            continue
        with pytest.raises(
            ValueError, match=f"biases of {dtype} weights cannot be trained; .*precision=bf16"
        ):
            asked(**options, dtype=dtype)


def test_what_was_saved_elsewhere_is_not_taken(tmp_path):
    model = adapted("bert", "p_tuning")
    save_adapter(model, asked("p_tuning"), tmp_path)
    longer = adapted("bert", "p_tuning", recipe=replace(SHORT, virtual_tokens=N + 1))
    with pytest.raises(
        ValueError, match=r"trained\.safetensors and this model differ in prompt_encoder\.default\.emb"
    ):
        longer.load_adapter(tmp_path, "default", is_trainable=True)
    (tmp_path / "trained.safetensors").unlink()
    with pytest.raises(ValueError, match=r"trained\.safetensors"):
        model.load_adapter(tmp_path, "default", is_trainable=True)


@pytest.mark.parametrize("family", ENCODERS)
@pytest.mark.parametrize("method", ["adalora", "peft", "lora"])
def test_only_the_matrices_that_are_asked_for(family, method):
    """`output` is not the attention's, whose name in BERT ends in the same way."""
    if family == "modernbert":
        chosen = ("query key value", "output")
    else:
        chosen = ("query", "output")
    recipe = replace(SHORT, matrices=chosen, adapter_dropout=0.25)
    model = adapted(family, method, recipe=recipe)
    found = [locate_matrix(n) for n, m in model.base_model.model.named_modules() if hasattr(m, "lora_A")]
    assert sorted(found) == sorted((i, name) for i in range(LAYERS) for name in chosen)
    assert model.peft_config["default"].lora_dropout == 0.25
    assert {m.lora_dropout["default"].p for m in model.modules() if hasattr(m, "lora_dropout")} == {0.25}
    if method != "peft":
        assert len(ranks_of(model, asked(method, recipe=recipe))) == LAYERS * len(chosen)


def test_an_unknown_matrix():
    for family in ("bert", "modernbert"):
        names = ", ".join(FAMILIES[family].matrices)
        with pytest.raises(
            ValueError, match=f"a {family} encoder has no matrix 'pooler'; choose from {names}"
        ):
            adapted(family, "lora", recipe=replace(SHORT, matrices=("output", "pooler")))


@pytest.mark.parametrize("method", VIRTUAL)
def test_half_precision_of_the_base(method):
    """What is trained stays float32."""
    from adalora_fast.experiments.models.encoders import cast_encoder

    model = encoder_with_head("bert", "classification")
    cast_encoder(model, FAMILIES["bert"].head_for("classification"), torch.bfloat16)
    model = adapt(model, asked(method, dtype="bfloat16"), TASKS["sst2"])
    assert {p.dtype for p in trained(model).values()} == {torch.float32}
    model.train()(input_ids=IDS, attention_mask=MASK, labels=torch.tensor([0, 1])).loss.backward()
    assert all(p.grad.isfinite().all() for p in trained(model).values())


RUNS = {
    **{method: {"method": method} for method in ("prefix", "p_tuning", "ia3", "bitfit")},
    "adalora and biases": {
        "method": "adalora",
        "recipe": replace(SHORT, train_biases=True, adapter_dropout=0.1),
    },
    "prompt and biases": {"method": "prompt", "recipe": replace(SHORT, train_biases=True)},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_sst2(tmp_path_factory.mktemp("data"), train=16, validation=8)


@pytest.mark.parametrize("name", RUNS)
def test_a_run_goes_on_where_it_was_stopped(name, encoder, data, tmp_path):
    """Two epochs of two steps; stopped in the second one."""
    run = settings(encoder, data, **({"recipe": SHORT} | RUNS[name]))
    run = replace(run, recipe=replace(run.recipe, tinit=1, tfinal=1, deltaT=1))
    whole = train(run, tmp_path / "whole")
    interrupt(run, tmp_path / "run", 3)
    result = train(run, tmp_path / "run")
    assert result["resumed"] and result["metrics"] == whole["metrics"]
    assert result["arm"] == run.arm
    assert result["trainable_parameters"] == whole["trainable_parameters"]
    assert files(tmp_path / "run") == files(tmp_path / "whole")
    for file in (tmp_path / "run" / "adapter").glob("*.safetensors"):
        ours, theirs = load_file(file), load_file(tmp_path / "whole" / "adapter" / file.name)
        assert ours.keys() == theirs.keys() and all(ours[key].equal(theirs[key]) for key in ours), file.name
    saved = {file.name for file in (tmp_path / "run" / "adapter").glob("*.safetensors")}
    assert ("trained.safetensors" in saved) == (name in ("p_tuning", "bitfit", "prompt and biases"))
    assert read(tmp_path / "run", "ranks.json")["ranks"] == {} or "lora" in name
