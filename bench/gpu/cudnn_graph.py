"""cuDNN's runtime fusion of a convolution with the whole B-cos epilogue, through cudnn-frontend.

The graph is ``relu(((|z| * r) * z) * scale + shift)`` with ``z = conv(x, w)`` and ``r = 1 / n`` given: cuDNN fuses
pointwise operations into a convolution's epilogue, and ``r`` broadcasts over channels as a [N, 1, H', W'] tensor. The
norm itself (a box sum over a reduction of x) is no pointwise operation, so it stays outside; the caller decides whether
to count it. A linear layer is a 1 x 1 convolution of 1 x 1 images, without scale, shift and ReLU.

cuDNN 9.24 proposes 12 to 14 runtime-compiled plans for this graph on sm_90 (asked without a device, from serialised
device properties); whether they build and run is seen on a device.
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
    x, weight, inverse_norm = case.x, case.weight, case.inverse_norm
    if not shape.is_conv:
        x, weight, inverse_norm = (v.reshape(-1, v.shape[-1], 1, 1) for v in (x, weight, inverse_norm))
    sides = shape.out[2:] if shape.is_conv else (1, 1)
    out = torch.empty((x.shape[0], weight.shape[0], *sides), dtype=case.dtype, device=x.device)
    out = out.contiguous(memory_format=torch.channels_last)

    feed: dict[Any, Tensor] = {}

    def given(name: str, tensor: Tensor, data_type: Any) -> Any:
        described = graph.tensor(name=name, dim=list(tensor.shape), stride=_strides(tensor), data_type=data_type)
        feed[described] = tensor
        return described

    z = graph.conv_fprop(
        image=given("x", x, io), weight=given("weight", weight, io), pre_padding=list(shape.padding),
        post_padding=list(shape.padding), stride=list(shape.stride), dilation=list(shape.dilation),
    )  # fmt: skip
    r = given("inverse_norm", inverse_norm, types.FLOAT)
    y = graph.mul(a=graph.mul(a=graph.abs(input=z), b=r), b=z)
    if shape.is_conv:
        scale, shift = (
            given(name, value.reshape(1, -1, 1, 1), types.FLOAT)
            for name, value in (("scale", case.scale), ("shift", case.shift))
        )
        y = graph.relu(input=graph.add(a=graph.mul(a=y, b=scale), b=shift))
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
        return out.reshape(shape.out)

    return run


def _strides(tensor: Tensor) -> list[int]:
    """Strides as cuDNN reads a layout off them: packed also where a side of 1 lets torch have any stride."""
    _, c, h, w = tensor.shape
    return [c * h * w, 1, w * c, c]
