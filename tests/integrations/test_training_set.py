"""Measuring between epochs: the numbers are right, the training does not notice, two processes agree with one."""

import copy
import random
import warnings
from importlib.util import find_spec

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from timm.data.distributed_sampler import OrderedDistributedSampler
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    RandomSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from ncreg import NeuralCollapse, TPTScheduler, swap_head
from ncreg.integrations import EpochCloser, find_classifier, measure_training_set
from tests import nccl_rules, warm_start
from tests.stand_ins import ModulesToSave


def classifier(classes=3):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(8, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, classes))
    return swap_head(net, "etf", num_classes=classes, input_size=(8,)).train()


def data(rows=23):
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(torch.randn(rows, 8, generator=generator), torch.arange(rows) % 3)


def by_hand(model, rows):
    model = model.eval()
    logits, features = model(rows.tensors[0], with_features=True)
    metric = NeuralCollapse(3, model.head_hidden_size, classifier=model.head)
    metric.update(features.detach(), rows.tensors[1])
    right = float((logits.argmax(1) == rows.tensors[1]).double().mean())
    return {"accuracy": right} | {name: float(value) for name, value in metric.compute().items()}


def test_the_measures_are_those_of_one_batch_in_eval_mode():
    measured = measure_training_set(classifier(), DataLoader(data(), 5))
    expected = by_hand(classifier(), data())
    assert measured.keys() == expected.keys() and "intra_cosine" in measured
    assert measured == pytest.approx(expected, rel=1e-5, abs=1e-9)


def test_a_model_that_changes_its_input_in_place_changes_no_image_of_the_loader():
    class Centred(nn.Module):
        def forward(self, rows):
            return rows.sub_(3)

    model, rows = classifier(), data()
    apart = by_hand(copy.deepcopy(model), TensorDataset(rows.tensors[0] - 3, rows.tensors[1]))
    model.preprocess = Centred()
    batches = [(rows.tensors[0].clone(), rows.tensors[1])]
    for _ in range(2):
        assert measure_training_set(model, batches) == pytest.approx(apart, rel=1e-5, abs=1e-9)
    assert torch.equal(batches[0][0], rows.tensors[0])


def test_nothing_of_the_training_changes():
    model = classifier()
    model.backbone.eval()  # a part that its owner keeps in eval mode
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [part.training for part in model.modules()]
    torch.manual_seed(5)
    measure_training_set(model, DataLoader(data(), 5, shuffle=True))
    assert torch.rand(1) == torch.rand(1, generator=torch.Generator().manual_seed(5))
    assert modes == [part.training for part in model.modules()]
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


class Loud(Dataset):
    """Every image draws from all generators that there are without a name of their own."""

    def __init__(self, generator):
        self.generator = generator  # its own

    def __len__(self):
        return 8

    def __getitem__(self, index):
        draws = torch.rand(1, generator=self.generator) + torch.rand(1) + random.random() + np.random.rand()
        return torch.ones(8) * draws, index % 3


SAMPLERS = {
    "in order": lambda data, g: DataLoader(data, 4, generator=g),
    "shuffled": lambda data, g: DataLoader(data, 4, shuffle=True, generator=g),
    "sampler": lambda data, g: DataLoader(data, 4, sampler=RandomSampler(data, generator=g)),
    "weighted": lambda data, g: DataLoader(
        data, 4, sampler=WeightedRandomSampler(torch.ones(8), 8, False, generator=g)
    ),
    "batch sampler": lambda data, g: DataLoader(
        data, batch_sampler=BatchSampler(SubsetRandomSampler(range(8), generator=g), 4, drop_last=False)
    ),
    "workers": lambda data, g: DataLoader(
        data, 4, generator=g, num_workers=1, multiprocessing_context=warm_start.METHOD
    ),
    "wrapped": lambda data, g: SimpleLoader(DataLoader(data, 4, shuffle=True, generator=g)),
}


class SimpleLoader:
    """A loader around a loader, as timm's PrefetchLoader is."""

    def __init__(self, loader):
        self.loader = loader

    def __iter__(self):
        return iter(self.loader)


@pytest.mark.parametrize("build", SAMPLERS.values(), ids=SAMPLERS)
def test_what_training_draws_afterwards_is_what_it_would_have_drawn(build, unchecked):
    """The training loader shares its generator with the clean one, and its data draw from the global ones."""

    def draws(measure):
        torch.manual_seed(0), random.seed(0), np.random.seed(0)
        shared, own = torch.Generator().manual_seed(1), torch.Generator().manual_seed(2)
        training = DataLoader(range(8), 4, shuffle=True, generator=shared)
        clean = build(Loud(own) if build is not SAMPLERS["workers"] else data(8), shared)
        model, found = classifier(), []
        for _ in range(2):
            found += [batch.tolist() for batch in training]
            if measure:
                measure_training_set(model, clean)
            found += [random.random(), np.random.rand(), float(torch.rand(1)), float(torch.rand(1, generator=own))]
        return found

    assert draws(True) == draws(False)


def test_the_generators_come_back_from_a_measurement_that_fails():
    shared = torch.Generator().manual_seed(1)
    loader = DataLoader(TensorDataset(torch.zeros(8, 8)), 4, shuffle=True, generator=shared)
    with pytest.raises(ValueError, match="a batch must be"):
        measure_training_set(classifier(), loader)
    assert shared.get_state().equal(torch.Generator().manual_seed(1).get_state())


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda m: nn.ModuleDict({"net": m})])
def test_of_a_wrapped_classifier_the_one_inside_is_measured(wrap):
    model = classifier()
    plain = measure_training_set(model, DataLoader(data(), 5))
    wrapped = wrap(model)
    modes = [part.training for part in wrapped.modules()]
    scheduler = TPTScheduler(torch.optim.SGD(model.parameters(), lr=0.1), max_epochs=4)
    assert EpochCloser(DataLoader(data(), 5)).close(scheduler, wrapped, 1) == pytest.approx(plain, rel=1e-6, abs=1e-9)
    assert modes == [part.training for part in wrapped.modules()]


def test_a_measurement_within_autocast_has_the_dtype_of_the_weights():
    model = classifier()
    with torch.autocast("cpu", torch.bfloat16):
        measured = measure_training_set(model, DataLoader(data(), 5))
        assert torch.is_autocast_enabled("cpu")  # training goes on under it
    rows = TensorDataset(data().tensors[0].double(), data().tensors[1])
    assert measured == pytest.approx(by_hand(classifier().double(), rows), rel=1e-5, abs=1e-9)


def test_what_holds_no_classifier_is_refused_by_name(unchecked):
    closer = EpochCloser(DataLoader(data(), 5))
    with pytest.raises(TypeError, match="DataParallel holds no ncreg.Classifier"):
        closer.close(None, nn.DataParallel(nn.Linear(8, 3)), 1)


def test_dicts_of_hugging_face_are_batches_too():
    pairs = list(DataLoader(data(), 5))
    dicts = [{"pixel_values": images, "labels": labels} for images, labels in pairs]
    assert measure_training_set(classifier(), dicts) == measure_training_set(classifier(), pairs)


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "no batch to measure"),
        ([{"image": 1}], r"\['image'\]"),
        ([torch.zeros(2, 8)], "got Tensor"),
        ([(torch.zeros(3, 8), torch.zeros(2).long())], "3 images needs a label each, target has"),
    ],
)
def test_what_cannot_be_measured_is_refused(batches, message, unchecked):
    with pytest.raises(ValueError, match=message):
        measure_training_set(classifier(), batches)


def test_a_classifier_is_found_or_the_way_out_is_said(unchecked):
    one = classifier()
    assert find_classifier(nn.ModuleDict({"net": one})) is one
    with pytest.raises(TypeError, match="holds no ncreg.Classifier.*swap_head"):
        find_classifier(nn.Linear(2, 2))
    two = nn.ModuleDict({"teacher": nn.Sequential(classifier()), "net": one})
    with pytest.raises(ValueError, match=r"holds 2 ncreg.Classifiers \('teacher.0', 'net'\)") as told:
        find_classifier(two)
    way_out = str(told.value).partition("classifier=")[2]
    assert eval(way_out)(two) is two["teacher"][0]


def test_an_iterator_is_no_loader(unchecked):
    with pytest.raises(TypeError, match="read again every epoch"):
        EpochCloser(iter([1]))


def test_an_epoch_is_closed_once_and_never_skipped():
    model, closer = classifier(), EpochCloser(DataLoader(data(), 5))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = TPTScheduler(optimizer, max_epochs=4, threshold=0.1, min_terminal=1)
    assert closer.close(scheduler, model, 1)["accuracy"] > 0.1 and scheduler.onset_epoch == 1
    assert closer.close(scheduler, model, 1) is None and scheduler.epoch == 1
    with pytest.raises(ValueError, match="epoch 5 ends, the TPTScheduler stands at epoch 1.*resume"):
        closer.close(scheduler, model, 5)


class Unread(nn.Linear):
    """A head whose class vectors go by another name."""

    def __init__(self):
        super().__init__(6, 3)
        self.vectors = self._parameters.pop("weight")

    def forward(self, features):
        return features @ self.vectors.T + self.bias


def test_a_standstill_of_a_measure_that_is_not_there_is_refused(unchecked):
    model = swap_head(nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 3)), Unread(), num_classes=3, input_size=(8,))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    closer = EpochCloser(DataLoader(data(), 5), watch="nc3")
    waiting = TPTScheduler(optimizer, max_epochs=9, stop_patience=2)
    with pytest.raises(ValueError, match="watch='nc3' is not measured.*stop_patience=2.*watch 'nc1' or"):
        closer.close(waiting, model, 1)
    for more in ({}, {"stop_patience": 2, "extend": None}):  # nobody waits
        closer.close(TPTScheduler(optimizer, max_epochs=9, **more), model, 1)
    assert EpochCloser(DataLoader(data(), 5)).close(waiting, model, 1)["nc1"] > 0


def test_a_nearest_head_that_nobody_updates_is_said_once():
    model = swap_head(nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 3)), "nearest_etf", num_classes=3, input_size=(8,))
    closer = EpochCloser(DataLoader(data(), 5))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        closer.close(None, model, 0)  # before training
    with pytest.warns(UserWarning, match=r"handed no batch.*head.update\(features.detach\(\), target\)") as said:
        for epoch in (1, 2):
            closer.close(None, model, epoch)
    assert len([warning for warning in said if "handed no batch" in str(warning.message)]) == 1
    model.head = ModulesToSave(model.head, copy.deepcopy(model.head))  # as PEFT wraps it
    with pytest.warns(UserWarning, match="handed no batch"):
        EpochCloser(DataLoader(data(), 5)).close(None, model, 1)
    model.head.modules_to_save["default"].update(torch.eye(3, 6), torch.arange(3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        EpochCloser(DataLoader(data(), 5)).close(None, model, 1)


def _measure_on(rank, world, port, queue):
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    nccl_rules.enforce()
    model = classifier()
    if rank:  # each process has gathered its own statistics
        for buffer in model.buffers():
            buffer.add_(1)
    own = [buffer.clone() for buffer in model.buffers()]
    whole = measure_training_set(model, DataLoader(data(), 5))
    wrapped = nn.parallel.DistributedDataParallel(copy.deepcopy(model))
    assert measure_training_set(wrapped, DataLoader(data(), 5)) == whole
    place = {"num_replicas": world, "rank": rank}
    shared = []
    for rows in (24, 23):  # of 23 images one process would see one twice
        samplers = DistributedSampler(data(rows), **place), OrderedDistributedSampler(data(rows), **place)
        loaders = [DataLoader(data(rows), 4, sampler=sampler) for sampler in samplers]
        loaders.append(DataLoader(data(rows), batch_sampler=BatchSampler(samplers[0], 5, drop_last=False)))
        shared += [(rows, measure_training_set(model, loader)) for loader in loaders]
    torch.manual_seed(rank)  # each process draws for itself, as its augmentation should
    drawn = torch.Generator().manual_seed(10 + rank)
    for more in ({}, {"generator": drawn}):
        shared.append((23, measure_training_set(model, DataLoader(data(), 5, shuffle=True, **more))))
    assert torch.rand(1) == torch.rand(1, generator=torch.Generator().manual_seed(rank))
    assert torch.equal(drawn.get_state(), torch.Generator().manual_seed(10 + rank).get_state())
    if find_spec("accelerate"):
        from accelerate.data_loader import BatchSamplerShard

        divided = BatchSamplerShard(BatchSampler(range(23), 5, drop_last=False), world, rank)
        with pytest.raises(ValueError, match="divided by Accelerate.*before prepare"):
            measure_training_set(model, DataLoader(data(), batch_sampler=divided))
    sharded, mesh = classifier(), dist.device_mesh.init_device_mesh("cpu", (world,))
    for part in (sharded.backbone, sharded):
        fully_shard(part, mesh=mesh)
    for rows, size in ((23, 5), (23, 8), (11, 12)):  # 5, 3 and 1 batches: on one process one more than on the other
        shared.append((rows, measure_training_set(sharded, DataLoader(data(rows), size))))
    few = DataLoader(data(9), 4, sampler=DistributedSampler(data(9), **place))  # 4 of 5 are one process's own
    shared.append((9, measure_training_set(sharded, few)))
    kept = all(torch.equal(buffer, before) for buffer, before in zip(model.buffers(), own, strict=True))
    queue.put((rank, whole, shared, kept))
    dist.barrier()
    dist.destroy_process_group()


def test_two_processes_agree_with_one(free_port):
    context = mp.get_context(warm_start.METHOD)
    queue = context.Queue()
    processes = [context.Process(target=_measure_on, args=(rank, 2, free_port, queue)) for rank in range(2)]
    for process in processes:
        process.start()
    answers = [queue.get(timeout=120) for _ in processes]
    for process in processes:
        process.join(60)
    for _, whole, shared, kept in answers:
        assert whole == pytest.approx(by_hand(classifier(), data()), rel=1e-5, abs=1e-9)
        for rows, measures in shared:
            assert measures == pytest.approx(by_hand(classifier(), data(rows)), rel=1e-5, abs=1e-9)
        assert kept
