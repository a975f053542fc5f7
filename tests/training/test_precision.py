"""Half and double precision: loss scaling as on a GPU, losses in fp32, float64 throughout."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning_fabric import Fabric
from lightning_fabric.plugins.precision.amp import MixedPrecision
from torch import Tensor, nn
from torch.testing import assert_close

from bcos_rt import finetune
from bcos_rt.data import Augmentation, Mixing
from bcos_rt.errors import TrainingError
from bcos_rt.nn.conventional import ConventionalNetwork
from bcos_rt.nn.exponent import exponents
from bcos_rt.training import Distillation, TrainingRecipe, trainer
from tests.training.test_not_finite import broken
from tests.training.worker import colours, convnet, network

PLAIN = TrainingRecipe(
    epochs=2, batch_size=16, lr=5e-3, loss="bce", agc=None, augmentation=Augmentation.none(), log_every=1
)


@pytest.fixture(params=[False, True], ids=["looking", "fused"])
def scaler(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.amp.GradScaler:
    """Runs scale their losses as with fp16 on a GPU: Fabric's plugin with torch's scaler, for the CPU.

    Autocast is switched off, so that scaling is all that differs from a plain run.
    """
    made = torch.amp.GradScaler("cpu")

    def fabric(*_: Any) -> Fabric:
        plugin = MixedPrecision("16-mixed", "cpu", made)
        plugin._desired_input_dtype = torch.float32
        monkeypatch.setattr(plugin, "forward_context", lambda: torch.autocast("cpu", enabled=False))
        return Fabric(accelerator="cpu", devices=1, plugins=[plugin])

    monkeypatch.setattr(trainer, "make_fabric", fabric)
    if request.param:
        monkeypatch.setattr(trainer, "FUSED_DEVICES", ("cpu",))
    return made


@pytest.mark.parametrize(
    "changes",
    [{"agc": 0.01, "clip_norm": 0.05}, {"learn_b": True, "b_lr": 0.1, "clip_norm": 0.05}, {"accumulate": 2}],
    ids=["both clips", "learned B", "accumulated"],
)
def test_scaled_training_is_plain_training(scaler: torch.amp.GradScaler, changes: dict[str, Any]) -> None:
    """Also when the scale doubles after every step: all gradients of a step are of one scale."""
    scaler.set_growth_interval(1)
    recipe = PLAIN.replace(optimizer="sgd", lr=0.1, **changes)
    scaled, plain = network(1.5), network(1.5)
    finetune(scaled, colours(48), recipe)
    assert scaler.get_scale() == 2.0**16 * 2**6
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "make_fabric", lambda *_: Fabric(accelerator="cpu", devices=1))
        finetune(plain, colours(48), recipe)
    assert_close(scaled.state_dict(), plain.state_dict(), rtol=1e-4, atol=1e-6)
    assert exponents(scaled) == pytest.approx(exponents(plain), rel=1e-5)


def test_an_overflow_leaves_a_step_out_and_lowers_the_scale(scaler: torch.amp.GradScaler) -> None:
    """The first steps of fp16 overflow. All optimisers leave them out, and training goes on."""
    scaler._init_scale = 2.0**126
    net = network(1.5)
    result = finetune(net, colours(96), PLAIN.replace(learn_b=True, optimizer="sgd", lr=0.05, epochs=4))
    assert scaler.get_scale() < 2.0**126
    assert all(bool(torch.isfinite(p).all()) for p in net.state_dict().values())
    assert result.history[-1]["train_loss"] < result.history[0]["train_loss"]


def test_gradients_that_are_finite_at_no_scale_end_the_run(scaler: torch.amp.GradScaler) -> None:
    scaler._init_scale = 1.0
    with pytest.raises(TrainingError, match=r"the gradient is not finite.*gradient at the output of model\.2"):
        finetune(broken(2, "gradient"), colours(48), PLAIN.replace(epochs=8))


def test_a_loss_that_is_not_finite_is_no_overflow(scaler: torch.amp.GradScaler) -> None:
    with pytest.raises(TrainingError, match=r"the loss \(labels\) is not finite in epoch 2, step 1 of 3.*Later"):
        finetune(broken(4, "output"), colours(48), PLAIN)


def tower(seed: int) -> ConventionalNetwork:
    torch.manual_seed(seed)
    return ConventionalNetwork(nn.Sequential(nn.Flatten(), nn.Linear(768, 16)))


def test_embeddings_are_compared_in_fp32() -> None:
    """The pairwise loss of bf16 embeddings, its products in fp32: the mean cosine is near 1, and b is -10."""
    images = colours(32)[0]
    distillation = Distillation(logits=0.0, siglip=1.0, siglip_learned=False)
    recipe = PLAIN.replace(
        epochs=1, batch_size=32, loss="none", select="cosine", distillation=distillation, precision="bf16-mixed",
    )  # fmt: skip
    result = finetune(tower(0), (images, None), recipe, teacher=tower(1), validation=(images, None))
    net, teacher = tower(0).eval(), tower(1).eval()
    pixels = images.float() / 255
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        ours, theirs = net(pixels.bfloat16()).double(), teacher(pixels).double()

    def loss(one: Tensor, other: Tensor) -> float:
        logits = 10 * F.normalize(one, dim=1) @ F.normalize(other, dim=1).T - 10
        return float(-F.logsigmoid((2 * torch.eye(len(one), dtype=one.dtype) - 1) * logits).sum() / len(one))

    assert result.history[0]["train_loss"] == pytest.approx(loss(ours, theirs), rel=1e-4)


def test_float64_throughout(tmp_path: Any) -> None:
    net = network()
    recipe = PLAIN.replace(
        precision="64-true", ema=0.5, mixing=Mixing(mixup=0.5), distillation=Distillation(), epochs=1, loss="bce"
    )
    result = finetune(
        net, colours(32), recipe, validation=colours(16), teacher=ConventionalNetwork(convnet()),
        output=tmp_path / "run", explain_images=colours(1)[0].float() / 255,
    )  # fmt: skip
    assert {p.dtype for p in net.parameters()} == {torch.float64}
    assert 0 <= result.history[0]["ema_top1"] <= 1
    with pytest.raises(TrainingError, match=r"step 1 of 3.*output of model\.3 \(Later\)"):
        finetune(broken(1, "output"), colours(48), recipe.replace(distillation=None, mixing=None))
