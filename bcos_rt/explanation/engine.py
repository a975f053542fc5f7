"""The engine: a network's prediction and explanation, fused and compiled once, then run many times."""

from __future__ import annotations

import copy
import os
import shutil
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from bcos_rt.errors import CheckpointError, InvalidArgumentError, InvalidTypeError, UnsupportedOpError, did_you_mean
from bcos_rt.explanation.explain import as_network, class_ids_of, is_multi
from bcos_rt.explanation.explanation import Explanation
from bcos_rt.explanation.text import checked_texts, named_texts
from bcos_rt.graph import TokenPooling, serialize
from bcos_rt.graph.attention import Attention
from bcos_rt.graph.backends import Runner
from bcos_rt.graph.capture import module_of
from bcos_rt.graph.fused import FusedPrograms, build_fused
from bcos_rt.graph.program import MemoryPlan, Program, memory_plan
from bcos_rt.kernels import cpu
from bcos_rt.nn.network import EmbeddingLayer, InputEncoding, check_range

__all__ = ["Engine", "chosen_backend"]

Backend = Literal["auto", "native", "inductor", "eager", "triton"]
DTYPES = (torch.float32, torch.bfloat16)
GPU_DTYPES = (*DTYPES, torch.float16)
# Half of an explanation's weights lie below float16's smallest normal number: its adjoint runs this much larger.
FLOAT16_SEED_SCALE = 1024.0


class Engine:
    """A network compiled for one image size: :meth:`predict` and :meth:`explain`, any batch, any number of classes.

    The network's forward pass is captured and fused (:mod:`bcos_rt.graph.fuse`), its adjoint derived in fused ops, and
    both given to a backend. What comes out is what :func:`bcos_rt.explain` returns, up to rounding. The engine keeps
    the weights the network had; a network that is trained further needs a new one. Safe to call from several threads.

    Args:
        net: a :class:`BcosNetwork`; any other classifier is converted with :meth:`Recipe.equivalent` first.
        example: images [N, 3, H, W], of which only the size counts, or that size as (H, W).
        dtype: what weights and activations are stored in: float32 or bfloat16, on a GPU float16 too. Norms, scales and
            results are float32.
        forward_dtype: what the forward pass alone is stored in: ``dtype`` (None) or float32. With bfloat16 for
            ``dtype``, float32 here keeps explanations: 16-bit rounding in the forward pass grows from layer to layer,
            while the adjoint is linear (``docs/results/bf16.md``). Logits are then those of a float32 engine.
        device: where it runs; None: where the network is.
        backend: "native" (our C++ kernels around oneDNN), "inductor" (``torch.compile`` with freezing; needs a C++
            compiler), "eager" (plain PyTorch), "triton" (CUDA devices, and alone there; not yet run on one), or
            "auto": on a CUDA device triton; else native where it is built; else inductor where there is a compiler;
            else eager (33, 44 and 89 ms for an explanation by ResNet-18). :attr:`backend` says what it took.
        chunk: images that go through together (native only); None for the backend's own choice, two or four.
        pooling, power: of a network with an embedding (``Recipe.clip()``), as for :func:`bcos_rt.explain_text`; None:
            the mean. Such an engine predicts embeddings and explains texts, with :meth:`explain_text`.
        attention: "store" each attention layer's softmax for the adjoint, "recompute" it there from queries, keys and
            its log-sum-exp, or "auto": whichever keeps less (``docs/results/attention.md``).

    Attributes:
        backend: the backend taken.
        device: where it runs: images and results are there.
        image_size: (H, W).
        dtype, forward_dtype: as given; no None.
        pooling: of tokens, where texts are explained; None where classes are.
        programs: the fused programs, for a look inside.

    Raises:
        InvalidArgumentError, InvalidTypeError: an unusable argument (named).
        UnsupportedOpError: an op without a dynamic-linear rule, or a backend that cannot run here.
    """

    def __init__(
        self,
        net: nn.Module,
        example: Tensor | tuple[int, int],
        *,
        dtype: torch.dtype = torch.float32,
        forward_dtype: torch.dtype | None = None,
        device: str | torch.device | None = None,
        backend: Backend = "auto",
        chunk: int | None = None,
        pooling: Literal["mean", "max", "cosine_power"] | None = None,
        power: float | None = None,
        attention: Attention = "auto",
    ) -> None:
        _check_chunk(chunk)
        network, label = as_network(net)
        how: TokenPooling | None = None
        if isinstance(network.logit_layer, EmbeddingLayer):
            how = TokenPooling.of("mean" if pooling is None else pooling, power)
        elif pooling is not None or power is not None:
            got = f"{pooling!r}, {power!r} for a network that returns logits"
            raise InvalidArgumentError("pooling, power", got, "None")
        like = next(network.parameters(), network.encoding.mean)
        place = _device_of(like.device if device is None else device)
        size, taken = _size_of(example), chosen_backend(backend, place)
        allowed = GPU_DTYPES if taken == "triton" else DTYPES
        if dtype not in allowed:
            raise InvalidArgumentError("dtype", dtype, " or ".join(map(str, allowed)) + f" (backend {taken!r})")
        forward = dtype if forward_dtype is None else forward_dtype
        if forward not in (dtype, torch.float32):
            expected = "None, torch.float32" + ("" if dtype == torch.float32 else f" or {dtype}, as dtype=")
            raise InvalidArgumentError("forward_dtype", forward_dtype, expected)
        if like.dtype != torch.float32:
            raise InvalidArgumentError("net", f"of dtype {like.dtype}", "a float32 network (dtype= sets the storage)")
        if like.device.type != "cpu":
            # Programs are made on the CPU, whichever device they are for.
            network = copy.deepcopy(network).cpu()
        encoding = network.encoding
        about = {
            "forward_float32": forward == torch.float32,
            "label": label,
            "pooling": None if how is None else [how.kind, how.power],
            "class_names": network.class_names,
            "mean": encoding.mean.flatten().tolist(),
            "std": encoding.std.flatten().tolist(),
            "six_channels": encoding.six_channels,
        }
        scale = FLOAT16_SEED_SCALE if dtype == torch.float16 else 1.0
        programs = build_fused(network, size, dtype, scale, forward_dtype=forward, pooling=how, attention=attention)
        self._start(programs, size, dtype, taken, place, about, chunk)

    def _start(
        self,
        programs: FusedPrograms,
        image_size: tuple[int, int],
        dtype: torch.dtype,
        backend: str,
        device: torch.device,
        about: dict[str, Any],
        chunk: int | None,
    ) -> None:
        self.programs, self.image_size, self.dtype, self.backend = programs, image_size, dtype, backend
        self.device = device
        self.forward_dtype = torch.float32 if about["forward_float32"] else dtype
        self._about = about
        self._label = str(about["label"])
        self.pooling = None if about["pooling"] is None else TokenPooling(*about["pooling"])
        self._names = tuple(about["class_names"]) if about["class_names"] is not None else None
        self._encoding = InputEncoding(about["mean"], about["std"], about["six_channels"])
        self._classes = int(programs.predict.outputs["logits"].meta["val"].shape[1])
        self._predict, self._explain = _build(backend, (programs.predict, programs.explain), device, chunk)

    # Files ---------------------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the fused programs and their constants into one file; see :mod:`bcos_rt.graph.serialize`.

        Raises:
            InvalidArgumentError: a path that cannot be written.
        """
        programs = {"predict": self.programs.predict, "explain": self.programs.explain}
        about = {**self._about, "passes": self.programs.passes}
        return serialize.dump(programs, path, backend=self.backend, dtype=self.dtype, meta=about)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        device: str | torch.device = "cpu",
        backend: Backend = "auto",
        chunk: int | None = None,
    ) -> Engine:
        """An engine from a file that :meth:`save` wrote: the network is neither needed nor traced again.

        Args:
            device, backend: as for the constructor; they need not be those that the engine was saved with.

        Raises:
            CheckpointError: no such file, or no whole engine file of this version.
            InvalidArgumentError, UnsupportedOpError: as the constructor.
        """
        _check_chunk(chunk)
        place = _device_of(device)
        taken = chosen_backend(backend, place)
        file = serialize.load(path, "cpu")
        if file.dtype not in (GPU_DTYPES if taken == "triton" else DTYPES):
            raise InvalidArgumentError("backend", repr(taken), f"'triton' for an engine of {file.dtype}")
        try:
            programs = FusedPrograms(file.programs["predict"], file.programs["explain"], dict(file.meta["passes"]))
            about = {name: file.meta[name] for name in ("label", "class_names", "mean", "std", "six_channels")}
            about["forward_float32"] = bool(file.meta.get("forward_float32", False))
            about["pooling"] = file.meta.get("pooling")
        except KeyError as error:
            raise CheckpointError(f"{path}: an engine file without {error}") from error
        engine = cls.__new__(cls)
        engine._start(programs, file.image_size, file.dtype, taken, place, about, chunk)
        return engine

    # Running -------------------------------------------------------------------------------------------------------

    def predict(self, images: Tensor) -> Tensor:
        """Logits [N, classes], or embeddings [N, D], of images [N, 3, H, W] in [0, 1]; no multipliers are computed.

        Raises:
            InvalidArgumentError, InvalidTypeError: unusable images.
        """
        images = self._checked(images)
        if images.shape[0] == 0:
            return images.new_zeros(0, self._classes)
        return self._predict(images, None)["logits"]

    def explain(self, images: Tensor, targets: Any = None) -> Explanation:
        """Explanations of images [N, 3, H, W] in [0, 1]; arguments and result as :func:`bcos_rt.explain`'s.

        K classes of each image share one forward pass.

        Raises:
            InvalidArgumentError, InvalidTypeError: unusable images or targets; an engine that explains texts.
        """
        if self.pooling is not None:
            raise InvalidArgumentError(
                "Engine", "of a network with an embedding", "its explain_text instead of explain"
            )
        images = self._checked(images)
        multi, n = is_multi(targets), images.shape[0]
        # Checked on the CPU: a look at a GPU's numbers waits for all its work.
        ids = class_ids_of(targets, n, self._classes, torch.device("cpu")).to(self.device)
        names = self._names if self._names is not None and len(self._names) == self._classes else None
        if n == 0:
            logits, used = images.new_zeros(0, self._classes), ids
            result = self._empty(images, tuple(ids.shape))
        else:
            result = self._explain(images, ids if multi else ids[:, None])
            if not multi:
                result = {k: v if k == "logits" else v[:, 0] for k, v in result.items()}
            logits, used = result["logits"], result["class_used"]
        parts = (result["weights"], result["contributions"], result["residual"])
        return Explanation(logits, used, *parts, self._encoded(images), names, self._label)

    def explain_text(
        self, images: Tensor, text_embeddings: Tensor, *, prompts: Sequence[str] | None = None
    ) -> Explanation:
        """Explanations of P texts on images [N, 3, H, W] in [0, 1]; arguments and result as
        :func:`bcos_rt.explain_text`'s, with the engine's pooling.

        Raises:
            InvalidArgumentError, InvalidTypeError: unusable images or texts; an engine that explains classes.
        """
        if self.pooling is None:
            raise InvalidArgumentError(
                "Engine", "of a network that returns logits", "its explain instead of explain_text"
            )
        images = self._checked(images)
        # Checked on the CPU, as class ids are.
        texts = checked_texts(text_embeddings, self._classes, torch.device("cpu")).to(self.device, images.dtype)
        n, count = images.shape[0], texts.shape[0]
        names = named_texts(prompts, count)
        target = torch.arange(count, device=self.device).expand(n, count).contiguous()
        if n == 0:
            result = {"logits": images.new_zeros(0, count), **self._empty(images, (0, count))}
        else:
            result = self._explain(images, texts.expand(n, *texts.shape).contiguous())
        parts = (result["weights"], result["contributions"], result["residual"])
        return Explanation(result["logits"], target, *parts, self._encoded(images), names, self._label, "texts")

    def _encoded(self, images: Tensor) -> Tensor:
        return torch.cat([images, 1 - images], 1) if self._encoding.six_channels else images

    def _empty(self, images: Tensor, lead: tuple[int, ...]) -> dict[str, Tensor]:
        """What is explained of no image."""
        height, width = self.image_size
        shapes = {"weights": (self._encoding.channels, height, width), "contributions": (height, width), "residual": ()}
        return {name: images.new_zeros(*lead, *shape) for name, shape in shapes.items()}

    def _checked(self, images: Any) -> Tensor:
        self._encoding.encode(images[:0] if isinstance(images, Tensor) and images.ndim == 4 else images)
        if images.shape[1] != 3:
            raise InvalidArgumentError(
                "images", f"{images.shape[1]} channels", "3 (RGB): the engine encodes [x, 1 - x] itself"
            )
        if tuple(images.shape[2:]) != self.image_size:
            height, width = self.image_size
            raise InvalidArgumentError(
                "images",
                f"size {images.shape[2]} x {images.shape[3]}",
                f"{height} x {width}, the size this engine was made for (another size needs another Engine)",
            )
        if images.device != self.device:
            raise InvalidArgumentError("images", f"on {images.device}", f"the engine's device, {self.device}")
        if images.device.type == "cpu":
            check_range(images)
        checked: Tensor = images.detach().float()
        return checked

    # A look inside -------------------------------------------------------------------------------------------------

    def memory(self, batch: int = 1, classes: int = 1) -> MemoryPlan:
        """What an explanation of ``batch`` images at once holds at its peak, every value freed after its last use."""
        return memory_plan(self.programs.explain, batch, classes)

    def summary(self) -> str:
        """What was fused: the passes, and for each fused op of the explanation where it came from."""
        plan = self.memory()
        height, width = self.image_size
        lines = [
            f"Engine: {height} x {width}, {str(self.dtype).removeprefix('torch.')}, "
            f"backend {self.backend} on {self.device}",
            f"explanation of one image: at most {plan.peak_bytes / 2**20:.1f} MiB of values at {plan.peak_node}, "
            f"{plan.saved_bytes / 2**20:.1f} MiB saved by the forward pass; constants "
            f"{plan.constant_bytes / 2**20:.1f} MiB",
            "passes: " + ", ".join(f"{name} {count}" for name, count in self.programs.passes.items() if count),
            "",
        ]
        nodes = [n for n in self.programs.explain.graph.nodes if n.op == "call_function"]
        for node in nodes:
            if "fused_from" in node.meta:
                origin = " + ".join(_short(name) for name in node.meta["fused_from"])
                lines.append(f"{_short(str(node.target)):24} {module_of(node):40} {node.meta['pass']}: {origin}")
        plain = Counter(_short(str(n.target)) for n in nodes if str(n.target).startswith("aten"))
        if plain:
            lines += ["", "not fused: " + ", ".join(f"{name} {count}" for name, count in sorted(plain.items()))]
        return "\n".join(lines)

    def __repr__(self) -> str:
        where = f"backend={self.backend!r}, device={str(self.device)!r}"
        return f"Engine(image_size={self.image_size}, dtype={self.dtype}, {where})"


def _short(target: str) -> str:
    return target.removeprefix("bcos_rt.").removeprefix("aten.").removesuffix(".default")


def _check_chunk(chunk: Any) -> None:
    if chunk is not None and (isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1):
        raise InvalidArgumentError("chunk", repr(chunk), "a positive number of images, or None")


def _size_of(example: Any) -> tuple[int, int]:
    if isinstance(example, Tensor):
        if example.ndim != 4 or example.shape[1] != 3:
            raise InvalidArgumentError("example", f"shape {tuple(example.shape)}", "images [N, 3, H, W], or (H, W)")
        size = (int(example.shape[2]), int(example.shape[3]))
    elif isinstance(example, tuple | list) and len(example) == 2 and all(type(s) is int for s in example):
        size = (example[0], example[1])
    else:
        raise InvalidTypeError("example", repr(example)[:80], "images [N, 3, H, W], or their size (H, W)")
    if min(size) < 1:
        raise InvalidArgumentError("example", f"size {size}", "at least one pixel")
    return size


def _compiler() -> bool:
    return any(shutil.which(name) for name in ("c++", "g++", "clang++")) and sys.platform != "win32"


def _device_of(device: Any) -> torch.device:
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise InvalidArgumentError("device", repr(device), "a device, as 'cpu' or 'cuda:0'") from error
    if found.type not in ("cpu", "cuda"):
        raise InvalidArgumentError("device", repr(str(device)), "the CPU or a CUDA device")
    if found.type == "cuda" and not torch.cuda.is_available():
        raise UnsupportedOpError(f"device {str(device)!r}: PyTorch sees no CUDA device")
    if found.type == "cuda" and found.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu") if found.type == "cpu" else found


def chosen_backend(backend: Any, device: torch.device = torch.device("cpu")) -> str:  # noqa: B008 (a constant)
    """The backend an engine on ``device`` takes when asked for ``backend``."""
    names = get_args(Backend)
    if backend not in names:
        hint = did_you_mean(str(backend), names)
        raise InvalidArgumentError("backend", repr(backend), "one of " + ", ".join(map(repr, names)), hint)
    if device.type == "cuda":
        if backend not in ("auto", "triton"):
            raise InvalidArgumentError("backend", repr(backend), "'triton' or 'auto' on a CUDA device")
        return "triton"
    if backend == "auto":
        if cpu.available():
            return "native"
        return "inductor" if _compiler() else "eager"
    if backend == "native" and not cpu.available():
        raise UnsupportedOpError(f"backend 'native': the C++ kernels are not built ({cpu.unavailable_reason()})")
    return str(backend)


def _build(backend: str, programs: tuple[Program, ...], device: torch.device, chunk: int | None) -> tuple[Runner, ...]:
    if backend == "triton":
        from bcos_rt.graph.backends import triton

        return tuple(triton.build_all({str(i): p for i, p in enumerate(programs)}, device).values())
    if backend == "native":
        from bcos_rt.graph.backends import native

        return tuple(native.build(programs, chunk))
    if backend == "inductor":
        from bcos_rt.graph.backends import inductor

        return tuple(inductor.build(program) for program in programs)
    from bcos_rt.graph.backends import eager

    return tuple(eager.build(program) for program in programs)
