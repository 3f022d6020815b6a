"""Several processes: synchronised batch statistics, DDP and FSDP2, on gloo over the loopback
interface. The checks are those of distributed_worker.py and data_parallel.py."""

import copy
import subprocess
import sys

import data_parallel
import distributed_worker as worker
import pytest
import torch
import torch.distributed as dist
from torch import nn

import fusedconvbn
from fusedconvbn import FusedConvBN2d

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="torch has no gloo"
)


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    """Processes of a world of a given size, started at its first use."""
    pools = {}

    def of_size(world_size: int) -> worker.Processes:
        if world_size not in pools:
            pools[world_size] = worker.Processes(world_size, tmp_path_factory.mktemp("rendezvous"))
        return pools[world_size]

    yield of_size
    for each in pools.values():
        each.stop()


BOTH_WORLDS = pytest.mark.parametrize("world_size", [2, 4])


@pytest.mark.thin(1)
@pytest.mark.parametrize("name", worker.LAYERS)
@pytest.mark.parametrize(
    "world_size, split",
    [(world, split) for world in worker.SAMPLES for split in worker.SAMPLES[world]],
)
def test_equals_one_process_on_the_joined_batch(pool, world_size, split, name):
    pool(world_size).run(worker.check_joined_batch, name, split)


@BOTH_WORLDS
@pytest.mark.parametrize(
    "check",
    [
        worker.check_one_value,
        worker.check_no_samples_anywhere,
        worker.check_groups,
        worker.check_group_of_some,
        worker.check_large_mean,
        worker.check_scripted,
        worker.check_errors,
    ],
    ids=lambda check: check.__name__.removeprefix("check_"),
)
def test_synchronised(pool, world_size, check):
    pool(world_size).run(check)


@pytest.mark.parametrize("memory", ["auto", "min", 0.1])
@pytest.mark.parametrize("split", ["even", "uneven", "empty"])
def test_a_fused_model(pool, split, memory):
    pool(2).run(worker.check_fused_model, split, memory)


def test_a_synchronised_batch_norm_in_no_chain(pool):
    pool(2).run(worker.check_batch_norm_in_no_chain)


def test_one_all_reduce_in_forward_and_one_in_backward(pool):
    pool(2).run(worker.check_collectives)


def test_recompute_check_compares_the_statistics_of_the_process(pool):
    pool(2).run(worker.check_recompute_check)


@pytest.mark.parametrize("split", ["uneven", "empty"])
def test_compiled_as_eager(pool, split):
    pool(2).run(worker.check_compiled, split)


@pytest.mark.parametrize("static_graph", [False, True])
@pytest.mark.parametrize("check", [data_parallel.check_ddp, data_parallel.check_ddp_synchronised])
def test_ddp(pool, check, static_graph):
    pool(2).run(check, static_graph)


def test_ddp_under_autocast(pool):
    pool(2).run(data_parallel.check_ddp_autocast)


@pytest.mark.parametrize("synchronised", [False, True])
@pytest.mark.parametrize("whole", [False, True])
def test_fully_shard(pool, synchronised, whole):
    pool(2).run(data_parallel.check_fsdp, synchronised, whole)


@pytest.mark.parametrize("inner", [False, True])
def test_fully_shard_on_a_fused_model(pool, inner):
    pool(2).run(data_parallel.check_fsdp_fused_model, inner)


@pytest.mark.parametrize("after", ["", "sharded", "local"])
def test_replicated_dtensors(pool, after):
    pool(2).run(data_parallel.check_dtensor, after)


def test_other_dtensors_are_refused(pool):
    pool(2).run(data_parallel.check_dtensor_refusals)


def test_dtensor_is_imported_by_who_wants_it(tmp_path):
    code = "import sys, fusedconvbn; assert 'torch.distributed.tensor' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)


# -------------------------------------------------------------------------------------- one process


def test_conversion_and_back():
    model = nn.Sequential(
        FusedConvBN2d(3, 4, 3, momentum=None, eps=0.1),
        nn.Sequential(FusedConvBN2d(4, 4, 1, affine=False), nn.SyncBatchNorm(4)),
        FusedConvBN2d(4, 2, 1, track_running_stats=False).eval(),
    )
    plain = copy.deepcopy(model)
    tensors = [*model.parameters(), *model.buffers()]
    keys = list(model.state_dict())
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    layers = [converted[0], converted[1][0], converted[2]]
    converted[0].bn = converted[0].bn
    assert all("synchronised" in repr(layer) for layer in layers)
    another = copy.deepcopy(layers[0])
    assert "synchronised" in repr(another)
    another.bn = nn.BatchNorm2d(4)
    assert "synchronised" not in repr(another)
    assert fusedconvbn.revert_sync_batchnorm(converted) is converted
    assert [type(layer.bn) for layer in layers] == [nn.BatchNorm2d] * 3
    assert isinstance(converted[1][1], nn.SyncBatchNorm)  # no fused layer's
    after = [*converted.parameters(), *converted.buffers()]
    assert all(a is b for a, b in zip(after, tensors, strict=True))
    assert list(converted.state_dict()) == keys
    assert repr(converted) == repr(plain)
    assert [m.training for m in converted.modules()] == [m.training for m in plain.modules()]


@pytest.mark.parametrize("initialised", [False, True])
def test_one_process_has_plain_statistics(initialised, tmp_path):
    plain = FusedConvBN2d(3, 4, 3, activation="silu", dtype=torch.float64)
    own = copy.deepcopy(plain)
    bn = nn.SyncBatchNorm(4, dtype=torch.float64)
    synchronised = FusedConvBN2d.from_modules(own.conv, bn, "silu")
    assert synchronised.bn.weight is bn.weight and synchronised.bn.running_mean is bn.running_mean
    x = torch.randn(2, 3, 6, 5, dtype=torch.float64)
    if initialised:
        dist.init_process_group(
            "gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1
        )
    try:
        for _ in range(2):
            assert torch.equal(synchronised(x), plain(x))
        assert torch.equal(torch.jit.script(synchronised)(x), plain(x))
        with pytest.raises(ValueError, match="more than 1 value"):
            synchronised(x[:1, :, :3, :3])
    finally:
        if initialised:
            dist.destroy_process_group()
    torch.testing.assert_close(synchronised.state_dict(), plain.state_dict(), rtol=0, atol=0)
    folded = fusedconvbn.fold(synchronised)
    torch.testing.assert_close(folded(x), plain.eval()(x))


def test_group_that_there_is_not():
    layer = FusedConvBN2d(3, 4, 3)
    before = copy.deepcopy(layer.state_dict())
    bn, x = layer.bn, torch.randn(2, 3, 6, 5)
    with pytest.raises(RuntimeError, match="nobody"):
        fusedconvbn.conv_bn(
            x,
            layer.conv.weight,
            running_mean=bn.running_mean,
            running_var=bn.running_var,
            num_batches_tracked=bn.num_batches_tracked,
            process_group="nobody",
        )
    torch.testing.assert_close(layer.state_dict(), before, rtol=0, atol=0)
