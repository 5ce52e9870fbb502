"""AdapterFusion: the published equations, what stays frozen, the runs it starts from, and whole runs."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from adalora_fast import cli
from adalora_fast.experiments.data.tasks import TASKS
from adalora_fast.experiments.methods.adapters import adapt
from adalora_fast.experiments.methods.bottleneck import Bottleneck
from adalora_fast.experiments.methods.fusion import Fusion, mean_weights, open_sources
from adalora_fast.experiments.models.families import FAMILIES
from adalora_fast.experiments.models.loading import load_encoder
from adalora_fast.experiments.run import training
from tests.experiments.data.test_question_answering import write_squad
from tests.helpers.tiny import LAYERS, RECIPE, WIDTH, write_parquet, write_sst2
from tests.helpers.training_runs import TASK, StopAfter, files, read, settings, train, without_times

NARROW = replace(RECIPE, bottleneck=4)
PLACES = 2 * LAYERS


def stirred(*modules, std=0.5):
    for module in modules:
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=std)
    return modules


def fusion_of(count, features, width=3):
    torch.manual_seed(0)
    fusion = Fusion([Bottleneck(features, width) for _ in range(count)]).double()
    stirred(fusion)
    return fusion


def test_the_published_equations():
    """Position by position: s = softmax_n(hᵀQ · z_nᵀK), o = Σ_n s_n z_nᵀV; then h + o."""
    fusion, positions = fusion_of(3, 6), torch.randn(2, 4, 6, dtype=torch.float64)
    query, key, value = fusion.query, fusion.key, torch.eye(6, dtype=torch.float64) + fusion.value
    result = fusion(positions)
    for row in range(2):
        for position in range(4):
            h = positions[row, position]
            z = [source(h) - h for source in fusion.sources]
            scores = torch.stack([torch.dot(h @ query, each @ key) for each in z])
            s = scores.exp() / scores.exp().sum()
            o = sum(weight * (each @ value) for weight, each in zip(s, z, strict=True))
            assert torch.allclose(result[row, position], h + o, rtol=0, atol=1e-11)


def test_the_attention_is_the_same_with_the_skip_connection_inside():
    fusion, h = fusion_of(3, 6), torch.randn(5, 6, dtype=torch.float64)
    z = torch.stack([source(h) for source in fusion.sources], dim=1)  # with h in it, as the paper may be read
    expected = torch.einsum("td,tnd->tn", h @ fusion.query, z @ fusion.key).softmax(-1)
    seen = []
    fusion.softmax.register_forward_hook(lambda softmax, inputs, s: seen.append(s))
    fusion(h)
    assert torch.allclose(seen[0], expected, rtol=0, atol=1e-10)


def test_gradients():
    fusion, h = fusion_of(2, 4, 2), torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    names = ("query", "key", "value")
    values = [getattr(fusion, name).detach().clone().requires_grad_() for name in names]

    def run(h, *values):
        return torch.func.functional_call(fusion, dict(zip(names, values, strict=True)), (h,))

    assert torch.autograd.gradcheck(run, (h, *values))


def test_equal_adapters_and_v_at_its_start_give_that_adapter():
    torch.manual_seed(0)
    one, h = Bottleneck(6, 3), torch.randn(4, 6)
    stirred(one)
    fusion = Fusion([one, one])
    assert not fusion.value.any()  # V is the identity
    stirred(*[nn.ParameterList([fusion.query, fusion.key])])
    assert torch.allclose(fusion(h), one(h), rtol=0, atol=1e-6)
    assert torch.equal(fusion.double()(h.bfloat16()).float(), one.double()(h.bfloat16()).float())


def test_v_is_drawn_to_the_identity_by_weight_decay():
    fusion = Fusion([Bottleneck(4, 2), Bottleneck(4, 2)])
    nn.init.ones_(fusion.value)
    optimizer = torch.optim.AdamW([fusion.value], lr=0.1, weight_decay=0.5)
    fusion.value.grad = torch.zeros_like(fusion.value)
    optimizer.step()
    assert torch.allclose(fusion.value, torch.full((4, 4), 0.95))


def test_half_precision():
    torch.manual_seed(0)
    fusion, h = Fusion([Bottleneck(8, 2), Bottleneck(8, 2)]), torch.randn(5, 8)
    stirred(fusion, std=0.3)
    narrow = fusion(h.bfloat16())
    assert narrow.dtype == torch.bfloat16 and torch.equal(narrow, fusion(h.bfloat16().float()).bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.allclose(fusion(h), fusion(h).float(), atol=0.05, rtol=0.05)
    compiled = torch.compile(fusion, backend="eager", fullgraph=True)
    assert torch.equal(compiled(h), fusion(h))
    torch._dynamo.reset()


def write_stsb(folder):
    texts = ["the moon", "a star", "old bread", "new soup"] * 4
    for split in ("train", "validation"):
        columns = {"sentence1": texts, "sentence2": texts, "label": [0.0, 1.5, 4.0, 5.0] * 4}
        write_parquet(folder / "stsb" / f"{split}.parquet", **columns)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = write_sst2(tmp_path_factory.mktemp("data"), train=24, validation=16)
    write_stsb(folder)
    return folder


@pytest.fixture(scope="module")
def sources(encoder, data, tmp_path_factory):
    """Finished houlsby runs of two tasks."""
    root = tmp_path_factory.mktemp("sources")
    for task in ("sst2", "stsb"):
        train(settings(encoder, data, "houlsby", task=task, recipe=NARROW), root / task)
    return [root / "sst2", root / "stsb"]


@pytest.fixture(scope="module")
def run(encoder, data, sources):
    def make(*adapters, **options):
        paths = tuple(str(path) for path in adapters or sources)
        return settings(encoder, data, "fusion", adapters=paths, **({"recipe": NARROW} | options))

    return make


@pytest.fixture(scope="module")
def folder(run, tmp_path_factory):
    path = tmp_path_factory.mktemp("fusion") / "run"
    train(run(), path)
    return path


def saved(folder):
    return load_file(folder / "adapter" / "trained.safetensors")


def fusions_of(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, Fusion)}


def adapted(run, task=TASK):
    model, tokenizer = load_encoder(run, task)
    return adapt(model, run, task).eval(), tokenizer


def test_a_whole_run(folder, sources, run):
    result, tensors = read(folder, "result.json"), saved(folder)
    assert result["method"] == result["arm"] == "fusion" and result["steps"] == 6
    head = WIDTH * WIDTH + WIDTH + 2 * WIDTH + 2
    assert result["trainable_parameters"] == PLACES * 3 * WIDTH**2 + head
    assert [name for name in files(folder) if name.startswith("adapter/")] == ["adapter/trained.safetensors"]
    for number, source in enumerate(map(saved, sources)):
        for name in (name for name in source if ".adapter." in name):
            kept = tensors[name.replace(".adapter.", f".adapter.sources.{number}.")]
            assert torch.equal(kept, source[name])  # frozen, and in the folder
    for part in ("query", "key", "value"):
        assert sum(bool(tensors[name].any()) for name in tensors if name.endswith(part)) == PLACES


def test_the_weights_of_the_sources_in_the_folder(folder, sources):
    described = read(folder, "fusion.json")
    assert described["adapters"] == [str(source) for source in sources]
    assert list(described["weights"]) == ["validation"]
    weights = described["weights"]["validation"]
    assert len(weights) == PLACES and "bert.encoder.layer.1.attention.output.dense" in weights
    for each in weights.values():
        assert len(each) == 2 and sum(each) == pytest.approx(1) and 0 < each[0] < 1


def test_a_run_on_questions_in_half_precision(run, sources, tmp_path, monkeypatch):
    """Its weights are computed as its evaluation was: in its batches and its precision."""
    seen = []

    def looked_at(model, batches):
        batches = list(batches)
        seen.append(([len(batch["input_ids"]) for batch in batches], torch.is_autocast_enabled("cpu")))
        return mean_weights(model, batches)

    monkeypatch.setattr(training, "mean_weights", looked_at)
    data = write_squad(tmp_path / "data", repeat=1)
    recipe = replace(NARROW, epochs=1, batch_size=2, max_length=24, stride=6, precision="bf16")
    train(replace(run(recipe=recipe), task="squad", data_dir=str(data)), tmp_path / "run")
    ((sizes, is_narrow),) = seen
    assert max(sizes) == 4 and is_narrow
    weights = read(tmp_path / "run", "fusion.json")["weights"]["validation"]
    assert len(weights) == PLACES and all(
        sum(each) == pytest.approx(1, abs=1e-3) for each in weights.values()
    )


def test_the_folder_stands_alone(folder, run, data):
    """Its tensors on the base, without the runs it came from, give the predictions it has written down."""
    from adalora_fast.experiments.data.tasks import load_split
    from adalora_fast.experiments.methods.bottleneck import places_of, put_after

    model, tokenizer = load_encoder(run(), TASK)
    for place in places_of(model).values():
        put_after(place, Fusion([Bottleneck(WIDTH, 4) for _ in range(2)]))
    missing, unexpected = model.load_state_dict(saved(folder), strict=False)
    assert not unexpected and not [name for name in missing if ".adapter." in name]
    split = load_split(TASK, "validation", data)
    with torch.no_grad():
        logits = model.eval()(**tokenizer(*split.texts, padding=True, return_tensors="pt")).logits
    expected = load_file(folder / "predictions.safetensors")["validation/logits"]
    assert torch.allclose(logits, expected, atol=1e-5)


@pytest.mark.parametrize("task", ["sst2", "squad"])
def test_only_q_k_v_and_the_head_are_trained(run, task):
    model, tokenizer = adapted(run(task=task), TASKS[task])
    head = FAMILIES["bert"].head_for(TASKS[task].kind)
    parts = {f"{name}.{part}" for name in fusions_of(model) for part in ("query", "key", "value")}
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(fusions_of(model)) == PLACES and parts <= trained
    assert trained - parts == {
        n for n, _ in model.named_parameters() if not set(head).isdisjoint(n.split("."))
    }
    inputs = tokenizer(["the moon", "a star"], return_tensors="pt")
    model(**inputs)[0].sum().backward()
    assert all(model.get_parameter(name).grad is not None for name in parts)


def test_attention_to_one_source_alone_gives_that_run(run, sources):
    """What a source has learned is all in its bottlenecks: the encoder computes what it did in its run."""

    class First(nn.Module):
        def forward(self, scores):
            return torch.eye(scores.shape[-1])[0].expand_as(scores)

    model, tokenizer = adapted(run())
    for fusion in fusions_of(model).values():
        fusion.softmax = First()
    alone, _ = adapted(replace(run(), method="houlsby", adapters=()))
    alone.load_state_dict(saved(sources[0]), strict=False)
    inputs = tokenizer(["the moon and a star", "old bread"], padding=True, return_tensors="pt")
    ours, theirs = (each(**inputs, output_hidden_states=True).hidden_states[-1] for each in (model, alone))
    assert torch.allclose(ours, theirs, atol=1e-6)
    other, _ = adapted(replace(run(), method="houlsby", adapters=()))
    assert not torch.allclose(ours, other(**inputs, output_hidden_states=True).hidden_states[-1], atol=1e-3)


def test_the_mean_is_over_tokens_and_not_over_padding(run):
    model, tokenizer = adapted(run())
    torch.manual_seed(1)
    for fusion in fusions_of(model).values():
        for parameter in (fusion.query, fusion.key, *fusion.sources.parameters()):
            nn.init.normal_(parameter, std=0.3)
    texts = ["the moon", "a star and old bread near the comet"]
    padded = tokenizer(texts, padding=True, return_tensors="pt")
    single = [dict(tokenizer(text, return_tensors="pt")) for text in texts]
    lengths = [batch["input_ids"].shape[1] for batch in single]
    assert len(set(lengths)) == 2
    model.train()
    together = mean_weights(model, [{**padded, "labels": torch.tensor([0, 1]), "row": torch.tensor([0, 1])}])
    assert model.training
    apart = mean_weights(model, single)
    each = [mean_weights(model, [batch]) for batch in single]
    for name, weights in together.items():
        expected = sum(torch.tensor(e[name]) * n for e, n in zip(each, lengths, strict=True)) / sum(lengths)
        assert weights == pytest.approx(expected.tolist(), abs=1e-6) == apart[name]
    assert max(abs(weights[0] - 0.5) for weights in together.values()) > 0.01  # or else it would say nothing
    assert not any(fusion.softmax._forward_hooks for fusion in fusions_of(model).values())


def test_an_interrupted_run_ends_like_one_that_was_not(folder, run, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(run(), tmp_path / "run", progress=StopAfter(4))
    train(run(), tmp_path / "run")
    ours, theirs = (without_times(read(path, "result.json")) for path in (tmp_path / "run", folder))
    assert {name for name in ours if ours[name] != theirs[name]} <= {"resumed", "train_loss"}
    assert ours["resumed"] is True
    ours, theirs = saved(tmp_path / "run"), saved(folder)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def changed(source, target, part="settings", **values):
    """A copy of a run whose config.json says something else."""
    shutil.copytree(source, target)
    config = read(target, "config.json")
    (config["settings"]["recipe"] if part == "recipe" else config["settings"]).update(values)
    (target / "config.json").write_text(json.dumps(config))
    return target


def test_runs_that_a_fusion_cannot_start_from(run, sources, tmp_path):
    first = sources[0]
    (tmp_path / ".begun.partial").mkdir()
    (tmp_path / "bare").mkdir()
    (shutil.copytree(first, tmp_path / "strange") / "config.json").write_text("[]")
    (shutil.copytree(first, tmp_path / "empty") / "adapter" / "trained.safetensors").unlink()
    shutil.copytree(first, tmp_path / "linked")
    (tmp_path / "linked" / "adapter" / "trained.safetensors").unlink()
    (tmp_path / "linked" / "adapter" / "trained.safetensors").symlink_to(
        first / "adapter" / "trained.safetensors"
    )
    changed(first, tmp_path / "method", method="lora")
    changed(first, tmp_path / "model", model="minilm")
    changed(first, tmp_path / "width", "recipe", bottleneck=8)
    changed(first, tmp_path / "biases", "recipe", train_biases=True)
    wrong = {
        "nothing": (FileNotFoundError, "there is no run folder .*; train it with --method houlsby first"),
        "begun": (FileNotFoundError, "is not finished; train it"),
        "bare": (FileNotFoundError, "has no result.json"),
        "strange": (ValueError, "is not that of a houlsby run"),
        "empty": (FileNotFoundError, "is missing; train empty again"),
        "linked": (ValueError, "leaves its folder"),
        "method": (ValueError, "has method 'lora', and 'houlsby' is needed; give runs of --method houlsby"),
        "model": (ValueError, "has model 'minilm', and .* is needed; give --model minilm, or another run"),
        "width": (ValueError, "has bottleneck 8, and 4 is needed; --set bottleneck=8, or give another run"),
        "biases": (ValueError, "has train_biases"),
    }
    for name, (error, message) in wrong.items():
        with pytest.raises(error, match=message) as found:
            open_sources(run(first, tmp_path / name))
        assert "\n" not in str(found.value) and name in str(found.value)


def test_tensors_of_another_base(run, sources, tmp_path):
    """Its folder has been replaced since: the names and shapes do not fit."""
    from safetensors.torch import save_file

    file = shutil.copytree(sources[0], tmp_path / "other") / "adapter" / "trained.safetensors"
    tensors, name = load_file(file), "bert.encoder.layer.1.output.dense.adapter.up.bias"
    save_file(tensors | {name: torch.zeros(WIDTH + 1)}, file)
    with pytest.raises(ValueError, match=rf"has shape \[{WIDTH + 1}\] for {name} \[{WIDTH}\]"):
        adapted(run(sources[0], tmp_path / "other"))
    tensors.pop(name)
    save_file(tensors, file)
    with pytest.raises(ValueError, match=f"has no such tensor for {name}"):
        adapted(run(sources[0], tmp_path / "other"))


def test_on_the_command_line(folder, run, sources, data, encoder, tmp_path, capsys, monkeypatch):
    """Paths are made whole; a complete run needs its sources no more; mistakes are one line."""
    monkeypatch.chdir(sources[0].parent)
    shutil.copytree(folder, tmp_path / "out")
    recipe = tmp_path / "recipe.json"
    values = read(folder, "config.json")["settings"]["recipe"]
    recipe.write_text(json.dumps({"defaults": values}))
    common = ["train", "--task", "sst2", "--model", str(encoder), "--data-dir", str(data)]
    common += ["--recipe", str(recipe), "--method", "fusion"]
    assert cli.main([*common, "--output", str(tmp_path / "out"), "--adapters", "sst2", "stsb"]) == 0
    assert "already complete" in capsys.readouterr().out
    common[common.index(str(data))] = "nowhere"  # what is wrong with the adapters shows before data are read
    for adapters, message in ((["sst2"], "two or more"), (["sst2", "rte"], "there is no run folder")):
        assert cli.main([*common, "--output", str(tmp_path / "new"), "--adapters", *adapters]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert message in lines[-1] and len(lines) == 1 and not (tmp_path / "new").exists()
