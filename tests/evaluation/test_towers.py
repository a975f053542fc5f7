"""Zero-shot classification and linear probes of image towers, against what they are by hand."""

import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from bcos_rt import Recipe, bcosify, explain_text
from bcos_rt.errors import InvalidArgumentError, InvalidTypeError, MissingDependencyError
from bcos_rt.evaluation import linear_probe, zero_shot
from bcos_rt.evaluation.embeddings import embeddings_of, tokens_of
from bcos_rt.models.clip import load_clip
from tests.clip_models import NAMES, SIZE, WIDTH, register, seeded_weights
from tests.tolerances import TOLERANCES

pytest.importorskip("open_clip")

CLASSES = 6


def colours(n, seed=0):
    """Images of one colour and noise, one colour a class."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % CLASSES
    palette = torch.rand(CLASSES, 3, 1, 1, generator=torch.Generator().manual_seed(9))
    images = palette[labels] + 0.1 * torch.randn(n, 3, SIZE, SIZE, generator=generator)
    return images.clamp(0, 1), labels


@pytest.fixture(scope="module")
def towers(tmp_path_factory):
    """An image tower as it is, [N, D], and B-cosified, tokens."""
    folder = tmp_path_factory.mktemp("clip")
    register(folder)
    model = load_clip(NAMES["resnet"], weights=seeded_weights(NAMES["resnet"], folder))
    net, _ = bcosify(model.image_tower, Recipe.clip())
    return {"conventional": model.image_tower.conventional().eval(), "bcos": net.eval()}


@pytest.fixture(params=["conventional", "bcos"])
def tower(request, towers):
    return towers[request.param]


def class_means(embeddings, labels):
    return torch.stack([embeddings[labels == k].mean(0) for k in range(CLASSES)])


# --- embeddings ------------------------------------------------------------------------------------------------------


def test_embeddings(tower, towers):
    images, labels = colours(10)
    given, truth = embeddings_of(tower, (images, labels), batch_size=4)
    assert torch.equal(truth, labels)
    with torch.no_grad():
        outputs = tower(images)
    expected = F.normalize(outputs, dim=1) if tower is towers["conventional"] else outputs
    torch.testing.assert_close(given.float(), expected, rtol=1e-4, atol=1e-6)
    assert given.dtype == torch.float64


# --- zero shot -------------------------------------------------------------------------------------------------------


def test_class_means_as_texts_are_a_nearest_mean_classifier(tower):
    images, labels = colours(30)
    embeddings, _ = embeddings_of(tower, (images, labels))
    texts = class_means(embeddings, labels)
    data = colours(25, seed=1)
    found = zero_shot(tower, data, texts.float(), logit_scale=50, batch_size=8, completeness_images=0)
    seen, truth = embeddings_of(tower, data)
    cosines = seen @ F.normalize(texts, dim=1).T
    assert found.top1 == float((cosines.argmax(1) == truth).double().mean())
    top5 = (cosines.topk(5, 1).indices == truth[:, None]).any(1)
    assert found.top5 == float(top5.double().mean())
    assert found.loss == pytest.approx(float(F.cross_entropy(50 * cosines, truth)), rel=1e-4)
    assert found.top1 > 1 / CLASSES, "colours can be told apart"
    # Other texts in other places: the classes are wrong.
    other = zero_shot(tower, data, texts.float().roll(1, 0), completeness_images=0)
    assert other.top1 < found.top1


@pytest.mark.parametrize(("pooling", "power"), [("mean", None), ("max", None), ("cosine_power", 3.0)])
def test_logits_are_the_explained_scores(towers, pooling, power):
    net, (images, labels) = towers["bcos"], colours(6)
    texts = torch.randn(CLASSES, WIDTH, generator=torch.Generator().manual_seed(3))
    found = zero_shot(
        net, (images, labels), texts, pooling, power=power, logit_scale=20, completeness_images=2, batch_size=4
    )
    explanation = explain_text(net, images, texts, pooling, power=power)
    logits = 20 * explanation.logits.double()
    assert found.loss == pytest.approx(float(F.cross_entropy(logits, labels)), rel=1e-4)
    assert found.top1 == float((logits.argmax(1) == labels).double().mean())
    assert found.completeness.images == 2
    assert found.completeness.largest < 20 * TOLERANCES["completeness"]


def test_tokens_of_any_module():
    tokens = torch.randn(2, 5, 3)

    class Fixed(torch.nn.Module):
        def forward(self, images):
            return tokens

    torch.testing.assert_close(tokens_of(Fixed(), torch.rand(2, 3, 4, 4)), F.normalize(tokens, dim=2))
    tokens = torch.randn(2)
    with pytest.raises(InvalidArgumentError, match=r"net.*\[N, D\]"):
        tokens_of(Fixed(), torch.rand(2, 3, 4, 4))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"text_embeddings": torch.ones(CLASSES, WIDTH + 1)}, InvalidArgumentError, "text_embeddings"),
        ({"text_embeddings": torch.ones(CLASSES - 1, WIDTH)}, InvalidArgumentError, "label 5"),
        ({"pooling": "median"}, InvalidArgumentError, "pooling"),
        ({"logit_scale": 0}, InvalidArgumentError, "logit_scale"),
        ({"logit_scale": "100"}, InvalidTypeError, "logit_scale"),
        ({"data": (colours(6)[0], None)}, InvalidArgumentError, "without labels"),
        ({"net": 3}, InvalidTypeError, "net"),
    ],
)
def test_what_zero_shot_cannot_use_is_named(towers, changes, error, message):
    given = {"net": towers["conventional"], "data": colours(6), "text_embeddings": torch.ones(CLASSES, WIDTH)}
    with pytest.raises(error, match=message):
        zero_shot(**{**given, **changes})


def test_networks_with_logits_are_refused():
    layers = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    net, _ = bcosify(layers, Recipe(head="after_pool"))
    with pytest.raises(InvalidArgumentError, match="returns logits"):
        zero_shot(net, colours(6), torch.ones(CLASSES, 4))
    with pytest.raises(InvalidArgumentError, match="returns logits"):
        linear_probe(net, colours(6), colours(6))


# --- linear probes ---------------------------------------------------------------------------------------------------


def test_a_probe_is_logistic_regression(tower):
    linear_model = pytest.importorskip("sklearn.linear_model")
    train, validation = colours(48), colours(25, seed=1)
    found = linear_probe(tower, train, validation, c=100.0)
    x, labels = (v.numpy() for v in embeddings_of(tower, train))
    seen, truth = (v.numpy() for v in embeddings_of(tower, validation))
    model = linear_model.LogisticRegression(C=100.0, max_iter=1000).fit(x, labels)
    assert found.evaluation.top1 == pytest.approx(model.score(seen, truth))
    expected = -np.log(model.predict_proba(seen)[np.arange(25), truth]).mean()
    assert found.evaluation.loss == pytest.approx(expected, rel=1e-6)
    assert (found.c, found.tried, found.images, found.evaluation.classes) == (100.0, (), 48, CLASSES)


def test_c_is_chosen_on_held_out_images(towers):
    pytest.importorskip("sklearn")
    train, validation = colours(60), colours(24, seed=1)
    found = linear_probe(towers["bcos"], train, validation, held_out=0.2)
    shares = dict(found.tried)
    assert shares[found.c] == max(shares.values())
    assert {1e-6, 1e-4, 1e-2, 1.0, 1e2, 1e4, 1e6} <= set(shares)
    steps = np.diff(np.log10(sorted(shares)))
    assert steps.min() == pytest.approx(1 / 8)
    assert found.evaluation.top1 > 0.8, "six colours on a plane each"
    again = linear_probe(towers["bcos"], train, validation, c=found.c)
    assert again.evaluation == found.evaluation
    assert found.to_dict()["evaluation"]["top1"] == found.evaluation.top1


def test_classes_of_one_side_alone(towers):
    """A class without training images is never right, and one without validation images counts nowhere."""
    pytest.importorskip("sklearn")
    images, labels = colours(36)
    few = labels < 4
    found = linear_probe(towers["conventional"], (images[few], labels[few]), (images, labels), c=1e4)
    assert found.evaluation.classes == CLASSES
    assert found.evaluation.per_class[4] == found.evaluation.per_class[5] == 0
    assert found.evaluation.top1 <= 4 / 6
    other = linear_probe(towers["conventional"], (images, labels), (images[few], labels[few]), c=1e4)
    assert other.evaluation.per_class[5] is None
    # Two classes: scikit-learn has one column of coefficients for them.
    two = labels < 2
    binary = linear_probe(towers["conventional"], (images[two], labels[two]), (images[two], labels[two]), c=1e6)
    assert binary.evaluation.top1 == 1


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"c": 0}, InvalidArgumentError, "c"),
        ({"c": "1"}, InvalidTypeError, "c"),
        ({"held_out": 1.0}, InvalidArgumentError, "held_out"),
        ({"train": (colours(6)[0], None)}, InvalidArgumentError, "train.*without labels"),
        ({"validation": (colours(6)[0], None)}, InvalidArgumentError, "validation.*without labels"),
        ({"train": (colours(6)[0], torch.ones(6, dtype=torch.int64))}, InvalidArgumentError, "one class"),
    ],
)
def test_what_a_probe_cannot_use_is_named(towers, changes, error, message):
    pytest.importorskip("sklearn")
    with pytest.raises(error, match=message):
        linear_probe(**{"net": towers["conventional"], "train": colours(6), "validation": colours(6), **changes})


def test_without_scikit_learn(towers, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    with pytest.raises(MissingDependencyError, match=r"bcos-rt\[evaluate\]"):
        linear_probe(towers["conventional"], colours(6), colours(6))
