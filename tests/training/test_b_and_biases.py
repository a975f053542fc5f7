"""B and biases that change during training: at the end of a run, in its average, and after it was resumed."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torchvision.models import VisionTransformer

from bcos_rt import Recipe, bcosify, finetune, load
from bcos_rt.data import Augmentation
from bcos_rt.errors import InvalidArgumentError, TrainingError
from bcos_rt.nn.conventional import ConventionalNetwork
from bcos_rt.nn.exponent import exponents
from bcos_rt.nn.network import BcosNetwork
from bcos_rt.training import TrainingRecipe, trainer
from bcos_rt.training.biases import bias_names
from tests.training.worker import colours, convnet, network

# Three steps an epoch of 48 images.
PLAIN = TrainingRecipe(
    epochs=3, batch_size=16, lr=5e-3, loss="bce", agc=None, augmentation=Augmentation.none(), log_every=1
)


def all_b(net: nn.Module) -> float:
    (found,) = set(exponents(net).values())
    return found


def test_b_reaches_its_target_at_the_end_of_the_run(tmp_path: Path) -> None:
    net = network(b=2.0)
    result = finetune(net, colours(48), PLAIN.replace(b_start=1.0, b_epochs=3.0, ema=0.5), output=tmp_path / "run")
    assert result.averaged is not None
    for one in (net, result.averaged):
        assert isinstance(one, BcosNetwork)
        assert (all_b(one), one.recipe.b) == (2.0, 2.0)
    for name in ("last", "ema"):
        assert all_b(load(tmp_path / "run" / f"{name}.safetensors", model=convnet())) == 2.0


def test_the_average_has_the_networks_b_without_validation(tmp_path: Path) -> None:
    recipe = PLAIN.replace(b_start=1.0, b_epochs=12.0, epochs=1, ema=0.5)
    with pytest.warns(UserWarning, match="B does not reach the network's own: 12 epochs") as told:
        result = finetune(network(b=2.0), colours(48), recipe, output=tmp_path / "run")
    assert told[0].filename == __file__
    assert result.averaged is not None
    assert all_b(result.averaged) == all_b(result.net) == pytest.approx(1 + 3 / 36)
    assert all_b(load(tmp_path / "run" / "ema.safetensors", model=convnet())) == pytest.approx(1 + 3 / 36)


@pytest.mark.filterwarnings("ignore:B does not reach", "ignore:biases do not reach")
def test_a_finished_run_that_is_resumed_has_the_b_it_ended_with(tmp_path: Path) -> None:
    recipe = PLAIN.replace(b_start=1.0, b_epochs=10.0, epochs=1)
    one, two = network(), network()
    finetune(one, colours(48), recipe, output=tmp_path / "run")
    finetune(two, colours(48), recipe, output=tmp_path / "run", resume=True)
    assert all_b(one) == all_b(two) == pytest.approx(1.1)
    images = colours(4)[0].float() / 255
    with torch.no_grad():
        assert torch.equal(one(images), two(images))


def test_a_resumed_run_goes_on_with_the_b_it_began_with(tmp_path: Path) -> None:
    """B is no tensor: a network of another B must not take the place of the one that was trained."""

    class StoppedError(Exception):
        pass

    def stop(row: dict[str, Any]) -> None:
        if row["epoch"] == 1:
            raise StoppedError

    with pytest.raises(StoppedError):
        finetune(network(b=1.5), colours(48), PLAIN, output=tmp_path / "run", on_epoch=stop)
    result = finetune(network(b=2.0), colours(48), PLAIN, output=tmp_path / "run", resume=True)
    assert [row["b"] for row in result.history] == [1.5, 1.5, 1.5]
    assert all_b(result.net) == 1.5


class Loose(nn.Module):
    """A projection whose bias is a parameter of the model."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 4, 4), nn.Linear(4, 3, bias=False)
        self.offset, self.gain = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(self.conv(x).mean((2, 3)) * self.gain) + self.offset
        return out


def vit() -> nn.Module:
    torch.manual_seed(0)
    return VisionTransformer(16, 8, 1, 2, 16, 32, num_classes=3)


def beit() -> nn.Module:
    torch.manual_seed(0)
    return timm.models.beit.Beit(img_size=16, patch_size=8, embed_dim=16, depth=1, num_heads=2, num_classes=3)


@pytest.mark.parametrize("make", [convnet, vit, beit, Loose])
def test_biases_are_those_that_conversion_drops(make: Any) -> None:
    left = [
        {name for name, p in bcosify(make(), Recipe(biases=biases))[0].named_parameters() if p.requires_grad}
        for biases in ("keep", "drop")
    ]
    net, _ = bcosify(make(), Recipe(biases="keep"))
    assert set(bias_names(net)) == left[0] - left[1] != set()
    conventional = {name.partition(".")[2] for name in bias_names(ConventionalNetwork(make()))}
    assert conventional >= {name.partition(".")[2] for name in bias_names(net)}


def test_a_network_without_biases_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="biases='keep'"):
        bias_names(network())


@pytest.mark.parametrize("make", [vit, beit])
def test_packed_and_loose_biases_decay_to_zero_in_the_average_too(make: Any) -> None:
    source = make()
    with torch.no_grad():
        for name, p in source.named_parameters():
            if name.endswith("bias"):
                p.fill_(0.5)
    net, _ = bcosify(source, Recipe(biases="keep", mean=(0, 0, 0), std=(1, 1, 1)))
    result = finetune(net, colours(32), PLAIN.replace(bias_decay_epochs=1.0, epochs=2, ema=0.9))
    assert result.averaged is not None
    names = bias_names(net)
    assert any(name.endswith(("in_proj_bias", "q_bias")) for name in names)
    for one in (net, result.averaged):
        assert {name for name in names if bool(one.get_parameter(name).any())} == set()


@pytest.mark.filterwarnings("ignore:B does not reach", "ignore:biases do not reach")
def test_the_average_of_biases_is_scaled_as_they_are() -> None:
    """Biases that are not trained: the average of equal values under one scale is that value."""
    net, _ = bcosify(convnet(), Recipe.equivalent(b=2.0, mean=(0, 0, 0), std=(1, 1, 1)))
    names = bias_names(net)
    for name in names:
        net.get_parameter(name).data.fill_(0.5)
        net.get_parameter(name).requires_grad_(False)
    result = finetune(net, colours(48), PLAIN.replace(bias_decay_epochs=2.0, epochs=1, ema=0.9))
    assert result.averaged is not None
    for one in (net, result.averaged):
        for name in names:
            torch.testing.assert_close(one.get_parameter(name), torch.full_like(net.get_parameter(name), 0.25))


# --- runs that end early ---------------------------------------------------------------------------------------------


class Once(nn.Module):
    """Infinite in the training batch of one number."""

    def __init__(self, when: int) -> None:
        super().__init__()
        self.when, self.calls = when, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += self.training
        return x / 0 if self.calls == self.when else x


def test_after_an_error_the_network_has_its_own_b() -> None:
    """Another run rises to it again."""
    source = convnet()
    source.insert(3, Once(3))
    net = bcosify(source, Recipe(mean=(0, 0, 0), std=(1, 1, 1)))[0]
    recipe = PLAIN.replace(b_start=1.0, b_epochs=3.0)
    with pytest.raises(TrainingError, match="step 3"):
        finetune(net, colours(48), recipe)
    assert all_b(net) == 2.0
    finetune(net, colours(48), recipe)
    assert all_b(net) == 2.0


def test_a_learned_b_is_kept_after_an_error_and_learned_no_more() -> None:
    source = convnet()
    source.insert(3, Once(3))
    net = bcosify(source, Recipe(mean=(0, 0, 0), std=(1, 1, 1)))[0]
    with pytest.raises(TrainingError):
        finetune(net, colours(48), PLAIN.replace(learn_b=True, b_lr=0.5))
    assert not any(p.ndim == 0 for p in net.parameters())
    assert any(b != 2.0 for b in exponents(net).values())


@pytest.mark.parametrize("log_every", [1, 50])
def test_a_step_that_is_not_finite_scales_no_bias(log_every: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "FUSED_DEVICES", ("cpu",))
    source = convnet()
    source.insert(3, Once(3))
    net = bcosify(source, Recipe(biases="keep", mean=(0, 0, 0), std=(1, 1, 1)))[0]
    name = bias_names(net)[0]
    nn.init.ones_(net.get_parameter(name))
    recipe = PLAIN.replace(epochs=4, lr=0.0, bias_decay_epochs=4.0, log_every=log_every)
    with pytest.raises(TrainingError, match="step 3"):
        finetune(net, colours(48), recipe)
    # Two of twelve steps were done; on a GPU the next ones are too before anyone looks.
    torch.testing.assert_close(net.get_parameter(name), torch.full_like(net.get_parameter(name), 10 / 12))
