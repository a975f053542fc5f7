"""BatchNorm without centring."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.autograd.function import once_differentiable

from bcos_rt.kernels import cpu
from bcos_rt.kernels.ops import has_memory

__all__ = ["BatchNormUncentered2d"]


def _in_one_pass(x: Tensor) -> bool:
    """Whether the C++ kernels go over this image: without a copy or a product that is kept for its sum."""
    # Modes that watch operations (make_fx, FlopCounterMode) would not see them.
    watched = torch._C._len_torch_dispatch_stack() > 0
    return x.dtype == torch.float32 and cpu.in_channels_last(x) and x.numel() > 0 and not watched and cpu.available()


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel, [N, C, H, W] -> two [C]."""
    if _in_one_pass(x):
        return cpu.channel_moments(x)
    count = x.numel() // x.shape[1]
    mean = _channel_sums(x) / count
    centred = x - mean[:, None, None]
    return mean, _channel_sums(centred.mul_(centred)) / count


def _channel_sums(x: Tensor) -> Tensor:
    """Sums over all but channels, [N, C, H, W] -> [C], axis by axis from the innermost one.

    On CPUs 10 to 40 times as fast as a sum over three axes at once, whose loops do not follow the memory; and summed
    in parts as few numbers as here, float32 loses less.
    """
    if has_memory(x) and x.is_contiguous(memory_format=torch.channels_last):
        return x.permute(0, 2, 3, 1).sum(2).sum(1).sum(0)
    return x.sum(3).sum(2).sum(0)


class _Uncentered(torch.autograd.Function):
    """``x weight / sqrt(var + eps)``, and the batch's mean and variance, which carry no gradient of their own.

    With g the gradient and s = weight / sqrt(var + eps)::

        dL/dx = g s + (x - mean) (2 / M) dL/dvar,   dL/dvar = -1/2 sum(g x) weight (var + eps)^(-3/2)
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        mean, var = _moments(x)
        root = (var + eps).rsqrt()
        scale = root if weight is None else root * weight
        ctx.save_for_backward(x, weight, mean, root)
        ctx.eps = eps
        ctx.mark_non_differentiable(mean, var)
        return x * scale[:, None, None], mean, var

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, weight, mean, root = ctx.saved_tensors
        count = x.numel() // x.shape[1]
        if torch.is_grad_enabled():
            # A second derivative is asked for (create_graph=True): the statistics as functions of x.
            var, mean = torch.var_mean(x, dim=(0, 2, 3), correction=0)
            root = (var + ctx.eps).rsqrt()
        scale = root if weight is None else root * weight
        # Not of several gradients at a time (torch.func.vmap, is_grads_batched), nor where one is to be differentiated.
        fast = not torch.is_grad_enabled() and has_memory(grad) and _in_one_pass(x)
        if fast:
            grad = cpu.channels_last(grad.resolve_neg())
        total = cpu.channel_products(x, grad).to(x.dtype) if fast else _channel_sums(grad * x)
        slope = -total * scale * root**2 / count
        if fast:
            grad_x = cpu.channel_combine(x, mean, slope, grad, scale)
        else:
            grad_x = torch.addcmul((-slope * mean)[:, None, None], x, slope[:, None, None])
            grad_x = torch.addcmul(grad_x, grad, scale[:, None, None])
        return grad_x, None if weight is None else total * root, None


class _SumOverProcesses(torch.autograd.Function):
    """The sum of a tensor over all processes; its gradient too is summed, since all losses depend on it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        distributed.all_reduce(total)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        total = grad.contiguous().clone()
        distributed.all_reduce(total)
        return total


class BatchNormUncentered2d(nn.BatchNorm2d):
    """BatchNorm that divides by the standard deviation and does not subtract the mean (B-cos v2, section 3.2).

    ``y = x * weight / sqrt(var + eps) (+ bias)``. ``var`` is the *biased* variance about the mean, of the batch in
    training and ``running_var`` in evaluation: only the subtraction is left out. ``running_mean`` is tracked and not
    used, so that state-dict keys stay those of the source.

    Args:
        bias: whether there is a bias.
        drop, act: modules applied to the result, under the names timm's ``BatchNormAct2d`` gives them.

    Attributes:
        synchronised: in training, take the statistics over the batches of all processes.
    """

    synchronised = False

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
            out, mean, var = self._of_batch(input)
            if self.training and self.track_running_stats:
                self._track(mean.detach(), var.detach())
        else:
            out = self._scaled(input, self.running_var)
        if self.bias is not None:
            out = out + self.bias.to(input.dtype)[:, None, None]
        if self.has_post:
            out = self.act(self.drop(out))
        return out

    def _of_batch(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The result without bias, and the batch's mean and variance."""
        if self.synchronised and distributed.is_available() and distributed.is_initialized():
            return self._of_all_batches(x)
        if self._is_ordinary(x):
            found: tuple[Tensor, Tensor, Tensor] = _Uncentered.apply(x, self.weight, self.eps)
            return found
        # fp16 squares overflow: statistics are taken in fp32.
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        var, mean = torch.var_mean(wide, dim=(0, 2, 3), correction=0)
        return self._scaled(x, var), mean, var

    def _is_ordinary(self, x: Tensor) -> bool:
        """Whether the fast way may be taken: real tensors of one dtype on the CPU, nothing traced or transformed."""
        if x.device.type != "cpu" or x.dtype not in (torch.float32, torch.float64):
            return False
        if torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
            return False
        return has_memory(x) and (self.weight is None or self.weight.dtype == x.dtype)

    def _of_all_batches(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        count = wide.new_tensor([x.numel() // x.shape[1]])
        distributed.all_reduce(count)
        mean = wide.detach().sum((0, 2, 3))
        distributed.all_reduce(mean)
        # The variance about the mean does not change with the mean to first order: that carries no gradient.
        mean = mean / count
        squares: Tensor = _SumOverProcesses.apply((wide - mean[:, None, None]).square().sum((0, 2, 3)))
        var = squares / count
        return self._scaled(x, var), mean, var

    def _scaled(self, x: Tensor, var: Tensor) -> Tensor:
        scale = (var + self.eps).rsqrt()
        if self.weight is not None:
            scale = scale * self.weight
        return x * scale.to(x.dtype)[:, None, None]

    def _track(self, mean: Tensor, var: Tensor) -> None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked.add_(1)
        momentum = self.momentum if self.momentum is not None else 1.0 / float(self.num_batches_tracked)
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
        self.running_var.lerp_(var.to(self.running_var.dtype), momentum)
