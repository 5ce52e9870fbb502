"""Lotteries that are drawn again, and ranks that are dealt: they control for what they claim."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from adalora_fast import AdaLoraLinear, RankAllocator
from adalora_fast.allocator.scores import Score
from adalora_fast.experiments.methods.nulls import dealt, lottery, read_ranks, score_of, shuffled
from adalora_fast.experiments.run.masks import MaskLog, described
from adalora_fast.experiments.settings.recipes import Recipe
from adalora_fast.experiments.settings.settings import RunSettings

INIT_R, MATRICES, STEPS = 16, 12, 41
SETTINGS = RunSettings(task="mrpc", model="minilm", score="random", recipe=Recipe(deltaT=5))


def run(score, seed=0, target_r=8, steps=STEPS, resume_at=None):
    """(allocator, churn of every mask) of a run that gradients play no part in."""
    torch.manual_seed(seed)
    model = torch.nn.ModuleList(
        AdaLoraLinear.from_linear(torch.nn.Linear(6, 5), r=INIT_R, alpha=6) for _ in range(MATRICES)
    )
    schedule = {"target_r": target_r, "tinit": 1, "tfinal": 2, "deltaT": 5, "total_step": steps}
    allocator, changes, seen = RankAllocator(model, score=score, **schedule), [], 0
    torch.manual_seed(seed)
    for t in range(steps):
        if t == resume_at:
            state, allocator = allocator.state_dict(), RankAllocator(model, score=score, **schedule)
            allocator.load_state_dict(state)
            seen = 0
        for parameter in allocator.parameters():
            parameter.grad = torch.ones_like(parameter)
        allocator.step(t)
        if allocator.mask_number > seen:
            seen = allocator.mask_number
            changes.append(allocator.last_mask_change)
    return allocator, changes


def lottery_of(redraw):
    settings = replace(SETTINGS, recipe=replace(SETTINGS.recipe, redraw=redraw))
    return score_of(settings, None, None)


def test_without_redraw_it_is_the_registered_lottery():
    assert lottery_of(0.0) == "random"
    assert all(change.revived == 0 for change in run("random")[1])


@pytest.mark.parametrize("redraw", [0.1, 0.3, 1.0])
def test_the_share_that_is_drawn_again_between_two_masks(redraw):
    """Of numbers in [0, 1), over `redraw` of which the next mask decides anew: counted by hand."""
    function, state, shape = lottery(1 - (1 - redraw) ** (1 / 5)), {}, (64, 64, 1)
    torch.manual_seed(3)
    before = function(torch.zeros(shape), torch.zeros(shape), state).clone()
    for _ in range(5):
        after = function(torch.zeros(shape), torch.zeros(shape), state).clone()
    share = float((before != after).double().mean())
    # 4,096 draws: five standard deviations
    assert abs(share - redraw) <= 5 * (redraw * (1 - redraw) / before.numel()) ** 0.5
    assert float(after.min()) >= 0 and float(after.max()) < 1


def test_more_redraw_is_more_churn():
    churn = {
        redraw: sum(change.churn for change in run(lottery_of(redraw))[1][2:]) for redraw in (0.1, 0.4, 1.0)
    }
    assert 0 < churn[0.1] < churn[0.4] < churn[1.0]


def test_a_redrawn_lottery_goes_on_after_a_checkpoint():
    whole, again = run(lottery_of(0.4))[0], run(lottery_of(0.4), resume_at=22)[0]
    assert whole.rank_pattern() == again.rank_pattern()


def test_dealt_ranks_are_the_final_ones_and_nothing_returns():
    ranks = [0, 16, 3, 8, 8, 8, 1, 15, 9, 8, 12, 8]
    assert sum(ranks) == 8 * MATRICES
    score = Score(name="dealt", smoothing="none", source="", function=dealt(ranks))
    allocator, changes = run(score)
    assert list(allocator.ranks().values()) == ranks
    assert all(kept == [i < rank for i in range(INIT_R)]
               for kept, rank in zip(allocator.rank_pattern().values(), ranks))  # fmt: skip
    assert len(changes) > 4 and all(change.revived == 0 for change in changes)


def test_too_few_ranks():
    score = Score(name="dealt", smoothing="none", source="", function=dealt([8] * 5))
    with pytest.raises(ValueError, match="5 ranks are dealt to 12 matrices"):
        run(score)


def test_shuffled_keeps_the_number_of_parameters():
    ranks = {f"m{i}": rank for i, rank in enumerate([0, 16, 3, 8, 8, 8, 1, 15, 9, 8, 12, 8])}
    sizes = {name: 100 if i % 3 else 250 for i, name in enumerate(ranks)}
    found = {tuple(shuffled(ranks, sizes, seed).values()) for seed in range(20)}
    assert len(found) > 15, "no lot was drawn"
    for of_seed in found:
        for size in (100, 250):
            names = [i for i, name in enumerate(ranks) if sizes[name] == size]
            assert sorted(of_seed[i] for i in names) == sorted(list(ranks.values())[i] for i in names)
    assert shuffled(ranks, sizes, 4) == shuffled(ranks, sizes, 4)


class TestReadRanks:
    recipe = Recipe(init_r=16, target_r=8, ranks_from="fisher")
    settings = RunSettings(task="mrpc", model="minilm", score="dealt", seed=3, recipe=recipe)

    def write(self, tmp_path, ranks, init_r=16):
        folder = tmp_path / "fisher-seed3"
        folder.mkdir()
        (folder / "ranks.json").write_text(json.dumps({"init_r": init_r, "ranks": ranks}))

    def test_those_of_the_run_beside_it(self, tmp_path):
        self.write(tmp_path, {"a": 10, "b": 6})
        assert read_ranks(self.settings, tmp_path / "dealt-found-seed3") == {"a": 10, "b": 6}
        assert read_ranks(replace(self.settings, score="fisher"), tmp_path / "x") is None

    def test_one_that_is_not_finished(self, tmp_path):
        with pytest.raises(ValueError, match="fisher-seed3, which is not finished; run that first"):
            read_ranks(self.settings, tmp_path / "dealt-seed3")

    @pytest.mark.parametrize(("ranks", "init_r"), [({"a": 10, "b": 5}, 16), ({"a": 10, "b": 6}, 12)])
    def test_one_of_another_budget(self, tmp_path, ranks, init_r):
        self.write(tmp_path, ranks, init_r)
        with pytest.raises(ValueError, match="deal those of a run with its settings"):
            read_ranks(self.settings, tmp_path / "dealt-seed3")

    def test_none_is_named(self, tmp_path):
        settings = replace(self.settings, recipe=replace(self.recipe, ranks_from=None))
        with pytest.raises(ValueError, match="name its arm, for instance ranks_from=sensitivity"):
            read_ranks(settings, tmp_path / "dealt-seed3")


class TestMaskLog:
    def test_a_line_for_every_mask(self):
        torch.manual_seed(0)
        model = torch.nn.ModuleList(
            AdaLoraLinear.from_linear(torch.nn.Linear(6, 5), r=4, alpha=4) for _ in range(3)
        )
        allocator = RankAllocator(model, target_r=2, tinit=1, tfinal=2, deltaT=2, total_step=12)
        log, lines = MaskLog(allocator, replace(SETTINGS, score="sensitivity", record_scores=True)), []
        for t in range(12):
            for parameter in allocator.parameters():
                parameter.grad = torch.randn_like(parameter)
                parameter.data.add_(0.1 * parameter.grad)
            allocator.step(t)
            if log.is_due:
                lines.append(log.line())
            assert not log.is_due
        assert [line["mask"]["kept"] for line in lines] == [
            allocator.schedule.budget(t) for t in (2, 4, 6, 8, 10)
        ]
        for line in lines:
            assert sum(line["terms"]["share"].values()) == pytest.approx(1)
            assert sum(line["triplets"]["kept"]) == line["mask"]["kept"]
            assert len(line["triplets"]["score"]) == len(line["triplets"]["lambda"]) == 12
        json.dumps(lines)

    def test_a_null_has_no_terms(self):
        allocator = SimpleNamespace(mask_number=0, keep_terms=None)
        MaskLog(allocator, SETTINGS)
        assert allocator.keep_terms is False

    def test_what_scores_are_made_of(self):
        terms = {
            "lora_A": torch.tensor([1.0, 1.0, 1.0, 1.0]),
            "lora_E": torch.tensor([4.0, 3.0, 2.0, 1.0]),
            "lora_B": torch.tensor([0.0, 0.0, 0.0, 9.0]),
        }
        scores = sum(terms.values())  # 5, 4, 3, 11
        found = described(terms, scores, torch.tensor([1, 0, 0, 1]).bool())
        assert found["share"] == pytest.approx({"lora_A": 4 / 23, "lora_E": 10 / 23, "lora_B": 9 / 23})
        assert found["same_mask"] == 0.5 and found["spearman"]["lora_A"] is None
        assert found["spearman"]["lora_E"] == pytest.approx(-0.2)
        assert described(terms, scores / 0, scores > 0) is None
