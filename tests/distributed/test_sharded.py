"""fully_shard (FSDP2): the run of one process, from statistics that no process holds in whole."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from adalora_fast import orthogonality_loss, register_score
from adalora_fast.allocator import capture, scores
from adalora_fast.allocator.state import FILE_NAME, read_state, write_state
from tests.distributed.runs import GAMMA, STEPS, agree, alone, same_run, share, step, train
from tests.helpers.small_model import kept, make_allocator, make_model, make_optimizer, parameters_of

WRAPPINGS = ("layers and root", "root", "layers", "layers kept whole", "two groups", "replicated shards")


def shard(model, wrapping: str, **options):
    """``model``, its parameters sharded over both processes."""
    shape = (2, 1) if wrapping == "replicated shards" else (2,)
    names = ("replicate", "shard") if len(shape) == 2 else ("shard",)
    options["mesh"] = init_device_mesh("cpu", shape, mesh_dim_names=names)
    if wrapping == "layers kept whole":
        options["reshard_after_forward"] = False
    if wrapping == "two groups":
        fully_shard([model[0], model[2]], **options)
    elif wrapping != "root":
        for layer in model[::2]:
            fully_shard(layer, **options)
    return model if wrapping == "layers" else fully_shard(model, **options)


def sharded(wrapping: str, ranks=(4, 3, 5), policy: dict | None = None, **options):
    """(model, optimizer, allocator): made, then sharded."""
    model = make_model(ranks)
    allocator = make_allocator(model, **options)
    shard(model, wrapping, **({"mp_policy": MixedPrecisionPolicy(**policy)} if policy else {}))
    return model, make_optimizer(model), allocator


def result(model, masks: list) -> dict:
    weights = [parameter.full_tensor().detach() for parameter in parameters_of(model)]
    return {"masks": masks, "weights": weights}


def run(wrapping: str, **options):
    model, optimizer, allocator = sharded(wrapping, **options)
    found = result(model, train(model, model, optimizer, allocator, range(STEPS)))
    assert allocator.t == STEPS and allocator.is_over
    return found


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_equals_one_process(pair, wrapping):
    results = pair.run(run, wrapping)
    agree(results)
    same_run(results[0], alone())


@pytest.mark.parametrize("score", ["movement", "fisher", "gsnr", "magnitude"])
def test_every_score(pair, score):
    results = pair.run(run, "layers and root", score=score)
    agree(results)
    same_run(results[0], alone(score=score))


@pytest.mark.parametrize("options", [{"hysteresis": 0.5}, {"remember": True}, {"triplet": "lambda"}], ids=str)
def test_stable_allocation(pair, options):
    options = {"score": "movement", "smoothing": "none", "deltaT": 1, **options}
    results = pair.run(run, "layers and root", **options)
    agree(results)
    same_run(results[0], alone(**options))


@pytest.mark.parametrize("ranks", [(1, 3, 5), (5, 1, 1), (2, 6, 1)], ids=str)
def test_processes_that_hold_no_triplet_of_a_layer(pair, ranks):
    options = {"ranks": ranks, "target_total_rank": 3}
    results = pair.run(run, "layers and root", **options)
    agree(results)
    same_run(results[0], alone(**options))


def run_mixed():
    policy = {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32}
    model, optimizer, allocator = sharded("layers and root", policy=policy)
    masks = []
    for t in range(STEPS):
        x, y = share(t)
        loss = (model(x).double() - y).square().mean() + GAMMA * orthogonality_loss(model).double()
        loss.backward()
        optimizer.step()
        allocator.step()
        optimizer.zero_grad()
        masks.append(kept(allocator))
    return result(model, masks)


def test_mixed_precision(pair):
    results = pair.run(run_mixed)
    agree(results)
    expected = alone()
    assert [sum(mask) for mask in results[0]["masks"]] == [sum(mask) for mask in expected["masks"]]
    for ours, theirs in zip(results[0]["weights"], expected["weights"], strict=True):
        assert ours.isfinite().all() and (ours - theirs).norm() < 0.1 * theirs.norm() + 0.1


def run_shared_batches(accumulate: int):
    model, optimizer, allocator = sharded("layers and root")
    masks = []
    for t in range(STEPS):
        x, y = share(t)
        for part in range(accumulate):
            model.set_requires_gradient_sync(part == accumulate - 1)
            rows = slice(part * len(x) // accumulate, (part + 1) * len(x) // accumulate)
            loss = (model(x[rows]) - y[rows]).square().mean() + GAMMA * orthogonality_loss(model)
            (loss / accumulate).backward()
        optimizer.step()
        allocator.step()
        optimizer.zero_grad()
        masks.append(kept(allocator))
    return result(model, masks)


def test_gradient_accumulation(pair):
    results = pair.run(run_shared_batches, 2)
    agree(results)
    same_run(results[0], alone())


def run_label_smoothing_path():
    """The regulariser's gradient by itself, as AdaLoraCallback adds it."""
    model, _, _ = sharded("layers and root")
    factors = [p for i, p in enumerate(parameters_of(model)) if i % 3 != 1]
    return [part.full_tensor() for part in torch.autograd.grad(orthogonality_loss(model), factors)]


def test_gradient_of_the_regulariser(pair):
    model = make_model()
    factors = [p for i, p in enumerate(parameters_of(model)) if i % 3 != 1]
    expected = torch.autograd.grad(orthogonality_loss(model), factors)
    for found in pair.run(run_label_smoothing_path):
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


def run_disturbed():
    model, optimizer, allocator = sharded("replicated shards")
    masks = []
    for t in range(STEPS):
        if dist.get_rank() == 1 and t > 0:
            allocator._statistics.values.uniform_()
        masks += train(model, model, optimizer, allocator, [t])
    return result(model, masks)


def test_replicas_whose_statistics_differ(pair):
    results = pair.run(run_disturbed)
    agree(results)
    same_run(results[0], alone())


def run_overflow():
    model, optimizer, allocator = sharded("layers and root")
    train(model, model, optimizer, allocator, range(3))
    before = allocator._statistics.values.clone(), allocator._statistics.updates.clone()
    x, y = share(3)
    (model(x) - y).square().mean().backward()
    optimizer.step()
    if dist.get_rank() == 1:
        parameters_of(model)[2].grad.to_local()[0, 0] = float("inf")
    allocator.step()
    after = allocator._statistics.values, allocator._statistics.updates
    return all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_an_infinite_entry_in_one_shard_counts_in_none(pair):
    assert pair.run(run_overflow) == [True, True]


def run_forgotten_step():
    model, optimizer, allocator = sharded("layers and root")
    allocator.attach(optimizer, automatic=False)
    x, y = share(0)
    (model(x) - y).square().mean().backward()
    with pytest.raises(RuntimeError, match=r"without an optimizer.step\(\)"):
        allocator.step()
    if dist.get_rank() == 1:
        parameters_of(model)[2].grad.to_local()[0, 0] = float("nan")
    allocator.step()  # what a GradScaler does: no optimizer step for gradients that are not finite anywhere


def test_order_of_steps(pair):
    pair.run(run_forgotten_step)


def run_pruned_stay_pruned():
    model, optimizer, allocator = sharded("layers and root")
    train(model, model, optimizer, allocator, range(STEPS))
    with torch.no_grad():
        for parameter in parameters_of(model)[1::3]:
            parameter.to_local().fill_(1.0)
    allocator.finalize()
    values = torch.cat([p.full_tensor().flatten() for p in parameters_of(model)[1::3]])
    return (values != 0).tolist() == kept(allocator)


def test_pruned_triplets_do_not_come_back(pair):
    assert pair.run(run_pruned_stay_pruned) == [True, True]


# -- state -------------------------------------------------------------------------------------


def state_after(steps: int, folder, **options):
    """The weights in whole and the state, which is also written to ``folder``."""
    model, optimizer, allocator = sharded("layers and root", **options)
    train(model, model, optimizer, allocator, range(steps))
    write_state(allocator, folder)
    moments = [
        {name: value.full_tensor() if value.dim() else value for name, value in each.items()}
        for each in optimizer.state_dict()["state"].values()
    ]
    return {**result(model, []), "state": allocator.state_dict(), "moments": moments}


def alone_after(steps: int, **options):
    model = make_model()
    optimizer, allocator = make_optimizer(model), make_allocator(model, **options)
    train(model, model, optimizer, allocator, range(steps))
    return model, optimizer, allocator


@pytest.mark.parametrize("steps", [1, 7, STEPS], ids=["warm-up", "budget", "final"])
@pytest.mark.parametrize("score", ["sensitivity", "gsnr", "magnitude"])
def test_the_state_is_that_of_one_process(pair, score, steps, tmp_path):
    for found in pair.run(state_after, steps, tmp_path, score=score):
        _, _, allocator = alone_after(steps, score=score)
        expected = allocator.state_dict()
        for state in (found["state"], read_state(tmp_path)):
            assert state["config"] == expected["config"]
            assert state["tensors"].keys() == expected["tensors"].keys()
            for name, tensor in state["tensors"].items():
                torch.testing.assert_close(tensor, expected["tensors"][name], rtol=1e-9, atol=1e-12)
    assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME]  # one process wrote it


def go_on(steps: int, saved: dict):
    """To the end from what another number of processes saved: loaded first, sharded then."""
    model = make_model()
    with torch.no_grad():
        for parameter, weight in zip(parameters_of(model), saved["weights"], strict=True):
            parameter.copy_(weight)
    allocator = make_allocator(model)
    allocator.load_state_dict(saved["state"])
    if dist.is_initialized():
        shard(model, "layers and root")
    optimizer = make_optimizer(model)
    for group in optimizer.param_groups:
        for parameter, moments in zip(group["params"], saved["moments"], strict=True):
            optimizer.state[parameter] = {
                name: split(value, parameter) if value.dim() else value for name, value in moments.items()
            }
    masks = train(model, model, optimizer, allocator, range(steps, STEPS))
    if dist.is_initialized():
        return result(model, masks)
    return {"masks": masks, "weights": [p.detach() for p in parameters_of(model)]}


def split(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A whole tensor, sharded as ``like`` is."""
    if not isinstance(like, DTensor):
        return value.clone()
    return distribute_tensor(value, like.device_mesh, like.placements)


@pytest.mark.parametrize("steps", [1, 7, 10], ids=["warm-up", "budget", "final"])
def test_resumes_with_another_number_of_processes(pair, steps, tmp_path):
    expected = alone()
    expected["masks"] = expected["masks"][steps:]
    saved = pair.run(state_after, steps, tmp_path)[0]
    same_run(go_on(steps, saved), expected)
    model, optimizer, allocator = alone_after(steps)
    whole = {
        "weights": [p.detach() for p in parameters_of(model)],
        "state": allocator.state_dict(),
        "moments": list(optimizer.state_dict()["state"].values()),
    }
    for found in pair.run(go_on, steps, whole):
        same_run(found, expected)


# -- what is refused ---------------------------------------------------------------------------


def step_of(model, allocator):
    optimizer = make_optimizer(model)
    step(model, model, optimizer, allocator, 0)


def run_registered():
    if "slope" not in scores.score_names():
        register_score("slope", lambda w, g, state: g.abs())
    model, _, allocator = sharded("root", score="slope")
    with pytest.raises(ValueError, match=r"'slope' is a registered function.*built-in score"):
        step_of(model, allocator)


def run_task_gradient():
    model, _, allocator = sharded("layers", score_gradient="task")
    with pytest.raises(RuntimeError, match=r"score_gradient='task'.*'total'"):
        step_of(model, allocator)


def run_capturable():
    capture.require_proof = lambda: None
    model, _, allocator = sharded("root", capturable=True)
    with pytest.raises(RuntimeError, match="capturable=True"):
        step_of(model, allocator)


def run_other_dimension():
    model = make_model()
    mesh = init_device_mesh("cpu", (2,))
    fully_shard(model, mesh=mesh, shard_placement_fn=lambda p: Shard(1) if p.shape == (8, 4) else None)
    with pytest.raises(ValueError, match=r"sharded in two ways"):
        make_allocator(model)


def run_two_meshes():
    model = make_model()
    for layer, shape in ((model[0], (2,)), (model[2], (2, 1))):
        names = ("shard", "other")[: len(shape)] if len(shape) == 1 else ("replicate", "shard")
        fully_shard(layer, mesh=init_device_mesh("cpu", shape, mesh_dim_names=names))
    with pytest.raises(ValueError, match=r"sharded in two ways.*the same mesh"):
        make_allocator(model)


@pytest.mark.parametrize(
    "run", [run_registered, run_task_gradient, run_capturable, run_other_dimension, run_two_meshes]
)
def test_what_cannot_work(pair, run):
    pair.run(run)
