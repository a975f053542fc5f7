"""The program through TorchInductor with frozen weights: packed oneDNN convolutions and fused loops in between.

Fused ops are opaque to a compiler, so the program is lowered to ATen first (:mod:`bcos_rt.graph.lower`). Freezing
(``torch._inductor.config.freezing``) takes the weights, buffers of the module, as constants: they are packed for the
convolutions at compile time, and what depends on them alone is computed then. It is in force only where the config
says so, in the thread that compiles, with gradients off. Shapes are static: one compiled function for each batch size,
number of classes, image dtype and number of threads (which the loops are cut for).

:func:`package` does the same ahead of time: a file that :func:`load_package` (or a C++ program) runs without tracing
or compiling anything. Recomputed attention stays an op of ours in it, which only Python has: a program for C++ is built
with ``attention="store"``.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bcos_rt.errors import InvalidArgumentError, InvalidTypeError, MissingDependencyError
from bcos_rt.graph.backends.aten_module import aten_module, check_inputs
from bcos_rt.graph.lower import lower_to_aten
from bcos_rt.graph.program import Program
from bcos_rt.graph.specialise import specialise

__all__ = ["Inductor", "Package", "build", "load_package", "package"]

_FORMAT = "2"


def _require_compiler() -> None:
    """Raises MissingDependencyError where there is no C++ compiler."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except (InvalidCxxCompiler, OSError, RuntimeError) as error:
        raise MissingDependencyError(
            "the inductor backend compiles C++ and found no compiler: install g++ or name one in the environment "
            "variable CXX, or take the backend 'native' or 'eager'"
        ) from error


def _config(channels_last: bool) -> dict[str, Any]:
    return {"freezing": True, "layout_optimization": channels_last}


class Inductor:
    """Compiles at the first call of each shape, which takes seconds to minutes, under a lock; then runs.

    Args:
        program: see :class:`bcos_rt.graph.program.Program`.
        channels_last: keep activations in channels-last memory. Images are taken as they usually come, [N, 3, H, W].
    """

    def __init__(self, program: Program, channels_last: bool = True) -> None:
        self._program = program
        self._names = tuple(program.outputs)
        self._channels_last = channels_last
        self._compiled: dict[tuple[Any, ...], Callable[..., Any]] = {}
        self._lock = threading.Lock()

    def __call__(self, images: Tensor, targets: Tensor | None = None) -> dict[str, Tensor]:
        """See :data:`bcos_rt.graph.backends.Runner`; ``images`` of the program's dtype or uint8 (0 to 255)."""
        check_inputs(self._program, images, targets)
        given = (images.contiguous(), *(() if targets is None else (targets.contiguous(),)))
        classes = None if targets is None else targets.shape[1]
        key = (images.shape[0], classes, images.dtype, images.device, torch.get_num_threads())
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            function = self._compiled.get(key)
            if function is None:
                with self._lock:
                    function = self._compiled.get(key)
                    if function is None:
                        function = self._compile(given)
                        self._compiled[key] = function
            return dict(zip(self._names, function(*given), strict=True))

    def _compile(self, given: tuple[Tensor, ...]) -> Callable[..., Any]:
        if given[0].device.type == "cpu":
            _require_compiler()
        classes = given[1].shape[1] if len(given) > 1 else None
        fixed = specialise(self._program, given[0].shape[0], classes, given[0].dtype)
        module = aten_module(lower_to_aten(fixed, compiled=True))
        # The key above stands for every guard: the module is used for one shape and never changed.
        options: dict[str, Any] = {"guard_filter_fn": torch.compiler.skip_all_guards_unsafe}
        with torch._inductor.config.patch(_config(self._channels_last)):
            function = torch.compile(module, fullgraph=True, dynamic=False, options=options)
            function(*given)
        return function


def build(program: Program, channels_last: bool = True) -> Inductor:
    """A runner that compiles each shape at its first call.

    Raises:
        MissingDependencyError: no C++ compiler.
    """
    if program.image.meta["val"].device.type == "cpu":
        _require_compiler()
    return Inductor(program, channels_last)


# --- ahead of time ---------------------------------------------------------------------------------------------------


def package(
    program: Program,
    path: str | os.PathLike[str],
    batch: int,
    classes: int | None = None,
    *,
    image_dtype: torch.dtype | None = None,
    channels_last: bool = True,
) -> None:
    """Compile a program for one batch size and number of classes into a file, weights included.

    Args:
        path: ends in ``.pt2``.
        batch, classes: N and K; K is None for a program without class ids.
        image_dtype: torch.uint8 for images of 0 to 255.

    Raises:
        InvalidArgumentError: another ending, or a number of classes that does not go with the program.
        MissingDependencyError: no C++ compiler.
    """
    path = os.fspath(path)
    if not path.endswith(".pt2"):
        raise InvalidArgumentError("path", path, "a file name that ends in .pt2")
    if (classes is None) != (program.targets is None):
        wanted = "None: this program only predicts" if program.targets is None else "a number of classes"
        raise InvalidArgumentError("classes", classes, wanted)
    value = program.image.meta["val"]
    if value.device.type == "cpu":
        _require_compiler()
    fixed = specialise(program, batch, classes, image_dtype)
    dtype = fixed.image.meta["val"].dtype
    module = aten_module(lower_to_aten(fixed, compiled=True))
    images = torch.zeros(batch, *value.shape[1:], dtype=dtype, device=value.device)
    example: tuple[Tensor, ...] = (images,)
    given = None if fixed.targets is None else fixed.targets.meta["val"]
    if given is not None:
        example += (torch.zeros(tuple(given.shape), dtype=given.dtype, device=value.device),)
    about = {
        "format": _FORMAT,
        "outputs": list(program.outputs),
        "images": [batch, *value.shape[1:]],
        "targets": None if given is None else list(given.shape),
        "targets_dtype": None if given is None else str(given.dtype).removeprefix("torch."),
        "dtype": str(dtype).removeprefix("torch."),
    }
    # Loops are cut for the threads of the process that runs them, not of this one.
    config = {
        **_config(channels_last),
        "cpp.dynamic_threads": True,
        "aot_inductor.metadata": {"bcos_rt": json.dumps(about)},
    }
    with torch.no_grad(), torch._inductor.config.patch(config):
        exported = torch.export.export(module, example, strict=False)
        torch._inductor.aoti_compile_and_package(exported, package_path=path)


class Package:
    """A packaged program, ready to run.

    Attributes:
        images: shape of the images it takes.
        classes: classes of each image; None if it only predicts.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        model = torch._inductor.aoti_load_package(os.fspath(path))
        about = json.loads(model.get_metadata().get("bcos_rt", "{}"))
        if about.get("format") != _FORMAT:
            raise InvalidArgumentError("path", os.fspath(path), f"a package of this library, format {_FORMAT}")
        self.images: tuple[int, ...] = tuple(about["images"])
        self._targets = None if about["targets"] is None else tuple(about["targets"])
        self._targets_dtype = None if about["targets"] is None else getattr(torch, about["targets_dtype"])
        self.classes: int | None = None if self._targets is None else self._targets[1]
        self._names: list[str] = about["outputs"]
        self._dtype: torch.dtype = getattr(torch, about["dtype"])
        # The model's own call parses its signature from text every time.
        self._run = model.loader.boxed_run

    def __call__(self, images: Tensor, targets: Tensor | None = None) -> dict[str, Tensor]:
        """See :data:`bcos_rt.graph.backends.Runner`; shapes and dtype must be the package's."""
        if tuple(images.shape) != self.images:
            raise InvalidArgumentError("images", f"shape {tuple(images.shape)}", str(self.images))
        if images.dtype != self._dtype:
            raise InvalidTypeError("images", f"dtype {images.dtype}", str(self._dtype))
        shape = None if targets is None else tuple(targets.shape)
        if shape != self._targets:
            raise InvalidArgumentError("targets", "None" if shape is None else f"shape {shape}", str(self._targets))
        given = [images.contiguous()]
        if targets is not None:
            if targets.dtype != self._targets_dtype:
                raise InvalidTypeError("targets", f"dtype {targets.dtype}", str(self._targets_dtype))
            given.append(targets.contiguous())
        with torch.no_grad():
            return dict(zip(self._names, self._run(given), strict=True))


def load_package(path: str | os.PathLike[str]) -> Package:
    """A runner of what :func:`package` wrote.

    Raises:
        InvalidArgumentError: not such a file.
    """
    return Package(path)
