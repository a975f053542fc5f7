"""B-cos linear layer on token matrices: the convolution's kernel on an image of one place (see ``conv.py``).

z = x w^T + bias      n = sqrt(sum of squares) + eps      y = act(z (|z| / n)^(B-1) scale + shift + residual)
"""

from __future__ import annotations

from torch import Tensor

from bcos_rt.kernels.reference import LINEAR_EPS
from bcos_rt.kernels.triton.conv import launch_forward
from bcos_rt.kernels.triton.launch import Config
from bcos_rt.kernels.triton.square_sum import row_square_sum

__all__ = ["linear_fused"]


def linear_fused(
    x: Tensor,
    weight: Tensor,
    squares: Tensor | None = None,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    b: float | Tensor = 2.0,
    eps: float = LINEAR_EPS,
    activation: str = "none",
    want_multiplier: bool = False,
    want_gate: bool = False,
    want_squares: bool = False,
    config: Config | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """B-cos linear layer with its epilogue; see :func:`bcos_rt.kernels.ops.linear_fused` for every argument."""
    lead = x.shape[:-1]

    def image(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.reshape(-1, 1, 1, tensor.shape[-1]).contiguous()

    if squares is None and not (isinstance(b, float | int) and b == 1):
        squares = row_square_sum(x)
    x_image = x.reshape(-1, 1, 1, x.shape[-1]).contiguous()
    out = launch_forward(
        x_image, weight[:, None, None, :].contiguous(), image(squares), bias, scale, shift, image(residual),
        (1, 1), (0, 0), (1, 1), 1, b, eps, activation, want_multiplier, want_gate, want_squares, True, config, "linear",
    )  # fmt: skip
    y, multiplier, gate, out_squares = (t.reshape(*lead, t.shape[-1]) if t.ndim == 4 else t for t in out)
    return y, multiplier, gate, out_squares
