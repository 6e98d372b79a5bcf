"""Sets that memory does not hold: read from their files by workers, they give the same run to the last bit."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from test_data import cifar, native
from test_faults import Killed, same_end
from test_recipes_distributed import ending, launch

import recipes.data.load as data
from recipes.core.cli import parse
from recipes.core.config import DataConfig, as_yaml
from recipes.core.errors import UserError
from recipes.core.interrupt import EXIT_CODE
from recipes.data import image_folder
from recipes.data import lazy_images as unread
from recipes.data.lazy_images import LazyImages, worker_count
from recipes.data.load import load
from recipes.data.split import Split
from recipes.data.torchvision_sets import torchvision_set
from recipes.evaluation.accuracy import evaluate_model
from recipes.evaluation.model_under_test import open_model
from recipes.train import main, train
from recipes.training.run_dir import RunDir

ROOT = Path(__file__).parents[2]
ON_DISK = ["--data.memory_limit", "0"]
pytestmark = [
    pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning"),  # a machine of one core
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),  # from Python 3.12 on
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three classes of photographs of sorts, unequal in size, shape and format."""
    root, draw = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for part, count in {"train": 50, "test": 8}.items():
        for index, name in enumerate("abc"):
            (root / part / name).mkdir(parents=True)
            for number in range(count + 10 * index):
                height, width = draw.integers(28, 60, 2)
                rows, columns = np.mgrid[:height, :width]
                wave = 128 + 60 * np.sin((rows * (index + 1) + columns) / 6 + draw.uniform(0, 6))
                pixels = (wave[..., None] + draw.normal(0, 30, (height, width, 3))).clip(0, 255).astype(np.uint8)
                kind = ("png", "jpg", "bmp")[number % 3]
                Image.fromarray(pixels if number % 5 else pixels[..., 0]).save(root / part / name / f"{number}.{kind}")
    return root


@pytest.fixture(scope="module")
def args(folder):
    return [
        *("cosine", "--data.name", "folder", "--data.root", str(folder), "--data.image_size", "28"),
        *("--data.batch_size", "32", "--tpt.max_epochs", "3", "--tpt.threshold", "0.2", "--tpt.min_terminal", "1"),
        *("--tpt.extend", "1", "--quiet", "true", "--measure_size", "100", "--data.label_noise", "0.1"),
        *("--augment.crop", "2", "--augment.flip", "true", "--model.model_args", "{drop_path_rate: 0.1}"),
        *("--data.train_size", "140",),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def in_memory(args, tmp_path_factory):
    return train(parse([*args, "--out", str(tmp_path_factory.mktemp("memory"))]))


@pytest.mark.parametrize("workers", ["0", "1", "2"])
def test_a_run_is_bit_equal_whether_its_images_are_held_in_memory_or_not(args, in_memory, tmp_path, workers):
    config = parse([*args, *ON_DISK, "--data.workers", workers, "--out", str(tmp_path)])
    loaded = load(config.data, seed=0, image_size=lambda own: 28)
    assert all(isinstance(part.images, LazyImages) for part in (loaded.train, loaded.val, loaded.test))
    same_end(in_memory, train(config))


def test_a_run_with_workers_that_was_killed_goes_on_bit_equal(args, in_memory, tmp_path, monkeypatch):
    calls, step = [], torch.optim.SGD.step

    def dying(self, *more, **kwargs):
        calls.append(0)
        if len(calls) == 6:
            raise Killed
        return step(self, *more, **kwargs)

    monkeypatch.setattr(torch.optim.SGD, "step", dying)
    config = parse([*args, *ON_DISK, "--data.workers", "2", "--out", str(tmp_path)])
    with pytest.raises(Killed):
        train(config)
    monkeypatch.undo()
    same_end(in_memory, train(config, resume=RunDir.unfinished(config.out, as_yaml(config))))


def test_a_stopped_process_group_finishes_its_step_and_goes_on_bit_equal(args, in_memory, tmp_path):
    """SIGTERM to every process of the job, workers too, as Slurm sends it."""
    command = [sys.executable, str(ROOT / "recipes" / "train.py"), *args, *ON_DISK, "--data.workers", "2"]
    command += ["--out", str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads()), "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while process.poll() is None and not list(tmp_path.glob("*/history.jsonl")):
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGTERM)
    said = process.communicate(timeout=120)[1]
    assert process.returncode == EXIT_CODE and "stopped at step" in said, said
    (path,) = tmp_path.iterdir()
    assert main(["--resume", str(path)]) == 0
    same_end(in_memory, path)


@pytest.mark.parametrize("workers", ["0", "2"])
def test_an_image_that_a_worker_cannot_read_is_one_line_that_names_it(tmp_path, capsys, workers):
    draw = np.random.default_rng(0)
    for name in "ab":
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(30):
            Image.fromarray(draw.integers(0, 256, (28, 28, 3), dtype=np.uint8)).save(
                tmp_path / "images" / name / f"{number}.png"
            )
    short = ["cosine", "--data.name", "folder", "--data.root", str(tmp_path / "images"), "--data.batch_size", "8"]
    short += ["--data.image_size", "28", *ON_DISK, "--data.workers", workers, "--tpt.max_epochs", "1"]
    bad = tmp_path / "images" / "b" / "7.png"
    bad.write_bytes(bad.read_bytes()[:200])
    assert main([*short, "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {bad} is not a readable image (") and said.count("\n") == 1
    bad.unlink()
    assert main([*short, "--out", str(tmp_path / "out"), "--quiet", "true"]) == 0


@pytest.mark.usefixtures("unchecked")  # torch's signal handler tells the loss wherever the run is, inside a check too,
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # or in its own loader's __del__
def test_a_lost_worker_is_one_line(args, tmp_path, monkeypatch, capsys):
    parent, real = os.getpid(), image_folder.read_image

    def dying(path, side):
        if os.getpid() != parent and path.name == "33.png":
            os.kill(os.getpid(), signal.SIGKILL)
        return real(path, side)

    monkeypatch.setattr(image_folder, "read_image", dying)
    assert main([*args, *ON_DISK, "--data.workers", "1", "--data.train_size", "162", "--out", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: a process that reads images was lost (DataLoader worker") and said.count("\n") == 1


@pytest.mark.skipif(sys.platform != "linux", reason="workers are forked, so that they have the patch")
def test_a_signal_to_a_worker_just_born_does_not_end_it(monkeypatch):
    real = torch.utils.data._utils.worker.signal_handling._set_worker_signal_handlers

    def at_once():  # after the loader's own handlers are set, before ours
        real()
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(torch.utils.data._utils.signal_handling, "_set_worker_signal_handlers", at_once)
    images = LazyImages(numbered, torch.arange(20), (3, 4, 4), 2)
    positions = torch.cat([index for _, index in images.batches([slice(10, 20), slice(0, 10)])])
    assert positions.tolist() == [*range(10, 20), *range(10)]
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, []) & {signal.SIGINT, signal.SIGTERM}


@pytest.mark.parametrize("error", [ConnectionResetError("by peer"), EOFError(), BrokenPipeError()])
def test_a_worker_lost_while_it_hands_a_batch_over_is_told_alike(error):
    def interrupted():
        yield "batch"
        raise error

    batches = unread._checked_batches(interrupted())
    assert next(batches) == "batch"
    with pytest.raises(UserError, match="a process that reads images was lost .*hung up"), unread.report_lost_workers():
        next(batches)


def numbered(number):
    return torch.full((3, 4, 4), number, dtype=torch.uint8)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_come_in_the_order_asked_for_whatever_part_of_the_set_is_taken(workers):
    target = torch.arange(100) % 7
    split = Split(LazyImages(numbered, torch.arange(100), (3, 4, 4), workers), target)
    held, turn = split.in_memory(), torch.randperm(50, generator=torch.Generator().manual_seed(0)).view(5, 10)
    assert split.images.shape == held.images.shape and split.images.nbytes == held.images.nbytes == 4800
    before = torch.get_rng_state()
    for part in (torch.arange(99, 0, -2), torch.arange(100) % 2 == 1):
        for (images, labels), (expected, right) in zip(
            split[part].batches(turn), held[part].batches(turn), strict=True
        ):
            assert torch.equal(images, expected) and images.stride() == expected.stride()
            assert torch.equal(labels, right)
        numbers = part.nonzero().flatten() if part.dtype == torch.bool else part
        assert torch.equal(torch.cat([labels for _, labels in split[part].in_batches(8)]), target[numbers])
    assert torch.equal(before, torch.get_rng_state())
    assert not list(split[torch.arange(0)].in_batches(8))


def test_mean_and_deviation_of_a_set_on_disk_are_those_of_evenly_spaced_images(monkeypatch):
    split = Split(LazyImages(numbered, torch.arange(200), (3, 4, 4), 0), torch.zeros(200, dtype=torch.long))
    mean, std = data.Dataset(("a",), split, split, split).moments()
    np.testing.assert_allclose(mean, [99.5 / 255] * 3, rtol=1e-12)
    monkeypatch.setattr(data, "MOMENT_IMAGES", 50)
    mean, std = data.Dataset(("a",), split, split, split).moments()
    np.testing.assert_allclose(mean, [np.arange(0, 200, 4).mean() / 255] * 3, rtol=1e-12)
    np.testing.assert_allclose(std, [np.arange(0, 200, 4).std() / 255] * 3, rtol=1e-9)


def test_the_limit_is_on_the_whole_set_and_reads_only_what_is_drawn(folder, monkeypatch):
    whole, drawn, opened, real = 162 + 18 + 54, 84 + 18 + 54, [], image_folder.read_image
    monkeypatch.setattr(image_folder, "read_image", lambda *given: opened.append(0) or real(*given))
    image = 3 * 28 * 28 / 2**30
    for size, limit, held in ((None, whole, True), (None, whole - 1, False), (84, drawn, True)):
        opened.clear()
        asked = DataConfig("folder", folder, batch_size=8, train_size=size, memory_limit=limit * image)
        found = load(asked, seed=0, image_size=native(28))
        parts = (found.train, found.val, found.test)
        assert {isinstance(part.images, torch.Tensor) for part in parts} == {held}
        assert len(opened) == (sum(map(len, parts)) if held else 0)


def test_evaluation_reads_from_files_too(args, in_memory, tmp_path):
    results = [
        evaluate_model(open_model(in_memory, overrides=more), split="test", overrides=more, train_images=0).result
        for more in ([], ["--data.memory_limit=0", "--data.workers=1"])
    ]
    assert results[0] == results[1] and results[0]["images"] == 54


def test_a_set_of_torchvision_stays_in_its_files_where_it_is_too_large(tmp_path, monkeypatch):
    rows = cifar(tmp_path)
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *args: True)
    config = DataConfig(name="torchvision.CIFAR10", root=tmp_path, batch_size=8, memory_limit=0, workers=1)
    parts = load(config, seed=0, image_size=native(32))
    assert isinstance(parts.train.images, LazyImages)
    ((images, target),) = parts.test.in_batches(40)
    np.testing.assert_array_equal((images * 255).round().numpy().reshape(40, -1), rows["test_batch"])
    assert target.tolist() == list(range(10)) * 4


def test_workers_default_to_the_cores_shared_among_the_ranks_of_a_node(monkeypatch):
    assert worker_count(0) == 0 and worker_count(5) == 5
    for cores, ranks, expected in ((64, 1, 8), (16, 4, 4), (2, 1, 2), (2, 4, 1)):
        monkeypatch.setattr(unread.os, "sched_getaffinity", lambda who, cores=cores: set(range(cores)), raising=False)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
        assert worker_count(None) == expected


@pytest.mark.slow
def test_ranks_read_their_own_share_and_train_the_same_run_as_one_process(folder, tmp_path):
    more = ["--data.name", "folder", "--data.root", str(folder), "--data.train_size", "141", "--augment.mixup", "0.5"]
    more += ["--loss", "{cross_entropy: {}}"]
    ends = []
    for name, ranks, where in (("one", 1, []), ("two", 2, [*ON_DISK, "--data.workers", "1"])):
        done = launch(tmp_path / name, ranks, *more, *where)
        assert done.returncode == 0, done.stderr
        ends.append(ending(tmp_path / name))
    for name, value in ends[0][0]["model"].items():
        torch.testing.assert_close(ends[1][0]["model"][name], value, rtol=1e-9, atol=1e-9)
    for first, second in zip(ends[0][1], ends[1][1], strict=True):
        assert first["train_accuracy"] == second["train_accuracy"]
        assert second["loss"] == pytest.approx(first["loss"], rel=1e-9)


def test_imagenet_is_read_from_where_torchvision_lays_it_out(tmp_path):
    draw, wnids = np.random.default_rng(0), {"n01": ("tench", "Tinca tinca"), "n02": ("crane",), "n03": ("crane",)}
    torch.save((wnids, []), tmp_path / "meta.bin")
    pixels = {}
    for part, count in (("train", 10), ("val", 3)):
        for wnid in wnids:
            (tmp_path / part / wnid).mkdir(parents=True)
            for number in range(count):
                pixels[part, wnid, number] = draw.integers(0, 256, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels[part, wnid, number]).save(tmp_path / part / wnid / f"{number}.png")
    config = DataConfig(name="torchvision.ImageNet", root=tmp_path, batch_size=2, memory_limit=0, workers=0)
    found = load(config, seed=0, image_size=native(8))
    assert found.class_names == ("tench, Tinca tinca", "crane (1)", "crane (2)")
    assert found.test.target.tolist() == [0] * 3 + [1] * 3 + [2] * 3
    expected = [pixels["val", wnid, number].transpose(2, 0, 1) for wnid in wnids for number in range(3)]
    np.testing.assert_array_equal(found.test.read().numpy(), expected)
    (tmp_path / "train" / "n02" / "4.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"torchvision.ImageNet: its image 14 is not readable .*4\.png"):
        torchvision_set(config, native(8)).train.read()


class Pets:
    """A set that calls its training part trainval, keeps a list of labels, and mixes gray images with coloured ones."""

    def __init__(self, root, split="trainval", download=False):
        if split not in ("trainval", "test"):
            raise ValueError(f"Unknown value '{split}' for argument split.")
        self.looked_at, self._labels = 0, [number % 3 for number in range(60)]

    def __len__(self):
        return len(self._labels)

    def __getitem__(self, number):
        self.looked_at += 1
        image = Image.new("L", (4, 4), number)
        return (image if number % 5 == 0 else image.convert("RGB")), self._labels[number]


def test_labels_are_taken_from_a_sets_list_and_gray_images_become_coloured(monkeypatch):
    monkeypatch.setattr(torchvision.datasets, "OxfordIIITPet", Pets)
    source = torchvision_set(DataConfig(name="torchvision.OxfordIIITPet"), native(4))
    assert source.train.target.tolist() == [number % 3 for number in range(60)]
    assert (
        source.train.images.read.found.looked_at <= 21
    )  # of 60: 9 for their pixels, 9 and one of each class for labels
    assert torch.equal(source.train.read()[:, :, 0, 0], torch.arange(60, dtype=torch.uint8)[:, None].expand(60, 3))
    monkeypatch.setattr(Pets, "labels", [0] * 60, raising=False)  # a list that says something else is passed over
    source = torchvision_set(DataConfig(name="torchvision.OxfordIIITPet"), native(4))
    assert source.train.target.tolist() == [number % 3 for number in range(60)]
