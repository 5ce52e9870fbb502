"""A checkpoint that is damaged or another model's is refused in one line, and the model stays as it was."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from adalora_fast import fuse
from adalora_fast.integrations.layers import adapter_layers
from tests.helpers.checkpoints import ADAPTER, CONFIG, END, STATE, checkpoints, new, train
from tests.helpers.models import adapted, trained_weights
from tests.helpers.peft_models import adamw, logits, one_line, same_state


def truncate(path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def change(path, tensors=lambda tensors: None, metadata=lambda config: None) -> None:
    """Rewrite a safetensors file after ``tensors(its tensors)`` and ``metadata(the allocator's config)``."""
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
    content = load_file(path)
    tensors(content)
    if "adalora_fast" in header:
        config = json.loads(header["adalora_fast"])
        metadata(config)
        header["adalora_fast"] = json.dumps(config)
    save_file(content, path, metadata=header)


def state_of(folder, score: str = "sensitivity", **config) -> None:
    """Replace the state by another model's."""
    other = fuse(adapted("bert", **{**CONFIG, **config}), score=score)
    train(other, adamw(other), 0, 4)
    other.save_pretrained(folder / "other")
    shutil.copy(folder / "other" / STATE, folder / STATE)
    shutil.rmtree(folder / "other")


def rename_layers(config) -> None:
    config["layers"] = {name.replace("bert.", "electra."): rank for name, rank in config["layers"].items()}


def of_a_wider_model(folder) -> None:
    def widen(tensors):
        for name in tensors:
            if name.endswith("lora_A"):
                tensors[name] = torch.zeros(tensors[name].shape[0], 24)

    change(folder / ADAPTER, widen)


def without_query(tensors) -> None:
    for name in [name for name in tensors if ".query." in name]:
        del tensors[name]


def poison(tensors, value: float, end: str = "layer.1.output.dense.lora_B") -> None:
    """One number of one tensor."""
    tensors[next(name for name in tensors if name.endswith(end))].view(-1)[0] = value


def to_integers(tensors) -> None:
    for name in [name for name in tensors if name.endswith("lora_A")]:
        tensors[name] = tensors[name].int()


def add_a_dimension(tensors) -> None:
    name = next(name for name in tensors if name.endswith("lora_A"))
    tensors[name] = tensors[name].unsqueeze(-1)


class Boom:
    """Unpickling it would show."""

    def __reduce__(self):
        return pytest.fail, ("unpickled",)


def to_pickle(folder) -> None:
    (folder / ADAPTER).unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Boom()))


def config_as(folder, content) -> None:
    (folder / "adapter_config.json").write_text(json.dumps(content))


def with_pattern(folder, pattern) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    config_as(folder, {**config, "rank_pattern": pattern})


def link_out(folder, name: str, through: Path | None = None) -> None:
    """A link to the same content outside of the folder."""
    outside = folder.parent / f"outside-{name}"
    shutil.move(folder / name, outside)
    (folder / name).symlink_to(outside if through is None else through / outside.name)


QUERY = "bert.encoder.layer.0.attention.self.query.lora_E"
DAMAGES = {
    "truncated state": (lambda folder: truncate(folder / STATE), STATE, "restore it or delete it"),
    "empty state": (lambda folder: (folder / STATE).write_bytes(b""), STATE, "restore it or delete it"),
    "state that is no state": (
        lambda folder: save_file({"x": torch.zeros(1)}, folder / STATE),
        STATE,
        "restore it or delete it",
    ),
    "state without one statistic": (
        lambda folder: change(folder / STATE, lambda t: t.pop(next(n for n in t if "ema/" in n))),
        "ema/",
        "damaged",
    ),
    "state without its mask": (
        lambda folder: change(folder / STATE, lambda t: t.pop("mask")),
        "mask",
        "damaged",
    ),
    "state of another score": (lambda folder: state_of(folder, "fisher"), "fisher", "sensitivity"),
    "state of another target": (lambda folder: state_of(folder, target_r=3), "39", "26", "target_r"),
    "state of fewer layers": (lambda folder: state_of(folder, target_modules=["query"], tinit=1), "26"),
    "state of other layers": (
        lambda folder: change(folder / STATE, metadata=rename_layers),
        "other layers",
        "encoder.layer.0.attention.self.query",
    ),
    "state of another format": (
        lambda folder: change(folder / STATE, metadata=lambda config: config.update(format=99)),
        "format 99",
    ),
    "truncated adapter": (lambda folder: truncate(folder / ADAPTER), ADAPTER, "restore it"),
    "empty adapter": (lambda folder: (folder / ADAPTER).write_bytes(b""), ADAPTER, "restore it"),
    "missing adapter": (lambda folder: (folder / ADAPTER).unlink(), ADAPTER, ""),
    "adapter of a wider model": (of_a_wider_model, "lora_A", "24"),
    "NaN": (lambda folder: change(folder / ADAPTER, lambda t: poison(t, float("nan"))), "lora_B", "NaN"),
    "infinity": (lambda folder: change(folder / ADAPTER, lambda t: poison(t, float("-inf"))), "infinite"),
    "NaN in the head": (
        lambda folder: change(folder / ADAPTER, lambda t: poison(t, float("nan"), "classifier.bias")),
        "classifier.bias",
    ),
    "adapter of integers": (lambda folder: change(folder / ADAPTER, to_integers), "int32", "restore it"),
    "factor of three dimensions": (lambda folder: change(folder / ADAPTER, add_a_dimension), "lora_A", "1)"),
    "pickle instead of the adapter": (to_pickle, ADAPTER, "adapter_model.bin", "only safetensors"),
    "config that is a list": (lambda folder: config_as(folder, []), "adapter_config.json", "list"),
    "config that is null": (lambda folder: config_as(folder, None), "adapter_config.json", "NoneType"),
    "config too deep": (
        lambda folder: (folder / "adapter_config.json").write_text("[" * 200_000),
        "adapter_config.json",
    ),
    "link out for the adapter": (lambda folder: link_out(folder, ADAPTER), ADAPTER, "link", "copy the file"),
    "link out for the config": (
        lambda folder: link_out(folder, "adapter_config.json"),
        "link",
        "copy the file",
    ),
    "link out for a state file": (lambda folder: link_out(folder, STATE), STATE, "link", "copy the file"),
    "link by a relative path": (
        lambda folder: link_out(folder, ADAPTER, Path("..")),
        "link",
        "copy the file",
    ),
    "rank pattern that is a list": (lambda folder: with_pattern(folder, [1, 2]), "rank_pattern", "list"),
    "rank pattern of numbers": (
        lambda folder: with_pattern(folder, {QUERY: [2, 1]}),
        "query",
        "true and false",
    ),
    "rank pattern of another size": (lambda folder: with_pattern(folder, {QUERY: [True] * 7}), "query", "7"),
    "rank pattern of a foreign layer": (
        lambda folder: with_pattern(folder, {"../../etc/passwd.lora_E": [True]}),
        "../../etc/passwd",
        "lacks",
    ),
    "truncated config": (lambda folder: truncate(folder / "adapter_config.json"), "adapter_config.json", ""),
}


UNREADABLE = ("truncated state", "empty state", "state that is no state")
CASES = [("middle", damage) for damage in DAMAGES] + [
    ("end", damage)
    for damage in DAMAGES
    if damage in UNREADABLE
    or "state" not in damage
    or "link" in damage  # nothing of a finished run's state is needed but that it is one
]


@pytest.mark.parametrize(("which", "damage"), CASES)
def test_refused_and_nothing_changed(which, damage, tmp_path):
    spoil, *pieces = DAMAGES[damage]
    folder = tmp_path / "checkpoint"
    shutil.copytree(getattr(checkpoints(), which), folder)
    spoil(folder)

    model = new()
    optimizer = adamw(model)
    train(model, optimizer, 0, 5)
    allocator, state = model.base_model.rankallocator, model.base_model.rankallocator.state_dict()
    weights, objects, expected = trained_weights(model), list(model.parameters()), logits(model)

    with one_line(ValueError, *pieces):
        model.load_adapter(folder, "default", is_trainable=True)

    now = trained_weights(model)
    assert now.keys() == weights.keys()
    assert all(torch.equal(now[name], weights[name]) for name in weights)
    assert all(old is new for old, new in zip(objects, model.parameters(), strict=True))
    assert torch.equal(logits(model), expected)
    assert model.base_model.rankallocator is allocator
    assert same_state(allocator.state_dict(), state)
    assert model.peft_config["default"].rank_pattern is None
    train(model, optimizer, 5, END)  # and the run goes on
    assert sum(model.base_model.rankallocator.ranks().values()) == 2 * len(adapter_layers(model))


def test_an_adapter_that_lacks_layers_does_not_pass_silently(tmp_path):
    folder = tmp_path / "checkpoint"
    shutil.copytree(checkpoints().middle, folder)
    change(folder / ADAPTER, without_query)
    model = new()
    with one_line(ValueError, "query"):
        model.load_adapter(folder, "default", is_trainable=True)


def test_a_folder_that_is_not_there(tmp_path):
    model = new()
    weights = trained_weights(model)
    with pytest.raises((ValueError, OSError)):
        model.load_adapter(tmp_path / "nowhere", "default", is_trainable=True)
    now = trained_weights(model)
    assert all(torch.equal(now[name], weights[name]) for name in weights)


def test_links_within_the_folder_and_the_hubs_cache_are_fine(tmp_path):
    snapshot = tmp_path / "models--someone--adapter" / "snapshots" / "0123abc"
    blobs = snapshot.parents[1] / "blobs"
    shutil.copytree(checkpoints().end, snapshot)
    blobs.mkdir()
    for path in list(snapshot.iterdir()):
        shutil.move(path, blobs / path.name)
        path.symlink_to(Path("../../blobs") / path.name)
    within = tmp_path / "within"
    shutil.copytree(checkpoints().end, within)
    shutil.move(within / ADAPTER, within / "other")
    (within / ADAPTER).symlink_to("other")
    for folder in (snapshot, within):
        model = new()
        model.load_adapter(folder, "default", is_trainable=True)
        assert model.base_model.rankallocator.ranks() == checkpoints().ranks


@pytest.mark.parametrize("damage", ["pickle instead of the adapter", "NaN", "link out for the adapter"])
def test_a_second_adapter_is_judged_as_strictly(damage, tmp_path):
    spoil, *pieces = DAMAGES[damage]
    shutil.copytree(checkpoints().end, tmp_path / "checkpoint")
    spoil(tmp_path / "checkpoint")
    model = new()
    with one_line(ValueError, *pieces):
        model.load_adapter(tmp_path / "checkpoint", "second")
    assert list(model.peft_config) == ["default"]
