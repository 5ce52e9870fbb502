"""The Triton importance kernels against the float64 history; what must not move stays bit for bit."""

import pytest
import torch

from adalora_fast.ops.dispatch import tables
from adalora_fast.ops.dispatch.launch import observed
from adalora_fast.ops.importance import ScoreRule, reference
from tests.helpers.kernels import DEVICE, ON_DEVICE, counted, needs_triton, poisoned
from tests.helpers.scoring import SCORES, SMOOTHINGS, make_buffers, make_parameters, triplet_scores
from tests.helpers.tolerances import assert_accurate

pytestmark = [needs_triton, *ON_DEVICE, pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")]
kernels = pytest.importorskip("adalora_fast.ops.importance.triton", reason="triton is not installed")

SHAPES = ((5, 3, 7), (6, 0, 3), (21, 9, 2))  # (in, r, out)
BETAS = (0.85, 0.7)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Several chunks, slices and blocks of a small model; each test's tables are its own."""
    monkeypatch.setattr(kernels, "CHUNK", 64)
    monkeypatch.setattr(kernels, "BLOCK", 16)
    monkeypatch.setattr(kernels, "COUNTS", 4)
    caches = (kernels._chunks, kernels._slices, tables.table)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


def buffers(parameters, score, smoothing):
    return [buffer.to(DEVICE) for buffer in make_buffers(parameters, score, smoothing, torch.float32)]


def draw(parameters, seed, dtype=None):
    generator = torch.Generator().manual_seed(seed)
    noise = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in parameters]
    return [n.to(p.device, dtype or p.dtype) for n, p in zip(noise, parameters, strict=True)]


def make(shapes=SHAPES, dtype=torch.float32, seed=0):
    return [parameter.to(DEVICE) for parameter in make_parameters(shapes, dtype, seed)]


def run(score, smoothing, steps=3, dtype=torch.float32, grad_dtype=None, missing=()):
    """(scores, histories, updates) after ``steps`` steps."""
    parameters = make(SHAPES, dtype)
    statistics, updates = buffers(parameters, score, smoothing)
    histories = [[] for _ in parameters]
    for step in range(steps):
        grads = []
        for number, noise in enumerate(draw(parameters, step, torch.float64)):
            parameters[number].add_((0.1 * noise).to(dtype))
            grad = None if (step, number) in missing else (noise.flip(0) + 0.3).to(grad_dtype or dtype)
            grads.append(grad)
            histories[number].append(
                [t if t is None else t.cpu().clone() for t in (parameters[number], grad)]
            )
        kernels.update_(parameters, grads, statistics, updates, ScoreRule(score, smoothing, *BETAS))
    return kernels.triplet_scores(parameters, statistics, ScoreRule(score, smoothing)), histories, updates


@pytest.mark.parametrize("smoothing", SMOOTHINGS)
@pytest.mark.parametrize("score", SCORES)
def test_against_the_history(score, smoothing):
    missing = {(0, 0), (2, 1), (1, 8)} | {(step, 6) for step in range(3)}
    with poisoned(), counted() as names:
        got, histories, updates = run(score, smoothing, missing=missing)
    assert_accurate(got.cpu(), triplet_scores(histories, score, smoothing, *BETAS), torch.float32, factor=10)
    assert names == ["flag_kernel", "update_kernel"] * 3 + ["triplet_kernel"]
    assert updates.tolist() == [sum(g is not None for _, g in history) for history in histories]


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("dtypes", [("float16", "bfloat16"), ("bfloat16", "float32")], ids=str)
def test_narrower_parameters_and_gradients(score, dtypes):
    dtype, grad_dtype = (getattr(torch, name) for name in dtypes)
    got, histories, _ = run(score, "ema", 2, dtype, grad_dtype)
    assert_accurate(got.cpu(), triplet_scores(histories, score, "ema", *BETAS), torch.float32, factor=10)


def test_mixed_types_in_one_model():
    parameters = make(((6, 2, 4),) * 3)
    types = [torch.float32, torch.bfloat16, torch.float16] * 3
    parameters = [p.to(dtype) for p, dtype in zip(parameters, types, strict=True)]
    grads = [g.to(dtype) for g, dtype in zip(draw(parameters, 1), types[1:] + types[:1], strict=True)]
    statistics, updates = buffers(parameters, "sensitivity", "none")
    kernels.update_(parameters, grads, statistics, updates, ScoreRule("sensitivity", "none", *BETAS))
    history = [[(p.cpu(), g.cpu())] for p, g in zip(parameters, grads, strict=True)]
    got = kernels.triplet_scores(parameters, statistics, ScoreRule("sensitivity", "none")).cpu()
    assert_accurate(got, triplet_scores(history, "sensitivity", "none", *BETAS), torch.float32)


@pytest.mark.parametrize("beta1", [0.01, 0.5, 0.999])
def test_shares_of_gsnr_over_many_counts(beta1):
    """The count is what the update before left; its power of β1 is taken in float64."""
    parameters = make(((3, 1, 2),))
    results = []
    for functions in (kernels, reference):
        statistics, updates = buffers(parameters, "gsnr", "none")
        for start in (0, 6, 1000, 2**20):
            updates.fill_(start)
            functions.update_(
                parameters,
                draw(parameters, start),
                statistics,
                updates,
                ScoreRule("gsnr", "none", beta1, 0.5),
            )
            assert (updates == start + 1).all()
        results.append(statistics)
    assert_accurate(results[0].cpu(), results[1].double().cpu(), torch.float32)


@pytest.mark.parametrize("score", SCORES)
def test_one_bad_entry_anywhere_changes_nothing(score):
    parameters = make(((5, 2, 3), (40, 2, 2)))  # the last entries lie in a second chunk
    statistics, updates = buffers(parameters, score, "ema")
    kernels.update_(parameters, draw(parameters, 0), statistics, updates, ScoreRule(score, "ema", *BETAS))
    before = statistics.view(torch.int32).clone(), updates.clone()
    places = [1, 4, 4] if score == "magnitude" else [0, 3, 5]
    for place, value in zip(places, (float("inf"), float("-inf"), float("nan")), strict=True):
        grads = draw(parameters, 1)
        grads[place].view(-1)[-1] = value
        with poisoned():
            kernels.update_(parameters, grads, statistics, updates, ScoreRule(score, "ema", *BETAS))
        assert torch.equal(statistics.view(torch.int32), before[0]), "an overflow changed a statistic"
        assert torch.equal(updates, before[1]), "an overflow was counted as an update"


@pytest.mark.parametrize("score", SCORES)
def test_a_step_that_is_not_active_changes_nothing(score):
    parameters = make(((5, 2, 3), (40, 2, 2)))
    statistics, updates = buffers(parameters, score, "ema")
    for number, active in enumerate((True, False, True)):
        before = statistics.clone(), updates.clone()
        grads, mark = draw(parameters, number), torch.tensor(active, device=DEVICE)
        with poisoned():
            kernels.update_(parameters, grads, statistics, updates, ScoreRule(score, "ema", *BETAS), mark)
        assert torch.equal(updates, before[1] + active)
        assert torch.equal(statistics, before[0]) != active


@pytest.mark.parametrize(("score", "weight", "gradient"), [
    ("sensitivity", 1e20, 1e20), ("sensitivity", 1e20, 0.9e18), ("movement", 1e20, -1e20),
    ("fisher", 1.0, 1e19), ("gsnr", 1.0, 5e18), ("sensitivity", float("nan"), 1.0),
    ("movement", float("inf"), None),
    ("magnitude", 1e38, 1.0), ("magnitude", 1e38, None), ("fisher", 1.0, 9e18), ("gsnr", 1.0, 4e18),
    ("sensitivity", 1e20, 0.8e18), ("magnitude", 8e37, 1e38),
], ids=str)  # fmt: skip
def test_the_room_above_a_signal_is_the_references(score, weight, gradient):
    """Just above and just below 4 |I| (gsnr: 16 g²) reaching infinity, and weights without a gradient."""
    taken = []
    for functions in (kernels, reference):
        parameters = make(((5, 2, 3),))
        statistics, updates = buffers(parameters, score, "ema")
        grads = draw(parameters, 1)
        parameters[1][1, 0] = weight
        if gradient is None:
            grads[1] = None
        else:
            grads[1][1, 0] = gradient
        functions.update_(parameters, grads, statistics, updates, ScoreRule(score, "ema", *BETAS))
        taken.append(updates.tolist())
    assert taken[0] == taken[1]


def test_a_missing_gradient_leaves_its_statistics_bitwise():
    for score in SCORES:
        parameters = make(((5, 3, 7), (5, 3, 7)))
        statistics, updates = buffers(parameters, score, "ema_uncertainty")
        kernels.update_(
            parameters, draw(parameters, 0), statistics, updates, ScoreRule(score, "ema_uncertainty", *BETAS)
        )
        before = kernels.triplet_scores(parameters, statistics, ScoreRule(score, "ema_uncertainty"))
        grads = [None] * 3 + draw(parameters, 1)[3:]
        kernels.update_(
            [p * 2 for p in parameters],
            grads,
            statistics,
            updates,
            ScoreRule(score, "ema_uncertainty", *BETAS),
        )
        after = kernels.triplet_scores(parameters, statistics, ScoreRule(score, "ema_uncertainty"))
        assert torch.equal(before[:3], after[:3]) and not torch.equal(before[3:], after[3:])
        assert updates.tolist() == [1] * 3 + [2] * 3
        kernels.update_(
            parameters, [None] * 6, statistics, updates, ScoreRule(score, "ema_uncertainty", *BETAS)
        )
        assert torch.equal(
            after, kernels.triplet_scores(parameters, statistics, ScoreRule(score, "ema_uncertainty"))
        )
        assert updates.tolist() == [1] * 3 + [2] * 3


@pytest.mark.parametrize("restride", [
    lambda t: t.t().contiguous().t(),
    lambda t: torch.stack([t, torch.full_like(t, float("nan"))], dim=-1)[..., 0],
], ids=["transposed", "strided"])  # fmt: skip
def test_strided_parameters_and_gradients(restride):
    results = []
    for change in (lambda t: t, restride):
        parameters = [change(p) for p in make()]
        statistics, updates = buffers(parameters, "sensitivity", "ema")
        grads = [change(p * 2) for p in parameters]
        kernels.update_(parameters, grads, statistics, updates, ScoreRule("sensitivity", "ema", *BETAS))
        results.append(statistics)
    assert torch.equal(*results)


def test_tables_follow_the_addresses_and_nothing_else():
    """Gradients that move, a parameter that is replaced, values that change in place."""
    parameters = make(((4, 2, 3),))
    statistics, updates = buffers(parameters, "fisher", "none")
    grads = draw(parameters, 0)

    def check(grads):
        kernels.update_(parameters, grads, statistics, updates, ScoreRule("fisher", "none", *BETAS))
        views = {i: group.view(statistics[0]) for group in reference.layout_of(parameters, "fisher").groups
                 for i in group.members}  # fmt: skip
        assert all(torch.equal(views[i][0], grad.square()) for i, grad in enumerate(grads))

    check(grads)
    misses = tables.table.cache_info().misses
    for grad in grads:
        grad.mul_(-3)
    check(grads)
    assert tables.table.cache_info().misses == misses, "nothing moved, yet a table was made"
    check([grad.clone() for grad in grads])
    assert tables.table.cache_info().misses == misses + 1


@pytest.mark.parametrize("aligned", [True, False])
def test_alignment_changes_nothing(aligned):
    """Addresses that are not multiples of 16 bytes are read entry by entry."""
    parameters = make(((8, 4, 4),))
    if not aligned:
        parameters = [torch.cat([p.flatten()[:1], p.flatten()])[1:].view(p.shape) for p in parameters]
    seen = []
    statistics, updates = buffers(parameters, "fisher", "none")
    with observed(lambda kernel, grid, arguments, meta: seen.append(meta["ALIGNED"])):
        kernels.update_(parameters, parameters, statistics, updates, ScoreRule("fisher", "none", *BETAS))
    assert seen == [aligned] * 2


def test_float64_goes_to_the_reference_and_says_so():
    tables.say_once.cache_clear()
    parameters = make_parameters(SHAPES)
    statistics, updates = make_buffers(parameters, "fisher", "ema")
    arguments = updates, ScoreRule("fisher", "ema", *BETAS)
    with counted() as names:
        with pytest.warns(
            UserWarning, match=r"importance runs in plain PyTorch.*statistics are torch.float64"
        ):
            kernels.update_(parameters, parameters, statistics, *arguments)
        with pytest.warns(UserWarning, match=r"a parameter or gradient is torch.float64"):
            kernels.update_(parameters, parameters, statistics.float(), *arguments)
    assert not names and (updates == 2).all()


def test_ranks_of_zero_only():
    parameters = make(((5, 0, 4), (3, 0, 3)))
    statistics, updates = buffers(parameters, "fisher", "ema")
    kernels.update_(parameters, parameters, statistics, updates, ScoreRule("fisher", "ema", *BETAS))
    assert kernels.triplet_scores(parameters, statistics, ScoreRule("fisher", "ema")).shape == (0,)
    assert (updates == 1).all()


def test_many_layers_are_still_two_launches_and_one(monkeypatch):
    monkeypatch.setattr(kernels, "FLAGS", 8)  # programs that look for bad signals take several chunks each
    parameters = make(((3, 2, 2),) * 20)
    statistics, updates = buffers(parameters, "sensitivity", "none")
    with poisoned(), counted() as names:
        kernels.update_(parameters, parameters, statistics, updates, ScoreRule("sensitivity", "none", *BETAS))
        got = kernels.triplet_scores(parameters, statistics, ScoreRule("sensitivity", "none"))
    assert names == ["flag_kernel", "update_kernel", "triplet_kernel"]
    history = [[(p.cpu(), p.cpu())] for p in parameters]
    assert_accurate(got.cpu(), triplet_scores(history, "sensitivity", "none", *BETAS), torch.float32)
    before = statistics.clone()
    bad = [p.clone() for p in parameters]
    bad[-1][-1, -1] = float("nan")
    kernels.update_(bad, bad, statistics, updates, ScoreRule("sensitivity", "none", *BETAS))
    assert torch.equal(before, statistics) and (updates == 1).all()


@pytest.mark.parametrize(("score", "smoothing"), [("cubic", "none"), ("fisher", "median")])
def test_a_name_without_a_formula_does_not_compile(score, smoothing, monkeypatch):
    """Should what triton.py declares and what kernels.py computes ever differ, nothing is computed."""
    assert kernels.limit(score, smoothing) is not None
    monkeypatch.setitem(reference.SIGNALS, "cubic", lambda w, g: w)
    monkeypatch.setitem(reference.SMOOTHINGS, "median", ("last",))
    parameters = make(((5, 2, 3),))
    statistics, updates = buffers(parameters, score, smoothing)
    with pytest.raises(Exception, match="has no formula here"):
        kernels.update_(parameters, parameters, statistics, updates, ScoreRule(score, smoothing, *BETAS))
    assert (statistics == 0).all() and (updates == 0).all()


def test_a_smoothing_without_a_formula_is_not_scored(monkeypatch):
    monkeypatch.setitem(reference.SMOOTHINGS, "median", ("last",))
    parameters = make(((5, 2, 3),))
    statistics, _ = buffers(parameters, "fisher", "median")
    with pytest.raises(Exception, match="this smoothing has no formula here"):
        kernels.triplet_scores(parameters, statistics, ScoreRule("fisher", "median"))
