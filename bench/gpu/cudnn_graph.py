"""cuDNN's runtime fusion of a convolution (matrix product) with the whole B-cos epilogue, through cudnn-frontend.

The graph is ``relu(((|z| * r) * z) * scale + shift)`` with ``z = conv(x, w)`` and ``r = 1 / n`` given: cuDNN fuses
pointwise operations into a convolution's epilogue, and ``r`` broadcasts over channels as a [N, 1, H', W'] tensor. The
norm itself (a box sum over a reduction of x) is no pointwise operation, so it stays outside; the caller decides whether
to count it. cuDNN 9.24 proposes 12 to 14 runtime-compiled plans for this graph on sm_90 (asked without a device, from
serialised device properties); whether one builds and runs is seen on the device.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.gpu.cases import Case

__all__ = ["GraphNotSupportedError", "build"]


class GraphNotSupportedError(RuntimeError):
    """The package is missing, or cuDNN has no engine for the graph; the message is the reason."""


@functools.cache
def _handle() -> Any:
    cudnn = _package()
    return cudnn.create_handle()


def _package() -> Any:
    try:
        import cudnn
    except ImportError as error:
        raise GraphNotSupportedError(f"the package nvidia-cudnn-frontend is missing ({error})") from error
    return cudnn


def build(case: Case) -> Callable[[], Tensor]:
    """A function that runs the fused graph on ``case``'s operands and returns its output (always the same tensor).

    Raises:
        GraphNotSupportedError: with cuDNN's reason.
    """
    cudnn = _package()
    try:
        return _build(cudnn, case)
    except cudnn.cudnnGraphNotSupportedError as error:
        raise GraphNotSupportedError(f"cuDNN {cudnn.backend_version_string()}: {_brief(error)}") from error


def _brief(error: Exception) -> str:
    # cuDNN lists every engine it tried; reasons repeat, so the distinct ones are kept.
    reasons = [line.split("Reason:", 1)[1].strip() for line in str(error).splitlines() if "Reason:" in line]
    return " | ".join(dict.fromkeys(reasons))[:500] or str(error).strip()[:500]


def _build(cudnn: Any, case: Case) -> Callable[[], Tensor]:
    types = cudnn.data_type
    io = {torch.bfloat16: types.BFLOAT16, torch.float16: types.HALF, torch.float32: types.FLOAT}[case.dtype]
    handle = _handle()
    cudnn.set_stream(handle=handle, stream=torch.cuda.current_stream().cuda_stream)
    graph = cudnn.pygraph(
        io_data_type=io, intermediate_data_type=types.FLOAT, compute_data_type=types.FLOAT, handle=handle
    )
    shape = case.shape
    if shape.is_conv:
        x, weight = case.x, case.weight
        inverse_norm = case.inverse_norm.contiguous(memory_format=torch.channels_last)
        out = torch.empty(shape.out, dtype=case.dtype, device=x.device).to(memory_format=torch.channels_last)
        scale, shift = (v.reshape(1, -1, 1, 1) for v in (case.scale, case.shift))
    else:
        # cuDNN multiplies batches of matrices: one batch of all rows, [1, M, C] x [1, C, O].
        x, weight = case.x.reshape(1, -1, shape.x[-1]), case.weight.t()[None]
        inverse_norm = case.inverse_norm.reshape(1, -1, 1)
        out = torch.empty((1, x.shape[1], shape.weight[0]), dtype=case.dtype, device=x.device)

    def given(tensor: Tensor, name: str, data_type: Any) -> Any:
        return graph.tensor(name=name, dim=list(tensor.shape), stride=_strides(tensor), data_type=data_type)

    feed = {given(x, "x", io): x, given(weight, "w", io): weight}
    x_in, w_in = feed
    if shape.is_conv:
        z = graph.conv_fprop(
            image=x_in, weight=w_in, pre_padding=list(shape.padding), post_padding=list(shape.padding),
            stride=list(shape.stride), dilation=list(shape.dilation),
        )  # fmt: skip
    else:
        z = graph.matmul(A=x_in, B=w_in)
    r = given(inverse_norm, "inverse_norm", types.FLOAT)
    feed[r] = inverse_norm
    y = graph.mul(a=graph.mul(a=graph.abs(input=z), b=r), b=z)
    if shape.is_conv:
        scale_in, shift_in = given(scale, "scale", types.FLOAT), given(shift, "shift", types.FLOAT)
        feed |= {scale_in: scale, shift_in: shift}
        y = graph.relu(input=graph.add(a=graph.mul(a=y, b=scale_in), b=shift_in))
    y.set_output(True).set_data_type(io).set_dim(list(out.shape)).set_stride(_strides(out))
    feed[y] = out
    graph.validate()
    graph.build_operation_graph()
    graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
    graph.check_support()
    graph.build_plans()
    workspace = torch.empty(max(1, graph.get_workspace_size()), dtype=torch.uint8, device=x.device)

    def run() -> Tensor:
        # A capture into a CUDA graph runs on its own stream.
        cudnn.set_stream(handle=handle, stream=torch.cuda.current_stream().cuda_stream)
        graph.execute(feed, workspace, handle=handle)
        return out if shape.is_conv else out.reshape(shape.out)

    return run


def _strides(tensor: Tensor) -> list[int]:
    """Strides as cuDNN reads a layout off them: packed also where a side of 1 lets torch have any stride."""
    if tensor.ndim != 4:
        return list(tensor.stride())
    _, c, h, w = tensor.shape
    return [c * h * w, 1, w * c, c]
