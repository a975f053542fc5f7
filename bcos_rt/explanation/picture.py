"""The colour picture of an explanation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bcos_rt.errors import InvalidArgumentError, InvalidTypeError

__all__ = ["colour_picture"]

EPS = 1e-12


def colour_picture(encoded: Tensor, weights: Tensor, smooth: int = 15, alpha_percentile: float = 99.5) -> Tensor:
    """Dynamic linear weights as an RGBA image (B-cos networks, arXiv 2205.10268, appendix B; v2's published code).

    Colour: each location's six weights divided by their largest magnitude, negative ones set to 0, then
    ``colour = w_c / (w_c + w_(1-c))``. Opacity: the weights' norm where the contribution is not negative, averaged over
    ``smooth`` x ``smooth`` pixels, relative to its ``alpha_percentile``.

    Args:
        encoded: [M, 6, H, W], the encoded images ``[x, 1 - x]``.
        weights: [M, 6, H, W], W of each.
        smooth: odd window in pixels; 0 for none.
        alpha_percentile: in (0, 100]; everything above it is fully opaque.

    Returns:
        [M, H, W, 4] in [0, 1]: red, green, blue, opacity.

    Raises:
        InvalidArgumentError: not six channels, an even or negative window, a percentile outside (0, 100].
    """
    if weights.ndim != 4 or weights.shape[1] != 6:
        raise InvalidArgumentError(
            "weights", f"shape {tuple(weights.shape)}", "[M, 6, H, W]: the colour picture needs the encoding [x, 1 - x]"
        )
    if isinstance(smooth, bool) or not isinstance(smooth, int):
        raise InvalidTypeError("smooth", repr(smooth), "an odd integer, or 0 for no smoothing")
    if smooth < 0 or (smooth and smooth % 2 == 0):
        raise InvalidArgumentError("smooth", smooth, "an odd number of pixels, or 0 for no smoothing")
    if not 0 < alpha_percentile <= 100:
        raise InvalidArgumentError("alpha_percentile", alpha_percentile, "a number in (0, 100]")
    # A percentile has no half-precision form, and a picture no use for one.
    encoded, weights = (v.float() if v.dtype in (torch.float16, torch.bfloat16) else v for v in (encoded, weights))
    contributions = (encoded * weights).sum(1, keepdim=True)
    direction = (weights / (weights.abs().amax(1, keepdim=True) + EPS)).clamp(min=0)
    colour = direction[:, :3] / (direction[:, :3] + direction[:, 3:] + EPS)
    alpha = torch.linalg.vector_norm(weights, dim=1, keepdim=True)
    alpha = torch.where(contributions < 0, torch.full_like(alpha, EPS), alpha)
    if smooth:
        alpha = F.avg_pool2d(alpha, smooth, stride=1, padding=(smooth - 1) // 2)
    if weights.shape[0] and alpha[0].numel():
        top = torch.quantile(alpha.flatten(1), alpha_percentile / 100, dim=1)[:, None, None, None]
        # An explanation that is zero everywhere (a dead network) is transparent, not NaN.
        alpha = (alpha / top.clamp(min=torch.finfo(alpha.dtype).tiny)).clamp(0, 1)
    return torch.cat([colour, alpha], dim=1).permute(0, 2, 3, 1)
