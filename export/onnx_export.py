"""``to_onnx``: prediction and explanation as one ONNX file."""

from __future__ import annotations

import copy
import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.fx import Node

from bcos_rt.errors import (
    InvalidArgumentError,
    InvalidTypeError,
    MissingDependencyError,
    did_you_mean,
)
from bcos_rt.export.errors import ExportError
from bcos_rt.export.report import ExportReport
from bcos_rt.graph import ExplanationGraph, TokenPooling, build_explanation_graph, explanation_graph
from bcos_rt.graph.capture import Captured, capture, eval_mode
from bcos_rt.nn.network import BcosNetwork, EmbeddingLayer

if TYPE_CHECKING:
    import onnx_ir as ir

    from bcos_rt.export.parity import Tolerances
    from bcos_rt.export.program import Program

__all__ = ["to_onnx"]

IR_VERSION = 10
OPSETS = (18, 23)  # the oldest with every op used here, and the newest this was tested with
GIB = 1 << 30
# A protobuf message must stay below 2 GiB: some of that is for everything that is no weight.
PROTOBUF_LIMIT = 2 * GIB - (64 << 20)

_DOCS = {
    "image": "RGB images, [batch, 3, H, W], values in [0, 1], not normalised: the file encodes and normalises.",
    "class_ids": "Classes to explain, [batch], each from 0 on; -1 is the class with the largest logit.",
    "class_ids_multi": "Classes to explain, [batch, K], each from 0 on; -1 is the class with the largest logit.",
    "text_embedding": "Embeddings of the texts to explain, [batch, D], of any norm: they are scaled to 1.",
    "text_embedding_multi": "Embeddings of the texts to explain, [batch, K, D], of any norm: they are scaled to 1.",
    "logits": "Logits, [batch, classes].",
    "logits_of_texts": "Scores of the texts, [batch, K]: cosines with the image's tokens, pooled.",
    "logits_of_embedding": "The image's embedding, [batch, D]: unit tokens, averaged.",
    "class_used": "The classes explained: class_ids with -1 replaced.",
    "weights": "W, the dynamic linear weights of the encoded image [x, 1 - x]: logit = sum(W * encoded) + residual.",
    "contributions": "sum_c W_c * encoded_c per pixel, in logits.",
    "residual": "What does not come from pixels (biases, input mean): sum(contributions) + residual = logit.",
    "picture": "The colour explanation: red, green, blue, opacity in [0, 1].",
}


def to_onnx(
    net: BcosNetwork,
    path: str | os.PathLike[str],
    image_size: int | tuple[int, int] = 224,
    *,
    multi: bool = False,
    pooling: Literal["mean", "max", "cosine_power"] | None = None,
    power: float | None = None,
    outputs: Sequence[str] | None = None,
    forward_only: bool = False,
    precision: Literal["fp32", "fp16"] = "fp32",
    verify: bool = True,
    verify_images: Tensor | None = None,
    tolerances: Tolerances | None = None,
    opset: int = 18,
    external_data_threshold: int = 2 * GIB,
    progress: Callable[[str], None] | None = None,
) -> ExportReport:
    """Write a network's prediction and explanation as one ONNX file of standard ops.

    Inputs are ``image``, float32 [N, 3, H, W] in [0, 1] with any N, and ``class_ids``, int64 [N] (or [N, K] with
    ``multi``), where -1 stands for the top class. Outputs are those of :func:`bcos_rt.explain`: ``logits``,
    ``class_used``, ``weights``, ``contributions``, ``residual``, and ``picture`` [N(, K), H, W, 4].
    A network with an embedding (``Recipe.clip()``) is explained for texts: in place of ``class_ids`` its input is
    ``text_embedding``, float32 [N, D] (or [N, K, D]) of any norm, ``logits`` are the texts' scores [N, K] (K = 1), and
    there is no ``class_used``; see :func:`bcos_rt.explain_text`.
    B-cos pieces are model-local functions of the domain ``ai.bcos``, which every runtime inlines. It is the function of
    evaluation mode that is exported, and nothing in the network changes.

    Args:
        net: the network.
        path: the file, ``NAME.onnx``; it appears, whole, only once everything below has succeeded.
        image_size: H = W, or (H, W), in pixels.
        multi: explain K classes of each image with one forward pass.
        pooling, power: of tokens, for a network with an embedding, as for :func:`bcos_rt.explain_text`; None: the mean.
        outputs: names of the outputs to keep; what only led to others is not in the file. Default all (without
            ``picture`` for a network with three input channels).
        forward_only: logits (or the embedding, under that name) only; no ``class_ids``.
        precision: ``"fp16"`` stores weights and activations in 16 bits; norms, sums, W and everything derived from W
            stay 32-bit, and the adjoint's seed is scaled up on its way. Inputs and outputs are float32 either way.
        verify: run the file in onnxruntime on the CPU and compare with PyTorch; the report has the differences.
        verify_images: images [M, 3, H, W] to compare on, besides random ones.
        tolerances: what the comparison allows; by default 1e-4 for logits and 1e-3 for W and contributions, relative to
            the largest magnitude (at B = 1, where single switches flip: relative L2 1e-2, cosine 0.9999).
        opset: version of the standard operator set, 18 to 23.
        external_data_threshold: from how many bytes of weights on they go to ``NAME.onnx.data`` beside the file.
        progress: called with the name of each stage.

    Raises:
        InvalidArgumentError, InvalidTypeError: an unusable argument, an unwritable path.
        MissingDependencyError: onnx, onnx-ir or (to verify) onnxruntime is not installed.
        UnsupportedOpError: an op without a rule or an ONNX form, named with its module.
        ExportError: the file would be invalid, or is further from PyTorch than the tolerances allow; no file is left.
    """
    _require("onnx", "onnx_ir", *(("onnxruntime",) if verify else ()))
    from bcos_rt.export import parity
    from bcos_rt.export.half import scale_seed
    from bcos_rt.export.passes import rewrite
    from bcos_rt.export.program import build_program

    size = _image_size(image_size)
    how = _pooling(net, pooling, power, forward_only)
    chosen = _outputs(net, outputs, forward_only, how is not None)
    target = _target(path)
    if precision not in ("fp32", "fp16"):
        raise InvalidArgumentError("precision", repr(precision), "'fp32' or 'fp16'")
    if isinstance(opset, bool) or not isinstance(opset, int) or not OPSETS[0] <= opset <= OPSETS[1]:
        raise InvalidArgumentError("opset", repr(opset), f"an int from {OPSETS[0]} to {OPSETS[1]}")
    if forward_only and multi:
        raise InvalidArgumentError("multi", True, "False with forward_only: without explanation there are no classes")
    images = _verify_images(verify_images, size)
    say = progress or (lambda stage: None)

    say("capture")
    net = _plain(net)
    source: ExplanationGraph | Captured
    if forward_only:
        source = capture(net, size)
    else:
        source = explanation_graph(net, size, multi=multi, pooling=how, attention="store")
    program = build_program(source, net, chosen)
    targets = None if isinstance(source, Captured) else _some_targets(source)

    say("rewrite")
    seed_scale = 1.0
    if precision == "fp16" and program.seed is not None and targets is not None:
        calibration = images if images is not None else parity.random_images(size, 2)
        asked = targets(len(calibration)) if how is not None else torch.full_like(targets(len(calibration)), -1)
        seed_scale = scale_seed(program, calibration, asked)
    rewrites = rewrite(program)

    say("write")
    model = _build_model(program, net, size, opset, precision == "fp16", multi)
    staging = _staging(target)
    try:
        staged, data = _write(model, staging, target.name, external_data_threshold)
        say("check")
        _check(staged)
        compared = None
        if verify:
            say("verify")
            compared = parity.verify(
                staged,
                _reference(source, net),
                lambda: _exact(net, size, multi, forward_only, how),
                image_size=size,
                targets=targets,
                images=images,
                tolerances=tolerances or parity.Tolerances.of(net.recipe.b, precision),
            )
        size_in_bytes = sum(p.stat().st_size for p in (staged, data) if p is not None)
        # The weights first: the file that names them then never stands there without them.
        if data is not None:
            os.replace(data, target.with_name(data.name))
        os.replace(staged, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    graph = model.graph
    return ExportReport(
        path=target,
        external_data=None if data is None else target.with_name(data.name),
        bytes=size_in_bytes,
        opset=opset,
        precision=precision,
        image_size=size,
        inputs={str(v.name): _shape(v) for v in graph.inputs},
        outputs={str(v.name): _shape(v) for v in graph.outputs},
        nodes=dict(Counter(n.op_type for n in graph).most_common()),
        rewrites=rewrites,
        seed_scale=seed_scale,
        parity=compared,
    )


# Arguments ---------------------------------------------------------------------------------------------------------


def _require(*modules: str) -> None:
    import importlib

    for module in modules:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise MissingDependencyError(
                f"exporting to ONNX needs {module.replace('_', '-')}: pip install bcos-rt[onnx] "
                f"(or bcos-rt[onnx-gpu], never both); {error}"
            ) from error


def _image_size(image_size: Any) -> tuple[int, int]:
    given = (image_size, image_size) if isinstance(image_size, int) else image_size
    if isinstance(image_size, bool | str) or not isinstance(given, Sequence) or len(given) != 2:
        raise InvalidTypeError("image_size", repr(image_size), "an int or (height, width), in pixels")
    if not all(isinstance(s, int) and not isinstance(s, bool) for s in given):
        raise InvalidTypeError("image_size", repr(image_size), "an int or (height, width), in pixels")
    if min(given) < 1:
        raise InvalidArgumentError("image_size", repr(image_size), "at least one pixel each way")
    return int(given[0]), int(given[1])


def _pooling(net: Any, pooling: Any, power: Any, forward_only: bool) -> TokenPooling | None:
    """How tokens are pooled where texts are explained; None elsewhere."""
    if not isinstance(net, BcosNetwork):
        raise InvalidTypeError("net", type(net).__name__, "a BcosNetwork, as bcosify makes it")
    if isinstance(net.logit_layer, EmbeddingLayer) and not forward_only:
        return TokenPooling.of("mean" if pooling is None else pooling, power)
    if pooling is not None or power is not None:
        why = "with forward_only" if forward_only else "for a network that returns logits"
        raise InvalidArgumentError("pooling, power", f"{pooling!r}, {power!r} {why}", "None")
    return None


def _outputs(net: BcosNetwork, outputs: Any, forward_only: bool, texts: bool) -> tuple[str, ...]:
    from bcos_rt.export.program import OUTPUTS

    absent = {*(() if net.encoding.six_channels else ("picture",)), *(("class_used",) if texts else ())}
    possible = ("logits",) if forward_only else tuple(o for o in OUTPUTS if o not in absent)
    if outputs is None:
        return possible
    if isinstance(outputs, str) or not isinstance(outputs, Sequence):
        raise InvalidTypeError("outputs", repr(outputs), f"a sequence of names out of {', '.join(possible)}")
    for name in outputs:
        if name not in possible:
            raise InvalidArgumentError(
                "outputs", repr(name), f"names out of {', '.join(possible)}", did_you_mean(str(name), possible)
            )
    if not outputs:
        raise InvalidArgumentError("outputs", "no name", f"at least one out of {', '.join(possible)}")
    return tuple(outputs)


def _target(path: str | os.PathLike[str]) -> Path:
    target = Path(path)
    if target.suffix.lower() != ".onnx":
        raise InvalidArgumentError("path", repr(str(target)), "a file name ending in .onnx")
    if target.is_dir():
        raise InvalidArgumentError("path", f"{str(target)!r}, a directory", "a file name ending in .onnx")
    if not target.parent.is_dir():
        raise InvalidArgumentError("path", repr(str(target)), "a file in a folder that exists")
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise InvalidArgumentError("path", repr(str(target)), "a file in a folder that can be written")
    return target


def _verify_images(images: Any, size: tuple[int, int]) -> Tensor | None:
    if images is None:
        return None
    if not isinstance(images, Tensor) or not images.is_floating_point():
        raise InvalidTypeError("verify_images", type(images).__name__, "a floating-point tensor [M, 3, H, W] in [0, 1]")
    if images.ndim != 4 or tuple(images.shape[1:]) != (3, *size) or len(images) == 0:
        raise InvalidArgumentError("verify_images", f"shape {tuple(images.shape)}", f"[M, 3, {size[0]}, {size[1]}]")
    if not bool(torch.isfinite(images).all()):
        raise InvalidArgumentError("verify_images", "NaN or infinite values", "finite values in [0, 1]")
    return images.detach().to(device="cpu", dtype=torch.float32).contiguous()


def _plain(net: BcosNetwork) -> BcosNetwork:
    """The network in float32 on the CPU; a copy where it is not."""
    tensors = [t for t in (*net.parameters(), *net.buffers()) if t.is_floating_point()]
    if all(t.dtype == torch.float32 and t.device.type == "cpu" for t in tensors):
        return net
    return copy.deepcopy(net).to(device="cpu", dtype=torch.float32)


def _some_targets(source: ExplanationGraph) -> Callable[[int], Tensor]:
    """Makes targets of so many images to run a graph on."""
    from bcos_rt.export.parity import some_class_ids, some_texts

    some = some_texts if source.texts else some_class_ids
    return lambda count: some(count, source.classes, source.multi)


# The reference -----------------------------------------------------------------------------------------------------


def _reference(source: ExplanationGraph | Captured, net: BcosNetwork) -> Callable[[Tensor, Any], Mapping[str, Tensor]]:
    """What PyTorch computes, by the graph as it was before any rewrite."""

    def forward(image: Tensor, targets: Any) -> Mapping[str, Tensor]:
        with torch.no_grad(), eval_mode(net):
            return {"logits": net(image)}

    def explanation(image: Tensor, targets: Any) -> Mapping[str, Tensor]:
        return _Explained(source, net, image, targets)  # type: ignore[arg-type]

    return forward if isinstance(source, Captured) else explanation


def _exact(
    net: BcosNetwork, size: tuple[int, int], multi: bool, forward_only: bool, pooling: TokenPooling | None
) -> Any:
    """The same in float64."""
    wide = copy.deepcopy(net).double()
    source = capture(wide, size) if forward_only else build_explanation_graph(wide, size, multi=multi, pooling=pooling)
    reference = _reference(source, wide)

    def exact(image: Tensor, targets: Any) -> Mapping[str, Tensor]:
        texts = targets is not None and targets.is_floating_point()
        return reference(image.double(), targets.double() if texts else targets)

    return exact


class _Explained(dict[str, Tensor]):
    """An explanation graph's outputs; the picture is made when it is asked for."""

    def __init__(self, graph: ExplanationGraph, net: BcosNetwork, image: Tensor, targets: Tensor) -> None:
        self.encoded = net.encode(image)
        super().__init__(graph(net, self.encoded, targets))

    def __missing__(self, name: str) -> Tensor:
        from bcos_rt.explanation.picture import colour_picture

        if name != "picture":
            raise KeyError(name)
        weights = self["weights"]
        rows = weights.flatten(0, -4)
        encoded = self.encoded.repeat_interleave(len(rows) // len(self.encoded), 0)
        return colour_picture(encoded, rows).reshape(*weights.shape[:-3], *weights.shape[-2:], 4)


# The model ---------------------------------------------------------------------------------------------------------


def _build_model(
    program: Program, net: BcosNetwork, size: tuple[int, int], opset: int, half: bool, multi: bool
) -> ir.Model:
    import onnx_ir as ir

    from bcos_rt import __version__
    from bcos_rt.export.builder import OnnxBuilder
    from bcos_rt.export.functions import DOMAIN, make_functions
    from bcos_rt.export.half import wide_nodes
    from bcos_rt.export.ops import emit

    wide = wide_nodes(program) if half else set()
    builder = OnnxBuilder(opset, program.constants, half, wide, program.names)
    axes = _axis_names(program, multi)
    inputs = []
    for node in (program.image, program.targets):
        if node is None:
            continue
        value = ir.Value(name=node.name, shape=_ir_shape(node, axes), type=ir.TensorType(_io_type(node)))
        value.doc_string = _DOCS[f"{node.name}_multi" if multi and node is program.targets else node.name]
        builder.values[node] = value
        builder.reserve(node.name)
        inputs.append(value)
    for name in program.outputs:
        builder.reserve(name)
    for node in program.graph.nodes:
        if node.op == "call_function":
            emit(builder, node)
    outputs = []
    for name, node in program.outputs.items():
        value = builder.result(node, name, _io_type(node))
        value.shape, value.type = _ir_shape(node, axes), ir.TensorType(_io_type(node))
        value.doc_string = _DOCS[_documented(name, program, net)]
        outputs.append(value)

    functions = make_functions(builder.functions, opset)
    imports = {"": opset, **({DOMAIN: 1} if functions else {})}
    graph = ir.Graph(
        inputs,
        outputs,
        nodes=builder.nodes,
        initializers=list(builder.initializers.values()),
        opset_imports=imports,
        name="explanation" if program.targets is not None else "prediction",
        doc_string="Prediction and dynamic linear explanation of a B-cos network.",
    )
    _remove_unused(graph)
    model = ir.Model(
        graph,
        ir_version=IR_VERSION,
        producer_name="bcos-rt",
        producer_version=__version__,
        functions=functions,
        doc_string=graph.doc_string,
        metadata_props=_metadata(net, size, half, multi, __version__),
    )
    model.opset_imports.update(imports)
    return model


def _documented(output: str, program: Program, net: BcosNetwork) -> str:
    """The entry of the table of documentation for an output."""
    if output != "logits" or not isinstance(net.logit_layer, EmbeddingLayer):
        return output
    return "logits_of_embedding" if program.targets is None else "logits_of_texts"


def _remove_unused(graph: ir.Graph) -> None:
    """Nodes and weights that no output needs (an index of a max-pool, a multiplier nobody multiplies with)."""
    outputs = set(graph.outputs)
    for node in reversed(list(graph)):
        if all(o not in outputs and not o.uses() for o in node.outputs):
            graph.remove(node, safe=True)
    for name, value in list(graph.initializers.items()):
        if not value.uses() and value not in outputs:
            del graph.initializers[name]


def _axis_names(program: Program, multi: bool) -> dict[str, str]:
    names = {str(program.image.meta["val"].shape[0]): "batch"}
    if multi and program.targets is not None:
        names[str(program.targets.meta["val"].shape[1])] = "k"
    return names


def _ir_shape(node: Node, axes: Mapping[str, str]) -> ir.Shape:
    import onnx_ir as ir

    return ir.Shape([s if isinstance(s, int) else axes.get(str(s), str(s)) for s in node.meta["val"].shape])


def _io_type(node: Node) -> ir.DataType:
    """Inputs and outputs are float32 in every precision."""
    import onnx_ir as ir

    return ir.DataType.FLOAT if node.meta["val"].is_floating_point() else ir.DataType.INT64


def _shape(value: ir.Value) -> list[int | str]:
    return [s if isinstance(s, int) else str(s.value) for s in value.shape or ()]


def _metadata(net: BcosNetwork, size: tuple[int, int], half: bool, multi: bool, version: str) -> dict[str, str]:
    preprocessing = {
        "layout": "NCHW",
        "channels": "RGB",
        "range": [0.0, 1.0],
        "normalisation": "none: the file encodes and normalises the image itself",
        "size": list(size),
        "resize": "shorter side to size / crop_fraction, bilinear with antialiasing",
        "crop": "centre",
    }
    values: dict[str, Any] = {
        "bcos_rt.version": version,
        "bcos_rt.recipe": net.recipe.to_dict(),
        "bcos_rt.source": net.source,
        "bcos_rt.preprocessing": preprocessing,
        "bcos_rt.precision": "fp16" if half else "fp32",
        "bcos_rt.encoding": "[x, 1 - x]" if net.encoding.six_channels else "x",
    }
    if net.class_names is not None:
        values["bcos_rt.class_names"] = list(net.class_names)
    return {k: v if isinstance(v, str) else json.dumps(v, ensure_ascii=False) for k, v in values.items()}


# The file ----------------------------------------------------------------------------------------------------------


def _staging(target: Path) -> Path:
    """A new folder beside the file-to-be, on its file system, so that finished files can be moved into place."""
    try:
        return Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.stem}-"))
    except OSError as error:
        expected = "a file in a folder that can be written"
        raise InvalidArgumentError("path", f"{str(target)!r} ({error.strerror})", expected) from error


def _write(model: ir.Model, folder: Path, name: str, threshold: int) -> tuple[Path, Path | None]:
    """Write the model into a folder; weights beside it where they, together, reach the threshold."""
    import onnx_ir as ir

    staged = folder / name
    weights = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)
    if weights < min(threshold, PROTOBUF_LIMIT):
        ir.save(model, staged)
        return staged, None
    ir.save(model, staged, external_data=f"{name}.data", size_threshold_bytes=1024)
    data = folder / f"{name}.data"
    return staged, data if data.exists() else None


def _check(path: Path) -> None:
    """The checker, and shape inference, strict and with data propagation.

    Raises:
        ExportError: with the first complaint.
    """
    import onnx

    try:
        onnx.checker.check_model(str(path), full_check=True)
        model = onnx.load(str(path), load_external_data=False)
        onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
    except Exception as error:  # the checker's and the inference's errors have no base class in common
        raise ExportError(f"the file is no valid ONNX model: {error}") from error
