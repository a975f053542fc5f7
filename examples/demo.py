"""The whole way of a network: pretrained, converted, explained, fine-tuned, exported; ends in one HTML report.

    python examples/demo.py --out demo_out

Part 1 takes EfficientNet-Lite0 with its ImageNet weights, converts it to an equivalent B = 1 network and explains
photographs from scikit-image. Part 2 explains them with a ResNet-20 that was B-cosified and fine-tuned on CIFAR-10 and
comes with the package. Part 3 trains a small CNN on scikit-learn's digits, makes a B-cos network of it and fine-tunes
that. Part 4 writes all three as ONNX files and compares them with PyTorch.
"""

from __future__ import annotations

import argparse
import base64
import html
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

from bcos_rt import BcosNetwork, Explanation, Recipe, bcosify, explain, load, packaged, recalibrate, save
from bcos_rt.export import to_onnx
from bcos_rt.files import replacing, write_json, write_text
from bcos_rt.images import load_image
from bcos_rt.models import load_model

PHOTOGRAPHS = ("chelsea.png", "coffee.png", "astronaut.png", "rocket.jpg", "motorcycle_left.png")
SEED = 0


@dataclass
class Report:
    """Collects what the demo prints, with its pictures, for one self-contained HTML page."""

    console: Console
    parts: list[str] = field(default_factory=list)
    tables: list[dict[str, Any]] = field(default_factory=list)

    def heading(self, text: str) -> None:
        self.console.rule(f"[bold]{text}")
        self.parts.append(f"<h2>{html.escape(text)}</h2>")

    def text(self, text: str) -> None:
        self.console.print(text, highlight=False)
        self.parts.append(f"<p>{html.escape(text)}</p>")

    def table(self, columns: list[str], rows: list[list[str]]) -> None:
        table = Table(*columns)
        for row in rows:
            table.add_row(*row)
        self.console.print(table)
        self.tables.append({"columns": columns, "rows": rows})
        head = "".join(f"<th>{html.escape(c)}</th>" for c in columns)
        body = "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>" for row in rows)
        self.parts.append(f"<table><tr>{head}</tr>{body}</table>")

    def picture(self, path: Path, caption: str) -> None:
        data = base64.b64encode(path.read_bytes()).decode()
        self.parts.append(
            f'<figure><img src="data:image/png;base64,{data}" alt="{html.escape(caption)}">'
            f"<figcaption>{html.escape(caption)}</figcaption></figure>"
        )

    def write(self, path: Path, seconds: float) -> None:
        style = (
            "body{font:16px/1.5 system-ui,sans-serif;max-width:62rem;margin:2rem auto;padding:0 1rem;color:#222}"
            "img{max-width:100%}figure{margin:1.5rem 0}figcaption{color:#555;font-size:.9rem}"
            "table{border-collapse:collapse}td,th{border:1px solid #ccc;padding:.25rem .7rem;text-align:left}"
        )
        page = (
            '<!doctype html><html lang="en"><meta charset="utf-8"><title>bcos-rt demo</title>'
            f"<style>{style}</style><h1>bcos-rt demo</h1>"
            f"<p>Measured on {html.escape(machine())}; the whole demo took {seconds:.0f} s.</p>"
            + "".join(self.parts)
            + "</html>"
        )
        write_text(path, page)
        numbers = {"machine": machine(), "seconds": round(seconds, 1), "tables": self.tables}
        write_json(path.with_name("results.json"), numbers)


def machine() -> str:
    """CPU model and threads, for every number that depends on them."""
    name = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.split(":", 1)[1].strip()
                break
    except OSError:
        pass
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def median_ms(function: Callable[[], object], runs: int = 7) -> float:
    """Median wall time of a call in milliseconds, after one call that is not counted."""
    function()
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        function()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


# Part 1: EfficientNet-Lite0 on photographs -----------------------------------------------------------------------


def photographs(size: int = 224) -> tuple[list[str], Tensor]:
    """The photographs inside scikit-image, [N, 3, size, size] in [0, 1]."""
    import skimage.data

    folder = Path(skimage.data.__file__).parent
    names = [Path(name).stem for name in PHOTOGRAPHS]
    return names, torch.stack([load_image(folder / name, size=size) for name in PHOTOGRAPHS])


def imagenet_part(report: Report, out: Path) -> tuple[BcosNetwork, Tensor]:
    report.heading("1. EfficientNet-Lite0 with its ImageNet weights")
    source = load_model("efficientnet-lite0")
    names, images = photographs()
    mean, std = (torch.tensor(v)[:, None, None] for v in (source.mean, source.std))
    with torch.no_grad():
        logits = source.module.eval()((images - mean) / std)
    top = torch.softmax(logits, 1).topk(3)
    report.table(
        ["photograph", "what the pretrained network predicts"],
        [
            [name, ", ".join(f"{source.class_names[i]} {p:.0%}" for p, i in zip(*row, strict=True))]
            for name, row in zip(names, zip(top.values.tolist(), top.indices.tolist(), strict=True), strict=True)
        ],
    )

    net, _ = bcosify("efficientnet-lite0", Recipe.equivalent(), verify_images=images)
    net.eval()
    with torch.no_grad():
        converted = net(images)
    error = float((converted - logits).abs().max() / logits.abs().max())
    same = int((converted.argmax(1) == logits.argmax(1)).sum())
    report.text(
        f"Converted, step 1 of the method (six input channels, B = 1): largest relative logit error {error:.1e}, "
        f"same top class on {same} of {len(names)} photographs."
    )
    if error >= 1e-4 or same != len(names):
        raise SystemExit("the converted network is not equivalent to its source")

    explanation = explain(net, images)
    report.text(
        "The explanation below is the equivalent network's (B = 1): an initial explanation. B = 2 means nothing before "
        "the network is fine-tuned. Left: the photograph. Middle: the weights W of the predicted class as colour, "
        "opaque where they are strong. Right: what each pixel adds to the class's logit."
    )
    errors = explanation.completeness_error().tolist()
    rows = []
    for i, name in enumerate(names):
        path = explanation.save(out / f"explanation_{name}.png", indices=[i])
        total, residual = float(explanation.contributions[i].sum()), float(explanation.residual[i])
        report.picture(path, f"{name}: {explanation.class_name(int(explanation.target[i]))}")
        logit = float(explanation.target_logit()[i])
        rows.append([name, f"{total:.4f}", f"{residual:.4f}", f"{logit:.4f}", f"{errors[i]:.1e}"])
    report.table(["photograph", "Σ contributions", "residual", "logit", "|Σ + residual - logit|"], rows)
    return net, images


# Part 2: the network that comes with the package -------------------------------------------------------------------


def cifar_part(report: Report, out: Path) -> tuple[BcosNetwork, Tensor]:
    report.heading("2. ResNet-20, B-cosified and fine-tuned on CIFAR-10, from the package")
    name = packaged.PREFIX + "cifar10-resnet20"
    net, about = load(name), packaged.about(name)
    names, images = photographs(size=32)
    explanation = explain(net, images)
    report.table(
        ["network", "CIFAR-10 test accuracy", "3 x 3 grid pointing"],
        [
            ["original, conventional", f"{about['test_top1_conventional']:.1%}", ""],
            ["B-cosified (B = 2, no biases), fine-tuned", f"{about['test_top1']:.1%}",
             f"{about['grid_pointing_3x3']:.1%}"],
        ],
    )  # fmt: skip
    report.text(
        "Measured when it was trained, with: " + "; ".join(about["commands"]) + ". Grid pointing: of nine test images "
        "side by side, the share of positive contributions that falls on the one whose class is explained (by chance "
        "11 %)."
    )
    titles = [f"{photo}\n{explanation.class_name(int(c))}?" for photo, c in zip(names, explanation.target, strict=True)]
    path = explanation_grid(explanation, titles, out / "cifar10.png")
    report.picture(path, "The photographs at 32 x 32 pixels, the explanation of what the network takes each for, and "
                   "each pixel's contribution (red for, blue against). It knows ten classes and has to choose one: an "
                   "astronaut, a cup of coffee and a rocket are none of them.")  # fmt: skip
    report.text(f"Largest |sum(contributions) + residual - logit|: {float(explanation.completeness_error().max()):.1e}")
    return net, images


# Part 3: digits, trained, B-cosified, fine-tuned -----------------------------------------------------------------


def digit_data() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """scikit-learn's 1,797 digits as RGB in [0, 1], 32 x 32; 1,437 for training, 360 for testing."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.tensor(digits.images / 16.0, dtype=torch.float32)[:, None]
    images = F.interpolate(images, scale_factor=4, mode="bilinear").expand(-1, 3, -1, -1).contiguous()
    labels = torch.tensor(digits.target, dtype=torch.int64)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(SEED))
    train, test = order[:1437], order[1437:]
    return images[train], labels[train], images[test], labels[test]


def digit_network() -> nn.Module:
    """A small conventional CNN: four convolutions with BatchNorm and ReLU, global pool, linear head."""

    def block(cin: int, cout: int, stride: int) -> list[nn.Module]:
        return [nn.Conv2d(cin, cout, 3, stride, 1, bias=False), nn.BatchNorm2d(cout), nn.ReLU(inplace=True)]

    features = nn.Sequential(*block(3, 16, 1), *block(16, 32, 2), *block(32, 48, 2), *block(48, 64, 1))
    return nn.Sequential(features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def fit(
    network: nn.Module,
    data: tuple[Tensor, Tensor],
    loss: Callable[[Tensor, Tensor], Tensor],
    epochs: int,
    lr: float,
    label: str,
    console: Console,
) -> None:
    """A plain training loop: Adam with a cosine schedule, batches of 64."""
    images, labels = data
    optimizer = torch.optim.Adam(network.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    generator = torch.Generator().manual_seed(SEED)
    network.train()
    for _ in track(range(epochs), description=label, console=console):
        for index in torch.randperm(len(labels), generator=generator).split(64):
            optimizer.zero_grad()
            loss(network(images[index]), labels[index]).backward()
            optimizer.step()
        schedule.step()
    network.eval()


def accuracy(network: nn.Module, images: Tensor, labels: Tensor) -> float:
    with torch.no_grad():
        return float((network(images).argmax(1) == labels).double().mean())


def one_hot_bce(logits: Tensor, labels: Tensor) -> Tensor:
    """Binary cross-entropy over all classes, what B-cos networks are trained with."""
    return F.binary_cross_entropy_with_logits(logits, F.one_hot(labels, logits.shape[1]).to(logits.dtype))


def digits_part(report: Report, out: Path) -> tuple[BcosNetwork, Tensor]:
    report.heading("3. Digits: trained, B-cosified, fine-tuned")
    train_x, train_y, test_x, test_y = digit_data()
    mean, std = (0.31, 0.31, 0.31), (0.35, 0.35, 0.35)
    torch.manual_seed(SEED)
    source = digit_network()
    normalised = (train_x - mean[0]) / std[0]
    fit(source, (normalised, train_y), F.cross_entropy, 8, 2e-3, "training the conventional CNN", report.console)
    original = accuracy(source, (test_x - mean[0]) / std[0], test_y)

    net, _ = bcosify(source, Recipe(mean=mean, std=std), class_names=[str(i) for i in range(10)])
    before = accuracy(net.eval(), test_x, test_y)
    recalibrate(net, [train_x])
    recalibrated = accuracy(net.eval(), test_x, test_y)
    fit(net, (train_x, train_y), one_hot_bce, 20, 2e-3, "fine-tuning the B-cos network", report.console)
    after = accuracy(net, test_x, test_y)
    report.table(
        ["network", "test accuracy (360 digits)"],
        [
            ["original, conventional", f"{original:.1%}"],
            ["B-cosified (B = 2, no biases), before fine-tuning", f"{before:.1%}"],
            ["the same with its norms' statistics recomputed", f"{recalibrated:.1%}"],
            ["B-cosified, fine-tuned for 20 epochs", f"{after:.1%}"],
        ],
    )
    if after < 0.9:
        raise SystemExit("fine-tuning failed: below 90 % of the digits are right")
    save(net, out / "digits.safetensors")

    chosen = [int((test_y == digit).nonzero()[0]) for digit in range(10)]
    images = test_x[chosen]
    explanation = explain(net, images)
    path = explanation_grid(explanation, [f"predicted {int(c)}" for c in explanation.target], out / "digits.png")
    report.picture(path, "One test image of each digit, the fine-tuned network's explanation of its prediction, and "
                   "each pixel's contribution (red for, blue against).")  # fmt: skip
    report.text(f"Largest |sum(contributions) + residual - logit|: {float(explanation.completeness_error().max()):.1e}")
    return net, images


def explanation_grid(explanation: Explanation, titles: list[str], path: Path) -> Path:
    """A column an image: the image, colour explanation, contribution map."""
    from matplotlib.figure import Figure

    rgba = explanation.picture(smooth=5).numpy()
    figure = Figure(figsize=(1.4 * max(len(explanation), 6), 4.8), layout="constrained")
    axes = figure.subplots(3, len(explanation), squeeze=False)
    for i in range(len(explanation)):
        contributions = explanation.contributions[i].numpy()
        limit = float(np.percentile(np.abs(contributions), 99.5)) or 1.0
        axes[0, i].imshow(explanation.images[i, :3].permute(1, 2, 0).numpy())
        axes[0, i].set_title(titles[i], fontsize=10)
        axes[1, i].imshow(np.ones((*rgba.shape[1:3], 3)))
        axes[1, i].imshow(rgba[i])
        axes[2, i].imshow(contributions, cmap="bwr", vmin=-limit, vmax=limit)
    for row, title in enumerate(("image", "explanation", "contributions")):
        axes[row, 0].set_ylabel(title)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=100, format="png")
    return path


# Part 4: one ONNX file each --------------------------------------------------------------------------------------


def onnx_part(report: Report, out: Path, networks: dict[str, tuple[BcosNetwork, Tensor]]) -> None:
    import onnxruntime

    report.heading("4. Prediction and explanation in one ONNX file")
    rows = []
    for name, (net, images) in networks.items():
        path = out / f"{name}.onnx"
        size = tuple(images.shape[-2:])
        to_onnx(net, path, image_size=size, verify_images=images)
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        outputs = [o.name for o in session.get_outputs()]

        def run(batch: Tensor, session: Any = session, outputs: list[str] = outputs) -> dict[str, Any]:
            ids = np.full(len(batch), -1, dtype=np.int64)
            return dict(zip(outputs, session.run(outputs, {"image": batch.numpy(), "class_ids": ids}), strict=True))

        result = run(images)
        reference = explain(net, images)

        def difference(key: str, result: dict[str, Any] = result, reference: Explanation = reference) -> str:
            ours = getattr(reference, key).numpy()
            return f"{np.abs(result[key] - ours).max():.0e} of {np.abs(ours).max():.2g}"

        one = images[:1]
        rows.append(
            [
                name,
                f"{path.stat().st_size / 1e6:.1f}",
                difference("logits"),
                difference("weights"),
                difference("contributions"),
                f"{median_ms(lambda net=net, one=one: explain(net, one)):.1f}",
                f"{median_ms(lambda run=run, one=one: run(one)):.1f}",
            ]
        )
    report.table(
        ["network", "MB", "Δ logits", "Δ W", "Δ contrib.", "PyTorch ms", "ONNX ms"],
        rows,
    )
    report.text(
        "Δ: the largest difference between onnxruntime and PyTorch over all images, beside the largest value. Times: "
        "prediction and explanation of one image. At B = 1 a ReLU that is almost exactly at its switch may fall to the "
        "other side in the other runtime, which moves single entries of W."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("demo_out"), help="folder for pictures, networks and report")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    report = Report(Console())
    report.console.print(f"bcos-rt demo on {machine()}")
    networks = {
        "efficientnet-lite0": imagenet_part(report, arguments.out),
        "cifar10": cifar_part(report, arguments.out),
        "digits": digits_part(report, arguments.out),
    }
    onnx_part(report, arguments.out, networks)
    page = arguments.out / "report.html"
    report.write(page, time.perf_counter() - start)
    report.console.print(f"\nDone in {time.perf_counter() - start:.0f} s. Open [bold]{page}[/bold]")


if __name__ == "__main__":
    main()
