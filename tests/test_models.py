import copy

import pytest
import timm
import torch

from ncreg.models import Normalize, swap_head


def images(n=4, size=32, channels=3):
    return torch.rand(n, channels, size, size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_convnext"])
@pytest.mark.parametrize("training", [True, False])
def test_features_are_the_models_own(name, training):
    model = timm.create_model(name, num_classes=10).train(training)
    before = copy.deepcopy(model.state_dict())
    classifier = swap_head(model, "etf", norm="none")
    assert classifier.training == training and classifier.backbone.training == training
    x = images()
    model.eval(), classifier.eval()
    logits, features = classifier(x, with_features=True)
    torch.testing.assert_close(features, model.forward_head(model.forward_features(x), pre_logits=True))
    torch.testing.assert_close(logits, classifier.head(features))
    after = model.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before) and before.keys() == after.keys()


def test_runs_that_differ_in_the_head_alone_stay_paired():
    drawn = []
    for head in ("etf", "linear", "cosine"):
        torch.manual_seed(7)
        classifier = swap_head("test_resnet", head, num_classes=5, project=16)
        shared = torch.cat([p.flatten() for p in (*classifier.backbone.parameters(), classifier.project.weight)])
        drawn.append(torch.cat([shared, torch.rand(3)]))
    assert torch.equal(drawn[0], drawn[1]) and torch.equal(drawn[0], drawn[2])


def test_normalize_is_the_affine_map_per_channel():
    mean, std = [0.1, 0.2, 0.3], [0.5, 0.25, 1.0]
    x = images()
    expected = torch.stack([(x[:, c] - mean[c]) / std[c] for c in range(3)], dim=1)
    torch.testing.assert_close(Normalize(mean, std)(x), expected)
