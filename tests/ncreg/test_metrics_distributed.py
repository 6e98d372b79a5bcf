"""Measures under gloo: uneven and empty shards give every rank what one process gets from all the data."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from ncreg.metrics import LayerwiseCollapse, NearestClassCenter, NeuralCollapse
from tests import nccl_rules, warm_start

CLASSES, DIM, SAMPLES = 5, 8, 97
MODES = [{}, {"scatter": False}, {"cache": False}, {"cache": False, "scatter": False}]


def _data():
    generator = torch.Generator().manual_seed(0)
    target = (CLASSES * torch.rand(SAMPLES, generator=generator) ** 2).long()
    target[:CLASSES] = torch.arange(CLASSES)
    means = torch.randn(CLASSES, DIM, generator=generator, dtype=torch.float64) + 100
    features = means[target] + 1e-4 * torch.randn(SAMPLES, DIM, generator=generator, dtype=torch.float64)
    head = nn.Linear(DIM, CLASSES, dtype=torch.float64)
    with torch.no_grad():
        head.weight.copy_(torch.randn(CLASSES, DIM, generator=generator, dtype=torch.float64))
        head.bias.copy_(torch.randn(CLASSES, generator=generator, dtype=torch.float64))
    return features, target, head


def _shard(rank, world):
    """Uneven, and of four ranks the last has nothing."""
    edges = {1: [0, SAMPLES], 2: [0, 70, SAMPLES], 4: [0, 60, 75, SAMPLES, SAMPLES]}[world]
    return slice(edges[rank], edges[rank + 1])


def _fill(metric, features, target):
    for _ in metric.passes():
        for rows, labels in zip(features.split(11), target.split(11), strict=True):
            if len(rows):
                metric.update(rows, labels)


def _measure(rank, world, group):
    features, target, head = _data()
    shard = _shard(rank, world)
    found = []
    for options in MODES:
        metric = NeuralCollapse(CLASSES, DIM, head, **options, process_group=group)
        _fill(metric, features[shard], target[shard])
        values, means = metric.compute(), metric.class_means()
        centre = NearestClassCenter(means, head, per_class=True, process_group=group)
        if shard.start < shard.stop:
            centre.update(features[shard], target[shard])
        found.append({"values": values, "means": means, "centre": centre.compute()})
        if rank == 0:
            own = NeuralCollapse(CLASSES, DIM, head, **options, sync_on_compute=False)
            _fill(own, features[shard], target[shard])
            found[-1]["own"] = own.compute()
        byhand = NeuralCollapse(CLASSES, DIM, head, **options, sync_on_compute=False, process_group=group)
        byhand.update(features[shard], target[shard])
        byhand.sync()
        found[-1]["synced"] = byhand.compute()
    return found


def _by_depth(model, rank, world):
    """LayerwiseCollapse of this rank's shard; a rank without samples never runs the model."""
    features, target, _ = _data()
    shard = _shard(rank, world)
    with torch.no_grad(), LayerwiseCollapse(model, layers=["0", "2"], num_classes=CLASSES) as depth:
        for rows, labels in zip(features[shard].split(11), target[shard].split(11), strict=True):
            if len(rows):
                model(rows - 100)  # the middle of tanh
                depth.update(labels)
        return depth.compute()


def _net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(DIM, 6), nn.Tanh(), nn.Linear(6, 4)).double()


def _rank(rank, path):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}/rendezvous", rank=rank, world_size=4)
    nccl_rules.enforce()
    pair = dist.new_group([0, 1])
    torch.save(_measure(rank, 4, None), f"{path}/4-{rank}.pt")
    torch.save(_by_depth(nn.parallel.DistributedDataParallel(_net()), rank, 4), f"{path}/depth-{rank}.pt")
    if rank < 2:
        torch.save(_measure(rank, 2, pair), f"{path}/2-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """Four processes, of which the first two also work as a group of their own."""
    path = tmp_path_factory.mktemp("ranks")
    mp.start_processes(_rank, (str(path),), nprocs=4, start_method=warm_start.METHOD)
    found = {world: [torch.load(path / f"{world}-{rank}.pt") for rank in range(world)] for world in (2, 4)}
    return found | {"depth": [torch.load(path / f"depth-{rank}.pt") for rank in range(4)]}


@pytest.mark.parametrize("number", range(len(MODES)))
@pytest.mark.parametrize("world", [2, 4])
def test_every_rank_measures_all_the_data(world, number, ranks):
    features, target, head = _data()
    whole = NeuralCollapse(CLASSES, DIM, head, **MODES[number])
    _fill(whole, features, target)
    expected = whole.compute()
    once = NeuralCollapse(CLASSES, DIM, head, **MODES[number])
    once.update(features, target)
    centre = NearestClassCenter(whole.class_means(), head, per_class=True)
    centre.update(features, target)
    for found in (rank[number] for rank in ranks[world]):
        for name, reference in (("values", expected), ("synced", once.compute())):
            assert set(found[name]) == set(reference)
            for key, value in reference.items():
                assert float(found[name][key]) == pytest.approx(float(value), rel=1e-9, abs=1e-11), key
        torch.testing.assert_close(found["means"], whole.class_means(), rtol=1e-14, atol=0)
        for key, value in centre.compute().items():
            torch.testing.assert_close(found["centre"][key], value, rtol=0, atol=0)
    shard = _shard(0, world)
    own = NeuralCollapse(CLASSES, DIM, head, **MODES[number])
    _fill(own, features[shard], target[shard])
    for key, value in own.compute().items():
        assert float(ranks[world][0][number]["own"][key]) == pytest.approx(float(value), rel=1e-12), key


def test_layers_under_ddp(ranks):
    expected = _by_depth(_net(), 0, 1)
    for found in ranks["depth"]:
        for layer in ("0", "2"):
            for key, value in expected[layer].items():
                assert float(found[layer][key]) == pytest.approx(float(value), rel=1e-7, abs=1e-11), (layer, key)
