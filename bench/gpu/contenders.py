"""Who computes a layer, and how: ours, cuDNN, cuDNN's fused graph, the published layer.

``build`` of a contender gets a :class:`Case` and returns what is timed, and pairs (what came out, what should have)
that are compared before anything is timed. It raises :class:`UnsupportedError` where it cannot compute the case.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bcos_rt.kernels import ops, reference
from bench.gpu import cudnn_graph
from bench.gpu.cases import Case, exact

__all__ = ["CONTENDERS", "Contender", "Prepared", "UnsupportedError"]

Run = Callable[[], Any]
Pairs = Callable[[], list[tuple[str, Tensor, Tensor]]]


class UnsupportedError(RuntimeError):
    """The contender cannot compute this case; the message is the reason."""


@dataclass(frozen=True)
class Prepared:
    """What is timed, and (name, actual, expected float64) of what it must return."""

    run: Run
    pairs: Pairs


@dataclass(frozen=True)
class Contender:
    """One way to compute a layer.

    Attributes:
        name: in the results.
        builders: mode -> function that prepares a case.
        ours: a disagreement of ours is a failure of the run; another's is only recorded.
        slow: takes seconds to prepare (compilation by torch), so it comes last.
        note: what it computes beyond or short of the others.
    """

    name: str
    builders: Mapping[str, Callable[[Case], Prepared]]
    ours: bool = False
    slow: bool = False
    note: str = ""


def _one(case: Case, run: Callable[[], Tensor], expected: Callable[[], Tensor], name: str = "y") -> Prepared:
    return Prepared(run, lambda: [(name, case.ends(run()), expected())])


# --- ours -------------------------------------------------------------------------------------------------------------


def _fused(case: Case, **wants: bool) -> Callable[[], tuple[Tensor, ...]]:
    x, weight, squares = case.x, case.weight, case.squares
    if not case.shape.is_conv:
        return lambda: ops.linear_fused(x, weight, squares, **wants)
    geometry = case.geometry
    scale, shift = case.scale, case.shift
    return lambda: ops.conv2d_fused(
        x, weight, squares, scale=scale, shift=shift, activation="relu", **geometry, **wants
    )


def _ours_forward(case: Case) -> Prepared:
    run = _fused(case, want_squares=True)

    def pairs() -> list[tuple[str, Tensor, Tensor]]:
        y, _, _, squares = run()
        own = y.double().square().sum(1 if case.shape.is_conv else -1)
        total = squares.double().sum(1 if case.shape.is_conv else -1)
        return [("y", case.ends(y), case.expected_forward()), ("squares", total, own)]

    return Prepared(run, pairs)


def _ours_forward_explained(case: Case) -> Prepared:
    run = _fused(case, want_squares=True, want_multiplier=True)

    def pairs() -> list[tuple[str, Tensor, Tensor]]:
        y, multiplier, *_ = run()
        with_z = case.ends(multiplier).double() * _response(case)
        expected = case.expected_forward()
        # y = multiplier * z + gate * shift: where the gate is open, the rest is the shift.
        if case.shape.is_conv:
            with_z = (with_z + (expected > 0) * case.shift.double()[:, None, None]) * (expected > 0)
        return [("y", case.ends(y), expected), ("multiplier * z", with_z, expected)]

    return Prepared(run, pairs)


def _response(case: Case) -> Tensor:
    x, w = case.ends(case.x).double(), case.weight.double()
    if not case.shape.is_conv:
        return F.linear(x, w)
    geometry = case.geometry
    return F.conv2d(x, w, None, **geometry)


def _ours_explain(case: Case) -> Prepared:
    grad, weight, multiplier, s = case.grad, case.weight, case.multiplier, case.shape
    if not s.is_conv:
        return _one(
            case, lambda: ops.linear_transposed(grad, weight, multiplier=multiplier)[0], case.expected_explain, "grad"
        )
    return _one(
        case,
        lambda: ops.conv2d_transposed(
            grad, weight, s.x[2:], s.stride, s.padding, s.dilation, s.groups, multiplier=multiplier
        )[0],
        case.expected_explain,
        "grad",
    )


def _ours_train(case: Case) -> Prepared:
    if not case.shape.is_conv:
        return _training(case, lambda x, w: ops.linear(x, w), 2.0)
    geometry = case.geometry
    return _training(case, lambda x, w: ops.conv2d(x, w, **geometry), 2.0)


def _training(case: Case, forward: Callable[[Tensor, Tensor], Tensor], b: float) -> Prepared:
    """Forward and both gradients; grad_w, a sum over the whole batch, is compared with float32 PyTorch."""
    x, weight = case.x.detach().requires_grad_(), case.weight.detach().requires_grad_()
    grad = case.grad

    def run() -> tuple[Tensor, ...]:
        return torch.autograd.grad(forward(x, weight), (x, weight), grad)

    def pairs() -> list[tuple[str, Tensor, Tensor]]:
        grad_x, grad_w = run()
        return [
            ("grad_x", case.ends(grad_x), case.expected_grad_x(b)),
            ("grad_w", grad_w, _expected_grad_w(case, b)),
        ]

    return Prepared(run, pairs)


def _expected_grad_w(case: Case, b: float) -> Tensor:
    x, w, grad = case.x.float(), case.weight.float(), case.grad.float()
    needs = (False, True, False)
    with exact():
        if not case.shape.is_conv:
            y = reference.linear(x, w, None, b, case.eps)
            out = reference.linear_backward(grad, x, w, None, y, b, case.eps, needs)[1]
        else:
            y = reference.conv2d(x, w, None, **case.geometry, b=b, eps=case.eps)
            out = reference.conv2d_backward(grad, x, w, None, y, **case.geometry, b=b, eps=case.eps, needs=needs)[1]
    if out is None:
        raise RuntimeError("the reference returned no gradient for the weight")
    return out


# --- the network without B-cos ----------------------------------------------------------------------------------------


def _library_forward(case: Case) -> Prepared:
    """Convolution, BatchNorm (evaluation), ReLU, as PyTorch runs them; of a linear layer the product alone."""
    x, weight = case.x, case.weight
    if not case.shape.is_conv:
        return _one(case, lambda: F.linear(x, weight), case.expected_plain)
    geometry = case.geometry
    scale, shift = case.scale.to(case.dtype), case.shift.to(case.dtype)
    mean, var = torch.zeros_like(case.scale).to(case.dtype), torch.ones_like(case.scale).to(case.dtype)
    return _one(
        case,
        lambda: F.batch_norm(F.conv2d(x, weight, None, **geometry), mean, var, scale, shift, eps=0.0).relu_(),
        case.expected_plain,
    )


def _cudnn_fused_forward(case: Case) -> Prepared:
    """cuDNN's own fused convolution + bias + ReLU, the BatchNorm folded into filters and bias."""
    if not case.shape.is_conv:
        raise UnsupportedError("convolutions only")
    if case.device != "cuda":
        raise UnsupportedError("needs a GPU")
    s = case.shape
    folded = (case.weight.float() * case.scale[:, None, None, None]).to(case.dtype)
    folded, shift, x = folded.contiguous(memory_format=torch.channels_last), case.shift.to(case.dtype), case.x
    return _one(
        case,
        lambda: torch.cudnn_convolution_relu(x, folded, shift, s.stride, s.padding, s.dilation, s.groups),
        case.expected_plain,
    )


def _library_explain(case: Case) -> Prepared:
    grad, weight, multiplier = case.grad, case.weight, case.multiplier
    return _one(case, lambda: case.transpose(grad, weight) * multiplier, case.expected_explain, "grad")


def _library_train(case: Case) -> Prepared:
    if not case.shape.is_conv:
        return _training(case, F.linear, 1.0)
    geometry = case.geometry
    return _training(case, lambda x, w: F.conv2d(x, w, None, **geometry), 1.0)


# --- cuDNN's runtime fusion -------------------------------------------------------------------------------------------


def _graph_forward(case: Case) -> Prepared:
    return _one(case, _fused_graph(case), case.expected_forward)


def _graph_forward_with_norm(case: Case) -> Prepared:
    """The same with 1 / n computed each time from x, by PyTorch, into the graph's input."""
    graph = _fused_graph(case)
    x, s, inverse_norm = case.x, case.shape, case.inverse_norm

    def run() -> Tensor:
        if s.is_conv:
            norm = reference.patch_norm(x, s.weight[2:], s.stride, s.padding, s.dilation, s.groups, case.eps)
        else:
            norm = reference.row_norm(x, case.eps)
        inverse_norm.copy_(norm.reciprocal())
        return graph()

    return _one(case, run, case.expected_forward)


def _fused_graph(case: Case) -> Callable[[], Tensor]:
    if case.device != "cuda":
        raise UnsupportedError("needs a GPU")
    if case.shape.groups != 1:
        raise UnsupportedError("the norm of a grouped convolution does not broadcast over all channels")
    try:
        return cudnn_graph.build(case)
    except cudnn_graph.GraphNotSupportedError as error:
        raise UnsupportedError(str(error)) from error


# --- the published layer ----------------------------------------------------------------------------------------------


class _PublishedBlock(nn.Module):
    """The published layer (package bcos), and the scale, shift and ReLU that stand behind it in a network."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        try:
            # A lookup of settings there warns about paths this does not use.
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                from bcos.modules import BcosConv2d, BcosLinear
        except ImportError as error:
            raise UnsupportedError(f"the package bcos is missing ({error})") from error
        s = case.shape
        if s.is_conv:
            if len(set(s.dilation)) > 1 or max(s.dilation) > 1:
                raise UnsupportedError("the published layer's dilation is another, slower code")
            channels = s.x[1]
            self.layer = BcosConv2d(
                channels, s.weight[0], s.weight[2:], s.stride, s.padding, s.dilation[0], s.groups, b=2
            )
        else:
            self.layer = BcosLinear(s.x[-1], s.weight[0], b=2)
        self.layer.linear.weight = nn.Parameter(case.weight.clone(memory_format=torch.preserve_format))
        self.scale: Tensor | None = None
        self.shift: Tensor | None = None
        if s.is_conv:
            self.scale = case.scale.to(case.dtype)[:, None, None]
            self.shift = case.shift.to(case.dtype)[:, None, None]

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, O, H', W'], or [N, T, C] -> [N, T, O]."""
        y: Tensor = self.layer(x)
        if self.scale is not None and self.shift is not None:
            y = (y * self.scale + self.shift).relu()
        return y


def _published(case: Case, compiled: bool) -> tuple[_PublishedBlock, Callable[[Tensor], Tensor]]:
    block = _PublishedBlock(case).to(case.device)
    if not compiled:
        return block, block
    torch._dynamo.reset()  # the cache of other shapes must not turn this one dynamic
    return block, torch.compile(block, fullgraph=True, dynamic=False)


def _published_forward(case: Case, compiled: bool = False) -> Prepared:
    _, call = _published(case, compiled)
    x = case.x

    def run() -> Tensor:
        with torch.no_grad():
            return call(x)

    return _one(case, run, case.expected_forward)


def _published_explain(case: Case) -> Prepared:
    """Backward through the published layer in its explanation mode (its multiplier detached)."""
    block, _ = _published(case, False)
    block.layer.set_explanation_mode(True)
    for parameter in block.parameters():
        parameter.requires_grad_(False)
    x, grad = case.x.detach().requires_grad_(), case.grad
    y = block.layer(x)

    def run() -> Tensor:
        return torch.autograd.grad(y, x, grad, retain_graph=True)[0]

    return _one(case, run, case.expected_published_explain, "grad")


def _published_train(case: Case, compiled: bool = False) -> Prepared:
    block = _PublishedBlock(case).to(case.device)
    layer: Callable[[Tensor], Tensor] = block.layer
    if compiled:
        torch._dynamo.reset()
        layer = torch.compile(block.layer, fullgraph=True, dynamic=False)
    x, weight, grad = case.x.detach().requires_grad_(), block.layer.linear.weight, case.grad

    def run() -> tuple[Tensor, ...]:
        return torch.autograd.grad(layer(x), (x, weight), grad)

    # Its grad_w goes through the normalisation of the filters as well: only grad_x is the same function.
    return Prepared(run, lambda: [("grad_x", case.ends(run()[0]), case.expected_grad_x())])


CONTENDERS = (
    Contender(
        "bcos_rt",
        {"forward": _ours_forward, "explain": _ours_explain, "train": _ours_train},
        ours=True,
        note="forward also writes the map of squares for the next layer",
    ),
    Contender("bcos_rt+multiplier", {"forward": _ours_forward_explained}, ours=True, note="forward for an explanation"),
    Contender(
        "plain",
        {"forward": _library_forward, "explain": _library_explain, "train": _library_train},
        note="no B-cos: cuDNN conv, BatchNorm, ReLU in eager PyTorch (linear layers: cuBLAS)",
    ),
    Contender("plain_fused", {"forward": _cudnn_fused_forward}, note="no B-cos: cuDNN's fused conv + bias + ReLU"),
    Contender("cudnn_graph", {"forward": _graph_forward}, note="B-cos epilogue fused by cuDNN; 1 / n given, no map"),
    Contender("cudnn_graph+norm", {"forward": _graph_forward_with_norm}, note="the same, 1 / n computed by PyTorch"),
    Contender(
        "published",
        {"forward": _published_forward, "explain": _published_explain, "train": _published_train},
        note="the package bcos in eager PyTorch",
    ),
    Contender(
        "published_compiled",
        {
            "forward": lambda case: _published_forward(case, compiled=True),
            "train": lambda case: _published_train(case, compiled=True),
        },
        slow=True,
        note="the package bcos under torch.compile",
    ),
)
