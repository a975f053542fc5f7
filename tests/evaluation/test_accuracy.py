"""Evaluation against numbers worked out one by one."""

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bcos_rt import Recipe, bcosify
from bcos_rt.data import open_data
from bcos_rt.errors import InvalidArgumentError, InvalidTypeError
from bcos_rt.evaluation.accuracy import evaluate, reliability
from bcos_rt.evaluation.checks import spread
from bcos_rt.files import read_rows


class Given(nn.Module):
    """Answers with the logits that stand in the image's first row."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.classes = classes
        self.one = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return 10 * x[:, 0, 0, : self.classes] * self.one


def data(count: int = 40, classes: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(count, 3, 8, 8, generator=generator)
    labels = torch.randint(0, classes - 1, (count,), generator=generator)  # the last class has no image
    images[torch.arange(count), 0, 0, labels] += 0.3
    return images.clamp(max=1), labels, 10 * images.clamp(max=1)[:, 0, 0, :classes].double()


def test_numbers_by_hand() -> None:
    images, labels, logits = data()
    found = evaluate(Given(7), (images, labels), batch_size=9)
    assert (found.images, found.classes, found.completeness) == (40, 7, None)
    right, top5, loss = 0, 0, 0.0
    confidences = []
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        order = sorted(range(7), key=lambda k: -row[k])
        right += order[0] == label
        top5 += label in order[:5]
        total = sum(math.exp(v) for v in row)
        loss -= math.log(math.exp(row[label]) / total) / 40
        confidences.append((math.exp(row[order[0]]) / total, order[0] == label))
    assert found.top1 == pytest.approx(right / 40)
    assert found.top5 == pytest.approx(top5 / 40)
    assert found.loss == pytest.approx(loss, rel=1e-6)
    largest = [max(row) for row in logits.tolist()]
    sigmoids = [(1 / (1 + math.exp(-v)), hit) for v, (_, hit) in zip(largest, confidences, strict=True)]
    for pairs, measured in ((confidences, found.softmax), (sigmoids, found.sigmoid)):
        error = 0.0
        for b in range(15):
            inside = [(c, hit) for c, hit in pairs if b / 15 < c <= (b + 1) / 15]
            if inside:
                gap = sum(hit for _, hit in inside) - sum(c for c, _ in inside)
                error += abs(gap) / 40
        assert measured.error == pytest.approx(error, rel=1e-6)
    assert found.softmax.confidence == pytest.approx(sum(c for c, _ in confidences) / 40)
    assert found.sigmoid.confidence == pytest.approx(sum(1 / (1 + math.exp(-max(row))) for row in logits.tolist()) / 40)
    assert sum(found.softmax.counts) == sum(found.sigmoid.counts) == 40
    assert found.per_class[6] is None
    for k in range(6):
        mine = [logits[i].argmax() == k for i in range(40) if labels[i] == k]
        assert found.per_class[k] == pytest.approx(sum(map(float, mine)) / len(mine))
    assert json.loads(json.dumps(found.to_dict()))["top1"] == found.top1


def test_reliability_at_its_ends() -> None:
    sure = torch.tensor([1.0, 1.0, 0.0])
    assert reliability(sure, torch.tensor([True, True, False])).error == 0
    assert reliability(sure, torch.tensor([False, False, True])).error == pytest.approx(1.0)
    one_bin = reliability(torch.tensor([0.2, 0.6]), torch.tensor([True, False]), bins=1)
    assert one_bin.error == pytest.approx(0.1)
    assert (one_bin.counts, one_bin.accuracies) == ((2,), (0.5,))


def test_completeness_of_a_bcos_network(tmp_path: Path) -> None:
    torch.manual_seed(0)
    source = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)
    )
    net, _ = bcosify(source, Recipe(mean=(0, 0, 0), std=(1, 1, 1)))
    net.train()
    images = torch.rand(30, 3, 8, 8)
    found = evaluate(net, (images, torch.arange(30) % 4), completeness_images=10, batch_size=8)
    assert net.training, "the mode is as it was"
    assert found.completeness is not None
    assert found.completeness.images == 10
    assert 0 <= found.completeness.mean <= found.completeness.largest < 1e-4
    assert found.completeness.median <= found.completeness.q90 <= found.completeness.q99 <= found.completeness.largest
    assert found.top5 is None
    assert found.save(tmp_path / "r.png").stat().st_size > 5000
    with pytest.raises(InvalidArgumentError, match=r"ending in \.png"):
        found.save(tmp_path / "r.jpg")


def test_quantiles_of_the_completeness_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """With explanations whose errors are known."""

    class Known:
        def __init__(self, net: nn.Module, images: Tensor) -> None:
            self.logits = torch.full((len(images), 4), -2.0)
            self.errors = images[:, 0, 0, 0].double()

        def completeness_error(self) -> Tensor:
            return self.errors

    monkeypatch.setattr("bcos_rt.evaluation.accuracy.explain", Known)
    source = nn.Sequential(nn.Conv2d(3, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    net, _ = bcosify(source, Recipe(mean=(0, 0, 0), std=(1, 1, 1)))
    images = torch.rand(31, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    found = evaluate(net.eval(), (images, torch.arange(31) % 4), batch_size=8).completeness
    assert found is not None
    errors = images[:, 0, 0, 0].double().numpy()
    assert (found.mean, found.largest) == (pytest.approx(errors.mean()), errors.max())
    assert found.largest_relative == pytest.approx(errors.max() / 2)
    for value, q in ((found.median, 0.5), (found.q90, 0.9), (found.q99, 0.99)):
        assert value == pytest.approx(np.quantile(errors, q))


def test_a_folder_gets_every_number(tmp_path: Path) -> None:
    images, labels, _ = data()
    found = evaluate(Given(7), (images, labels))
    out = found.save(tmp_path / "new" / "v1.2", {"network": "given"})
    names = {"evaluation.json", "evaluation.csv", "evaluation_classes.csv", "evaluation.png"}
    assert {p.name for p in out.iterdir()} == names
    written = json.loads((out / "evaluation.json").read_text())
    assert written == {"network": "given", "results": json.loads(json.dumps(found.to_dict()))}
    (row,) = read_rows(out / "evaluation.csv")
    assert float(row["top1"]) == found.top1
    assert float(row["softmax_confidence"]) == found.softmax.confidence
    assert row["completeness_q99"] == ""
    classes = read_rows(out / "evaluation_classes.csv")
    assert [row["class"] for row in classes] == list(map(str, range(7)))
    assert float(classes[0]["top1"]) == found.per_class[0]
    assert classes[6]["top1"] == ""
    assert {row["name"] for row in classes} == {""}
    named = open_data((images, labels))
    named.class_names = tuple("abcdefg")
    rows = read_rows(evaluate(Given(7), named).save(tmp_path / "named") / "evaluation_classes.csv")
    assert [row["name"] for row in rows] == list("abcdefg")
    net = Given(7)
    net.class_names = list("hijklmn")  # type: ignore[assignment]
    assert evaluate(net, (images, labels)).class_names == tuple("hijklmn")
    named.class_names = tuple("abcdef")
    assert evaluate(Given(7), named).class_names is None
    with pytest.raises(InvalidArgumentError, match="or a folder"):
        found.save(out / "evaluation.json")


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (torch.rand(2, 3, 8, 8), None, "images without labels"),
        (torch.rand(2, 3, 8, 8), torch.tensor([0, 9]), "label 9, expected labels 0 to 6"),
        (torch.rand(0, 3, 8, 8), torch.zeros(0, dtype=torch.int64), "no image"),
    ],
)
def test_bad_data_is_named(images: Tensor, labels: Tensor | None, message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        evaluate(Given(7), (images, labels))


def test_wrong_types_are_named() -> None:
    with pytest.raises(InvalidTypeError, match="net: got str"):
        evaluate("resnet", (torch.rand(2, 3, 8, 8), torch.zeros(2, dtype=torch.int64)))  # type: ignore[arg-type]


class Poolings(nn.Module):
    """Has neither parameters nor buffers; three classes, the colours."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


def test_a_network_without_parameters() -> None:
    images = torch.zeros(6, 3, 8, 8)
    labels = torch.arange(6) % 3
    images[torch.arange(6), labels] = 1.0
    assert evaluate(Poolings(), (images, labels)).top1 == 1.0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_named(value: float) -> None:
    class Broken(Poolings):
        def forward(self, x: Tensor) -> Tensor:
            logits = super().forward(x)
            return logits.where(x[:, :1, 0, 0] < 1, torch.full_like(logits, value))

    images = torch.rand(7, 3, 8, 8)
    images[4, 0] = 1.0
    with pytest.raises(InvalidArgumentError, match=r"NaN or infinite values \(image 4\)"):
        evaluate(Broken(), (images, torch.zeros(7, dtype=torch.int64)), batch_size=3)
    with pytest.raises(InvalidArgumentError, match=r"shape \(3, 3, 8\), expected logits \[N, classes\]"):
        evaluate(Rows(), (images, torch.zeros(7, dtype=torch.int64)), batch_size=3)


class Rows(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(3)


@pytest.mark.parametrize(("count", "among"), [(32, 33), (256, 257), (10, 30), (5, 3), (0, 7), (1, 1)])
def test_as_many_are_explained_as_asked(count: int, among: int) -> None:
    found = sorted(spread(count, among))
    assert len(found) == min(count, among)
    assert all(0 <= i < among for i in found)
    gaps = {b - a for a, b in itertools.pairwise(found)}
    assert not gaps or max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize("changes", [{"batch_size": 0}, {"batch_size": -1}, {"completeness_images": -5}, {"bins": 0}])
def test_counts_are_checked_before_anything_runs(changes: dict[str, int]) -> None:
    (name,) = changes
    with pytest.raises(InvalidArgumentError, match=rf"{name}: got"):
        evaluate(torch.nn.Identity(), (torch.rand(4, 3, 8, 8), torch.arange(4)), **changes)
