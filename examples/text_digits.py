"""Texts that are explained: a small CLIP-like image tower on scikit-learn's digits, B-cosified and fine-tuned.

    python examples/text_digits.py --picture text_digits.png --results text_digits.json

Nothing is downloaded. Ten fixed directions stand for the embeddings of ten texts ("a three"), which a text tower would
give. A conventional tower (CLIP's ModifiedResNet, small) learns to embed digits along them, is converted with
``Recipe.clip()`` and fine-tuned; then boards of four digits, where it only ever saw one, are explained for each of the
texts. Takes some minutes.
"""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path

import torch
import torch.nn.functional as F
from open_clip.modified_resnet import ModifiedResNet
from rich.console import Console
from rich.progress import track
from sklearn.datasets import load_digits
from torch import Tensor, nn

from bcos_rt import Recipe, bcosify, explain_text
from bcos_rt.files import write_json

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
# A board has 2 x 2 cells, each as large as one token of the tower sees in its middle.
CELL, WIDTH, SCALE, BATCH, TRAINING = 32, 64, 20.0, 64, 1400


def digits() -> tuple[Tensor, Tensor]:
    """Cells [N, 1, CELL, CELL] in [0, 1] with one digit each, in random order; labels [N]."""
    data = load_digits()
    order = torch.randperm(len(data.images), generator=torch.Generator().manual_seed(2))
    grey = torch.from_numpy(data.images).float()[order, None] / 16
    return F.interpolate(grey, (CELL, CELL), mode="bilinear"), torch.from_numpy(data.target).long()[order]


def boards(cells: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Boards [N, 3, 2 CELL, 2 CELL] of cells [N, 4, CELL, CELL], row by row, with noise over all."""
    board = torch.unflatten(cells, 1, (2, 2)).permute(0, 1, 3, 2, 4).flatten(3).flatten(1, 2)[:, None]
    noise = torch.rand(len(cells), 3, 2 * CELL, 2 * CELL, generator=generator)
    return 0.7 * board + 0.3 * noise


def placed(cells: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Boards with one digit of [N, 1, CELL, CELL], each in a cell drawn at random."""
    where = F.one_hot(torch.randint(4, (len(cells),), generator=generator), 4)[..., None, None]
    return boards(cells * where, generator)


def train(net: nn.Module, cells: Tensor, labels: Tensor, texts: Tensor, epochs: int, lr: float, name: str) -> None:
    """Cross-entropy of the scaled cosines with the texts, as CLIP's loss with fixed texts."""
    optimizer = torch.optim.Adam(net.parameters(), lr)
    steps = len(cells) // BATCH
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * steps)
    net.train()
    for _ in track(range(epochs), name, console=Console(stderr=True), transient=True):
        for batch in torch.randperm(len(cells)).split(BATCH)[:steps]:
            embeddings = F.normalize(net(placed(cells[batch])), dim=1)
            loss = F.cross_entropy(SCALE * embeddings @ texts.T, labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    net.eval()


@torch.no_grad()
def accuracy(net: nn.Module, images: Tensor, labels: Tensor, texts: Tensor) -> float:
    """Share of images whose best text is the right one."""
    right = [(net(x) @ texts.T).argmax(1) == y for x, y in zip(images.split(128), labels.split(128), strict=True)]
    return float(torch.cat(right).float().mean())


def four_digits(cells: Tensor, labels: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Boards [count, 3, 2 CELL, 2 CELL] of four different digits, and their labels [count, 4]."""
    generator = torch.Generator().manual_seed(1)
    chosen: list[Tensor] = []
    while len(chosen) < count:
        four = torch.randperm(len(cells), generator=generator)[:4]
        if len(set(labels[four].tolist())) == 4:
            chosen.append(four)
    four = torch.stack(chosen)
    return boards(cells[four, 0], generator), labels[four]


def inside(maps: Tensor) -> Tensor:
    """Share of positive contributions inside the right cell, [N, 4], of maps [N, 4, 2 CELL, 2 CELL]."""
    cells = F.avg_pool2d(maps.clamp(min=0), CELL).flatten(2)
    return cells.diagonal(dim1=1, dim2=2) / cells.sum(2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--picture", type=Path, default=Path("text_digits.png"))
    parser.add_argument("--results", type=Path, default=Path("text_digits.json"))
    parser.add_argument("--epochs", type=int, default=15, help="of each of the two trainings")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    cells, labels = digits()
    held_out = placed(cells[TRAINING:], torch.Generator().manual_seed(3)), labels[TRAINING:]
    texts = torch.linalg.qr(torch.randn(WIDTH, len(NAMES))).Q.T.contiguous()
    training = (cells[:TRAINING], labels[:TRAINING], texts, arguments.epochs, 1e-3)

    tower = ModifiedResNet((1, 1, 1, 1), output_dim=WIDTH, heads=8, image_size=2 * CELL, width=16)
    train(tower, *training, "conventional tower")
    found = {"conventional": accuracy(tower, *held_out, texts)}
    net, _ = bcosify(tower, Recipe.clip(mean=(0.0,) * 3, std=(1.0,) * 3))
    found["converted"] = accuracy(net.eval(), *held_out, texts)
    train(net, *training, "B-cosified tower")
    found["finetuned"] = accuracy(net, *held_out, texts)

    images, shown = four_digits(cells[TRAINING:], labels[TRAINING:], 50)
    for pooling, power in (("mean", None), ("max", None), ("cosine_power", 3.0)):
        explanations = [
            explain_text(net, image[None], texts[digits_of], pooling, power=power)
            for image, digits_of in zip(images, shown, strict=True)
        ]
        found[f"inside_right_cell_{pooling}"] = float(torch.cat([inside(e.contributions) for e in explanations]).mean())
        errors = torch.cat([e.completeness_error() for e in explanations])
        found["largest_completeness_error"] = max(found.get("largest_completeness_error", 0.0), float(errors.max()))
    prompts = [f"a {NAMES[i]}" for i in shown[0].tolist()]
    picture = explain_text(net, images[:1], texts[shown[0]], prompts=prompts)
    picture.save(arguments.picture, dpi=60)
    about = {"torch": torch.__version__, "threads": torch.get_num_threads(), "machine": platform.machine()}
    write_json(arguments.results, {**{k: round(v, 9) for k, v in found.items()}, "epochs": arguments.epochs, **about})
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
