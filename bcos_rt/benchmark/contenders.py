"""The contenders an installed package has: the engine's backends, exported files in onnxruntime, the plain network.

The plain network (the one that was converted) gets images already normalised, a free advantage; its "explanation" is
input x gradient, what a saliency map costs.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import statistics
import time
from collections.abc import Callable
from typing import Any

from bcos_rt.benchmark.contender import (
    BCOS,
    EMBEDDING,
    EXPLAIN,
    FORWARD,
    PLAIN,
    Contender,
    Prepared,
    UnsupportedError,
)

__all__ = [
    "EngineContender",
    "LoadedEngineContender",
    "OnnxContender",
    "PlainContender",
    "fastest_layout",
    "forward_reference",
    "gradients",
    "start_torch",
    "texts_of",
    "torch_images",
    "torch_module",
]

# What tracing and compiling import.
_TRACING = ("torch.export", "torch._dynamo", "torch._inductor.compile_fx", "sympy", "bcos_rt.kernels.cpu")


def start_torch(*others: str) -> None:
    """Import torch, what it imports while tracing, and ``others``; run each kind of op once.

    Modules, thread pools and libraries' own tables are then in memory before anything is counted as a contender's.
    """
    for name in ("torch", *_TRACING, *others):
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    import torch

    torch.export.export(torch.nn.Linear(1, 1), (torch.zeros(1, 1),)).run_decompositions({})
    for layout in (torch.contiguous_format, torch.channels_last):
        layers = (torch.nn.Conv2d(8, 8, 3, padding=1), torch.nn.BatchNorm2d(8), torch.nn.ReLU(), torch.nn.AvgPool2d(2))
        x = torch.zeros(2, 8, 32, 32).contiguous(memory_format=layout).requires_grad_()
        torch.nn.Sequential(*layers).to(memory_format=layout)(x).sum().backward()
    torch.nn.functional.linear(torch.ones(2, 8), torch.ones(8, 8))


def torch_images(contender: Contender) -> Any:
    """The setting's images, float32 [N, 3, size, size] in [0, 1]."""
    import torch

    return torch.from_numpy(contender.setting.arrays("images")["images"])


def torch_module(contender: Contender, name: str) -> Any:
    """A network of the setting's folder, in eval mode, its parameters needing no gradient."""
    import torch

    path = contender.setting.folder / f"{name}.pt"
    if not path.exists():
        raise UnsupportedError(f"there is no {name} network here")
    # Written by bcos_rt.benchmark.subject in a folder of the driver's own.
    module = torch.load(path, weights_only=False).eval()
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    return module


def fastest_layout(
    net: Any, images: Any, run: Callable[[Any, Any], Any], calls: int = 5
) -> tuple[Callable[[], Any], str]:
    """``run(net, images)`` in the memory layout that is faster here, contiguous or channels-last.

    Returns:
        The function, for which ``net`` stays in that layout; and a note with both medians.
    """
    import torch

    layouts = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last}
    medians = {}
    for name, layout in layouts.items():
        net.to(memory_format=layout)
        given = images.contiguous(memory_format=layout)
        times = []
        for _ in range(calls + 1):
            start = time.perf_counter()
            run(net, given)
            times.append(1e3 * (time.perf_counter() - start))
        medians[name] = statistics.median(times[1:])
    best = min(medians, key=medians.__getitem__)
    net.to(memory_format=layouts[best])
    given = images.contiguous(memory_format=layouts[best])
    listed = ", ".join(f"{name} {value:.1f} ms" for name, value in medians.items())
    return lambda: run(net, given), f"{best} (of {listed})"


class EngineContender(Contender):
    """:class:`bcos_rt.Engine`. Options: "backend"; "dtype" and "forward_dtype", names such as "bfloat16"."""

    net: Any = None
    engine: Any = None

    def load(self) -> None:
        start_torch()
        self.net = torch_module(self, "net")

    def prepare(self, mode: str) -> Prepared:
        import torch

        from bcos_rt import Engine
        from bcos_rt.errors import BcosError

        images = torch_images(self)
        if self.engine is None:
            dtype = getattr(torch, self.options.get("dtype", "float32"))
            forward = getattr(torch, self.options["forward_dtype"]) if "forward_dtype" in self.options else None
            try:
                self.engine = Engine(
                    self.net, images, dtype=dtype, forward_dtype=forward, backend=self.options["backend"]
                )
            except BcosError as error:
                raise UnsupportedError(str(error)) from error
            # The engine has what it needs of it; a service keeps no more either.
            self.net = None
        engine, targets = self.engine, _targets(self)
        facts = {"note": f"backend {engine.backend}"} if self.options["backend"] == "auto" else {}
        if mode == FORWARD:
            reference = forward_reference(self)
            return Prepared(lambda: engine.predict(images), lambda logits: {"logits": _float(logits)}, reference, facts)
        if mode != EXPLAIN:
            raise UnsupportedError(f"an engine has no mode {mode!r}")
        texts = texts_of(self)
        if texts is not None:
            return Prepared(lambda: engine.explain_text(images, texts), _of_texts(self), BCOS, facts)
        return Prepared(lambda: engine.explain(images, targets), _explained, BCOS, facts)


class LoadedEngineContender(EngineContender):
    """:meth:`bcos_rt.Engine.load` of a file that another process saved: no network, no tracing."""

    def load(self) -> None:
        start_torch()

    def prepare(self, mode: str) -> Prepared:
        import torch

        from bcos_rt import Engine

        if self.engine is None:
            path = self.setting.folder / "net.engine"
            if not path.exists():
                net = torch.load(self.setting.folder / "net.pt", weights_only=False).eval()
                Engine(net, torch_images(self), backend=self.options["backend"]).save(path)
            self.engine = Engine.load(path, backend=self.options["backend"])
        return super().prepare(mode)


def _targets(contender: Contender) -> Any:
    """Class ids [N, K], or None for each image's top class."""
    import torch

    setting = contender.setting
    if setting.classes == 1:
        return None
    return torch.arange(setting.classes).expand(setting.batch, -1).contiguous()


def texts_of(contender: Contender) -> Any:
    """Text embeddings [K, D] that are explained by a network with an embedding; None for a classifier."""
    import torch

    found = contender.setting.arrays("texts")
    return torch.from_numpy(found["texts"]) if found else None


def forward_reference(contender: Contender) -> str:
    """Whose results a forward pass of the B-cos network must reproduce: its logits or its embedding."""
    return EMBEDDING if contender.setting.arrays("texts") else BCOS


def _of_texts(contender: Contender) -> Callable[[Any], dict[str, Any]]:
    """The answer of an explanation of texts; with one text there is no dimension for them."""
    several = contender.setting.classes > 1

    def answer(explanation: Any) -> dict[str, Any]:
        found = _explained(explanation)
        if not several:
            found |= {name: found[name][:, 0] for name in ("weights", "contributions")}
        return found

    return answer


def _explained(explanation: Any) -> dict[str, Any]:
    names = ("logits", "weights", "contributions")
    return {name: _float(getattr(explanation, name)) for name in names}


def _float(value: Any) -> Any:
    return value.detach().float().numpy()


class OnnxContender(Contender):
    """A file in onnxruntime on the CPU. Option "file": "bcos" (ours) or "plain" (torch.onnx.export of the source)."""

    def load(self) -> None:
        try:
            importlib.import_module("onnxruntime")
        except ImportError as error:
            raise UnsupportedError(f"onnxruntime is not installed ({error})") from error

    def _file(self, mode: str) -> str:
        setting = self.setting
        if self.options["file"] == "plain":
            return f"plain-{setting.size}.onnx"
        if mode == FORWARD:
            return f"forward-{setting.size}.onnx"
        return f"explain-{setting.size}{'-multi' if setting.classes > 1 else ''}.onnx"

    def weight_bytes(self) -> int:
        paths = [self.setting.folder / self._file(mode) for mode in (FORWARD, EXPLAIN)]
        return max((path.stat().st_size for path in paths if path.exists()), default=0)

    def prepare(self, mode: str) -> Prepared:
        import numpy as np
        import onnxruntime

        plain = self.options["file"] == "plain"
        if mode not in (FORWARD, EXPLAIN) or (plain and mode == EXPLAIN):
            raise UnsupportedError(f"the file has no mode {mode!r}")
        path = self.setting.folder / self._file(mode)
        if not path.exists():
            raise UnsupportedError(f"{path.name} could not be exported: {self.setting.facts().get(path.name, '')}")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.setting.threads
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        images = self.setting.arrays("plain.images" if plain else "images").popitem()[1]
        feed = {session.get_inputs()[0].name: images}
        if mode == EXPLAIN:
            n, k = self.setting.batch, self.setting.classes
            texts = self.setting.arrays("texts")
            if texts:
                rows = texts["texts"][None] if k > 1 else texts["texts"]
                feed["text_embedding"] = np.repeat(rows, n, axis=0)
            else:
                feed["class_ids"] = np.tile(np.arange(k), (n, 1)) if k > 1 else np.full(n, -1)
        names = ["logits", "weights", "contributions"]
        if mode == FORWARD:
            names, outputs = names[:1], [session.get_outputs()[0].name]
        else:
            outputs = names
        return Prepared(
            lambda: session.run(outputs, feed),
            lambda values: dict(zip(names, values, strict=True)),
            PLAIN if plain else BCOS if mode == EXPLAIN else forward_reference(self),
            {"note": f"file written in {self.setting.facts().get(path.name, 0):.1f} s"},
        )


class PlainContender(Contender):
    """The network that was converted, in PyTorch. Option "compiled": under ``torch.compile`` with freezing."""

    taken = False

    def load(self) -> None:
        start_torch()
        self.net = torch_module(self, "plain")

    def prepare(self, mode: str) -> Prepared:
        import torch

        images = torch.from_numpy(self.setting.arrays("plain.images")["plain.images"])
        if mode not in (FORWARD, EXPLAIN) or (mode == EXPLAIN and self.options.get("compiled")):
            raise UnsupportedError(f"the plain network has no mode {mode!r} here")
        if self.options.get("compiled"):
            return self._compiled(images)
        # Each mode keeps a network in the layout that suits it.
        net = self.net if not self.taken else copy.deepcopy(self.net)
        self.taken = True
        run, note = fastest_layout(net, images, lambda net, x: self._run(net, x, mode))
        return Prepared(run, lambda result: _saliency(result, mode), PLAIN, {"note": note})

    def _run(self, net: Any, images: Any, mode: str) -> Any:
        import torch

        if mode == FORWARD:
            with torch.inference_mode():
                return net(images)
        x = images.detach().requires_grad_()
        logits = net(x)
        return (logits, *gradients(logits, x, self.setting.classes))

    def _compiled(self, images: Any) -> Prepared:
        import torch
        from torch._inductor import config

        config.freezing = True
        compiled: Any = torch.compile(self.net)

        def run() -> Any:
            with torch.no_grad():
                return compiled(images)

        run()
        return Prepared(run, lambda logits: {"logits": _float(logits)}, PLAIN)


def gradients(logits: Any, x: Any, classes: int) -> tuple[Any, Any]:
    """Gradients of the top logit [N, C, H, W], or of the first K [N, K, C, H, W]; their sum with x over channels."""
    import torch

    if classes == 1:
        (grads,) = torch.autograd.grad(logits.amax(1).sum(), x)
        return grads, (grads * x.detach()).sum(1)
    parts = [torch.autograd.grad(logits[:, k].sum(), x, retain_graph=k < classes - 1)[0] for k in range(classes)]
    grads = torch.stack(parts, 1)
    return grads, (grads * x.detach()[:, None]).sum(2)


def _saliency(result: Any, mode: str) -> dict[str, Any]:
    if mode == FORWARD:
        return {"logits": _float(result)}
    logits, grads, maps = result
    return {"logits": _float(logits), "weights": _float(grads), "contributions": _float(maps)}
