"""Fitting a B-cos network block by block (bench/few_images/blocks.py)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from bcos_rt import Recipe, bcosify, save
from bcos_rt.files import read_rows
from bcos_rt.models import load_model
from bcos_rt.nn import BatchNormUncentered2d, BcosConv2d
from bench.few_images import __main__ as program
from bench.few_images.blocks import _error, _Layer, _patches, _relative, _solve, _train, fit_blocks


@pytest.mark.parametrize("b", [1.0, 1.5, 2.0])
@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 1},
        {"kernel_size": 3, "padding": 1, "groups": 4},
        {"kernel_size": 3, "stride": 2, "tf_same_padding": True},
    ],
    ids=["pointwise", "depthwise", "strided"],
)
def test_a_layer_is_found_again_from_what_it_gives(b: float, options: dict) -> None:
    """Least squares for ``sign(t) (|t| r^(B-1))^(1/B)`` gives the weights back that the results came from."""
    torch.manual_seed(0)
    made, other = (BcosConv2d(4, 4, bias=False, b=b, **options) for _ in range(2))
    x = torch.rand(6, 4, 9, 8) + 0.1
    with torch.no_grad():
        y = made(x)
    places = torch.stack([torch.randperm(y[0, 0].numel())[:16] for _ in x])
    rows = y.flatten(2).transpose(1, 2)[torch.arange(len(x))[:, None], places].flatten(0, 1)
    norm = BatchNormUncentered2d(4, bias=False).eval()
    _solve(nn.ModuleDict({"conv": other, "norm": norm}), _Layer("conv", "norm", False), _patches(made, x, places), rows)
    torch.testing.assert_close(other.weight, made.weight, rtol=0.02, atol=2e-3)
    with torch.no_grad():
        # The norm behind it changes nothing: its scale is that of the results.
        torch.testing.assert_close(norm(other(x)), y, rtol=0.03, atol=3e-3)


def test_a_whole_network_is_fitted_to_its_source() -> None:
    """The plain encoded image, a constant among its combinations, has B = 1 without biases give the stem exactly."""
    teacher = load_model("efficientnet-lite0").conventional().eval()
    images = torch.rand(8, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    net, _ = bcosify("efficientnet-lite0", Recipe(b=1.0, logit_bias=None, mean=(0.0,) * 6, std=(1.0,) * 6))
    net.eval()
    report = fit_blocks(net, teacher, images, steps=0)
    assert [name for name, _, _ in report] == ["bn1", *(n for n, _, _ in report[1:-1]), "head"]
    assert len(report) == 18
    # All but the border: what is padded has no constant. Without a constant it is 1.
    assert report[0][1] < 0.1
    # From the fourth stage on there are fewer places than weights: least squares meets every one of them.
    deep = [
        before for name, before, _ in report if name[:8] in ("blocks.3", "blocks.4", "blocks.5", "blocks.6", "head")
    ]
    assert len(deep) == 12
    assert max(deep) < 1e-3
    with torch.no_grad():
        torch.testing.assert_close(net(images).softmax(1), teacher(images).softmax(1), rtol=0, atol=1e-3)


def test_a_block_is_trained_towards_what_it_should_give() -> None:
    torch.manual_seed(0)
    made, other = (nn.Sequential(BcosConv2d(4, 6, 3, bias=False), BcosConv2d(6, 5, 1, bias=False)) for _ in range(2))
    x = torch.rand(32, 4, 6, 6)
    with torch.no_grad():
        wanted = made(x)
    error = _relative(wanted)
    untrained = _error(other, x, wanted, error)
    before, after = _train(other, list(other.parameters()), x, wanted, error, steps=60, batch_size=8)
    assert before == untrained
    assert after == _error(other, x, wanted, error)
    assert after < before / 2


def test_a_block_that_training_makes_worse_is_left_as_it_was() -> None:
    torch.manual_seed(0)
    part = nn.Sequential(BcosConv2d(4, 5, 1, bias=False))
    x = torch.rand(32, 4, 6, 6)
    with torch.no_grad():
        wanted = part(x)
    weights = part[0].weight.detach().clone()
    assert _train(part, list(part.parameters()), x, wanted, _relative(wanted), steps=3, batch_size=8) == (0, 0)
    assert torch.equal(part[0].weight, weights)


def test_folders_of_ones_own_are_measured_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that was trained again has its own numbers, and the committed ones stay as they are."""
    work, results = tmp_path / "work", tmp_path / "results"
    net, _ = bcosify("efficientnet-lite0", Recipe(logit_bias=None))
    (work / "blocks").mkdir(parents=True)
    save(net, work / "blocks" / "last.safetensors")
    shutil.copytree(program.RESULTS / "teacher", results / "teacher")
    monkeypatch.setattr(program, "MEASURED", 64)
    generator = torch.Generator().manual_seed(0)

    def photographs(_: Path) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        images = torch.randint(0, 256, (20, 3, 256, 256), generator=generator, dtype=torch.uint8)
        return (images[:10], torch.arange(10)), (images[10:], torch.arange(10))

    monkeypatch.setattr(program, "photographs", photographs)
    # Noise is no class with confidence: there is nothing to make grids of.
    monkeypatch.setattr(program, "_measured", lambda name, *_: {"top1": 0.25, "top5": 0.5, "localisation": 0.75})
    tar = tmp_path / "photos.tar"
    tar.touch()
    committed = (program.RESULTS / "blocks" / "measured.json").read_bytes()
    own = ["--photos", str(tar), "--work", str(work), "--results", str(results)]
    said = CliRunner().invoke(program.app, ["measure", *own])
    assert said.exit_code == 0, said.output
    assert "teacher: is measured" in said.output
    assert json.loads((results / "blocks" / "measured.json").read_text())["top1"] == 0.25
    assert (program.RESULTS / "blocks" / "measured.json").read_bytes() == committed
    said = CliRunner().invoke(program.app, ["table", "--results", str(results), "--output", str(tmp_path / "docs")])
    assert said.exit_code == 0, said.output
    rows = {row["variant"]: row for row in read_rows(tmp_path / "docs" / "results" / "few_images.csv")}
    assert {"teacher", "blocks"} <= set(rows)
    assert float(rows["blocks"]["localisation"]) == 0.75
    said = CliRunner().invoke(program.app, ["free", "--work", str(work), "--output", str(tmp_path / "docs")])
    assert said.exit_code == 2
    assert "features_224" in said.output
