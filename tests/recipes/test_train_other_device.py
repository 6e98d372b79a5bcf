"""Training and evaluating on a device that is not the CPU: the run's numbers are the CPU's, to the last digit."""

import json

import pytest

from recipes import evaluate, train
from tests.other_device import DEVICE, OtherDevice

OPTIONS = {
    "etf": ["etf"],
    "supcon": ["supcon", "--optim.accumulate=2"],
    "mixed, long tail": [
        "default", "--augment.crop=2", "--augment.flip=true", "--augment.mixup=0.4", "--augment.cutmix=0.5",
        "--data.imbalance=2", "--data.label_noise=0.2", "--optim.name=adamw", "--optim.lr=0.001",
        "--loss.logit_adjusted.class_weights=effective",
    ],
}  # fmt: skip


def history(words, folder):
    size = ["--tpt.max_epochs=1", "--data.train_size=60", "--data.batch_size=30"]
    assert not train.main([*words, *size, f"--out={folder}", "--quiet=true"])
    (run,) = folder.iterdir()
    lines = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
    return run, lines


def without_times(value):
    if isinstance(value, dict):
        return {key: without_times(item) for key, item in value.items() if "second" not in key and "per_s" not in key}
    return value


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.filterwarnings("ignore:at..frobenius_norm is deprecated")
def test_a_run_on_another_device_is_the_run_on_the_cpu(name, tmp_path):
    _, expected = history([*OPTIONS[name], "--device=cpu"], tmp_path / "cpu")
    with OtherDevice():
        run, found = history([*OPTIONS[name], f"--device={DEVICE}"], tmp_path / "other")
        if name == "etf":
            assert not evaluate.main([str(run), f"--device={DEVICE}"])
    assert [without_times(line) for line in found] == [without_times(line) for line in expected]
