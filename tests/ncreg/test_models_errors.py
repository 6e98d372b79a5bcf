"""What swap_head says to input it can't take."""

import pytest
import timm
import torch
from torch import nn

from ncreg.models import Classifier, Normalize, swap_head


class Net(nn.Module):
    """A classifier of no library, its layers under names of their own."""

    def __init__(self, last=None):
        super().__init__()
        self.unused = nn.Bilinear(3, 4, 5)
        self.body = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.out = nn.ModuleDict({"logits": nn.Linear(8, 5)})
        self.last = last or nn.Identity()

    def forward(self, x):
        return self.last(self.out["logits"](self.body(x)))


class Vectors(nn.Module):
    """Two layers on vectors, in no Sequential."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.second(self.first(x).relu())


class Temperature(nn.Module):
    def forward(self, logits):
        return logits / 0.1


BAD = {
    "no timm model.*close: test_resnet": dict(model="test_resnett"),
    "no timm model.*a repository of the hub is 'hf-hub:timm/test_resnet'": dict(model="timm/test_resnet"),
    "a tag that timm does not know; known: test_resnet.r160_in1k": dict(model="test_resnet.nope"),
    r"model_args\['features_only'\]=True: 'test_resnet' would return a list of feature maps.*leave it out": dict(
        model="test_resnet", model_args={"features_only": True}
    ),
    "'mobilenetv5_300m_enc' is an encoder": dict(model="mobilenetv5_300m_enc"),
    "'qwen3_vit_88m_enc' is an encoder.*'qwen3_vit_88m' has the same backbone": dict(model="qwen3_vit_88m_enc"),
    "head='etv' is unknown; known: .*etf": dict(head="etv"),
    "norm 'batsch' is unknown": dict(norm="batsch"),
    "project=0": dict(project=0),
    "project='etf' must be a width .an integer of at least 1., 'fixed' or None": dict(project="etf"),
    "num_classes=0 must be at least 2": dict(num_classes=0),
    "head_args..sead..=3 is unknown; known: structure, normalize, .*seed": dict(head_args={"sead": 3}),
    "head_args..scal..=3.0 is unknown; known: seed, normalize, scale, permutation, similarity$": dict(
        head="orthoplex", head_args={"scal": 3.0}
    ),
    "model='test_resnet': model_args..width..=4 is unknown; ResNet takes block, layers, .*in_chans, .*drop_rate": dict(
        model_args={"width": 4}
    ),
    "model_args..depths..=4 is unknown; VisionTransformer takes img_size, .*depth, ": dict(
        model="test_vit", model_args={"depths": 4}
    ),
    "model='torchvision:resnet18' does not take .*model_args..depth..=4 is unknown; ResNet takes block, .*groups": dict(
        model="torchvision:resnet18", model_args={"depth": 4}
    ),
    "100.*project=": dict(num_classes=100, model="test_convnext"),
    "num_classes=1\\b": dict(num_classes=1),
    "num_classes is required": dict(num_classes=None, model=timm.create_model("test_resnet", num_classes=0)),
    "model_args holds num_classes": dict(model_args={"num_classes": 3}),
    "model_args=.* is for timm names": dict(model=Net(), model_args={"in_chans": 3}),
    "head_args=.* is for heads by name": dict(head=nn.Linear(96, 10), head_args={"scale": 1.0}),
    "head takes 95 features, the model gives 96: pass project=95": dict(head=nn.Linear(95, 10)),
    "head gives 9 logits where num_classes=10": dict(head=nn.Linear(96, 9)),
    "shape \\(1, 96, .*global_pool": dict(model=timm.create_model("test_resnet", num_classes=0, global_pool="")),
    "is for modules": dict(classifier="fc"),
    "'nope' is no module.*'out.logits' \\(Linear, 5 out\\), 'body.0' \\(Conv2d, 8 out\\)": dict(
        model=Net(), classifier="nope"
    ),
    "something follows the classifier 'out.logits'": dict(model=Net(last=nn.LogSoftmax(1))),
    "something follows the classifier 'out.logits' \\(a softmax": dict(model=Net(last=Temperature())),
    "can't be found: no Linear or Conv2d has the 1 .*candidates": dict(model=Net(last=nn.AdaptiveAvgPool1d(1))),
    "can't be found: forward returns a Tensor of shape.*candidates": dict(model=nn.Conv2d(3, 4, 1)),
    "can't be found: forward returns a list": dict(model=timm.create_model("test_resnet", features_only=True)),
    "the model without 'body.0' failed": dict(model=Net(), classifier="body.0", input_size=(1, 8, 8)),
    "'unused' is not what the model ends in": dict(model=Net(), classifier="unused", input_size=(1, 8, 8)),
    "classifier='' is the whole model": dict(model=Net(), classifier=""),
    "norm=LayerNorm does not take the features .batch, 96.*project=": dict(norm=nn.LayerNorm(7)),
    "norm=BatchNorm1d does not take the features": dict(norm=nn.BatchNorm1d(7)),
    "head_args holds num_classes": dict(head_args={"num_classes": 4}),
    "something follows the classifier '0'": dict(
        model=nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6)), classifier="0"
    ),
    "the model without 'first' failed|'first' is not what the model ends in": dict(model=Vectors(), classifier="first"),
    "failed on an example of shape \\(1, 3, 224, 224\\).*input_size=": dict(model=nn.Linear(4, 3)),
}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_answered_with_a_way_out(message):
    arguments = {"model": "test_resnet", "num_classes": 10} | BAD[message]
    with pytest.raises(ValueError, match=f"(?s){message}"):
        swap_head(**arguments)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name", ["project", "num_classes"])
def test_sizes_are_integers(name):
    with pytest.raises(TypeError, match=f"{name}=9.5"):
        swap_head(**{"model": "test_resnet", "num_classes": 10, name: 9.5})


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name", ["model", "head", "norm"])
def test_neither_name_nor_module(name):
    with pytest.raises(TypeError, match=f"{name} must be a name or an nn.Module, got int 3"):
        swap_head(**{"model": "test_resnet", "num_classes": 10, name: 3})


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    "mean, std", [([0.5], [0.5, 0.5]), ([], []), ([0.5], [0.0]), ([0.5], [float("nan")]), ([float("nan")], [1.0])]
)
def test_normalize_refuses(mean, std):
    with pytest.raises(ValueError, match="mean|std"):
        Normalize(mean, std)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    "mean, std, words",
    [
        ("a", "b", "mean='a' must be a sequence of numbers"),
        (0.5, 0.5, "mean=0.5 must be a sequence of numbers"),
        ([0.5], [True], r"std\[0\]=True must be a number"),
    ],
)
def test_normalize_takes_sequences_of_numbers(mean, std, words):
    with pytest.raises(TypeError, match=words):
        Normalize(mean, std)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    "wrong, words",
    [
        ({"input_size": "224"}, "input_size='224' must be a sequence of integers"),
        ({"input_size": 224}, "input_size=224 must be a sequence of integers"),
        ({"input_size": (3, "a", 8)}, r"input_size\[1\]='a' must be an integer"),
        ({"head_args": "a"}, "head_args='a' must be a dict"),
        ({"model_args": ["a"]}, r"model_args=\['a'\] must be a dict"),
        ({"classifier": 6}, "classifier=6 must be the path"),
        ({"num_classes": "10", "head": nn.Linear(96, 10)}, "num_classes='10' must be an integer"),
    ],
)
def test_arguments_of_another_kind(wrong, words):
    with pytest.raises(TypeError, match=words):
        swap_head(**({"model": "test_resnet", "num_classes": 10} | wrong))


@pytest.mark.usefixtures("unchecked")
def test_switches_and_numbers_of_a_classifier():
    parts = nn.Identity(), nn.Identity(), nn.Linear(3, 4)
    with pytest.raises(TypeError, match="with_features='False' must be True or False"):
        Classifier(*parts)(torch.ones(2, 3), with_features="False")
    with pytest.raises(TypeError, match="num_classes='5' must be an integer"):
        Classifier(*parts, num_classes="5")


@pytest.mark.usefixtures("unchecked")
def test_images_that_a_normalised_model_would_misread_are_refused():
    model = swap_head("test_resnet", "etf", num_classes=4).eval()
    model.preprocess = Normalize([0.5] * 3, [0.25] * 3)
    images = torch.rand(2, 3, 32, 32)
    with pytest.raises(TypeError, match=r"images must be floats in \[0, 1\], got torch.uint8: images.float\(\) / 255"):
        model((images * 255).byte())
    for wrong in (images[:, :1], images.movedim(1, -1), images[0, 0]):
        with pytest.raises(ValueError, match=r"images must be \(batch, 3, height, width\), got \("):
            model(wrong)
    assert torch.equal(torch.fx.symbolic_trace(model)(images), model(images))
    assert torch.equal(Normalize([0.5], [0.25])(images), Normalize([0.5] * 3, [0.25] * 3)(images))


@pytest.mark.parametrize("classifier", [None, "cls_classifier"])
@pytest.mark.parametrize("head", ["etf", "keep"])
def test_a_distilled_pair_of_hugging_face_is_refused_by_name(classifier, head):
    """With the path of one classifier it was built, and failed at its first image."""
    transformers = pytest.importorskip("transformers")
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    config = transformers.DeiTConfig(**sizes, image_size=32, patch_size=16, num_labels=4)
    pair = transformers.DeiTForImageClassificationWithTeacher(config)
    said = r"model=DeiTForImageClassificationWithTeacher returns the mean of two.*DeiTForImageClassification\.from_pre"
    with pytest.raises(ValueError, match=said):
        swap_head(pair, head, classifier=classifier)
    plain = transformers.DeiTForImageClassification(config)
    assert swap_head(plain, "etf", num_classes=5)(torch.rand(2, 3, 32, 32)).shape == (2, 5)
