"""A network's files, made once and read by every contender: weights, exports, images and expected results.

======================================= ================================================================================
file                                    what
======================================= ================================================================================
``net.pt``, ``plain.pt``                the B-cos network and the one it was made from (where there is one)
``reference-{batch}-{size}-{K}.npz``    images, and the results of both networks on them: ``bcos.*`` by
                                        :func:`bcos_rt.explain` (the un-fused graph), ``plain.*`` by autograd. Of a
                                        network with an embedding: ``texts``, and ``bcos.*`` of their scores
``forward-{size}.onnx`` ...             exports: ``explain-``, ``explain-...-multi``, ``plain-``
``facts.json``                          mean and std of the plain network; seconds an export took, or why it failed
======================================= ================================================================================

Each function here runs in a process of its own (:meth:`bcos_rt.benchmark.comparison.Workplace.call`).
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bcos_rt.benchmark.contender import BCOS, EMBEDDING, PLAIN, Setting
from bcos_rt.benchmark.contenders import gradients
from bcos_rt.benchmark.worker import resolve
from bcos_rt.nn.network import BcosNetwork, EmbeddingLayer

__all__ = ["Subject", "by_name", "export", "made_up_images", "make", "reference"]


@dataclass(frozen=True)
class Subject:
    """What is measured.

    Attributes:
        net: the B-cos network, in eval mode.
        plain: the network it was made from, in eval mode; None if there is none.
        mean, std: the normalisation ``plain`` expects.
        about: JSON-ready, for a reader.
    """

    net: BcosNetwork
    plain: nn.Module | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    about: Mapping[str, Any]


def made_up_images(batch: int, size: int, seed: int = 0) -> Tensor:
    """Smooth random colours with a little noise, float32 [batch, 3, size, size] in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(batch, 3, 8, 8, generator=generator)
    noise = torch.rand(batch, 3, size, size, generator=generator)
    return (0.8 * F.interpolate(coarse, (size, size), mode="bilinear") + 0.2 * noise).clamp(0, 1)


def make(folder: str, function: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Write ``net.pt``, ``plain.pt`` and ``facts.json`` of the subject that ``function(**arguments)`` returns."""
    subject: Subject = resolve(function)(**arguments)
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    torch.save(subject.net, place / "net.pt")
    if subject.plain is not None:
        torch.save(subject.plain, place / "plain.pt")
    about = {
        **subject.about,
        "parameters": sum(p.numel() for p in subject.net.parameters()),
        "mean": list(subject.mean),
        "std": list(subject.std),
    }
    (place / "facts.json").write_text(json.dumps(about), encoding="utf-8")
    return about


def reference(setting: Mapping[str, Any]) -> None:
    """Write a setting's images and expected results, unless they are there."""
    from bcos_rt.explanation import explain, explain_text

    where = Setting.from_json(setting)
    if where.reference_file.exists():
        return
    torch.set_num_threads(where.threads)
    images = made_up_images(where.batch, where.size)
    net: BcosNetwork = torch.load(where.folder / "net.pt", weights_only=False)
    arrays = {"images": images}
    if isinstance(net.logit_layer, EmbeddingLayer):
        with torch.no_grad():
            embedding = net(images)
        generator = torch.Generator().manual_seed(2)
        texts = torch.randn(where.classes, embedding.shape[1], generator=generator)
        arrays |= {"texts": texts, f"{EMBEDDING}.logits": embedding}
        expected = explain_text(net, images, texts)
    else:
        targets = torch.arange(where.classes).expand(where.batch, -1) if where.classes > 1 else None
        expected = explain(net, images, targets)
    results = {name: getattr(expected, name) for name in ("logits", "weights", "contributions")}
    if expected.of == "texts" and where.classes == 1:
        results |= {name: results[name][:, 0] for name in ("weights", "contributions")}
    arrays |= {f"{BCOS}.{name}": value for name, value in results.items()}
    if (where.folder / "plain.pt").exists():
        facts = where.facts()
        mean, std = (torch.tensor(facts[name])[:3, None, None] for name in ("mean", "std"))
        x = ((images - mean) / std).requires_grad_()
        logits = torch.load(where.folder / "plain.pt", weights_only=False)(x)
        grads, maps = gradients(logits, x, where.classes)
        of_plain = {"images": x, "logits": logits, "weights": grads, "contributions": maps}
        arrays |= {f"{PLAIN}.{name}": value for name, value in of_plain.items()}
    temporary = where.reference_file.with_suffix(".tmp.npz")
    # Typed as if further arrays were options.
    np.savez(temporary, **{name: value.detach().numpy() for name, value in arrays.items()})  # type: ignore[arg-type]
    os.replace(temporary, where.reference_file)


def export(folder: str, size: int, multi: bool = False, plain: bool = True) -> None:
    """Write the ONNX files of one image size that are not there yet; why one failed goes into ``facts.json``."""
    place = Path(folder)
    names = [f"forward-{size}.onnx", f"explain-{size}{'-multi' if multi else ''}.onnx"]
    names += [f"plain-{size}.onnx"] if plain and (place / "plain.pt").exists() else []
    facts = json.loads((place / "facts.json").read_text(encoding="utf-8"))
    for name in names:
        if (place / name).exists():
            continue
        start = time.perf_counter()
        try:
            _export(place, name, size, multi)
            facts[name] = time.perf_counter() - start
        except Exception as error:  # exporters fail in many ways; the contender's row then says how
            facts[name] = f"{type(error).__name__}: {error}"[:300]
    (place / "facts.json").write_text(json.dumps(facts), encoding="utf-8")


def _export(place: Path, name: str, size: int, multi: bool) -> None:
    if name.startswith("plain"):
        _export_plain(torch.load(place / "plain.pt", weights_only=False), place / name, size)
        return
    from bcos_rt.export import to_onnx

    net = torch.load(place / "net.pt", weights_only=False)
    if name.startswith("forward"):
        to_onnx(net, place / name, size, forward_only=True, verify=False)
    else:
        outputs = ["logits", "weights", "contributions"]
        to_onnx(net, place / name, size, multi=multi, outputs=outputs, verify=False)


def _export_plain(net: nn.Module, path: Path, size: int) -> None:
    """By torch's own exporter: the current one where its package is installed, else the older one."""
    example = (torch.rand(2, 3, size, size),)
    with warnings.catch_warnings(), open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        warnings.simplefilter("ignore")
        if importlib.util.find_spec("onnxscript") is not None:
            batch = ({0: torch.export.Dim("batch")},)
            torch.onnx.export(net, example, path, dynamic_shapes=batch, dynamo=True, external_data=False)
        else:
            axes = {"image": {0: "batch"}, "logits": {0: "batch"}}
            torch.onnx.export(
                net, example, path, dynamo=False, input_names=["image"], output_names=["logits"], dynamic_axes=axes
            )


def by_name(
    model: str | None, checkpoint: str | None, weights: str | None, num_classes: int | None, size: int
) -> Subject:
    """The subject of ``bcos-rt bench``: a model by name, converted with the default recipe, or a saved B-cos network.

    Norms are calibrated on made-up images, so that activations keep a usual size whatever the weights are; of a
    checkpoint, the plain network is its architecture with random weights (times do not depend on them), and there is
    none for a network made from a module of one's own.
    """
    from bcos_rt.checkpoint import load
    from bcos_rt.conversion import bcosify
    from bcos_rt.conversion.recalibrate import recalibrate
    from bcos_rt.models import load_model, rebuild_source

    images = made_up_images(4, size, seed=1)
    if checkpoint is not None:
        net = load(checkpoint)
        about = {"checkpoint": checkpoint, "source": dict(net.source)}
        plain = rebuild_source(net.source) if net.source.get("kind") != "module" else None
        if plain is not None:
            recalibrate(plain, images)
        return Subject(net, plain, (0.5,) * 3, (0.5,) * 3, about)
    torch.manual_seed(0)
    source = load_model(str(model), weights=weights, num_classes=num_classes)
    recalibrate(source.module, images)
    named: Any = source
    net, _ = bcosify(named)
    recalibrate(net, images)
    mean, std = source.mean or (0.5,) * 3, source.std or (0.5,) * 3
    return Subject(net.eval(), source.module.eval(), mean, std, {"model": model, "source": source.source})
