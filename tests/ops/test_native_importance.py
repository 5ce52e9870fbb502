"""The C++ importance kernels against the float64 reference, and what only they could get wrong."""

import pytest
import torch

from adalora_fast.ops import importance_scores, importance_update_
from adalora_fast.ops.importance import ScoreRule, native, reference
from tests.helpers.backends import each_backend
from tests.helpers.scoring import SCORES, SMOOTHINGS, make_buffers, make_parameters
from tests.helpers.tolerances import RelativeRule, assert_accurate

backend_in_use = each_backend("importance", "cpu")
HALVES = (torch.float16, torch.bfloat16)
DTYPES = (torch.float64, torch.float32, *HALVES)
SHAPES = ((63, 3, 100), (63, 3, 100), (1000, 8, 1), (5, 0, 7), (1, 1, 1), (33, 12, 1025), (129, 33, 64))


def draw_steps(parameters, steps, seed=0, missing=()):
    """Per step, the parameters' new values and their gradients."""
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        noise = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in parameters]
        parameters = [(p.double() + 0.1 * n).to(p.dtype) for p, n in zip(parameters, noise, strict=True)]
        grads = [(n.flip(0) + 0.3).to(p.dtype) for p, n in zip(parameters, noise, strict=True)]
        yield parameters, [None if (step, i) in missing else grad for i, grad in enumerate(grads)]


def run(functions, steps, score, smoothing, dtype, betas=(0.85, 0.7)):
    """(scores, statistics, updates) of an implementation after the steps, with statistics of ``dtype``."""
    for number, (parameters, grads) in enumerate(steps):
        if number == 0:
            statistics, updates = make_buffers(parameters, score, smoothing, dtype)
        functions.update_(parameters, grads, statistics, updates, ScoreRule(score, smoothing, *betas))
    return functions.triplet_scores(parameters, statistics, ScoreRule(score, smoothing)), statistics, updates


def widened(steps):
    """The same steps in float64."""
    for parameters, grads in steps:
        yield [p.double() for p in parameters], [None if g is None else g.double() for g in grads]


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_as_accurate_as_the_reference(score, dtype):
    for smoothing in SMOOTHINGS:
        is_as_accurate(score, smoothing, dtype)


def is_as_accurate(score, smoothing, dtype):
    statistics_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    rule = RelativeRule(statistics_dtype)
    for seed in range(3):
        missing = {(1, 0), (2, 4), (0, 7), (3, 7)}
        steps = list(draw_steps(make_parameters(SHAPES, dtype, seed), 4, seed, missing))
        truth = run(reference, widened(steps), score, smoothing, torch.float64)
        plain = run(reference, steps, score, smoothing, statistics_dtype)
        ours = run(native, steps, score, smoothing, statistics_dtype)
        assert torch.equal(ours[2], truth[2])
        rule.add("scores", ours[0], plain[0], truth[0])
        for row, name in enumerate(ScoreRule(score, smoothing).statistics):
            rule.add(name, ours[1][row], plain[1][row], truth[1][row])
    rule.check()


@pytest.mark.parametrize("layers", [1, 2, 72, 500])
@pytest.mark.parametrize("score", SCORES)
def test_any_number_of_layers(layers, score):
    shapes = tuple((7 + k % 3, (4, 3, 0, 1)[k % 4], 9 + k % 2) for k in range(layers))
    steps = list(draw_steps(make_parameters(shapes), 3, missing={(1, 2), (2, 0)}))
    ours = run(native, steps, score, "ema_uncertainty", torch.float64)
    truth = run(reference, steps, score, "ema_uncertainty", torch.float64)
    assert ours[0].shape == (sum(r for _, r, _ in shapes),) and torch.equal(ours[2], truth[2])
    assert_accurate(ours[0], truth[0], torch.float64, factor=100, what="scores")


@pytest.mark.parametrize("score", SCORES)
def test_parameters_and_gradients_of_mixed_types(score):
    """Types change from parameter to parameter, also within a shape, and between weight and gradient."""
    steps = []
    for parameters, grads in draw_steps(make_parameters(SHAPES, seed=3), 3):
        mixed = [p.to(DTYPES[i % 4]) for i, p in enumerate(parameters)]
        steps.append((mixed, [g.to(DTYPES[(i + 1) % 4]) for i, g in enumerate(grads)]))
    for dtype in (torch.float64, torch.float32):
        ours = run(native, steps, score, "ema_uncertainty", dtype)
        truth = run(reference, widened(steps), score, "ema_uncertainty", torch.float64)
        assert_accurate(ours[0], truth[0], dtype, factor=100 if dtype == torch.float64 else 1)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_every_finite_half_is_read_exactly(dtype):
    values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    values = values[values.float().abs() < 8e37]  # the largest bfloat16 leave no room for differences
    model = [torch.zeros(values.numel(), 1), values.unsqueeze(1), torch.zeros(1, values.numel())]
    for given, stride in ((model, 1), ([t.repeat_interleave(2, 0)[::2] for t in model], 2)):
        assert given[1].stride(0) == stride
        statistics, updates = make_buffers(given, "magnitude", "none", torch.float32)
        native.update_(given, model, statistics, updates, ScoreRule("magnitude", "none", 0.5, 0.5))
        assert torch.equal(statistics[0], values.float().abs())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_bad_gradient_is_seen_wherever_it_is(dtype):
    parameters = make_parameters(((1000, 10, 8),), dtype)
    statistics, updates = make_buffers(parameters, "fisher", "ema", torch.float32)
    for place in (0, 63, 1023, 1024, 8191, 8192, 9999):
        for value in (float("inf"), float("-inf"), float("nan")):
            grads = [torch.ones_like(p) for p in parameters]
            grads[0].view(-1)[place] = value
            native.update_(parameters, grads, statistics, updates, ScoreRule("fisher", "ema", 0.9, 0.9))
            assert (statistics == 0).all() and (updates == 0).all(), (place, value)


@pytest.mark.parametrize("score", SCORES)
def test_the_room_that_signals_need_is_the_references(score):
    """Around the limits 4 I and 16 g² of float32, and with an unusable weight whose gradient is missing."""
    for value in (float("inf"), float("nan"), 3e38, 8.6e37, 8.4e37, 5e18, 4.6e18):
        for missing in (False, True):
            has_the_room_of_the_reference(score, value, missing)


def has_the_room_of_the_reference(score, value, missing):
    outcomes = []
    for functions in (native, reference):
        parameters = make_parameters(((5, 2, 3),), torch.float32)
        parameters[1][0] = value
        grads = [torch.ones_like(p) for p in parameters]
        if missing:
            grads[1] = None
        else:
            grads[1][1], parameters[1][1] = value, 1.0
        statistics, updates = make_buffers(parameters, score, "none", torch.float32)
        functions.update_(parameters, grads, statistics, updates, ScoreRule(score, "none", 0.9, 0.9))
        outcomes.append(updates.tolist())
    assert outcomes[0] == outcomes[1], (value, missing)


@pytest.mark.parametrize("score", ["sensitivity", "gsnr"])
def test_any_number_of_threads_gives_the_same_bits(score):
    before, results = torch.get_num_threads(), []
    steps = list(draw_steps(make_parameters(((1000, 16, 900),) * 5, torch.float32), 2))
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(run(native, steps, score, "ema_uncertainty", torch.float32))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_statistics_whose_rows_lie_apart():
    steps = list(draw_steps(make_parameters(), 2))
    whole = run(native, steps, "fisher", "ema_uncertainty", torch.float64)
    wide = torch.full((2, whole[1].shape[1] + 3), 7.0, dtype=torch.float64)
    statistics, updates = wide[:, :-3], torch.zeros_like(whole[2])
    statistics.zero_()
    for parameters, grads in steps:
        native.update_(
            parameters, grads, statistics, updates, ScoreRule("fisher", "ema_uncertainty", 0.85, 0.7)
        )
    scores = native.triplet_scores(parameters, statistics, ScoreRule("fisher", "ema_uncertainty"))
    assert torch.equal(scores, whole[0]) and (wide[:, -3:] == 7).all()


def test_writing_is_visible_to_autograd():
    parameters = make_parameters()
    statistics, updates = make_buffers(parameters, "fisher", "ema")
    version = statistics._version
    importance_update_(parameters, parameters, statistics, updates, ScoreRule("fisher", "ema"))
    assert statistics._version > version
    with torch.inference_mode():
        parameters = make_parameters()
        statistics, updates = make_buffers(parameters, "fisher", "ema")
        importance_update_(parameters, parameters, statistics, updates, ScoreRule("fisher", "ema"))
        assert (importance_scores(parameters, statistics, ScoreRule("fisher", "ema")) > 0).all()


def bad_parameter(parameters, grads, statistics, updates):
    return [parameters[0].to(torch.int8), *parameters[1:]], grads, statistics, updates


def bad_gradient(parameters, grads, statistics, updates):
    return parameters, [grads[0].t().contiguous(), *grads[1:]], statistics, updates


def half_statistics(parameters, grads, statistics, updates):
    return parameters, grads, statistics.half(), updates


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (bad_parameter, "a parameter must be float32, float64, float16 or bfloat16"),
        (bad_gradient, "gradient 0 has another shape"),
        (half_statistics, "statistics must be float32 or float64"),
    ],
)
def test_bad_input_says_so_and_changes_nothing(change, said):
    parameters = make_parameters()
    grads = [p.clone() for p in parameters]
    statistics, updates = make_buffers(parameters, "fisher", "ema")
    arguments = change(parameters, grads, statistics, updates)
    with pytest.raises(RuntimeError, match=said):
        importance_update_(*arguments, ScoreRule("fisher", "ema"))
    assert (arguments[2] == 0).all() and (updates == 0).all()
