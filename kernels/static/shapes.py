"""Layers of a torchvision network with the shapes they see, from a captured graph; no weights, no pixels.

The network is built and captured (``torch.export``) on the meta device. Its first convolution takes the eight channels
of an encoded image: the six of a B-cos network (r, g, b, 1-r, 1-g, 1-b), padded with zeros.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import fx, nn

from bcos_rt.errors import InvalidArgumentError, did_you_mean

__all__ = ["Layer", "Network", "capture", "is_activation", "is_transparent", "layer", "layers", "operation", "shape"]

# Of an encoded image: six, padded.
IMAGE_CHANNELS = 8

# aten operations by what they are; the trailing underscore of in-place forms is dropped first.
_LAYERS = {
    "conv2d": "conv2d",
    "linear": "linear",
    "max_pool2d": "max_pool2d",
    "avg_pool2d": "avg_pool2d",
    "adaptive_avg_pool2d": "avg_pool2d",
    "mean": "avg_pool2d",
    "batch_norm": "batch_norm",
    "layer_norm": "layer_norm",
    "group_norm": "group_norm",
}
_ACTIVATIONS = frozenset({"relu", "gelu", "silu", "hardswish", "hardsigmoid", "sigmoid", "hardtanh", "relu6"})
# What moves no numbers in evaluation: a view, or nothing.
_TRANSPARENT = frozenset(
    {"dropout", "view", "reshape", "flatten", "unflatten", "transpose", "permute", "contiguous", "squeeze", "unsqueeze"}
    | {"select", "expand", "clone", "alias", "detach", "feature_dropout", "_assert_tensor_metadata"}
)


@dataclass(frozen=True)
class Layer:
    """One layer of a network as it is met in a forward pass.

    Attributes:
        name: of the module, or of the parameter where one module holds several layers.
        kind: "conv2d", "linear", "max_pool2d", "avg_pool2d", "batch_norm", "layer_norm" or "group_norm".
        input_shape, output_shape: with the batch; images [N, C, H, W], tokens [..., C].
        weight_shape: [O, C / groups, kh, kw], [O, C], [C], or None.
        kernel: of a convolution or pooling; (1, 1) otherwise, as ``stride`` and ``dilation``.
        followed_by: names of what is applied to the output and nothing else: "batch_norm", "add", "relu", ...
    """

    name: str
    kind: str
    input_shape: tuple[int, ...]
    weight_shape: tuple[int, ...] | None
    output_shape: tuple[int, ...]
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    followed_by: tuple[str, ...] = ()

    @property
    def gemm(self) -> bool:
        """Whether it is a convolution or linear layer: ``groups`` products of [m, k] and [k, n]."""
        return self.kind in ("conv2d", "linear")

    @property
    def depthwise(self) -> bool:
        """Whether it is a depthwise convolution."""
        return self.kind == "conv2d" and self.groups == self.input_shape[1] > 1

    @property
    def m(self) -> int:
        """Rows: output pixels or tokens of the batch; 0 unless ``gemm``."""
        if self.kind == "conv2d":
            return self.output_shape[0] * math.prod(self.output_shape[2:])
        return math.prod(self.output_shape[:-1]) if self.kind == "linear" else 0

    @property
    def n(self) -> int:
        """Columns: output channels of one group; 0 unless ``gemm``."""
        return self.weight_shape[0] // self.groups if self.gemm and self.weight_shape else 0

    @property
    def k(self) -> int:
        """Length of the sums: input channels of one group times kernel places; 0 unless ``gemm``."""
        return math.prod(self.weight_shape[1:]) if self.gemm and self.weight_shape else 0

    @property
    def flops(self) -> int:
        """Operations of the products, a multiply-add being two."""
        return 2 * self.m * self.n * self.k * self.groups


@dataclass(frozen=True)
class Network:
    """A captured network: ``graph`` of aten operations and its ``parameters``, placeholder to name, buffers too."""

    graph: fx.Graph
    parameters: dict[str, str]

    def nodes(self) -> Iterator[fx.Node]:
        """Operations in execution order."""
        return (node for node in self.graph.nodes if node.op == "call_function")


def operation(node: fx.Node) -> str:
    """Name of a node's aten operation without overload and in-place mark: "relu" for ``aten.relu_.default``."""
    name = getattr(node.target, "_opname", None) or getattr(node.target, "__name__", "")
    return str(name).rstrip("_")


def is_transparent(node: fx.Node) -> bool:
    """Whether a node moves no numbers in evaluation: a view, or nothing at all."""
    return operation(node) in _TRANSPARENT


def is_activation(node: fx.Node) -> bool:
    """Whether a node is an activation function."""
    return operation(node) in _ACTIVATIONS


def _known_models() -> list[str]:
    import torchvision

    names: list[str] = torchvision.models.list_models(module=torchvision.models)
    return names


@cache
def capture(model: str, batch: int, size: int = 224, channels: int = IMAGE_CHANNELS) -> Network:
    """Capture a torchvision classifier in evaluation mode with an image batch [batch, channels, size, size], on meta.

    Args:
        channels: of the image; the first convolution is replaced by one that takes them, unless there are three.

    Raises:
        InvalidArgumentError: a model torchvision's classifiers do not include, a batch below 1, or an image the
            network cannot take.
    """
    import torchvision

    known = _known_models()
    if model not in known:
        raise InvalidArgumentError(
            "model", repr(model), f"one of torchvision's {len(known)} classifiers", did_you_mean(model, known)
        )
    if batch < 1:
        raise InvalidArgumentError("batch", batch, "at least 1")
    # torchvision's initialisation of these two is slow and of no use here.
    options = {"init_weights": False} if model in ("googlenet", "inception_v3") else {}
    with torch.device("meta"):
        net = torchvision.models.get_model(model, weights=None, **options).eval()
        if channels != 3:
            widen(net, channels)
        image = torch.empty(batch, channels, size, size)
    try:
        return trace(net, image)
    except (RuntimeError, AssertionError) as error:
        raise InvalidArgumentError("size", size, f"an image size {model} takes ({error})") from error


def widen(net: nn.Module, channels: int) -> None:
    """Replace the first convolution by one of ``channels`` input channels, with new weights."""
    for name, module in net.named_modules():
        if isinstance(module, nn.Conv2d):
            wide = nn.Conv2d(
                channels, module.out_channels, module.kernel_size, module.stride, module.padding,  # type: ignore[arg-type]
                module.dilation, bias=module.bias is not None, device=module.weight.device,  # type: ignore[arg-type]
            )  # fmt: skip
            net.set_submodule(name, wide)
            return


def trace(net: nn.Module, image: torch.Tensor) -> Network:
    """Capture any network in evaluation mode with one image batch."""
    with torch.no_grad():
        program = torch.export.export(net, (image,), strict=False)
    signature = program.graph_signature
    return Network(program.graph, {**signature.inputs_to_parameters, **signature.inputs_to_buffers})


def layers(model: str, batch: int, size: int = 224) -> list[Layer]:
    """Convolution, linear, pooling and normalisation layers of a torchvision classifier in execution order.

    Args:
        model: any name ``torchvision.models.list_models`` gives for classifiers.
        batch: images.
        size: pixels of the image's sides.

    Raises:
        InvalidArgumentError: an unknown model (with the closest names), a batch below 1, an impossible size.
    """
    network = capture(model, batch, size)
    return [found for node in network.nodes() if (found := layer(node, network)) is not None]


def shape(node: Any) -> tuple[int, ...]:
    """Shape of a node's value."""
    return tuple(int(size) for size in node.meta["val"].shape)


def layer(node: fx.Node, network: Network) -> Layer | None:
    """The layer a node is, or None for other operations (a mean that is not over all pixels is none)."""
    op = operation(node)
    kind = _LAYERS.get(op)
    if kind is None:
        return None
    given = _arguments(node)
    x = node.args[0]
    before, after = shape(x), shape(node)
    window: dict[str, tuple[int, int]] = {}
    groups = 1
    if op == "mean":
        if len(before) != 4 or sorted(d % 4 for d in given.get("dim") or ()) != [2, 3]:
            return None
        window = {"kernel": (before[2], before[3]), "stride": (before[2], before[3])}
    elif op == "adaptive_avg_pool2d":
        step = (before[2] // after[2] or 1, before[3] // after[3] or 1)
        window = {"kernel": step, "stride": step}
    elif kind in ("max_pool2d", "avg_pool2d", "conv2d"):
        window = {
            "stride": _pair(given.get("stride") or given.get("kernel_size") or 1),
            "padding": _pair(given.get("padding") or 0),
            "dilation": _pair(given.get("dilation") or 1),
        }
        if kind != "conv2d":
            window["kernel"] = _pair(given["kernel_size"])
    weight = given.get("weight")
    weight_shape = None if weight is None else shape(weight)
    if kind == "conv2d" and weight_shape is not None:
        window["kernel"] = (weight_shape[2], weight_shape[3])
        groups = int(given.get("groups", 1))
    elif kind == "group_norm":
        groups = int(given["num_groups"])
    return Layer(
        name=_name(node, weight, network), kind=kind, input_shape=before, weight_shape=weight_shape,
        output_shape=after, groups=groups, followed_by=tuple(_followers(node)), **window,
    )  # fmt: skip


def _arguments(node: fx.Node) -> dict[str, Any]:
    """Arguments by name, without the defaults."""
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    return {**dict(zip((a.name for a in schema), node.args, strict=False)), **node.kwargs}


def _pair(value: Any) -> tuple[int, int]:
    if isinstance(value, int):
        return (value, value)
    first, *rest = value
    return (int(first), int(rest[0] if rest else first))


def _name(node: fx.Node, weight: Any, network: Network) -> str:
    stack = list(node.meta.get("nn_module_stack", {}).values())
    module = str(stack[-1][0]) if stack else node.name
    parameter = network.parameters.get(weight.name, "") if isinstance(weight, fx.Node) else ""
    if parameter:
        # Attention holds two linear layers in one module: their parameters tell them apart.
        return parameter.removesuffix(".weight").removesuffix("_weight")
    return module or node.name


def _followers(node: fx.Node) -> Iterator[str]:
    """What the value goes through, as long as it goes to one place."""
    while len(node.users) == 1:
        (node,) = node.users
        op = operation(node)
        if is_transparent(node):
            continue
        if not is_activation(node) and op not in ("batch_norm", "layer_norm", "group_norm", "add"):
            return
        yield op
