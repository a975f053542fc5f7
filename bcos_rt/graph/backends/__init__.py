"""What runs a :class:`bcos_rt.graph.program.Program`: one module each, with ``build(program) -> Runner``."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

__all__ = ["Runner"]

# Images [N, 3, H, W] and class ids [N, K] (None for a program without) -> the program's outputs by name. Thread-safe,
# without autograd.
Runner = Callable[[Tensor, Tensor | None], dict[str, Tensor]]
