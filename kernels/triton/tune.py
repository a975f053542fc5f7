"""Which tile configuration a matrix-multiplying kernel is launched with: a table by (architecture, op, shape class)."""

from __future__ import annotations

import torch

from bcos_rt.kernels.triton.launch import Config

__all__ = ["SHAPE_CLASSES", "pick", "shape_class"]

# "narrow": at most 64 output columns; "small": too few 128x128 tiles to fill a GPU once; "wide": everything else.
SHAPE_CLASSES = ("wide", "narrow", "small")

_BYTES16 = {"wide": (128, 128, 64, 8, 3), "narrow": (128, 64, 64, 4, 3), "small": (64, 64, 64, 4, 3)}
_BYTES32 = {"wide": (128, 64, 32, 8, 3), "narrow": (128, 64, 32, 8, 3), "small": (64, 64, 32, 4, 3)}
_INTERPRETER = Config(32, 32, 32)


def shape_class(m: int, n: int) -> str:
    """Shape class of an output of ``m`` rows and ``n`` columns."""
    if n <= 64:
        return "narrow"
    return "small" if -(-m // 128) * -(-n // 128) < 128 else "wide"


def pick(op: str, arch: str, m: int, n: int, k: int, dtype: torch.dtype) -> Config:
    """Configuration for ``op`` ("conv2d", "linear", "conv2d_transposed", "linear_transposed", "grad_weight").

    Args:
        arch: "sm_90", "gfx942", ... or "interpreter".
        m, n, k: rows and columns of the output (per group), length of the sum.
        dtype: storage type of the operands.
    """
    if arch == "interpreter":
        return _INTERPRETER
    table = _BYTES32 if dtype == torch.float32 else _BYTES16
    return Config(*table[shape_class(m, n)])
