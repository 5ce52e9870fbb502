"""States that do not fit are refused as a whole, with a reason, and files are written whole or not at all."""

import copy
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from adalora_fast.allocator import state as allocator_state
from adalora_fast.allocator.state import FILE_NAME, read_state, write_state
from tests.helpers.small_model import (
    kept,
    make_allocator,
    make_model,
    make_optimizer,
    same,
    snapshot,
    train,
)


def trained(steps=5, **options):
    model = make_model(**{key: options.pop(key) for key in ("ranks", "dtype") if key in options})
    allocator = make_allocator(model, **options)
    train(model, make_optimizer(model), allocator, range(steps))
    return model, allocator


@pytest.fixture
def run():
    return trained()


@pytest.fixture(scope="module")
def state():
    return trained(4)[1].state_dict()


def refused(run, state, said):
    model, allocator = run
    before = snapshot(model, allocator)
    with pytest.raises(ValueError, match=said) as error:
        allocator.load_state_dict(state)
    assert "\n" not in str(error.value)
    assert same(before, snapshot(model, allocator)), "a refused state changed something"


def changed(state, config=(), tensors=(), drop=()):
    state = copy.deepcopy(state)
    state["config"].update(dict(config))
    state["tensors"].update(dict(tensors))
    for key in drop:
        state["config"].pop(key, None)
        state["tensors"].pop(key, None)
    return state


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"score": "fisher"}, "saved with score='fisher', this allocator has 'sensitivity'"),
        ({"smoothing": "ema"}, "saved with smoothing='ema', this allocator has 'ema_uncertainty'"),
        ({"score_gradient": "task"}, "saved with score_gradient='task', this allocator has 'total'"),
        ({"triplet": "lambda"}, "saved with triplet='lambda', this allocator has 'full'"),
        ({"hysteresis": 0.5}, "saved with hysteresis=0.5, this allocator has 0.0"),
        ({"remember": True}, "saved with remember=True, this allocator has False"),
        (
            {"target_total_rank": 6},
            "target budget of 6 triplets, this allocator has 5; use the same target_r",
        ),
        ({"ranks": (4, 3, 4)}, "rank 4, the model has 5"),
        ({"ranks": (5, 2, 5)}, "rank 5, the model has 4"),
    ],
    ids=str,
)
@pytest.mark.parametrize("steps", [4, 12])
def test_the_state_of_another_run(run, options, said, steps):
    refused(run, trained(steps, **options)[1].state_dict(), said)


def test_the_state_of_another_model(run):
    model = torch.nn.ModuleDict({"net": make_model()})
    other = make_allocator(model)
    refused(run, other.state_dict(), r"belongs to other layers \(first difference: net.0\)")
    smaller = torch.nn.Sequential(*list(make_model())[:3])
    refused(run, make_allocator(smaller).state_dict(), r"other layers \(first difference: 4\)")


def test_layers_in_another_order(run, state):
    layers = dict(reversed(state["config"]["layers"].items()))
    refused(run, changed(state, {"layers": layers}), "their order")


@pytest.mark.parametrize("options", [{}, {"remember": True}, {"hysteresis": 0.5}, {"triplet": "lambda"}])
def test_a_state_of_the_first_format_is_one_without_stable_allocation(run, state, options):
    old = changed(state, {"format": 1}, drop=("weights", "triplet", "hysteresis", "remember"))
    model = make_model()
    allocator = make_allocator(model, **options)
    if options:
        with pytest.raises(ValueError, match=f"saved with {next(iter(options))}="):
            allocator.load_state_dict(old)
    else:
        allocator.load_state_dict(old)
        assert allocator.t == 4


def test_a_state_of_scores_before_the_step(run, state):
    said = "saved with weights='before', this allocator has 'after'"
    refused(run, changed(state, {"weights": "before"}), said)


def test_remembered_lambdas_belong_to_the_state():
    _, allocator = trained(6, remember=True, score="movement", smoothing="none", deltaT=1)
    state = allocator.state_dict()
    assert state["tensors"]["remembered"].any()
    other = make_allocator(make_model(), remember=True, score="movement", smoothing="none", deltaT=1)
    for spoilt in (
        changed(state, drop=("remembered",)),
        changed(state, tensors={"remembered": state["tensors"]["remembered"][:3]}),
        changed(state, tensors={"remembered": state["tensors"]["remembered"] / 0}),
    ):
        with pytest.raises(ValueError, match="remembered"):
            other.load_state_dict(spoilt)
    other.load_state_dict(state)
    assert torch.equal(other._remembered, allocator._remembered)


@pytest.mark.parametrize(
    "missing", ["format", "t", "is_final", "is_over", "score", "schedule", "layers", "update_count"]
)
def test_a_config_entry_is_missing(run, state, missing):
    refused(run, changed(state, drop=[missing]), missing)


@pytest.mark.parametrize("missing", ["mask", "updates", "ema/0.lora_A", "uncertainty/4.lora_B"])
def test_a_tensor_is_missing(run, state, missing):
    refused(run, changed(state, drop=[missing]), missing)


NAN = torch.full((4, 6), float("nan"))
DAMAGED = {
    "format": ({"format": 99}, {}, "format 99, this version reads"),
    "format none": ({"format": None}, {}, "format None"),
    "t text": ({"t": "five"}, {}, "five"),
    "t negative": ({"t": -3}, {}, "-3"),
    "t none": ({"t": None}, {}, "incomplete|damaged"),
    "schedule none": ({"schedule": None}, {}, "incomplete|damaged"),
    "schedule empty": ({"schedule": {}}, {}, "target"),
    "layers list": ({"layers": ["0", "2", "4"]}, {}, "incomplete|damaged|layers"),
    "layers ranks": ({"layers": {"0": "4", "2": 3, "4": 5}}, {}, "incomplete|damaged|rank"),
    "mask float": ({}, {"mask": torch.ones(12)}, "mask of 12 torch.float32 for 12 triplets"),
    "mask short": ({}, {"mask": torch.ones(11, dtype=torch.bool)}, "mask of 11"),
    "mask 2-D": ({}, {"mask": torch.ones(12, 1, dtype=torch.bool)}, "mask"),
    "updates short": (
        {},
        {"updates": torch.zeros(8, dtype=torch.int64)},
        "counts 8 parameters, the model has 9",
    ),
    "updates float": ({}, {"updates": torch.zeros(9)}, "updates"),
    "updates negative": ({}, {"updates": torch.full((9,), -1)}, "updates"),
    "statistic shape": ({}, {"ema/0.lora_A": torch.zeros(3, 6)}, r"lacks ema/0.lora_A \(4, 6\)"),
    "statistic nan": ({}, {"ema/0.lora_A": NAN}, "ema/0.lora_A"),
    "statistic inf": ({}, {"uncertainty/0.lora_A": NAN.nan_to_num(float("inf"))}, "uncertainty/0.lora_A"),
    "statistic integer": ({}, {"ema/0.lora_A": torch.zeros(4, 6, dtype=torch.int64)}, "ema/0.lora_A"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged(run, state, name):
    config, tensors, said = DAMAGED[name]
    refused(run, changed(state, config, tensors), said)


@pytest.mark.parametrize(
    "thing", [{}, {"config": {}}, {"config": {}, "tensors": {}}, {"state": 1}, None, [1], 3], ids=repr
)
def test_not_a_state(run, thing):
    refused(run, thing, "incomplete|damaged|not an allocator's")


def test_a_mask_that_keeps_another_number_of_triplets(run):
    final = trained(12)[1].state_dict()
    refused(run, changed(final, tensors={"mask": torch.ones(12, dtype=torch.bool)}), "mask|budget")


def test_a_state_of_the_final_phase_lacks_its_counts(run):
    final = trained(12)[1].state_dict()
    refused(
        run, changed(final, tensors={"updates": torch.zeros(2, dtype=torch.int64)}), "counts 2 parameters"
    )


def test_the_registered_scores_state_stays_too(run, state):
    """Entries that no score asked for are not an error, but are not kept for ever either."""
    _, allocator = run
    allocator.load_state_dict(changed(state, tensors={"user/0.mean": torch.zeros(1, 4, 6)}))
    allocator.load_state_dict(state)
    assert not any(name.startswith("user/") for name in allocator.state_dict()["tensors"])


@pytest.fixture(scope="module")
def reused():
    return trained(5)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_entry_of_any_kind_of_rubbish(data, reused, state):
    """Whatever one entry of the configuration becomes: loaded, or refused with ValueError; never half."""
    model, allocator = reused
    key = data.draw(st.sampled_from(sorted(state["config"])))
    numbers = st.lists(st.integers(), max_size=3)
    rubbish = st.one_of(st.none(), st.booleans(), st.integers(), st.text(max_size=3), numbers)
    value = data.draw(st.one_of(rubbish, st.dictionaries(st.text(max_size=3), rubbish, max_size=2)))
    before = snapshot(model, allocator)
    try:
        allocator.load_state_dict(changed(state, {key: value}))
    except ValueError:
        assert same(before, snapshot(model, allocator))


def test_no_file_is_no_state(tmp_path):
    assert read_state(tmp_path) is None
    assert read_state(tmp_path / "missing") is None


def test_round_trip(run, tmp_path):
    _, allocator = run
    path = write_state(allocator, tmp_path)
    assert path == tmp_path / FILE_NAME and [p.name for p in tmp_path.iterdir()] == [FILE_NAME]
    read, held = read_state(tmp_path), allocator.state_dict()
    assert read["config"] == held["config"] and read["tensors"].keys() == held["tensors"].keys()
    assert all(torch.equal(read["tensors"][name], held["tensors"][name]) for name in held["tensors"])
    assert all(read["tensors"][name].dtype == held["tensors"][name].dtype for name in held["tensors"])
    write_state(allocator, str(tmp_path))
    assert [p.name for p in tmp_path.iterdir()] == [FILE_NAME]


def test_any_truncation_is_noticed(run, tmp_path):
    path = write_state(run[1], tmp_path)
    whole = path.read_bytes()
    for length in (0, 1, 7, 8, 9, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(
            ValueError, match=r"not a readable allocator state .*; restore it or delete it"
        ) as error:
            read_state(tmp_path)
        assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "metadata", [None, {"format": "pt"}, {"adalora_fast": "{"}, {"adalora_fast": ""}], ids=str
)
def test_a_foreign_file(metadata, tmp_path):
    save_file({"weight": torch.zeros(3)}, tmp_path / FILE_NAME, metadata=metadata)
    with pytest.raises(ValueError, match="not a readable allocator state"):
        read_state(tmp_path)


def test_a_file_that_is_json_of_something_else(run, tmp_path):
    for text in ("[]", "3", "null", '"text"', "{}"):
        save_file({"weight": torch.zeros(3)}, tmp_path / FILE_NAME, metadata={"adalora_fast": text})
        try:
            state = read_state(tmp_path)
        except ValueError:
            continue
        refused(run, state, "incomplete|damaged")


def test_text_in_place_of_a_file(tmp_path):
    (tmp_path / FILE_NAME).write_text(json.dumps({"config": {}}))
    with pytest.raises(ValueError, match="not a readable allocator state"):
        read_state(tmp_path)


@pytest.mark.parametrize("step", ["save_file", "replace"])
def test_an_interrupted_write_keeps_the_old_file(run, tmp_path, monkeypatch, step):
    model, allocator = run
    path = write_state(allocator, tmp_path)
    old = path.read_bytes()
    train(model, make_optimizer(model), allocator, range(5, 8))

    def half_written(tensors, target, metadata=None):
        save_file(tensors, target, metadata=metadata)
        with open(target, "r+b") as file:
            file.truncate(50)
        raise OSError("no space left on device")

    def interrupted(*arguments):
        raise KeyboardInterrupt

    if step == "save_file":
        monkeypatch.setattr(allocator_state, "save_file", half_written)
    else:
        monkeypatch.setattr(allocator_state.os, "replace", interrupted)
    with pytest.raises((OSError, KeyboardInterrupt)):
        write_state(allocator, tmp_path)
    assert path.read_bytes() == old and [p.name for p in tmp_path.iterdir()] == [FILE_NAME]


def test_the_file_is_plain_safetensors(run, tmp_path):
    path = write_state(run[1], tmp_path)
    tensors = load_file(path)
    assert tensors["mask"].tolist() == kept(run[1])
    header = path.read_bytes()[8 : 8 + int.from_bytes(path.read_bytes()[:8], "little")]
    config = json.loads(json.loads(header)["__metadata__"]["adalora_fast"])
    assert config["score"] == "sensitivity" and config["schedule"]["total_step"] == 12 and config["t"] == 5


def test_layers_cut_to_their_final_ranks_take_the_final_state(run):
    """A checkpoint of whole layers, loaded after the model was cut to the triplets that were kept."""
    _, finished = trained(12)
    ranks = tuple(finished.ranks().values())
    model = make_model(ranks)
    allocator = make_allocator(model, finished=True)
    state = finished.state_dict()
    if state["config"]["schedule"]["target"] == allocator.schedule.target:
        allocator.load_state_dict(state)
        assert all(kept(allocator)) and tuple(allocator.ranks().values()) == ranks
