"""The program op by op in PyTorch: no compiler, any device, any dtype."""

from __future__ import annotations

import threading

import torch
from torch import Tensor
from torch.fx import GraphModule

from bcos_rt.graph.backends.aten_module import aten_module, check_inputs
from bcos_rt.graph.lower import lower_to_aten
from bcos_rt.graph.program import Program
from bcos_rt.graph.specialise import with_image_dtype

__all__ = ["Eager", "build"]


class Eager:
    """Runs a program lowered to ATen for any batch size and number of classes; lowered once for each image dtype.

    Values are freed after their last use. Images are made channels-last, and so is what comes of them.
    """

    def __init__(self, program: Program) -> None:
        self._program = program
        self._names = tuple(program.outputs)
        self._modules: dict[torch.dtype, GraphModule] = {}
        self._lock = threading.Lock()

    def __call__(self, images: Tensor, targets: Tensor | None = None) -> dict[str, Tensor]:
        """See :data:`bcos_rt.graph.backends.Runner`; ``images`` of the program's dtype or uint8 (0 to 255)."""
        check_inputs(self._program, images, targets)
        module = self._module(images.dtype)
        given = (images.contiguous(memory_format=torch.channels_last), *(() if targets is None else (targets,)))
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            return dict(zip(self._names, module(*given), strict=True))

    def _module(self, dtype: torch.dtype) -> GraphModule:
        with self._lock:
            if dtype not in self._modules:
                self._modules[dtype] = aten_module(lower_to_aten(with_image_dtype(self._program, dtype)))
            return self._modules[dtype]


def build(program: Program) -> Eager:
    """A runner that needs no compiler."""
    return Eager(program)
