"""Dropout inside the kernels: Philox's published vectors, one mask in every kernel, seeds, and exact ends."""

import pytest
import torch

from adalora_fast.ops import adalora_linear
from adalora_fast.ops.adapter import dropout
from adalora_fast.ops.adapter import triton as kernels
from adalora_fast.ops.adapter.adapter import Adapter
from adalora_fast.ops.adapter.plans import Tile
from tests.helpers.kernel_cases import (
    DEVICE,
    MEDIUM,
    ON_DEVICE,
    SMALL,
    WAYS,
    WAYS_AND_DTYPES,
    assert_same,
    exact_case,
    exact_grad,
    grad_like,
    planned,
    random_case,
    run,
    triton_backend,
)
from tests.helpers.kernels import poisoned
from tests.helpers.naive import draw_grad, formula, leaves, onto_linear, results, truth
from tests.helpers.properties import given, settings, st
from tests.helpers.tolerances import RelativeRule

pytestmark = ON_DEVICE
FUNCTIONS = [adalora_linear, onto_linear]
DROPPING_WAYS = ("epilogue", "library")  # "inline" computes the low-rank product of what is not dropped
SEEDS = (0, 1, 2**32, 2**63 - 1, 0x123456789ABCDEF)
TILES = (SMALL, Tile(32, 64, 16, 4, 1), Tile(64, 16, 32, 4, 1))


@pytest.fixture(autouse=True)
def kernels_write_all_they_return():
    with triton_backend(), poisoned():
        yield


def seed_of(value: int) -> torch.Tensor:
    return torch.tensor([value], dtype=torch.int64, device=DEVICE)


VECTORS = [  # counter, key, result: kat_vectors of Random123, philox4x32 with ten rounds
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


@pytest.mark.parametrize(("counter", "key", "expected"), VECTORS)
def test_philox_gives_the_published_words(counter, key, expected):
    low, high = (int(word, 16) for word in key.split())
    signed = (high << 32 | low) - (1 << 64 if high >> 31 else 0)
    words = [torch.tensor([int(word, 16)], device=DEVICE) for word in counter.split()]
    got = dropout.philox(torch.tensor([signed], device=DEVICE), words)
    assert [f"{word.item():08x}" for word in got] == expected.split()


def test_which_bits_decide_about_which_entry():
    """Entry (m, k) has the half-word k mod 8 of the block with counter (k // 8, m, 0, 0), low half first."""
    kept = dropout.survivors(seed_of(77), 5, 21, 0.5)
    zero = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    for m in range(5):
        for k in range(21):
            words = dropout.philox(seed_of(77), [zero + k // 8, zero + m, zero, zero])
            half = words[k % 8 // 2].item() >> (16 * (k % 2)) & 0xFFFF
            assert kept[m, k].item() == (half >= 32768)


def kernel_masks(rows: int, columns: int, seed, p: float, way: str, tile: Tile) -> dict[str, torch.Tensor]:
    """The mask of every kernel that makes one, made visible by identity matrices; ``columns`` <= 128."""
    eye = torch.eye(columns, device=DEVICE)
    ones = torch.ones(rows, columns, dtype=torch.float16, device=DEVICE)
    E, weight = torch.ones(columns, 1, device=DEVICE), torch.zeros_like(eye).half()
    with planned(way, tile):
        adapter = Adapter(eye, E, eye, 1.0, False, seed, p)
        y, h, S = kernels.linear(ones, None, weight, None, adapter)
        rest = (h, S, weight, adapter)
        dx, *_ = kernels.backward(ones, ones, *rest, True, [True, False, False, False, False])
        _, d_input, *_ = kernels.backward(ones, ones, *rest, False, [False, True, *[False] * 3])
    return {
        "project": h[:, :columns] != 0,
        "output": y != 0,
        "epilogue of the backward": dx != 0,
        "gradient of the adapter's input": d_input != 0,
    }


def outer_mask(rows: int, columns: int, seed, p: float, tile: Tile, parts: int) -> torch.Tensor:
    """The mask of ``outer``: with g the identity, V = gᵀ drop(x) is drop(x); ``rows`` <= 128."""
    eye = torch.eye(rows, device=DEVICE)
    x = torch.ones(rows, columns, dtype=torch.float16, device=DEVICE)
    A, E = torch.ones(rows, columns, device=DEVICE), torch.ones(rows, 1, device=DEVICE)
    h = torch.zeros(rows, kernels.padded(rows), dtype=torch.float16, device=DEVICE)
    with planned("library", tile, parts):
        _, _, dA, dE, _ = kernels.backward(
            eye.half(), x, h, h.new_empty(0), None, Adapter(A, E, eye, 1.0, False, seed, p), False,
            [False, False, True, True, False],
        )  # fmt: skip
    scale = dropout.survivors_scale(p)
    kept = dA != 0
    assert torch.allclose(dA[kept], torch.full_like(dA[kept], scale))
    assert torch.allclose(dE[:, 0], kept.sum(1) * scale, rtol=1e-5)
    return kept


@pytest.mark.parametrize("seed", SEEDS, ids=hex)
def test_kernels_drop_what_survivors_says(seed):
    seed, p = seed_of(seed), 0.4
    want = dropout.survivors(seed, 37, 20, p)
    for way in DROPPING_WAYS:
        for name, mask in kernel_masks(37, 20, seed, p, way, MEDIUM).items():
            assert torch.equal(mask, want), f"{name}, {way}"
    assert torch.equal(outer_mask(37, 20, seed, p, MEDIUM, 2), want)


def test_an_entry_at_the_threshold_survives():
    """p is the very number that entry (3, 5) has, so that >= and > differ."""
    seed, zero = seed_of(21), torch.zeros(1, dtype=torch.int64, device=DEVICE)
    p = (dropout.philox(seed, [zero, zero + 3, zero, zero])[2].item() >> 16) / dropout.LEVELS
    want = dropout.survivors(seed, 16, 16, p)
    assert want[3, 5] and not dropout.survivors(seed, 16, 16, p + 1 / dropout.LEVELS)[3, 5]
    for name, mask in kernel_masks(16, 16, seed, p, "epilogue", MEDIUM).items():
        assert torch.equal(mask, want), name
    assert torch.equal(outer_mask(16, 16, seed, p, MEDIUM, 1), want)


@pytest.mark.parametrize("tile", TILES, ids=lambda tile: f"{tile.rows}x{tile.columns}x{tile.depth}")
@pytest.mark.parametrize("way", WAYS)
def test_masks_do_not_depend_on_tiles(way, tile):
    seed, p = seed_of(5), 0.25
    want = dropout.survivors(seed, 70, 36, p)
    for name, mask in kernel_masks(70, 36, seed, p, way, tile).items():
        assert torch.equal(mask, want), name


@pytest.mark.parametrize("tile", TILES, ids=lambda tile: f"{tile.rows}x{tile.columns}x{tile.depth}")
@pytest.mark.parametrize("parts", [1, 3, 50])
def test_masks_of_the_outer_product_do_not_depend_on_tiles(tile, parts):
    seed = seed_of(6)
    assert torch.equal(outer_mask(70, 36, seed, 0.25, tile, parts), dropout.survivors(seed, 70, 36, 0.25))


@given(
    rows=st.integers(1, 60),
    columns=st.integers(1, 60),
    seed=st.integers(0, 2**63 - 1),
    p=st.sampled_from([1 / 65536, 0.001, 0.1, 0.5, 0.9, 65535 / 65536]),
)
@settings(max_examples=6, deadline=None, derandomize=True)
def test_masks_of_any_size(rows, columns, seed, p):
    seed = seed_of(seed)
    want = dropout.survivors(seed, rows, columns, p)
    for name, mask in kernel_masks(rows, columns, seed, p, "epilogue", MEDIUM).items():
        assert torch.equal(mask, want), name
    assert torch.equal(outer_mask(rows, columns, seed, p, MEDIUM, 2), want)


def test_a_mask_of_fewer_columns_or_rows_is_a_part_of_the_larger():
    seed = seed_of(3)
    whole = dropout.survivors(seed, 100, 77, 0.5)
    assert torch.equal(dropout.survivors(seed, 40, 77, 0.5), whole[:40])
    assert torch.equal(dropout.survivors(seed, 100, 13, 0.5), whole[:, :13])


@pytest.mark.parametrize("p", [0.1, 0.25, 0.5, 0.9])
def test_statistics(p):
    """Shares of survivors overall, by row and by column; neighbours and seeds are independent."""
    rows, columns = 2000, 512
    first, second = (dropout.survivors(seed_of(s), rows, columns, p).double() for s in (1, 2))
    deviation = (p * (1 - p)) ** 0.5
    for kept in (first, second):
        assert abs(kept.mean().item() - (1 - p)) < 4 * deviation / kept.numel() ** 0.5
        for dim, count in ((0, rows), (1, columns)):
            shares = (kept.mean(dim) - (1 - p)) / (deviation / count**0.5)
            assert shares.abs().max() < 5.5, "the worst of 2000 is hardly beyond four"
            assert abs(shares.square().mean().item() - 1) < 6 * (2 / shares.numel()) ** 0.5
    centred = (first - (1 - p)) / deviation
    other = (second - (1 - p)) / deviation
    pairs = {
        "columns": (centred[:, 1:], centred[:, :-1]),
        "columns of two blocks": (centred[:, 8:], centred[:, :-8]),
        "halves of a word": (centred[:, ::2], centred[:, 1::2]),
        "rows": (centred[1:], centred[:-1]),
        "seeds": (centred, other),
    }
    for name, (a, b) in pairs.items():
        assert abs((a * b).mean().item()) < 4.5 / a.numel() ** 0.5, name


def test_every_residue_of_a_column_is_dropped_alike():
    kept = dropout.survivors(seed_of(4), 4000, 64, 0.5).double().reshape(4000, 8, 8)
    shares = kept.mean((0, 1))
    assert ((shares - 0.5).abs() < 4 * 0.5 / 32000**0.5).all()


def keep_factors(x: torch.Tensor, seed: torch.Tensor, p: float) -> torch.Tensor:
    mask = dropout.survivors(seed, x[..., 0].numel(), x.shape[-1], p)
    return mask.view(x.shape) * torch.tensor(dropout.survivors_scale(p), dtype=torch.float64, device=DEVICE)


def next_seed(manual: int) -> torch.Tensor:
    """The seed that the next call will draw, and the generator set back to before it."""
    torch.manual_seed(manual)
    seed = dropout.draw_seed(DEVICE)
    torch.manual_seed(manual)
    return seed


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize(("way", "dtype"), WAYS_AND_DTYPES)
def test_forward_and_backward_have_one_mask(way, dtype, function):
    if function is onto_linear and way != "library":
        pytest.skip("without a base there is one way")
    rule = RelativeRule(dtype)
    for manual, shape in ((1, (63, 37)), (2, (2, 3, 40))):
        case = random_case(shape, 29, 8, dtype=dtype, factor_dtype=torch.float32, seed=manual)
        grad = draw_grad(case, manual).to(DEVICE)
        keep = keep_factors(case.x, next_seed(manual), 0.3)
        naive = leaves(case)
        dropped = (naive.x * keep.to(dtype)).to(dtype)
        plain = results(formula(*naive, adapter_input=dropped, product_dtype=dtype), naive, grad)
        exact = truth(case, grad, keep=keep)
        with planned(way, MEDIUM):
            got = run(function, case, grad, dropout_p=0.3, training=True)
        for name in exact:
            rule.add(name, got[name], plain[name], exact[name])
    rule.check()


@pytest.mark.parametrize("way", WAYS)
def test_a_half_is_dropped_exactly(way):
    """p = 1/2 scales by two: all sums stay exact, and every entry can be checked to the last bit."""
    case = exact_case(40, 24, 33, 3)
    grad = exact_grad(case)
    keep = keep_factors(case.x, next_seed(8), 0.5)
    with planned(way):
        got = run(adalora_linear, case, grad, dropout_p=0.5, training=True)
    assert_same(got, truth(case, grad, keep=keep))


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_manual_seed_repeats_and_calls_differ(function):
    case = exact_case(20, 24, 16, 3)
    torch.manual_seed(4)
    first, second = (function(*case, dropout_p=0.5, training=True) for _ in range(2))
    torch.manual_seed(4)
    again = [function(*case, dropout_p=0.5, training=True) for _ in range(2)]
    assert not torch.equal(first, second)
    assert torch.equal(again[0], first) and torch.equal(again[1], second)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("options", [{}, {"dropout_p": 0.5}, {"training": True}], ids=str)
def test_no_number_is_drawn_where_dropout_is_off(function, options):
    case = exact_case(5, 8, 8, 2)
    torch.manual_seed(5)
    function(*case, **options)
    after = torch.rand(4, device=DEVICE)
    torch.manual_seed(5)
    assert torch.equal(after, torch.rand(4, device=DEVICE))


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("p", [0.3, 1.0])
def test_one_number_is_drawn_from_the_devices_generator(function, p):
    case = exact_case(5, 8, 8, 2)
    torch.manual_seed(5)
    function(*case, dropout_p=p, training=True)
    after = torch.rand(4, device=DEVICE)
    torch.manual_seed(5)
    seed = dropout.draw_seed(DEVICE)
    assert seed.shape == (1,) and seed.dtype == torch.int64 and seed.device.type == DEVICE.type
    assert torch.equal(after, torch.rand(4, device=DEVICE))


def test_seeds_use_all_their_bits():
    torch.manual_seed(0)
    seeds = torch.cat([dropout.draw_seed(DEVICE) for _ in range(200)])
    assert (seeds >= 0).all() and seeds.unique().numel() == 200
    for bit in range(63):
        assert 0 < (seeds >> bit & 1).sum() < 200, f"bit {bit} never changes"


@pytest.mark.parametrize("half", ["low", "high"])
def test_both_halves_of_a_seed_matter(half):
    a, b = seed_of(12345), seed_of(12345 + (1 if half == "low" else 1 << 32))
    assert not torch.equal(dropout.survivors(a, 8, 64, 0.5), dropout.survivors(b, 8, 64, 0.5))
    masks = [kernel_masks(8, 64, seed, 0.5, "epilogue", MEDIUM)["project"] for seed in (a, b)]
    assert not torch.equal(*masks)


@pytest.mark.parametrize("way", WAYS)
def test_no_dropout_changes_nothing(way):
    case = random_case((33, 24), 17, 3, dtype=torch.float16, factor_dtype=torch.float32)
    grad = grad_like(case.x @ case.weight.t())
    with planned(way):
        off = run(adalora_linear, case, grad)
        assert_same(run(adalora_linear, case, grad, dropout_p=0.0, training=True), off)
        assert_same(run(adalora_linear, case, grad, dropout_p=0.7, training=False), off)


@pytest.mark.parametrize("p", [1e-9, 0.4 / 65536])
def test_a_probability_below_the_resolution_drops_nothing(p):
    assert dropout.threshold_of(p) == 0 and dropout.survivors_scale(p) == 1.0
    case = exact_case(33, 24, 17, 3)
    grad = exact_grad(case)
    with planned("epilogue"):
        assert_same(run(adalora_linear, case, grad, dropout_p=p, training=True), truth(case, grad))


@pytest.mark.parametrize("p", [1.0, 1 - 1e-9])
@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("way", WAYS)
def test_everything_dropped_leaves_the_base(way, function, p):
    assert dropout.threshold_of(p) == dropout.LEVELS and dropout.survivors_scale(p) == 0.0
    case = exact_case(33, 24, 17, 3)
    grad = exact_grad(case)
    with planned(way):
        got = run(function, case, grad, dropout_p=p, training=True)
    y = case.x.double() @ case.weight.double().t() + case.bias.double()
    dx = grad.double() @ case.weight.double()
    zeros = {name: torch.zeros_like(getattr(case, name)) for name in ("lora_A", "lora_E", "lora_B")}
    assert_same(got, {"y": y, "x": dx, **zeros})


@pytest.mark.parametrize("way", WAYS)
def test_everything_dropped_drops_what_is_not_finite(way):
    """A dropped infinity is zero, not NaN: the base carries it, the factors' gradients do not."""
    case = random_case((20, 24), 17, 3, dtype=torch.float16, factor_dtype=torch.float32)
    case.x[5, 7] = float("inf")
    with planned(way):
        got = run(adalora_linear, case, torch.ones(20, 17).half().to(DEVICE), dropout_p=1.0, training=True)
    assert all((got[name] == 0).all() for name in ("lora_A", "lora_E", "lora_B"))
    assert got["y"][[i for i in range(20) if i != 5]].isfinite().all()


@pytest.mark.parametrize(("p", "threshold"), [(0.5, 32768), (0.1, 6554), (0.25, 16384), (1 / 65536, 1)])
def test_probability_and_scale_are_rounded_together(p, threshold):
    assert dropout.threshold_of(p) == threshold
    assert dropout.survivors_scale(p) == pytest.approx(65536 / (65536 - threshold), rel=1e-15)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_survivors_are_scaled(p):
    """The kernels' factor of what survives, read off an adapter that is the identity."""
    eye, seed = torch.eye(24, device=DEVICE), seed_of(9)
    ones, E = torch.ones(33, 24, device=DEVICE), torch.ones(24, 1, device=DEVICE)
    with planned("library"):
        adapter = Adapter(eye, E, eye, 1.0, False, seed, p)
        y, _, _ = kernels.linear(ones, None, torch.zeros_like(eye), None, adapter)
    mask = dropout.survivors(seed, 33, 24, p)
    scale = torch.tensor(65536 / (65536 - round(p * 65536)), device=DEVICE)
    assert torch.allclose(y, mask * scale, rtol=1e-6)


def test_the_mean_is_the_output_without_dropout():
    eye, E = torch.eye(16, device=DEVICE), torch.ones(16, 1, device=DEVICE)
    x, weight = torch.ones(1000, 16, device=DEVICE), torch.zeros(16, 16, device=DEVICE)
    torch.manual_seed(0)
    with planned("library", Tile(128, 16, 16, 4, 1)):
        y = adalora_linear(x, weight, None, eye, E, eye, 1.0, dropout_p=0.25, training=True)
    assert abs(y.mean().item() - 1) < 4 * (0.25 / 0.75 / y.numel()) ** 0.5
