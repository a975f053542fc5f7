"""Fine-tuning B-cosified image towers of CLIP: towards the tower before its conversion, on images without labels."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bcos_rt import Recipe, bcosify, finetune, load
from bcos_rt.data import Augmentation, Mixing
from bcos_rt.errors import InvalidArgumentError, InvalidTypeError
from bcos_rt.models import load_model
from bcos_rt.nn.network import BcosNetwork
from bcos_rt.training import Distillation, TrainingRecipe
from tests.clip_models import NAMES, register, seeded_weights
from tests.training.test_finetune import weights, without_times
from tests.training.worker import network

pytest.importorskip("open_clip")

SMALL = TrainingRecipe.clip(
    epochs=3, batch_size=8, lr=2e-3, augmentation=Augmentation.none(), log_every=1,
)  # fmt: skip


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp("clip")
    register(folder)
    return f"open_clip:{NAMES['resnet']}", seeded_weights(NAMES["resnet"], folder)


def towers(file: tuple[str, Path]) -> tuple[BcosNetwork, nn.Module]:
    """Student and teacher."""
    source = load_model(file[0], weights=file[1])
    net, _ = bcosify(source, Recipe.clip())
    return net, source.conventional()


def photos(n: int = 24, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(n, 3, 4, 4, generator=generator)
    return F.interpolate(coarse, (64, 64), mode="bilinear")


def cosine(net: nn.Module, teacher: nn.Module, images: Tensor) -> float:
    with torch.no_grad():
        return float(F.cosine_similarity(net.eval()(images), teacher.eval()(images), dim=1).mean())


def test_the_recipe_is_the_published_one() -> None:
    recipe = TrainingRecipe.clip()
    assert (recipe.loss, recipe.optimizer, recipe.lr, recipe.epochs, recipe.batch_size) == (
        "none",
        "adam",
        1e-4,
        90,
        256,
    )
    assert (recipe.schedule, recipe.warmup_epochs, recipe.agc, recipe.clip_norm) == ("cosine", 0, 0.01, None)
    assert recipe.distillation == Distillation(logits=0.0, siglip=1.0, siglip_learned=False)
    # Fields of a field are changed at once: without either weight there would be nothing to learn.
    other = recipe.replace(**{"distillation.siglip": 0.0, "distillation.embedding": 1.0})
    assert other.distillation == Distillation(logits=0.0, embedding=1.0, siglip_learned=False)
    assert TrainingRecipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe


@pytest.mark.parametrize("loss", ["siglip", "embedding"])
def test_a_tower_comes_nearer_to_the_original(file: tuple[str, Path], tmp_path: Path, loss: str) -> None:
    net, teacher = towers(file)
    recipe = SMALL
    if loss == "embedding":
        recipe = SMALL.replace(distillation=Distillation(logits=0.0, embedding=1.0), ema=0.5)
    frozen, seen = weights(teacher), photos(12, seed=1)
    before = cosine(net, teacher, seen)
    result = finetune(net, (photos(), None), recipe, teacher=teacher, validation=(seen, None), output=tmp_path / "run")
    first, last = result.history[0], result.history[-1]
    assert last["train_loss"] < first["train_loss"]
    assert last["train_cosine"] > first["train_cosine"]
    assert "train_top1" not in last
    assert "val_top1" not in last
    assert last["val_cosine"] == pytest.approx(cosine(net, teacher, seen), abs=1e-5)
    assert last["val_cosine"] > before
    assert result.best is not None
    assert result.best["val_cosine"] == max(row["val_cosine"] for row in result.history)
    if loss == "embedding":
        assert last["val_loss"] == pytest.approx(1 - last["val_cosine"], abs=1e-5)
        assert result.averaged is not None
        assert last["ema_cosine"] == pytest.approx(cosine(result.averaged, teacher, seen), abs=1e-5)
    torch.testing.assert_close(weights(teacher), frozen, rtol=0, atol=0)
    again = load(tmp_path / "run" / "best.safetensors")
    assert again.recipe.output == "embedding"
    assert cosine(again, teacher, seen) == pytest.approx(result.best["val_cosine"], abs=1e-5)


def test_the_siglip_loss_is_the_written_out_one(file: tuple[str, Path]) -> None:
    """The first row of the log, of one step from the converted network."""
    net, teacher = towers(file)
    images = photos(4)
    with torch.no_grad():
        ours = F.normalize(net.train()(images), dim=1)
        theirs = F.normalize(teacher.eval()(images), dim=1)
    z = (2 * torch.eye(4) - 1) * (10 * ours @ theirs.T - 10)
    expected = sum(math.log1p(math.exp(-float(v))) for v in z.flatten()) / 4
    net, teacher = towers(file)
    result = finetune(net, (images, None), SMALL.replace(epochs=1, batch_size=4), teacher=teacher)
    assert result.history[0]["train_loss"] == pytest.approx(expected, rel=1e-4)


def test_a_resumed_run_is_the_run_that_was_not_stopped(file: tuple[str, Path], tmp_path: Path) -> None:
    recipe = SMALL.replace(epochs=2, distillation=Distillation(logits=0.0, siglip=1.0, embedding=0.5))
    data, seen = (photos(), None), (photos(8, seed=1), None)
    net, teacher = towers(file)
    whole = finetune(net, data, recipe, teacher=teacher, validation=seen)

    class StoppedError(Exception):
        pass

    def stop(row: dict[str, Any]) -> None:
        raise StoppedError

    other, teacher = towers(file)
    with pytest.raises(StoppedError):
        finetune(other, data, recipe, teacher=teacher, validation=seen, output=tmp_path / "run", on_epoch=stop)
    other, teacher = towers(file)
    resumed = finetune(other, data, recipe, teacher=teacher, validation=seen, output=tmp_path / "run", resume=True)
    assert without_times(resumed.history) == without_times(whole.history)
    for key, value in weights(whole.net).items():
        assert torch.equal(weights(resumed.net)[key], value), key


def test_runs_that_began_before_a_field_was_there_go_on(tmp_path: Path) -> None:
    """A stored recipe lacks fields of today; they count as their defaults."""
    from bcos_rt.training.run import Progress, RunFolder

    recipe = TrainingRecipe(distillation=Distillation())
    folder = RunFolder(tmp_path)
    values = folder.state_values(recipe, Progress())
    for name in ("siglip_learned", "embedding"):
        del values["recipe"]["distillation"][name]
    torch.save({**values, **dict.fromkeys(("sums", "precision", "targets", "model"))}, folder.state)
    assert folder.read_state(recipe)["version"] == values["version"]
    with pytest.raises(InvalidArgumentError, match="distillation"):
        folder.read_state(recipe.replace(distillation=Distillation(embedding=1.0)))


@pytest.mark.parametrize(
    ("changes", "arguments", "message"),
    [
        ({"loss": "bce"}, {}, r"recipe\.loss.*'bce'.*embedding"),
        ({"select": "top1"}, {}, r"recipe\.select.*'cosine' or 'loss'"),
        ({"mixing": Mixing(mixup=0.5)}, {}, r"recipe\.mixing"),
        ({}, {"explain_images": torch.rand(1, 3, 64, 64)}, "explain_images"),
        ({}, {"teacher": None}, "teacher: got None"),
        ({}, {"teacher": nn.Sequential(nn.Flatten(), nn.LazyLinear(7))}, r"teacher.*\(8, 7\).*\(8, 24\)"),
    ],
)
def test_bad_arguments(
    file: tuple[str, Path], changes: dict[str, Any], arguments: dict[str, Any], message: str
) -> None:
    net, teacher = towers(file)
    given: dict[str, Any] = {"teacher": teacher, "validation": (photos(8), None), **arguments}
    with pytest.raises(InvalidArgumentError, match=message):
        finetune(net, (photos(8), None), SMALL.replace(**changes), **given)


def test_cosine_is_of_embeddings() -> None:
    images = torch.rand(16, 3, 16, 16)
    data = (images, torch.zeros(16, dtype=torch.int64))
    with pytest.raises(InvalidArgumentError, match=r"recipe\.select.*logits"):
        finetune(network(), data, TrainingRecipe(batch_size=8, select="cosine"), validation=data)
    with pytest.raises(InvalidTypeError, match="siglip_learned"):
        Distillation(siglip_learned=1.0)  # type: ignore[arg-type]
