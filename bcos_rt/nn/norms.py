"""BatchNorm without centring."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["BatchNormUncentered2d"]


class BatchNormUncentered2d(nn.BatchNorm2d):
    """BatchNorm that divides by the standard deviation and does not subtract the mean (B-cos v2, section 3.2).

    ``y = x * weight / sqrt(var + eps) (+ bias)``. ``var`` is the *biased* variance about the mean, of the batch in
    training and ``running_var`` in evaluation: only the subtraction is left out. ``running_mean`` is tracked and not
    used, so that state-dict keys stay those of the source.

    Args:
        bias: whether there is a bias.
        drop, act: modules applied to the result, under the names timm's ``BatchNormAct2d`` gives them.
    """

    def __init__(
        self,
        num_features: int,
        *args: Any,
        bias: bool = True,
        drop: nn.Module | None = None,
        act: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_features, *args, **kwargs)
        if not bias:
            self.register_parameter("bias", None)
        self.has_post = drop is not None or act is not None
        if self.has_post:
            self.drop = drop if drop is not None else nn.Identity()
            self.act = act if act is not None else nn.Identity()

    def reset_parameters(self) -> None:
        self.reset_running_stats()
        if self.affine:
            nn.init.ones_(self.weight)
            if self.bias is not None:
                nn.init.zeros_(self.bias)

    def forward(self, input: Tensor) -> Tensor:
        self._check_input_dim(input)
        if self.training or self.running_var is None:
            # fp16 squares overflow: statistics are taken in fp32.
            wide = input.to(torch.promote_types(input.dtype, torch.float32))
            var, mean = torch.var_mean(wide, dim=(0, 2, 3), correction=0)
            if self.training and self.track_running_stats:
                self._track(mean.detach(), var.detach())
        else:
            var = self.running_var
        scale = (var + self.eps).rsqrt()
        if self.weight is not None:
            scale = scale * self.weight
        out = input * scale.to(input.dtype)[:, None, None]
        if self.bias is not None:
            out = out + self.bias.to(input.dtype)[:, None, None]
        if self.has_post:
            out = self.act(self.drop(out))
        return out

    def _track(self, mean: Tensor, var: Tensor) -> None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked.add_(1)
        momentum = self.momentum if self.momentum is not None else 1.0 / float(self.num_batches_tracked)
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
        self.running_var.lerp_(var.to(self.running_var.dtype), momentum)
