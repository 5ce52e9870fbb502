"""The callback's figures: reporters see them, what ``evaluate()`` and ``train()`` return does not change."""

import warnings
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerCallback
from transformers.trainer_utils import default_compute_objective

from adalora_fast import AdaLoraCallback
from adalora_fast.integrations.figures import HISTOGRAMS, RANKS, RankHistograms
from tests.helpers.peft_models import no_warning, one_line
from tests.helpers.trainers import STEPS, peft_model, trainer

SCALARS = ("budget", "rank_min", "rank_mean", "rank_max", "orthogonality")


def plain_trainer(folder, callback=None, **arguments):
    """A Trainer that has no AdaLoraCallback, or this one."""
    run = trainer(peft_model(), folder, callback=callback, **arguments)
    if callback is None:
        run.pop_callback(AdaLoraCallback)
    return run


@pytest.fixture(scope="module")
def events(tmp_path_factory):
    """What TensorBoard reads of a run to which the callback was given by ``install``."""
    event_accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="tensorboard is not installed"
    )
    folder = tmp_path_factory.mktemp("events")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TENSORBOARD_LOGGING_DIR", str(folder))
        run = plain_trainer(folder / "run", report_to=["tensorboard"], eval_strategy="steps", eval_steps=12)
        callback = AdaLoraCallback().install(run)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*does not see")
            run.train()
    read = event_accumulator.EventAccumulator(str(folder))
    read.Reload()
    return SimpleNamespace(read=read, run=run, callback=callback)


@pytest.mark.parametrize("name", SCALARS)
def test_tensorboards_file_has_the_scalars(events, name):
    tags = events.read.Tags()["scalars"]
    found = [tag for tag in tags if tag.endswith(f"adalora/{name}")]
    assert len(found) == 1, tags
    logged = {
        entry["step"]: entry[f"adalora/{name}"]
        for entry in events.run.state.log_history
        if f"adalora/{name}" in entry
    }
    written = {event.step: event.value for event in events.read.Scalars(found[0])}
    assert written == pytest.approx(logged) and sorted(written) == [6, 12, 18, 24]


def test_tensorboards_file_has_the_layers_ranks(events):
    found = events.read.Histograms(RANKS)
    assert len(found) <= HISTOGRAMS + 1 and found[-1].step == STEPS
    ranks = events.run.model.base_model.rankallocator.ranks().values()
    assert found[-1].histogram_value.num == len(ranks)
    assert found[-1].histogram_value.sum == sum(ranks)


def test_evaluations_are_as_without_the_callback(events):
    entries = [entry for entry in events.run.state.log_history if "eval_loss" in entry]
    assert entries and not any(key.startswith("adalora") for entry in entries for key in entry)


@pytest.mark.parametrize("installed", [False, True])
def test_the_objective_of_a_search_is_the_evaluations(tmp_path, installed):
    run = plain_trainer(tmp_path, None if installed else AdaLoraCallback(), max_steps=4)
    if installed:
        AdaLoraCallback().install(run)
    summary = run.train().metrics
    found = run.evaluate()
    assert default_compute_objective(dict(found)) == found["eval_loss"]
    assert not [key for key in (*found, *summary) if key.startswith("adalora")]
    assert not [key for key in run.predict(run.eval_dataset).metrics if key.startswith("adalora")]


def test_reporters_that_do_not_see_the_figures_are_named(tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    run = plain_trainer(tmp_path, AdaLoraCallback(), report_to=["tensorboard"], max_steps=2)
    with pytest.warns(UserWarning, match=r"tensorboard.*does not see adalora/\*.*install\(trainer\)"):
        run.train()


class Reporter(TrainerCallback):
    """What a reporter sees."""

    def __init__(self):
        self.seen = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.seen.append(dict(logs))


def test_a_callback_that_is_there_already_is_moved_to_the_front(tmp_path):
    reporter, callback = Reporter(), AdaLoraCallback()
    run = plain_trainer(tmp_path, callback, max_steps=2, logging_steps=1)
    run.callback_handler.callbacks.insert(0, reporter)
    assert callback.install(run) is callback
    assert run.callback_handler.callbacks.count(callback) == 1
    with no_warning():
        run.train()
    assert {f"adalora/{name}" for name in SCALARS} <= reporter.seen[0].keys()


def test_two_callbacks_are_refused(tmp_path):
    run = plain_trainer(tmp_path, AdaLoraCallback())
    with pytest.raises(ValueError, match="another AdaLoraCallback") as error:
        AdaLoraCallback().install(run)
    one_line(error.value)


class Wandb:
    """What the callback uses of W&B."""

    run = object()

    def __init__(self):
        self.logged = []

    @staticmethod
    def Histogram(values):
        return ("histogram", *values)

    def log(self, figures):
        self.logged.append(figures)


def test_wandb_gets_the_layers_ranks():
    wandb = Wandb()
    histograms = RankHistograms([SimpleNamespace(), SimpleNamespace(_wandb=wandb)])
    for step in range(1, 401):
        if histograms.is_due(step):
            histograms.write([1, 3], step, 400)
    assert wandb.logged[0] == {RANKS: ("histogram", 1, 3), "train/global_step": 1}
    assert len(wandb.logged) <= HISTOGRAMS


def test_reading_the_figures_is_left_to_logging(tmp_path, monkeypatch):
    """Ranks wait for the device, so that a step without a log entry must not read them."""
    asked = []
    run = plain_trainer(tmp_path, max_steps=6, logging_steps=3)
    AdaLoraCallback().install(run)
    allocator = run.model.base_model.rankallocator
    ranks = type(allocator).rank_pattern
    monkeypatch.setattr(type(allocator), "rank_pattern", lambda self: asked.append(self.t) or ranks(self))
    run.train()
    assert [t for t in asked if t not in (3, 6)] == []


def test_r_is_logged_beside_the_loss(tmp_path):
    run = plain_trainer(tmp_path, max_steps=2, logging_steps=1, label_smoothing_factor=0.1)
    AdaLoraCallback().install(run)
    run.train()
    values = [entry["adalora/orthogonality"] for entry in run.state.log_history if "loss" in entry]
    assert len(values) == 2 and all(torch.tensor(values) > 0)
