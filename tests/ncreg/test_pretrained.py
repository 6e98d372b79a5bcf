"""Classifiers in folders as on the hub, and what timm's tools read of a Classifier."""

import json
import shutil

import numpy as np
import pytest
import timm
import torch
import torchvision
from safetensors.torch import load_file, save_file
from test_models_any import stirred
from timm.data import resolve_model_data_config
from timm.models import save_for_hf
from timm.models._features import FeatureGetterNet

from ncreg import Classifier, Normalize, fold, load_classifier, load_weights, save_checkpoint, swap_head
from ncreg.checkpoint import classifier_header
from tests.stand_ins import quantize

pytestmark = pytest.mark.usefixtures("unchecked")
X = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))

CASES = {
    "etf": dict(model="test_resnet", head="etf", num_classes=10),
    "projected": dict(model="test_resnet", head="linear", num_classes=5, project=7, norm="layer"),
    "fixed projector": dict(model="test_resnet", head="linear", num_classes=5, project="fixed", norm="none"),
    "scaled": dict(model="test_resnet", head="cosine", num_classes=5, norm="none", head_args={"scale": 3.0}),
    "re-aimed": dict(model="test_resnet", head="nearest_etf", num_classes=4, head_args={"seed": 3}),
    "vit": dict(model="test_vit", head="etf", num_classes=10, model_args={"img_size": 32, "drop_path_rate": 0.1}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_folder_gives_the_same_classifier_back(case, tmp_path):
    classifier = stirred(swap_head(**CASES[case]))
    classifier.preprocess = Normalize([0.4, 0.5, 0.6], [0.2, 0.3, 0.4])
    classifier.image_shape, classifier.class_names = (3, 32, 32), tuple(map(str, range(classifier.num_classes)))
    classifier.to(memory_format=torch.channels_last)
    state = torch.get_rng_state()
    classifier.save_pretrained(tmp_path / "mine")
    again = Classifier.from_pretrained(tmp_path / "mine")
    assert torch.equal(torch.get_rng_state(), state)
    for name, value in classifier.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    again.to(memory_format=torch.channels_last)  # the order in memory decides how convolutions round
    assert torch.equal(again(X), classifier(X)) and not again.training
    assert again.pretrained_cfg == classifier.pretrained_cfg and again.class_names == classifier.class_names
    assert {n: type(m) for n, m in again.named_modules()} == {n: type(m) for n, m in classifier.named_modules()}
    again.save_pretrained(tmp_path / "again")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "mine" / name).read_bytes()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_tensor_comes_back_in_its_own_dtype(dtype, tmp_path):
    """A norm that is kept in float32 behind a backbone in half precision, as LastBatchNorm advises."""
    classifier = stirred(swap_head("test_resnet", "etf", num_classes=5)).to(dtype)
    classifier.norm.float()
    classifier.norm.running_mean += 1e-5
    classifier.save_pretrained(tmp_path)
    again = Classifier.from_pretrained(tmp_path)
    for name, value in classifier.state_dict().items():
        assert again.state_dict()[name].dtype == value.dtype and torch.equal(again.state_dict()[name], value), name


def test_what_training_leaves_behind_is_no_change(tmp_path):
    """Checkpointed gradients, in-place activations and a run of forward passes change no prediction."""
    classifier = swap_head("regnety_002", "etf", num_classes=3)
    classifier.backbone.set_grad_checkpointing(True)
    classifier.train()(torch.rand(2, 3, 64, 64)).sum().backward()
    classifier.eval().save_pretrained(tmp_path)
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(Classifier.from_pretrained(tmp_path)(x), classifier(x))


def test_a_timm_model_with_its_own_weights_and_changes_since(tmp_path):
    classifier = swap_head(
        timm.create_model("test_vit", num_classes=7, global_pool="avg", in_chans=3), "linear"
    ).double()
    classifier.set_input_size(img_size=64)
    classifier.reset_classifier(4)
    stirred(classifier).save_pretrained(tmp_path)
    x, again = torch.rand(2, 3, 64, 64, dtype=torch.float64), Classifier.from_pretrained(tmp_path)
    assert torch.equal(again(x), classifier(x)) and again.pretrained_cfg["input_size"] == (3, 64, 64)


IMAGES = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6), "interpolation": "bilinear", "crop_pct": 0.5}


@pytest.mark.filterwarnings("ignore:head='keep' on random weights", "ignore:dropout of rate 0.2")
@pytest.mark.parametrize("head", ["linear", "keep"])
@pytest.mark.parametrize("name", ["test_resnet", "deit_tiny_distilled_patch16_224", "torchvision:mobilenet_v2"])
def test_the_images_of_a_backbones_own_weights_are_those_of_its_folder(name, head, tmp_path):
    """Weights of one architecture differ in them: their tag, a file or a repository says so, not the architecture."""
    small = {"depth": 1, "embed_dim": 12} if name.startswith("deit") else {}
    classifier = swap_head(name, head, num_classes=3, model_args=small)
    backbone = classifier._named_backbone[1]
    backbone.pretrained_cfg = {k: v for k, v in backbone.pretrained_cfg.items() if k != "crop_mode"} | IMAGES
    classifier.eval().save_pretrained(tmp_path)
    again = Classifier.from_pretrained(tmp_path)
    told = resolve_model_data_config(again)
    assert {key: told[key] for key in IMAGES} == IMAGES and again.pretrained_cfg == classifier.pretrained_cfg
    (tmp_path / "config.json").write_text(
        json.dumps({k: v for k, v in json.loads((tmp_path / "config.json").read_text()).items() if k != "backbone_cfg"})
    )
    assert Classifier.from_pretrained(tmp_path).num_classes == 3  # a folder of an earlier version


def test_what_no_file_can_describe_is_refused(tmp_path):
    by_module = swap_head("test_resnet", torch.nn.Linear(96, 3))
    foreign = swap_head(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(8, 3)), "linear", classifier="1")
    for classifier in (by_module, foreign):
        with pytest.raises(
            ValueError, match="from a timm backbone, or from torchvision:NAME, and from head and norm by name"
        ):
            classifier.save_pretrained(tmp_path)
    changed = swap_head("test_resnet", "linear", num_classes=3)
    changed.norm = torch.nn.LayerNorm(96)
    with pytest.raises(ValueError, match="norm has changed since swap_head built it"):
        changed.save_pretrained(tmp_path)
    for part, name in (("head", "scale"), ("norm", "eps")):  # no tensor: a file would lose them silently
        annealed = swap_head("test_resnet", "etf", num_classes=3, norm="batch")
        setattr(getattr(annealed, part), name, 0.25)
        with pytest.raises(ValueError, match=rf"{part}\.{name}=0\.25 was set later"):
            annealed.save_pretrained(tmp_path)
    for change, words in {
        "head.scale = torch.tensor(0.25)": r"head\.scale=0\.25 was set later",
        "head.scale = np.float32(0.25)": r"head\.scale=0\.25 was set later",
        "norm.momentum = None": r"norm\.momentum=None was set later.* give 0\.1",
        "backbone.layer1[0].bn1.eps = 0.1": r"backbone\.layer1\.0\.bn1\.eps=0\.1 was set later",
        "backbone.layer1[0].conv2.stride = (2, 2)": r"backbone\.layer1\.0\.conv2\.stride=\(2, 2\) was set later",
        "head.scale = torch.nn.Parameter(torch.tensor(0.25))": r"head has changed since .* ncreg\.fold\(classifier\)",
    }.items():
        classifier = swap_head("test_resnet", "etf", num_classes=3, norm="batch")
        exec(f"classifier.{change}", {"classifier": classifier, "torch": torch, "np": np})
        with pytest.raises(ValueError, match=words):
            classifier.save_pretrained(tmp_path)
    custom = swap_head("test_resnet", num_classes=3)
    custom.preprocess = torch.nn.ReLU()
    with pytest.raises(ValueError, match="preprocess=ReLU cannot be saved"):
        custom.save_pretrained(tmp_path)
    headless = swap_head("test_resnet", num_classes=3)
    headless.reset_classifier(0)
    with pytest.raises(ValueError, match=r"reset_classifier\(C\) first"):
        headless.save_pretrained(tmp_path)
    args = swap_head("test_resnet", num_classes=3, model_args={"act_layer": torch.nn.ReLU6})
    with pytest.raises(ValueError, match="writes arguments as JSON"):
        args.save_pretrained(tmp_path)
    quantized = swap_head("test_resnet", "linear", num_classes=3)
    quantize(quantized.head)
    with pytest.raises(ValueError, match=r"head\.weight is of class Quantized.* save the classifier first"):
        quantized.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


NUMBERS = {  # as np.arange, a sweep or torch.randperm hand them over
    "numpy": (np.int64(6), {"scale": np.float32(3.3), "permutation": np.array([2, 0, 1]), "seed": np.int32(5)}),
    "torch": (torch.tensor(6), {"scale": torch.tensor(3.3), "permutation": torch.tensor([2, 0, 1])}),
}


@pytest.mark.parametrize("kind", NUMBERS)
def test_numbers_of_other_libraries_come_back(kind, tmp_path):
    project, head_args = NUMBERS[kind]
    classifier = swap_head("test_resnet", num_classes=3, project=project, head_args=head_args).eval()
    classifier.class_names = np.array(["cat", "dog", "owl"])
    classifier.save_pretrained(tmp_path)
    again = Classifier.from_pretrained(tmp_path)
    assert torch.equal(again(X), classifier(X)) and again.class_names == ("cat", "dog", "owl")
    build = {"model": "test_resnet", "num_classes": np.int64(3), "project": project, "head_args": head_args}
    header = classifier_header(build=build, class_names=classifier.class_names, image_shape=np.array([3, 32, 32]))
    save_checkpoint(tmp_path / "last.pt", header | {"model": classifier.state_dict()})
    assert torch.equal(load_classifier(tmp_path / "last.pt")(X), classifier(X))


@pytest.mark.parametrize(
    ("names", "error", "words"),
    [(["cat", "dog"], ValueError, "2 class_names for a classifier of 3"), ([0, 1, 2], TypeError, "list of names")],
)
def test_names_that_could_not_be_read_again_are_not_written(names, error, words, tmp_path):
    classifier = swap_head("test_resnet", num_classes=3)
    classifier.class_names = names
    with pytest.raises(error, match=words):
        classifier.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_folders_that_give_no_classifier_are_named(tmp_path):
    good = tmp_path / "good"
    swap_head("test_resnet", num_classes=3).save_pretrained(good)

    def spoilt(change):
        shutil.rmtree(tmp_path / "bad", ignore_errors=True)
        shutil.copytree(good, tmp_path / "bad")
        change(tmp_path / "bad")
        return tmp_path / "bad"

    def without_a_tensor(folder):
        tensors = load_file(folder / "model.safetensors")
        save_file(
            {name: value for name, value in tensors.items() if name != "head.weight"}, folder / "model.safetensors"
        )

    def truncated(folder):
        (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:1000])

    for change, words in {
        without_a_tensor: "does not give back a Classifier: .*head.weight",
        truncated: "does not give back a Classifier",
        lambda folder: (folder / "config.json").write_text("{"): "does not give back a Classifier",
        lambda folder: (folder / "config.json").write_text("{}"): "its architecture is None, not ncreg.Classifier",
    }.items():
        with pytest.raises(ValueError, match=words):
            Classifier.from_pretrained(spoilt(change))
    with pytest.raises(FileNotFoundError, match="it has no config.json"):
        Classifier.from_pretrained(spoilt(lambda folder: (folder / "config.json").unlink()))
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="a run folder is read by ncreg.load_classifier"):
        Classifier.from_pretrained(tmp_path / "run")
    with pytest.raises(FileNotFoundError, match="is no folder, and no repository"):
        Classifier.from_pretrained(tmp_path / "gone")


def test_timm_does_not_take_a_classifiers_folder_for_its_own(tmp_path):
    classifier = swap_head("test_resnet", num_classes=3)
    classifier.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="Unknown model .ncreg.Classifier"):
        timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    with pytest.raises(ValueError, match="holds a Classifier: Classifier.from_pretrained reads it"):
        swap_head(f"local-dir:{tmp_path}", num_classes=3)
    start = swap_head("test_resnet", num_classes=9, weights=load_weights(tmp_path))
    assert torch.equal(start.backbone.conv1[0].weight, classifier.backbone.conv1[0].weight)


def test_timm_does_not_write_a_classifier_as_one_of_its_own(tmp_path):
    classifier = swap_head("test_resnet", num_classes=3)
    with pytest.raises(ValueError, match=r"ncreg.Classifier \(its save_pretrained writes it; ncreg.fold"):
        save_for_hf(classifier, str(tmp_path / "hub"))
    assert not (tmp_path / "hub" / "config.json").exists()
    assert hasattr(classifier, "_model_args")  # torch.jit.trace and timm's create_model look at every attribute
    save_for_hf(fold(stirred(classifier), normalize="keep"), str(tmp_path / "kept"))
    with pytest.raises(RuntimeError, match="Unknown model"):  # the keys are not those of the architecture
        timm.create_model(f"local-dir:{tmp_path / 'kept'}", pretrained=True)


@pytest.mark.parametrize("case", ["linear", "vit"])
def test_a_folded_model_through_timms_folder_has_equal_logits(case, tmp_path):
    args = {"model": "test_resnet"} if case == "linear" else {"model": "test_vit", "model_args": {"img_size": 32}}
    classifier = stirred(swap_head(head="linear", num_classes=5, **args)).to(memory_format=torch.channels_last)
    classifier.image_shape, classifier.class_names = (3, 32, 32), tuple("abcde")
    folded = fold(classifier)
    save_for_hf(folded, str(tmp_path / "hub"), safe_serialization=True)
    again = timm.create_model(f"local-dir:{tmp_path / 'hub'}", pretrained=True).eval()
    assert torch.equal(again(X), folded(X)) and again.num_classes == 5
    told, expected = (json.dumps(resolve_model_data_config(model)) for model in (again, folded))
    assert told == expected
    assert list(again.pretrained_cfg["label_names"]) == list("abcde")
    assert json.loads((tmp_path / "hub" / "config.json").read_text())["architecture"] == args["model"]


def test_input_channels_and_size():
    classifier = swap_head("test_vit", num_classes=3, model_args={"in_chans": 1})
    assert classifier.in_chans == 1 and timm.models.get_model_input_config(classifier)["input_size"] == (1, 160, 160)
    classifier.image_shape = (1, 160, 160)
    classifier.set_input_size(img_size=64)
    assert classifier.image_shape == (1, 64, 64) == classifier.pretrained_cfg["input_size"]
    assert classifier(torch.rand(2, 1, 64, 64)).shape == (2, 3)
    with pytest.raises(AttributeError, match="set_input_size is timm's: the backbone ResNet has none"):
        swap_head("test_resnet", num_classes=3).set_input_size(64)


def test_timms_feature_extractor_takes_a_classifier():
    classifier = swap_head("test_resnet", num_classes=3).eval()
    classifier.preprocess = Normalize([0.5], [0.25])
    ours, theirs = FeatureGetterNet(classifier)(X), FeatureGetterNet(classifier.backbone, prune=False)((X - 0.5) / 0.25)
    assert len(ours) == len(theirs) and all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_images_of_another_training_and_other_classes_are_forgotten():
    classifier = swap_head("resnet18.a1_in1k", num_classes=3)
    assert "test_input_size" in classifier.pretrained_cfg
    classifier.image_shape, classifier.class_names = (3, 64, 48), ("a", "b", "c")
    cfg = classifier.pretrained_cfg
    assert cfg["input_size"] == (3, 64, 48) and cfg["pool_size"] is None and cfg["label_names"] == ("a", "b", "c")
    assert not {"test_input_size", "test_crop_pct"} & set(cfg)
    again = swap_head(classifier, "linear")
    assert again.image_shape == (3, 64, 48) and again.class_names == ("a", "b", "c")
    again.reset_classifier(2)
    assert "label_names" not in again.pretrained_cfg
    assert swap_head(classifier, "linear", num_classes=2).class_names is None
    classifier.data_config = {"interpolation": "bicubic", "crop_pct": 0.9}
    told = resolve_model_data_config(classifier)
    assert (told["interpolation"], told["crop_pct"]) == ("bicubic", 0.9)


def test_a_loop_that_normalises_by_itself_says_so_without_preprocess():
    classifier = swap_head("test_resnet", "linear", num_classes=3).eval()
    normalised = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}
    classifier.image_shape, classifier.data_config = (3, 64, 64), normalised | {"crop_pct": 0.9}
    for model in (classifier, fold(classifier)):  # takes the same images, so there is nothing to warn of
        told = resolve_model_data_config(model)
        assert {key: told[key] for key in ("mean", "std", "crop_pct", "input_size")} == {
            **normalised,
            "crop_pct": 0.9,
            "input_size": (3, 64, 64),
        }
    classifier.preprocess = Normalize([0.5] * 3, [0.25] * 3)  # now images in [0, 1]
    assert resolve_model_data_config(classifier)["mean"] == (0, 0, 0)


def test_torchvisions_models_say_their_images_too():
    classifier = swap_head(torchvision.models.resnet18(num_classes=3), "linear").eval()
    assert not hasattr(classifier, "pretrained_cfg") and not hasattr(fold(classifier), "pretrained_cfg")
    classifier.preprocess = Normalize([0.5] * 3, [0.25] * 3)
    told = resolve_model_data_config(classifier)
    assert (told["mean"], told["std"], told["input_size"]) == ((0, 0, 0), (1, 1, 1), (3, 224, 224))
    classifier.image_shape = (3, 32, 32)
    with pytest.warns(UserWarning, match="preprocess is not part"):
        folded = fold(classifier)
    told = resolve_model_data_config(folded)
    assert (told["mean"], told["std"], told["input_size"]) == ((0.5,) * 3, (0.25,) * 3, (3, 32, 32))
    own = swap_head("test_resnet", num_classes=3)
    own.preprocess = torch.nn.Sequential(Normalize([0.5], [0.5]))  # of one's own: it takes images in [0, 1] as well
    assert resolve_model_data_config(own)["mean"] == (0, 0, 0)


def test_a_backbone_that_was_folded_with_its_head_is_refused_with_the_way_out(tmp_path):
    folded = fold(swap_head("test_resnet", "etf", num_classes=5), normalize="keep")
    with pytest.raises(
        ValueError, match=r"comes from ncreg\.fold\(normalize='keep'\) of test_resnet.*normalize='drop'"
    ):
        swap_head(folded, "etf", num_classes=4).save_pretrained(tmp_path)
    plain = swap_head(fold(swap_head("test_resnet", "etf", num_classes=5), normalize="drop"), "etf", num_classes=4)
    plain.save_pretrained(tmp_path)
    again = Classifier.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(plain.state_dict().values(), again.state_dict().values(), strict=True))
