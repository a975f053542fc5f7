"""EfficientNet-Lite0 (ImageNet weights) B-cosified with 400 photographs, their labels unused; 100 are held out.

    python -m bench.few_images run long --photos photos.tar     one variant, or the rest of it
    python -m bench.few_images all --photos photos.tar          every variant
    python -m bench.few_images measure --photos photos.tar      accuracy, agreement, localisation of what is trained
    python -m bench.few_images table                            docs/results/few_images.csv
    python -m bench.few_images picture --photos photos.tar      docs/images/few_images.png
    python -m bench.few_images free                             docs/images/few_images_free.png

The photographs are a tar file of ``NNNN_WNID_NAME.jpg``, NNNN an ImageNet class. Weights and states lie in --work; logs
and numbers go to --results (bench/results/few_images): to measure what you trained, give folders of your own (--work
again --results again, and --output again/docs to table, picture and free). A stopped run goes on at its last epoch.
"""

from __future__ import annotations

import io
import json
import tarfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from PIL import Image
from rich.console import Console
from torch import Tensor, nn
from torchvision.transforms import functional as transforms

from bcos_rt import BcosNetwork, Recipe, bcosify, explain, load, recalibrate, save
from bcos_rt.data import Augmentation
from bcos_rt.files import write_csv, write_json
from bcos_rt.images import load_image, resized
from bcos_rt.models import load_model
from bcos_rt.nn.conventional import ConventionalNetwork
from bcos_rt.nn.exponent import bcos_layers
from bcos_rt.training import Distillation, TrainingRecipe, finetune
from bench.few_images.blocks import fit_blocks
from bench.few_images.picture import draw, draw_explained
from bench.logs import ROOT, all_epochs, copy_logs, describe_machine

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)
console = Console(stderr=True)
LAST = "last.safetensors"
# In the picture.
SHOWN = ("blocks", "features_224")
# Of scikit-image: CC0 and NASA's.
FREE = ("chelsea.png", "coffee.png", "rocket.jpg", "astronaut.png")
BLOCK_COLUMNS = ("block", "error_before", "error_after")
RESULTS = ROOT / "bench" / "results" / "few_images"
WORK = ROOT / "build" / "few_images"
Photos = Annotated[
    Path,
    typer.Option("--photos", metavar="TAR", exists=True, dir_okay=False, help="NNNN_WNID_NAME.jpg, 500 of them."),
]
Work = Annotated[Path, typer.Option(help="Weights and states.")]
Results = Annotated[Path, typer.Option(help="Logs and numbers; what has its numbers here is measured.")]
Output = Annotated[Path, typer.Option(help="Folder of what is written.")]
# Every fifth photograph, in the order of their names (classes), is held out.
HELD_OUT_EVERY = 5
SHORT, LONG = 6, 30
# Pixels of the training crops, of the images that blocks are fitted to (their number is VIEWS crops of each photograph)
# and of those measured.
CROP, FITTED, MEASURED = 128, 128, 224
VIEWS, STEPS = 2, 200
STAGES = tuple(f"blocks.{i}" for i in range(7))
# The converted network is the original at first (B = 1, biases kept, the norms' means folded into them). Its logits are
# those of a softmax, so nothing is added to them.
SAME_AT_FIRST: dict[str, Any] = {"biases": "keep", "batch_norm": "uncentered_folded", "logit_bias": None}
AS_PUBLISHED: dict[str, Any] = {"logit_bias": None}
# The encoded image itself, [x, 1 - x]: its two halves add up to 1, which does the work of a bias. Normalised they are
# each other's negative, and nothing in the network is constant.
PLAIN: dict[str, Any] = {"mean": (0.0,) * 6, "std": (1.0,) * 6}


@dataclass(frozen=True)
class Variant:
    """How the network is converted and trained; the fields not given are the short run's.

    Attributes:
        epochs: of training from end to end.
        conversion: of the recipe.
        training: of the training recipe.
        steps: of each block's fit to the original's, before the training; None: not fitted.
        start: the variant whose network is trained, in place of a converted one.
        recalibrated: whether the norms' statistics are recomputed from the photographs, after the conversion and again
            after the training (a few hundred steps do not move running averages far enough).
    """

    epochs: int = SHORT
    conversion: dict[str, Any] = field(default_factory=lambda: SAME_AT_FIRST)
    training: dict[str, Any] = field(default_factory=dict)
    steps: int | None = None
    start: str | None = None
    recalibrated: bool = True

    def recipe(self) -> TrainingRecipe:
        """Logits and features of the teacher; B from 1 to 2 and the biases to 0 in the first two thirds."""
        gradual = self.epochs * 2 / 3
        base = TrainingRecipe(
            epochs=self.epochs, batch_size=16, lr=5e-4, loss="none", agc=None, clip_norm=1.0, log_every=5,
            warmup_steps=10, augmentation=Augmentation.imagenet(CROP, scale=(0.25, 1.0)),
            b_start=1.0, b_epochs=gradual, bias_decay_epochs=gradual,
            distillation=Distillation(logit_loss="kl", logits=1.0, features=1.0, modules=STAGES),
        )  # fmt: skip
        return base.replace(**self.training)


def _fitted(**conversion: Any) -> Variant:
    return Variant(0, {**AS_PUBLISHED, **conversion}, steps=STEPS, recalibrated=False)


AT_ONCE: dict[str, Any] = {"b_start": None, "b_epochs": 0.0, "bias_decay_epochs": None}
TO_FEATURES: dict[str, Any] = {**AT_ONCE, "freeze_norms": True, "lr": 2e-4, "distillation.logits": 0.02}
TO_FEATURES_224: dict[str, Any] = {**TO_FEATURES, "augmentation.size": MEASURED}
VARIANTS: dict[str, Variant] = {
    # From end to end. B = 1 shows what the biases alone do; at_once drops them and has B = 2 from the first step.
    "b1": Variant(conversion={**SAME_AT_FIRST, "b": 1.0}, training={"b_start": None, "b_epochs": 0.0}),
    "short": Variant(),
    "at_once": Variant(conversion=AS_PUBLISHED, training=AT_ONCE),
    "biases_kept": Variant(training={"bias_decay_epochs": None}),
    # Block by block.
    "blocks": _fitted(**PLAIN),
    "blocks_normalised": _fitted(),
    "blocks_b1": _fitted(**PLAIN, b=1.0),
    "blocks_b1.5": _fitted(**PLAIN, b=1.5),
    "blocks_biases_kept": _fitted(**PLAIN, biases="keep", batch_norm="uncentered_folded"),
    # Both, one after the other.
    "long": Variant(LONG, training=AT_ONCE, start="blocks"),
    # Without statistics of 16 small crops, of which the last stages' norms see 256 places each.
    "long_frozen": Variant(LONG, training={**AT_ONCE, "freeze_norms": True}, start="blocks", recalibrated=False),
    # A photograph has one vector of logits, which a network can learn by heart, and thousands of places of features.
    "features": Variant(10, training=TO_FEATURES, start="blocks", recalibrated=False),
    # At the size at which networks are measured.
    "features_224": Variant(10, training=TO_FEATURES_224, start="blocks", recalibrated=False),
    "features_224_b1.5": Variant(10, training=TO_FEATURES_224, start="blocks_b1.5", recalibrated=False),
    "features_224_biases_kept": Variant(10, training=TO_FEATURES_224, start="blocks_biases_kept", recalibrated=False),
}


@app.command()
def run(name: str, photos: Photos, work: Work = WORK, results: Results = RESULTS) -> None:
    """Train one variant, or the rest of it."""
    if name not in VARIANTS:
        raise typer.BadParameter(f"{name!r} is none of {', '.join(VARIANTS)}", param_hint="NAME")
    _train(name, photos, work, results)


@app.command("all")
def run_all(photos: Photos, work: Work = WORK, results: Results = RESULTS) -> None:
    """Train every variant that is not finished."""
    for name in VARIANTS:
        _train(name, photos, work, results)


@app.command()
def measure(photos: Photos, work: Work = WORK, results: Results = RESULTS) -> None:
    """Accuracy on the held-out photographs and localisation on 2 x 2 grids, of every finished variant."""
    train, held_out = photographs(photos)
    for name in ("teacher", "converted", "recalibrated", *VARIANTS):
        target = results / name / "measured.json"
        if name in VARIANTS and not _finished(name, work):
            continue
        if target.exists():
            console.print(f"{name}: is measured, in {target.parent}")
            continue
        console.print(f"[bold]{name}")
        write_json(target, _measured(name, _network(name, work, train), held_out, target.parent))


@app.command()
def picture(photos: Photos, work: Work = WORK, output: Output = ROOT / "docs") -> None:
    """Write images/few_images.png: maps of four held-out photographs, of the source and of what is trained."""
    train, held_out = photographs(photos)
    source = teacher()
    columns: dict[str, tuple[nn.Module, str]] = {
        "source: Grad-CAM": (source, "grad_cam"), "source: input x gradient": (source, "input_x_gradient"),
    }  # fmt: skip
    for name in SHOWN:
        if _finished(name, work):
            columns[f"{name}: its own"] = (_network(name, work, train), "bcos")
    images, labels = _centre(held_out[0]), held_out[1]
    nets = [net for net, _ in columns.values()]
    with torch.no_grad():
        right = torch.stack([torch.cat([net(x).argmax(1) for x in images.split(25)]) == labels for net in nets]).sum(0)
    # Those that most of the networks know.
    chosen = right.argsort(descending=True, stable=True)[:4]
    names = source.class_names
    called = [names[int(k)] if names else str(int(k)) for k in labels[chosen]]
    (output / "images").mkdir(parents=True, exist_ok=True)
    draw(columns, images[chosen], labels[chosen], called, output / "images" / "few_images.png")


@app.command()
def free(work: Work = WORK, output: Output = ROOT / "docs") -> None:
    """Write images/few_images_free.png: explanations of scikit-image's photographs that are free to be shown."""
    import skimage.data

    folder = Path(skimage.data.__file__).parent
    images = torch.stack([load_image(folder / name, size=MEASURED) for name in FREE])
    if not _finished(SHOWN[-1], work):
        raise typer.BadParameter(f"{work} holds no finished run {SHOWN[-1]}", param_hint="--work")
    net = load(work / SHOWN[-1] / LAST)
    (output / "images").mkdir(parents=True, exist_ok=True)
    draw_explained(net, images, output / "images" / "few_images_free.png")


@app.command()
def table(results: Results = RESULTS, output: Output = ROOT / "docs") -> None:
    """Write results/few_images.csv from what was measured."""
    rows = []
    for name in ("teacher", "converted", "recalibrated", *VARIANTS):
        path = results / name / "measured.json"
        if path.exists():
            epochs = VARIANTS[name].epochs if name in VARIANTS else None
            rows.append({"variant": name, "epochs": epochs, **json.loads(path.read_text())})
    if not rows:
        raise typer.BadParameter(f"{results} holds nothing that was measured", param_hint="--results")
    columns = ("variant", "epochs", "top1", "top5", "agreement", "localisation", "best_posthoc", "completeness",
               "residual")  # fmt: skip
    (output / "results").mkdir(parents=True, exist_ok=True)
    write_csv(output / "results" / "few_images.csv", rows, columns)


def photographs(path: Path) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Training and held-out photographs: uint8 [N, 3, 256, 256] (whole images, centre square) and their classes."""
    found: list[tuple[str, Tensor]] = []
    with tarfile.open(path) as archive:
        for member in archive:
            file = archive.extractfile(member) if member.isfile() and member.name.endswith(".jpg") else None
            if file is not None:
                image = Image.open(io.BytesIO(file.read())).convert("RGB")
                square = transforms.center_crop(transforms.resize(image, 256), [256, 256])
                found.append((Path(member.name).name, transforms.pil_to_tensor(square)))
    found.sort(key=lambda entry: entry[0])
    if len(found) != 500:
        raise SystemExit(f"{path}: {len(found)} photographs, expected 500")
    images = torch.stack([image for _, image in found])
    labels = torch.tensor([int(name[:4]) for name, _ in found])
    held = torch.arange(len(found)) % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
    return (images[~held], labels[~held]), (images[held], labels[held])


def teacher() -> ConventionalNetwork:
    """The source network, conventional, with its ImageNet weights."""
    return load_model("efficientnet-lite0").conventional().eval()


def _finished(name: str, work: Path) -> bool:
    return (work / name / LAST).exists() and all_epochs(work / name, VARIANTS[name].epochs)


def _train(name: str, photos: Path, work: Path, results: Path) -> None:
    variant, folder = VARIANTS[name], work / name
    if _finished(name, work):
        console.print(f"{name}: is trained, in {folder}")
        return
    console.print(f"[bold]{name}")
    (images, _), held_out = photographs(photos)
    torch.manual_seed(0)
    if variant.start is not None:
        _train(variant.start, photos, work, results)
        net = load(work / variant.start / LAST)
    else:
        net, _ = bcosify("efficientnet-lite0", Recipe(**variant.conversion))
    if variant.steps is not None:
        report = fit_blocks(net.eval(), teacher(), _crops(images), steps=variant.steps, console=console)
        write_csv(
            results / name / "blocks.csv", [dict(zip(BLOCK_COLUMNS, row, strict=True)) for row in report], BLOCK_COLUMNS
        )
        describe_machine(results / name)
    if variant.recalibrated:
        recalibrate(net, _centre(images).split(50))
    if not variant.epochs:
        save(net, folder / LAST)
        return

    def told(row: dict[str, Any]) -> None:
        console.print(f"  epoch {row['epoch']:3} loss {row['train_loss']:.4f} held out {row['val_top1']:.3f} "
                      f"{row.get('images_per_s', 0.0):.1f} images/s", highlight=False)  # fmt: skip
        copy_logs(folder, results / name)

    finetune(
        net, (images, None), variant.recipe(), validation=held_out, output=folder, resume=True, teacher=teacher(),
        explain_images=_centre(held_out[0][:4]), accelerator="cpu", console=console, on_epoch=told,
    )  # fmt: skip


def _crops(images: Tensor) -> Tensor:
    """VIEWS random crops of each photograph, float [VIEWS N, 3, FITTED, FITTED] in [0, 1]."""
    augment = Augmentation.imagenet(FITTED, scale=(0.35, 1.0)).train_transform()
    found = [augment(image) for _ in range(VIEWS) for image in images]
    return torch.stack(found).contiguous(memory_format=torch.channels_last)


def _centre(images: Tensor) -> Tensor:
    centred = torch.stack([resized(image.float() / 255, MEASURED) for image in images])
    return centred.contiguous(memory_format=torch.channels_last)


def _network(name: str, work: Path, train: tuple[Tensor, Tensor]) -> nn.Module:
    if name == "teacher":
        return teacher()
    if name in VARIANTS:
        net, again = load(work / name / LAST), VARIANTS[name].recalibrated
    else:
        net, again = bcosify("efficientnet-lite0", Recipe(**AS_PUBLISHED))[0], name == "recalibrated"
    if again:
        recalibrate(net, _centre(train[0]).split(50))
    return net.eval()


def _measured(name: str, net: nn.Module, held_out: tuple[Tensor, Tensor], folder: Path) -> dict[str, Any]:
    from bcos_rt.evaluation import evaluate, grid_pointing_game

    data, source = (_centre(held_out[0]), held_out[1]), teacher()
    if name == "converted":
        # Its logits are 1e-24 and less: float32 has 0 on the way there, and all explanations would be empty.
        net = net.double()
    found = evaluate(net, data, batch_size=25, completeness_images=20)
    with torch.no_grad():
        like = next(net.parameters()).dtype
        agreement = torch.cat([net(x.to(like)).argmax(1) == source(x).argmax(1) for x in data[0].split(25)])
    result: dict[str, Any] = {
        "top1": found.top1, "top5": found.top5, "agreement": float(agreement.double().mean()),
        "completeness": None if found.completeness is None else found.completeness.largest,
    }  # fmt: skip
    post_hoc = ["gradient", "input_x_gradient", "grad_cam", "random"]
    methods = ["bcos"] if isinstance(net, BcosNetwork) else post_hoc
    if isinstance(net, BcosNetwork) and any(layer.bias is not None for layer in bcos_layers(net).values()):
        # What biases add is no pixel's: the share of the top class's logit that no explanation shows.
        explained = [explain(net, part.to(like)) for part in data[0].split(25)]
        shares = torch.cat([one.residual / one.target_logit() for one in explained])
        result["residual"] = float(shares.double().median())
    # The teacher's sure images for all: a network that is sure of few would play with few.
    nets = {"teacher": source, name: net} if name != "teacher" else {"teacher": net}
    chosen = {"teacher": ["random"], name: methods}
    game = grid_pointing_game(nets, chosen, data, n=2, grids=24, same_grids="teacher", batch_size=25)
    # The example shows photographs, which are not ours to keep.
    game.save(folder, example=False)
    means = {row["method"]: row["mean"] for row in game.summary() if row["network"] == name}
    result["localisation"] = means.get("bcos")
    if name == "teacher":
        best = max((m for m in means if m != "random"), key=lambda m: means[m])
        result["best_posthoc"] = f"{best} {means[best]:.3f}"
    return result


if __name__ == "__main__":
    # Directly after the conversion to B = 2 values are so small that CPUs take many times as long for them.
    torch.set_flush_denormal(True)
    app()
