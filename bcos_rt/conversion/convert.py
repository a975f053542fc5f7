"""``bcosify``: a conventional vision network becomes a B-cos network.

Layers are swapped in a copy of the model, so that names and state-dict keys stay. Where the forward itself must change
(classifier before the pool, functional activations and pools) the copy's ``torch.fx`` graph is rewritten. No step knows
an architecture: what is a stem, a gate branch or a classifier follows from the graph.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils import parametrize

from bcos_rt.conversion import nodes
from bcos_rt.conversion.equivalence import EquivalenceResult, check_equivalence
from bcos_rt.conversion.patches import widening
from bcos_rt.conversion.recipe import IMAGENET_MEAN, IMAGENET_STD, Recipe
from bcos_rt.conversion.record import record, same_answer, shared_copy
from bcos_rt.conversion.report import ConversionReport, Kind, LayerEntry, compare_weights
from bcos_rt.conversion.trace import Trace, is_torch_layer, trace_model
from bcos_rt.errors import InvalidArgumentError, InvalidTypeError, did_you_mean
from bcos_rt.nn import BatchNormUncentered2d, BcosConv2d, BcosLinear, BcosNetwork, InputEncoding
from bcos_rt.nn.attention import PROJECTIONS, AttentionPool, MultiheadAttention, call_projections
from bcos_rt.nn.network import EmbeddingLayer, LogitLayer, check_class_names

__all__ = ["bcosify"]

# A stem is a handful of convolutions; a max-pool behind more of them belongs to the network's body.
MAX_STEM_CONVS = 3

# Attributes in which modules around a first convolution say how many channels the image has.
_CHANNEL_COUNTS = ("num_channels", "in_chans", "in_channels", "n_channels")

_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm)
_OTHER_CONVS = (nn.Conv1d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def bcosify(
    model: nn.Module | str,
    recipe: Recipe | None = None,
    *,
    verify_images: Tensor | None = None,
    class_names: Sequence[str] | None = None,
) -> tuple[BcosNetwork, ConversionReport]:
    """Turn an image classifier into a B-cos network (Arya et al., NeurIPS 2024, arXiv 2411.00715).

    Args:
        model: A module that takes normalised images [N, 3, H, W] and returns logits, or a name that
            :func:`bcos_rt.models.load_model` knows (``"torchvision:resnet18"``). It is not modified; parameters are
            copied. Train/eval modes carry over.
        recipe: What to change; ``None`` is ``Recipe()``, the published CNN recipe. ``net.recipe`` is this recipe with
            mean and std filled in.
        verify_images: Images [N, 3, H, W] in [0, 1] on which to compare the result with the source; the difference is
            ``report.equivalence``.
        class_names: One name per logit.

    Returns:
        The network (its ``backbone`` has the source's submodule names and state-dict keys), and the report of what was
        replaced, what was kept and why.

    Raises:
        InvalidTypeError: ``model`` is no eager module, or is a B-cos network already; class names that are no strings.
        InvalidArgumentError: the model has no convolution that takes an RGB image, its input cannot be widened to six
            channels, a ``recipe.keep`` pattern matches no module, or ``class_names`` has a wrong length.
    """
    recipe = Recipe() if recipe is None else recipe
    if not isinstance(recipe, Recipe):
        raise InvalidTypeError("recipe", type(recipe).__name__, "a bcos_rt.Recipe")
    check_class_names("class_names", class_names)
    source = _resolve(model)
    try:
        work = copy.deepcopy(source.module)
    except RuntimeError as error:
        hint = " (torch.nn.utils.weight_norm: remove_weight_norm it, or use torch.nn.utils.parametrizations)"
        got = f"a {type(source.module).__name__} that cannot be copied ({str(error).split('.')[0]})"
        raise InvalidArgumentError("model", got, "a module whose tensors are parameters or buffers", hint) from error
    mean = recipe.mean or source.mean or IMAGENET_MEAN
    std = recipe.std or source.std or IMAGENET_STD
    known = {"mean": recipe.mean or source.mean, "std": recipe.std or source.std}
    recipe = recipe.replace(mean=mean, std=std)
    conversion = _Conversion(work, recipe)
    backbone = conversion.run()
    for field, default in (("mean", IMAGENET_MEAN), ("std", IMAGENET_STD)):
        if known[field] is None:
            conversion.notes.append(f"input {field}: the model has no metadata, ImageNet's {default} is used")
    if recipe.input_normalization == "none":
        mean, std = (0.0,) * 6, (1.0,) * 6
    encoding = InputEncoding(mean, std, six_channels=recipe.input_encoding == "six_channel")
    classes = conversion.classes
    if classes is None:
        classes = _declared_classes(source, conversion.notes)
    last: LogitLayer | EmbeddingLayer
    if recipe.output == "embedding":
        classes, last = None, EmbeddingLayer()
        conversion.add("", "logit", "", "EmbeddingLayer()", "output='embedding'")
    else:
        last = LogitLayer(_logit_bias(recipe, classes, conversion.notes), recipe.logit_temperature)
        conversion.add("", "logit", "", repr(last), "logit_bias")
    names = class_names if class_names is not None else source.class_names
    if class_names is not None and classes is not None and len(class_names) != classes:
        raise InvalidArgumentError("class_names", f"{len(class_names)} names", f"one per logit, {classes}")
    if names is not None and classes is not None and len(names) != classes:
        names = None
    # Without a graph the number is a guess.
    known_classes = classes if conversion.graph is not None else None
    net = BcosNetwork(backbone, encoding, last, recipe, source.origin, names, source.input_size, known_classes)
    for module in (net, net.encoding, net.logit_layer):
        module.training = source.module.training
    reference = next(backbone.parameters(), None)
    if reference is not None:
        net.encoding.to(reference.device)

    copied = compare_weights(
        source.module,
        backbone,
        conversion.is_dropped,
        conversion.folded_bias,
        conversion.factors,
        conversion.patch_channels,
    )
    equivalence: EquivalenceResult | None = None
    if verify_images is not None:
        equivalence = check_equivalence(source.module, net, verify_images)
    report = ConversionReport(source.name, tuple(conversion.entries), copied, equivalence, tuple(conversion.notes))
    return net, report


# --- the source ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Source:
    module: nn.Module
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    class_names: Sequence[str] | None
    origin: dict[str, Any]
    name: str
    input_size: int | None = None


def _resolve(model: object) -> _Source:
    # Not at the top: bcos_rt.models may itself need converted networks.
    from bcos_rt import models

    if isinstance(model, str):
        model = models.load_model(model)
    if isinstance(model, models.LoadedModel):
        name = str(model.source.get("name", type(model.module).__name__))
        _check_module(model.module)
        origin = dict(model.source)
        return _Source(model.module, model.mean, model.std, model.class_names, origin, name, model.input_size)
    module = _check_module(model)
    mean, std = models.metadata_of(module) or (None, None)
    cls = type(module)
    origin = {"kind": "module", "name": f"{cls.__module__}.{cls.__qualname__}"}
    return _Source(module, mean, std, None, origin, cls.__name__)


def _check_module(model: object) -> nn.Module:
    expected = "a torch.nn.Module that classifies images, or a model name"
    if isinstance(model, BcosNetwork):
        raise InvalidTypeError("model", "a BcosNetwork", expected, " (this one is converted already)")
    if not isinstance(model, nn.Module):
        hint = " (an instance, not the class)" if isinstance(model, type) and issubclass(model, nn.Module) else ""
        raise InvalidTypeError("model", type(model).__name__, expected, hint)
    if isinstance(model, torch.jit.ScriptModule):
        raise InvalidTypeError("model", "a TorchScript module", expected, " (pass the eager model)")
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        raise InvalidTypeError("model", type(model).__name__, expected, " (pass model.module)")
    if "_orig_mod" in model._modules:
        raise InvalidTypeError("model", "a compiled module", expected, " (pass model._orig_mod)")
    if any(isinstance(p, nn.parameter.UninitializedParameter) for p in model.parameters()):
        raise InvalidArgumentError("model", "uninitialised (lazy) parameters", "a model that has seen an image")
    return model


def _declared_classes(source: _Source, notes: list[str]) -> int | None:
    """The number of classes a model says it has, where its graph does not show a classifier."""
    value = source.origin.get("num_classes", getattr(source.module, "num_classes", None))
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        return None
    notes.append(f"classes: {value}, as the model says")
    return value


def _logit_bias(recipe: Recipe, classes: int | None, notes: list[str]) -> float | None:
    if recipe.logit_bias != "auto":
        return recipe.logit_bias
    if classes is None:
        notes.append("logit bias: the number of classes is unknown (no classifier at the output), none is added")
        return None
    if classes < 2:
        notes.append(f"logit bias: -log(classes - 1) is undefined for {classes} class, none is added")
        return None
    return -math.log(classes - 1)


def _carry_hooks(old: nn.Module, new: nn.Module) -> None:
    for kind in ("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"):
        getattr(new, kind).update(getattr(old, kind))
    for kind in ("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"):
        getattr(new, kind).update(getattr(old, kind))


def _with_called_projections(model: nn.Module) -> nn.Module:
    """The model with attention layers that call their projections where it has such that read their weights."""
    made: dict[int, nn.Module] = {}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        inside = [model.get_submodule(name.rpartition(".")[0])] if name else []
        new = made.get(id(module)) or (None if any(map(is_torch_layer, inside)) else call_projections(module))
        if new is None:
            continue
        if id(module) not in made:
            _carry_hooks(module, new)
        made[id(module)] = new
        if name == "":
            return new
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, new)
    return model


# --- the conversion --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Head:
    """A classifier behind a global pool: pool -> flatten, dropout, LayerNorm -> linear (or 1x1 conv).

    Attributes:
        between: what stands between pool and classifier, the last first.
        moved: those of them that move before the pool with it.
        keep_pool_shape: whether the pool's result is the logits' shape without a flatten.
        channels_last: whether the pool's input is [N, ..., C], where the linear layer stays one, or [N, C, H, W].
    """

    layer: fx.Node
    between: tuple[fx.Node, ...]
    moved: tuple[fx.Node, ...]
    pool: fx.Node
    keep_pool_shape: bool
    channels_last: bool


class _Conversion:
    """One run over a copy of the model, which it changes."""

    def __init__(self, work: nn.Module, recipe: Recipe) -> None:
        self.root = _with_called_projections(work)
        work = self.root
        self.recipe = recipe
        self.entries: list[LayerEntry] = []
        self.notes: list[str] = []
        self.folded_bias: dict[str, Tensor] = {}
        self.dropped: set[str] = set()
        self.rewritten = False
        self.names: dict[int, list[str]] = {}
        for name, module in work.named_modules(remove_duplicate=False):
            self.names.setdefault(id(module), []).append(name)
        self.modules = dict(work.named_modules(remove_duplicate=False))
        self._check_keep()
        self.trace = trace_model(work)
        self.roles, self.notes = self._recorded(work)
        if recipe.biases == "drop" and self._drop_loose_biases(work):
            self.trace = trace_model(work)
            self.roles, self.notes = self._recorded(work)
        if self.trace.graph is None or not nodes.returns_tensor(self.trace.graph):
            self.trace = self.roles
        self.graph = self.trace.graph
        self.rewritable = self.graph is not None and not self.trace.recorded and not self.trace.mode_dependent
        if self.graph is not None and self.trace.mode_dependent:
            self.notes.append(
                "the forward differs between train and eval mode, so its order of operations is left as it is"
            )
        self.live = nodes.live_nodes(self.graph, self.modules) if self.graph is not None else set()
        self.live_roles = self.live
        if self.roles.graph is not None and self.roles is not self.trace:
            self.live_roles = nodes.live_nodes(self.roles.graph, self.modules)
        self.attention = self._attention_projections()
        self.widenings: dict[int, tuple[Tensor, Tensor]] = {}
        self.patch_channels: dict[str, Tensor] = {}
        self.factors, self.first_weights = _channel_factors(recipe)
        self.classes: int | None = None

    def _recorded(self, work: nn.Module) -> tuple[Trace, list[str]]:
        """The graph that says what layers are for: the symbolic one where it shows everything, else a run's; notes."""
        trace = self.trace
        if trace.graph is not None and not trace.opaque and nodes.returns_tensor(trace.graph):
            return trace, []
        found = record(work, trace) if any(work.children()) and not is_torch_layer(work) else None
        if found is None:
            return trace, [
                f"{name or 'the model'}: its forward cannot be traced ({reason}); functional activations and pools,"
                " gates and classifiers inside it are not recognised"
                for name, reason in trace.opaque.items()
            ]
        recorded, (height, width) = found
        names = ", ".join(name or "the model" for name in trace.opaque) or "the model"
        return recorded, [
            f"{names}: symbolic tracing fails, the layers' roles come from a run on an image of {height}x{width}; the "
            "order of operations there is left as it is"
        ]

    def _drop_loose_biases(self, work: nn.Module) -> bool:
        """Take away parameters that serve as biases without being a layer's ``bias``; whether there were any.

        A forward that asks whether it has them (``if self.q_bias is None``) gets None; any other one zeros.
        """
        if self.roles.graph is None:
            return False
        tensors = dict(work.named_parameters(remove_duplicate=False)) | dict(work.named_buffers(remove_duplicate=False))
        names = {n for n in nodes.loose_biases(self.roles.graph, self.modules) if n in tensors and tensors[n].ndim == 1}
        owners = {name.rpartition(".")[0] for name in names}
        # Not every one of an owner's: dropping some would be a surprise.
        kept = {owner for owner in owners if self._kept_by_recipe(owner)}
        names = {name for name in names if name.rpartition(".")[0] not in kept}
        if not any(isinstance(tensors[name], nn.Parameter) for name in names):
            return False
        for name in names:
            with torch.no_grad():
                zeros = torch.zeros_like(tensors[name])
            _set_tensor(work, name, nn.Parameter(zeros, requires_grad=False) if _is_parameter(work, name) else zeros)
        absent = shared_copy(work)
        for name in names:
            _set_tensor(absent, name, None)
        reason = "biases='drop'"
        if same_answer(work, absent):
            for name in names:
                _set_tensor(work, name, None)
        else:
            reason += "; the forward needs one, which is zero and frozen now"
        for name in sorted(names):
            self.dropped.add(name)
            self.add(name, "other", f"a bias of {tensors[name].numel()}", "no bias", reason)
        return True

    def add(self, name: str, kind: Kind, before: str, after: str, reason: str) -> None:
        self.entries.append(LayerEntry(name, kind, before, after, reason))

    def keep_entry(self, name: str, kind: Kind, text: str, reason: str) -> None:
        self.add(name, kind, text, text, reason)

    def run(self) -> nn.Module:
        head = self._plan_head(self._output_layer())
        pool = self._plan_stem_pool()
        stem = self._stem_convs()
        stem_names = {key: self.names[key] for key in stem}
        activations = self._activation_calls()
        writing = self._writing_calls()
        self._write_to_no_input()

        pool_call = pool is not None and self._is_pool_call(pool)
        for name, module in list(self.root.named_modules()):
            if head is not None and name == head.layer.target and isinstance(module, nn.Linear):
                new: nn.Module = self._head_layer(name, module, head.channels_last)
            elif pool is not None and not pool_call and name == pool.target:
                new = self._average_pool(name, module)
            else:
                new = self._convert(name, module, stem)
            if new is not module:
                self._install(module, new)
        self._widen_checks([name for key in stem for name in stem_names[key]])
        root = self.root
        if head is not None or activations or pool_call or writing:
            root = self._rewrite(head, activations, pool if pool_call else None, writing)
            self.rewritten = True
        return root

    # --- names, roles --------------------------------------------------------------------------------------------

    def _check_keep(self) -> None:
        for pattern in self.recipe.keep:
            if not any(fnmatchcase(name, pattern) for name in self.modules):
                names = [n for n in self.modules if n]
                raise InvalidArgumentError(
                    "Recipe.keep", repr(pattern), "a pattern that matches a module's name", did_you_mean(pattern, names)
                )

    def _kept_by_recipe(self, name: str) -> bool:
        """Whether a keep pattern matches a module or one it is part of."""
        parts = name.split(".") if name else []
        prefixes = [".".join(parts[:end]) for end in range(len(parts), 0, -1)]
        return any(fnmatchcase(p, pattern) for p in prefixes or [""] for pattern in self.recipe.keep)

    def _is_kept(self, module: nn.Module) -> bool:
        return any(self._kept_by_recipe(name) for name in self.names[id(module)])

    def _is_gate(self, module: nn.Module) -> bool:
        """Whether every call of a module serves a gate only."""
        if self.roles.graph is None:
            return False
        calls = [node for name in self.names[id(module)] for node in self.roles.calls_of(name) or ()]
        return bool(calls) and not any(node in self.live_roles for node in calls)

    def _is_read(self, module: nn.Module) -> bool:
        """Whether a forward reads a layer's weight and never calls the layer."""
        if self.roles.graph is None or any(self.roles.calls_of(name) for name in self.names[id(module)]):
            return False
        return not nodes.weights_read(self.roles.graph).isdisjoint(self.names[id(module)])

    def _attention_projections(self) -> set[int]:
        """ids of the linear layers that make attention's queries, keys and values."""
        graph = self.roles.graph
        names = nodes.attention_projections(graph, self.modules) if graph is not None else set()
        for name, module in self.modules.items():
            names.update(f"{name}.{p}" if name else p for p in PROJECTIONS.get(type(module), ()))
        return {id(self.modules[name]) for name in names}

    def _part_of_torch_layer(self, name: str) -> str | None:
        """The torch.nn layer (attention, transformer) a module is part of; those read its weights themselves."""
        parts = name.split(".")
        for end in range(len(parts) - 1, -1, -1):
            parent = self.modules[".".join(parts[:end])]
            if is_torch_layer(parent) and not isinstance(parent, _NORMS):
                return type(parent).__name__
        return None

    def _install(self, old: nn.Module, new: nn.Module) -> None:
        new.training = old.training
        _carry_hooks(old, new)
        for name in self.names[id(old)]:
            if name == "":
                self.root = new
            else:
                parent, _, leaf = name.rpartition(".")
                setattr(self.root.get_submodule(parent), leaf, new)
        self.names[id(new)] = self.names[id(old)]

    def is_dropped(self, name: str) -> bool:
        """Whether the source's parameter or buffer ``name`` was meant to go."""
        if name in self.dropped:
            return True
        # A rewritten graph holds nothing that the forward never reads (constants it reads may have moved).
        if self.graph is None or not self.rewritten:
            return False
        read = any(node.op == "get_attr" and node.target == name for node in self.graph.nodes)
        return not read and self.trace.calls_of(name.rpartition(".")[0]) is None

    def _drop(self, module: nn.Module, *parameters: str) -> None:
        for name in self.names[id(module)]:
            self.dropped.update(f"{name}.{p}" if name else p for p in parameters)

    # --- layers --------------------------------------------------------------------------------------------------

    def _convert(self, name: str, module: nn.Module, stem: set[int]) -> nn.Module:
        """The module to put in place of ``module`` (itself when it stays)."""
        is_conv = isinstance(module, nn.Conv2d)
        is_linear = isinstance(module, nn.Linear)
        is_norm = isinstance(module, _NORMS)
        is_activation = nodes.is_activation(module)
        own_bias = not any(module.children()) and module._parameters.get("bias") is not None
        if isinstance(module, MultiheadAttention):
            return self._convert_packed_attention(name, module)
        if isinstance(module, AttentionPool):
            return self._convert_attention_pool(name, module)
        if not (is_conv or is_linear or is_norm or is_activation or own_bias or isinstance(module, _OTHER_CONVS)):
            return module
        if is_activation:
            return self._convert_activation(name, module)
        kind: Kind = "norm" if is_norm else "linear" if is_linear else "conv" if is_conv else "other"
        reason = ""
        torch_layer = self._part_of_torch_layer(name) if name else None
        if self._is_kept(module):
            reason = "matches Recipe.keep"
        elif torch_layer is not None:
            reason = f"part of {torch_layer}, whose forward reads its weights itself"
        elif id(module) in self.attention and self.recipe.attention == "linear":
            return self._convert_projection(name, module)
        elif self.recipe.gates == "keep" and id(module) not in self.attention and self._is_gate(module):
            reason = "computes a gate only"
        elif is_conv or is_linear:
            reason = self._why_not_bcos(module)
            if not reason and self._is_read(module):
                reason = "the forward reads its weight instead of calling it"
        if reason:
            if id(module) in stem:
                self._widen_kept(name, module, reason)
            else:
                self.keep_entry(name, kind, nodes.describe(module), reason)
            return module
        if isinstance(module, nn.Conv2d):
            return self._convert_conv(name, module, id(module) in stem)
        if isinstance(module, nn.Linear):
            return self._convert_linear(name, module, id(module) in stem)
        if is_norm:
            return self._convert_norm(name, module)
        what = "no B-cos counterpart" if isinstance(module, _OTHER_CONVS) else "a layer of its own kind, with a bias"
        self.keep_entry(name, kind, nodes.describe(module), what)
        return module

    def _why_not_bcos(self, module: nn.Module) -> str:
        """Why a convolution or linear layer cannot be replaced; empty when it can."""
        cls = type(module)
        if isinstance(module, NonDynamicallyQuantizableLinear):
            return "an attention layer's projection"
        if parametrize.is_parametrized(module) or "weight" not in module._parameters:
            return "its weight is computed by a parametrisation"
        # timm's Linear differs in TorchScript only.
        if cls in nodes.timm_classes("Conv2dSame", "Linear"):
            return ""
        if isinstance(module, nn.Conv2d):
            conv_forward = type(module)._conv_forward
            own = cls.forward is not nn.Conv2d.forward or conv_forward is not nn.Conv2d._conv_forward
        else:
            own = cls.forward is not nn.Linear.forward
        return f"{cls.__name__} has a forward of its own" if own else ""

    def _bcos_reason(self) -> str:
        return f"b={self.recipe.b:g}" + (", unit-norm weights" if self.recipe.weight_norm == "unit" else "")

    def _set_bias(self, new: nn.Module, old: nn.Module) -> None:
        bias = old._parameters.get("bias")
        if bias is not None and self.recipe.biases == "drop":
            self._drop(old, "bias")
            bias = None
        new.register_parameter("bias", bias)

    def _convert_conv(self, name: str, conv: nn.Conv2d, widen: bool) -> nn.Module:
        before = nodes.describe(conv)
        new = BcosConv2d(
            conv.in_channels * (2 if widen else 1),
            conv.out_channels,
            conv.kernel_size,
            conv.stride,
            conv.padding,
            conv.dilation,
            conv.groups,
            bias=False,
            padding_mode=conv.padding_mode,
            device="meta",
            b=self.recipe.b,
            weight_norm=self.recipe.weight_norm,
            tf_same_padding=type(conv) in nodes.timm_classes("Conv2dSame"),
        )
        new.weight = _widened(conv.weight, self.factors) if widen else conv.weight
        self._set_bias(new, conv)
        reason = self._bcos_reason() + (f", first convolution: weights {self.first_weights}" if widen else "")
        self.add(name, "conv", before, nodes.describe(new), reason)
        return new

    def _convert_projection(self, name: str, module: nn.Module) -> nn.Module:
        """Attention's projection of queries, keys or values stays linear (B-cos v2, arXiv 2306.10898, section 3.4)."""
        before, reason = nodes.describe(module), "attention='linear'"
        if self.recipe.biases == "drop" and module._parameters.get("bias") is not None:
            module.register_parameter("bias", None)
            self._drop(module, "bias")
            reason += ", biases='drop'"
        self.add(name, "linear", before, nodes.describe(module), reason)
        return module

    def _convert_packed_attention(self, name: str, module: MultiheadAttention) -> nn.Module:
        if self._is_kept(module):
            self.keep_entry(name, "other", "MultiheadAttention(...)", "matches Recipe.keep")
            return module
        before, after = "MultiheadAttention(...)", "MultiheadAttention(...)"
        reason = "its packed projections stay linear, attention='linear'"
        if self.recipe.attention == "convert":
            reason = "its projections are one packed weight, which stays linear"
        if self.recipe.biases == "drop" and module.in_proj_bias is not None:
            module.register_parameter("in_proj_bias", None)
            self._drop(module, "in_proj_bias")
            after, reason = "MultiheadAttention(without in_proj_bias)", reason + ", biases='drop'"
        self.add(name, "other", before, after, reason)
        return module

    def _convert_attention_pool(self, name: str, pool: AttentionPool) -> nn.Module:
        before = repr(pool).partition("\n")[0] + "...)"
        reason = "matches Recipe.keep" if self._is_kept(pool) else f"attention_pool={self.recipe.attention_pool!r}"
        if self.recipe.attention_pool == "tokens" and not self._is_kept(pool):
            pool.pooled = False
            pool.register_parameter("positional_embedding", None)
            self._drop(pool, "positional_embedding")
            reason += ": the projected values of all places, without position embedding"
            self.add(name, "pool", before, "AttentionPool(un-pooled)", reason)
        else:
            self.keep_entry(name, "pool", before, reason)
        return pool

    def _convert_linear(self, name: str, linear: nn.Linear, widen: bool = False) -> nn.Module:
        new = BcosLinear(
            linear.in_features * (2 if widen else 1),
            linear.out_features,
            bias=False,
            device="meta",
            b=self.recipe.b,
            weight_norm=self.recipe.weight_norm,
        )
        new.weight = self._widened_patches(linear) if widen else linear.weight
        self._set_bias(new, linear)
        reason = self._bcos_reason()
        if widen:
            reason += f", patch embedding: weights {self.first_weights} in its own pixel order"
        self.add(name, "linear", nodes.describe(linear), nodes.describe(new), reason)
        return new

    def _widened_patches(self, linear: nn.Linear) -> nn.Parameter:
        source, channel = self.widenings[id(linear)]
        weight = linear.weight.detach()[:, source] * self.factors.to(linear.weight)[channel]
        return nn.Parameter(weight, requires_grad=linear.weight.requires_grad)

    def _head_layer(self, name: str, linear: nn.Linear, channels_last: bool) -> nn.Module:
        """The classifier as it stands before the pool: over the last dimension, or as a 1x1 convolution."""
        options: dict[str, Any] = {"bias": False, "device": "meta", "b": self.recipe.b}
        options["weight_norm"] = self.recipe.weight_norm
        weight = linear.weight.detach()
        if channels_last:
            new: BcosLinear | BcosConv2d = BcosLinear(linear.in_features, linear.out_features, **options)
        else:
            new = BcosConv2d(linear.in_features, linear.out_features, 1, **options)
            weight = weight[:, :, None, None]
        new.weight = nn.Parameter(weight, requires_grad=linear.weight.requires_grad)
        self._set_bias(new, linear)
        self.add(
            name, "head", nodes.describe(linear), nodes.describe(new), f"{self._bcos_reason()}, before the global pool"
        )
        return new

    def _widen_kept(self, name: str, module: nn.Module, reason: str) -> None:
        if type(module) is nn.Linear:
            before = nodes.describe(module)
            module.weight = self._widened_patches(module)
            module.in_features *= 2
            self.add(name, "linear", before, nodes.describe(module), f"{reason}; widened as the input has six channels")
            return
        if not isinstance(module, nn.Conv2d) or (self._why_not_bcos(module) and not self._is_plain_conv(module)):
            raise InvalidArgumentError(
                "model",
                f"a first convolution {name!r} of type {type(module).__name__} ({reason})",
                f"a torch.nn.Conv2d, whose weights can become {self.first_weights}",
                " (or use Recipe(input_encoding='three_channel'))",
            )
        before = nodes.describe(module)
        module.weight = _widened(module.weight, self.factors)
        module.in_channels *= 2
        reason += f"; weights {self.first_weights} as the input has six channels"
        self.add(name, "conv", before, nodes.describe(module), reason)

    def _widen_checks(self, names: Sequence[str]) -> None:
        """Modules around a widened layer that state the image's channels (and check them) state six."""
        for name in names:
            parts = name.split(".")
            for end in range(len(parts)):
                owner = ".".join(parts[:end])
                for attribute in _CHANNEL_COUNTS:
                    module = self.root.get_submodule(owner)
                    if module.__dict__.get(attribute) == 3 and not is_torch_layer(module):
                        setattr(module, attribute, 6)

    def _is_plain_conv(self, module: nn.Module) -> bool:
        return type(module) is nn.Conv2d and "weight" in module._parameters

    def _convert_norm(self, name: str, module: nn.Module) -> nn.Module:
        before = nodes.describe(module)
        act_classes = nodes.timm_classes("BatchNormAct2d")
        exact = type(module) is nn.BatchNorm2d or type(module) is nn.SyncBatchNorm or type(module) in act_classes
        folded = self.recipe.batch_norm == "uncentered_folded"
        if isinstance(module, _BatchNorm) and exact and self.recipe.batch_norm != "keep":
            if folded and module.running_mean is None:
                self.keep_entry(name, "norm", before, "it has no running mean to fold into a bias")
                return module
            new = self._uncentered(name, module, folded)
            reason = f"batch_norm={self.recipe.batch_norm!r}"
            if type(module) is nn.SyncBatchNorm:
                reason += "; statistics are per process now"
            self.add(name, "norm", before, nodes.describe(new), reason)
            return new
        if self.recipe.biases == "drop" and module._parameters.get("bias") is not None:
            gone = _drop_norm_bias(module)
            self._drop(module, "bias")
            reason = "biases='drop'" + ("" if gone else "; its forward needs one, which is zero and frozen now")
            self.add(name, "norm", before, type(module).__name__ + "(without bias)", reason)
            return module
        if isinstance(module, _BatchNorm) and self.recipe.batch_norm != "keep":
            self.keep_entry(name, "norm", before, f"{type(module).__name__} is no 2-D batch norm with known forward")
        elif isinstance(module, _BatchNorm):
            self.keep_entry(name, "norm", before, "batch_norm='keep'")
        else:
            self.keep_entry(name, "norm", before, "LayerNorm and GroupNorm keep their centring")
        return module

    def _uncentered(self, name: str, old: _BatchNorm, folded: bool) -> BatchNormUncentered2d:
        affine = old.affine or folded
        keep_bias = affine and self.recipe.biases == "keep" and (folded or old.bias is not None)
        new = BatchNormUncentered2d(
            old.num_features,
            old.eps,
            old.momentum,
            affine,
            old.track_running_stats,
            device="meta",
            bias=keep_bias,
            drop=old._modules.get("drop"),
            act=old._modules.get("act"),
        )
        new.running_mean, new.running_var = old.running_mean, old.running_var
        new.num_batches_tracked = old.num_batches_tracked
        if old.weight is not None:
            new.weight = old.weight
        elif affine:
            new.weight = nn.Parameter(torch.ones_like(_present(old.running_var)))
        if keep_bias and not folded:
            new.bias = old.bias
        elif folded:
            # In float64: the mean may be large and the scale small, or the other way round.
            mean, var = _present(old.running_mean).double(), _present(old.running_var).double()
            bias = -mean * new.weight.detach().double() / torch.sqrt(var + old.eps)
            if old.bias is not None:
                bias = old.bias.detach().double() + bias
            new.bias = nn.Parameter(bias.to(new.weight.dtype), requires_grad=new.weight.requires_grad)
            for alias in self.names[id(old)]:
                self.folded_bias[f"{alias}.bias" if alias else "bias"] = bias.to(new.weight.dtype)
        if old.bias is not None and not keep_bias:
            self._drop(old, "bias")
        return new

    def _convert_activation(self, name: str, module: nn.Module) -> nn.Module:
        if self.recipe.activations == "keep":
            return module
        before = nodes.describe(module)
        if self._is_kept(module):
            self.keep_entry(name, "activation", before, "matches Recipe.keep")
            return module
        if self._is_gate(module):
            self.keep_entry(name, "activation", before, "computes a gate only")
            return module
        calls = [node for alias in self.names[id(module)] for node in self.roles.calls.get(alias, ())]
        if any(node not in self.live_roles for node in calls):
            # Shared with gates: its calls on the live path leave the graph instead (see _activation_calls).
            if not any(self.trace.calls.get(alias) for alias in self.names[id(module)]):
                self.keep_entry(name, "activation", before, "shared with a gate; the forward cannot be rewritten")
            return module
        self._drop(module, *module._parameters)
        self.add(name, "activation", before, "Identity()", "activations='identity'")
        return nn.Identity()

    # --- the input -----------------------------------------------------------------------------------------------

    def _stem_convs(self) -> set[int]:
        """ids of the convolutions, and linear patch embeddings, whose weights take six channels."""
        patches = self._patch_embedding()
        if patches is not None:
            return patches
        convs = self._image_convs()
        six = self.recipe.input_encoding == "six_channel"
        if not convs:
            raise InvalidArgumentError(
                "model", "no convolution that takes the image", "a convolution with 3 (RGB) input channels"
            )
        found: set[int] = set()
        for name, conv in convs:
            wanted = "a first convolution with 3 input channels (RGB)"
            if conv.in_channels == 6 and six:
                self.keep_entry(name, "input", nodes.describe(conv), "takes six channels already")
                continue
            if conv.in_channels != 3:
                hint = " (a grayscale model)" if conv.in_channels == 1 else ""
                raise InvalidArgumentError("model", f"{conv.in_channels} input channels in {name!r}{hint}", wanted)
            if not six:
                continue
            if conv.groups != 1:
                raise InvalidArgumentError(
                    "model",
                    f"groups={conv.groups} in the first convolution {name!r}",
                    "groups=1, as [x, 1 - x] puts a channel and its inverse into different groups",
                    " (or use Recipe(input_encoding='three_channel'))",
                )
            if self.roles.graph is not None:
                of_images = nodes.image_consumers(self.roles.graph, self.modules)
                self._check_sees_images_only("first convolution", name, conv, of_images)
            found.add(id(conv))
        return found

    def _check_sees_images_only(
        self, what: str, name: str, layer: nn.Module, of_images: Iterable[fx.Node | None]
    ) -> None:
        """Refuse a layer called by the nodes ``of_images`` and by others too."""
        graph = self.roles.graph
        calls = [] if graph is None else [n for n in graph.nodes if self._calls(n, layer)]
        takes_image = [n in set(of_images) for n in calls]
        if any(takes_image) and not all(takes_image):
            raise InvalidArgumentError(
                "model",
                f"the {what} {name!r} used again, behind other layers",
                "one that takes the image alone, as its weights become those of six channels",
                " (or use Recipe(input_encoding='three_channel'))",
            )

    def _calls(self, node: fx.Node, layer: nn.Module) -> bool:
        return node.op == "call_module" and self.modules.get(str(node.target)) is layer

    def _patch_embedding(self) -> set[int] | None:
        """The linear layer that takes the image's patches, where the image goes there and nowhere else."""
        if self.roles.graph is None:
            return None
        consumers = nodes.image_consumers(self.roles.graph, self.modules)
        calls = [nodes.first_linear(node, self.modules) for node in consumers]
        linears = {id(self.modules[str(call.target)]) for call in calls if call is not None}
        if len(linears) != 1 or None in calls:
            return None
        name = str(next(call.target for call in calls if call is not None))
        linear = self.modules[name]
        if not isinstance(linear, nn.Linear) or self.recipe.input_encoding == "three_channel":
            return set()
        found = widening(self.root, linear)
        if found is None:
            return None
        self._check_sees_images_only("linear patch embedding", name, linear, calls)
        self.widenings[id(linear)] = found
        source, channel = found
        of_column = torch.empty_like(source[: linear.in_features])
        of_column[source] = channel % 3
        self.patch_channels |= dict.fromkeys((f"{n}.weight" for n in self.names[id(linear)]), of_column)
        return {id(linear)}

    def _image_convs(self) -> list[tuple[str, nn.Conv2d]]:
        six = self.recipe.input_encoding == "six_channel"
        roots: list[tuple[str, nn.Module]] = [("", self.root)]
        if self.roles.graph is not None:
            consumers = nodes.image_consumers(self.roles.graph, self.modules)
            roots = []
            for node in consumers:
                module = self.modules[str(node.target)] if node.op == "call_module" else None
                has_conv = module is not None and any(isinstance(m, nn.Conv2d) for m in module.modules())
                if module is not None and has_conv:
                    roots.append((str(node.target), module))
                elif six:
                    raise InvalidArgumentError(
                        "model",
                        f"{nodes.describe_node(node, self.modules)} on the image before the first convolution",
                        "a model whose convolutions (or linear patch embedding, for any number of channels) take the "
                        f"normalised image itself, so that their weights can be {self.first_weights}",
                        " (normalisation belongs into Recipe(mean=, std=); or use input_encoding='three_channel')",
                    )
                else:
                    roots = [("", self.root)]
                    break
        found: dict[int, tuple[str, nn.Conv2d]] = {}
        for prefix, root in roots:
            first: list[tuple[str, nn.Conv2d]] = []
            for name, module in root.named_modules(prefix=prefix):
                if isinstance(module, nn.Conv2d):
                    if first and module.in_channels not in (3, 6):
                        break
                    first.append((name, module))
                    if module.in_channels not in (3, 6):
                        break
            # In registration order, where the graph does not tell: leading convolutions of an RGB image.
            for name, conv in first[:1] + [c for c in first[1:] if c[1].in_channels == first[0][1].in_channels]:
                found[id(conv)] = (name, conv)
        return list(found.values())

    # --- the stem's pool -----------------------------------------------------------------------------------------

    def _plan_stem_pool(self) -> fx.Node | None:
        if self.recipe.stem_pool == "keep":
            return None
        if self.graph is None:
            if any(isinstance(m, nn.MaxPool2d) for m in self.modules.values()):
                self.notes.append("stem pool: the model cannot be traced, so no max-pool is known to be the stem's")
            return None
        pools = [n for n in self.graph.nodes if n in self.live and self._is_max_pool(n)]
        if not pools and self.roles.graph is not None:
            pools = [n for n in self.roles.graph.nodes if n in self.live_roles and self._is_max_pool(n)]
        if not pools:
            return None
        node = pools[0]
        reason = self._why_not_stem_pool(node, len(pools))
        for pool in pools[1:] if not reason else pools:
            self.keep_entry(
                nodes.node_name(pool),
                "pool",
                nodes.describe_node(pool, self.modules),
                reason or "not the stem's max-pool",
            )
        return None if reason else node

    def _is_max_pool(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            return isinstance(self.modules[str(node.target)], nn.MaxPool2d)
        return node.op == "call_function" and node.target in (F.max_pool2d, torch.max_pool2d)

    def _why_not_stem_pool(self, pool: fx.Node, count: int) -> str:
        module = self.modules[str(pool.target)] if pool.op == "call_module" else None
        if self._kept_by_recipe(nodes.node_name(pool)) or (module is not None and self._is_kept(module)):
            return "matches Recipe.keep"
        options = nodes.max_pool_options(pool, self.modules)
        if options is None or options["dilation"] not in (1, (1, 1)) or options["return_indices"]:
            return "dilated or with indices, an average pool has neither"
        if module is not None and type(module) not in (nn.MaxPool2d, *nodes.timm_classes("MaxPool2dSame")):
            return f"{type(module).__name__} has a forward of its own"
        strides: list[int] = []
        node: fx.Node | None = nodes.sole_input(pool)
        while node is not None and node.op != "placeholder":
            if node.op == "call_module":
                called = self.modules[str(node.target)]
                if isinstance(called, nn.Conv2d):
                    strides.append(max(called.stride))
                elif any(isinstance(m, nn.Conv2d | nn.Linear) for m in called.modules()):
                    return "behind a block that cannot be traced"
            node = nodes.sole_input(node)
        if node is None or not 0 < len(strides) <= MAX_STEM_CONVS:
            return "not behind the stem's convolutions"
        if count > 1 and max(strides) < 2:
            return f"one of {count} max-pools, behind convolutions of stride 1: no separate stem"
        if self._is_pool_call(pool) and not (self.rewritable and pool.graph is self.graph):
            return "the forward cannot be rewritten"
        return ""

    def _is_pool_call(self, pool: fx.Node) -> bool:
        """Whether replacing a pool means rewriting the graph: it is a function, or a module called elsewhere too."""
        return pool.op != "call_module" or len(self.roles.calls[str(pool.target)]) > 1

    def _average_pool(self, name: str, module: nn.Module) -> nn.Module:
        if not isinstance(module, nn.MaxPool2d):  # the plan looked
            raise InvalidTypeError("model", type(module).__name__, "a max-pool")
        options: Any = (module.kernel_size, module.stride, module.padding, module.ceil_mode)
        if type(module) in nodes.timm_classes("MaxPool2dSame"):
            new: nn.Module = nodes.timm_classes("AvgPool2dSame")[0](*options)
        else:
            new = nn.AvgPool2d(*options)
        self.add(name, "pool", nodes.describe(module), nodes.describe(new), "stem_pool='average'")
        return new

    # --- activations ---------------------------------------------------------------------------------------------

    def _activation_calls(self) -> list[fx.Node]:
        """Calls to take out of the graph: functional ones, and live calls of modules that gates use too."""
        if self.recipe.activations == "keep" or self.graph is None:
            return []
        found = []
        if self.roles is not self.trace and self.roles.graph is not None:
            for node in self.roles.graph.nodes:
                inside = any(nodes.owner_of(node).startswith(name) for name in self.trace.opaque)
                if inside and nodes.is_activation_call(node):
                    text = nodes.describe_node(node, self.modules)
                    self.keep_entry(nodes.node_name(node), "activation", text, "the forward cannot be rewritten")
        for node in self.graph.nodes:
            if node.op == "call_module":
                if not nodes.is_activation(self.modules[str(node.target)]):
                    continue
                # Modules on or off the live path as a whole are swapped or kept; here are those that gates share.
                if len({n in self.live for n in self.trace.calls[str(node.target)]}) == 1:
                    continue
            elif not nodes.is_activation_call(node):
                continue
            text, name = nodes.describe_node(node, self.modules), nodes.node_name(node)
            if self._kept_by_recipe(name):
                self.keep_entry(name, "activation", text, "matches Recipe.keep")
            elif node not in self.live:
                self.keep_entry(name, "activation", text, "computes a gate only")
            elif not self.rewritable:
                self.keep_entry(name, "activation", text, "the forward cannot be rewritten")
            else:
                self.add(name, "activation", text, "Identity()", "activations='identity'")
                found.append(node)
        return found

    def _writing_calls(self) -> dict[fx.Node, tuple[Any, dict[str, Any]]]:
        """Calls that write to a layer's output, which its gradient is computed from, and what to call instead."""
        found: dict[fx.Node, tuple[Any, dict[str, Any]]] = {}
        for node in self.graph.nodes if self.graph is not None and self.rewritable else ():
            call, operand = nodes.out_of_place(node), node.args[0] if node.args else None
            if call is None or not isinstance(operand, fx.Node) or operand.op != "call_module":
                continue
            layer = self.modules[str(operand.target)]
            if isinstance(layer, nn.Conv2d | nn.Linear) and nodes.is_last_use(node, operand, self.modules):
                found[node] = call
        return found

    def _write_to_no_input(self) -> None:
        """The same for modules, but those that write over what is read again: there it is part of the forward."""
        writing: dict[nn.Module, bool] = {}
        for node in self.graph.nodes if self.graph is not None else ():
            module = self.modules[str(node.target)] if node.op == "call_module" else None
            if module is not None and nodes.writes_to_input(module):
                operand = nodes.sole_input(node)
                last = operand is not None and nodes.is_last_use(node, operand, self.modules)
                writing[module] = writing.get(module, True) and last
        for module, last in writing.items():
            if last:
                module.inplace = False  # type: ignore[assignment]

    # --- the classifier ------------------------------------------------------------------------------------------

    def _output_layer(self) -> fx.Node | None:
        """The classifier's call; sets the number of classes, None when there is no classifier."""
        if self.graph is None:
            linears = [m for m in self.modules.values() if isinstance(m, nn.Linear)]
            if linears:
                self.classes = linears[-1].out_features
                self.notes.append(f"classes: {self.classes}, the last linear layer's (the model cannot be traced)")
            return None
        output = next(n for n in self.graph.nodes if n.op == "output")
        node = output.args[0]
        if not isinstance(node, fx.Node):
            self.notes.append("head: the model does not return one tensor of logits")
            return None
        pooled = False
        start: fx.Node | None = node
        while start is not None and start.op != "placeholder":
            module = self.modules[str(start.target)] if start.op == "call_module" else None
            if isinstance(module, nn.Linear):
                self.classes = module.out_features
                return start
            if isinstance(module, nn.Conv2d):
                pooled = pooled or self._behind_pool(start)
                self.classes = module.out_channels if pooled else None
                return start
            if nodes.global_average(start, self.modules) is not None:
                pooled = True
            elif not (
                nodes.is_dropout(start, self.modules)
                or nodes.is_flatten(start, self.modules, None)
                or (module is not None and (isinstance(module, nn.Identity) or nodes.is_activation(module)))
                or nodes.is_activation_call(start)
            ):
                break
            start = nodes.sole_input(start)
        self.notes.append("head: the model's output is not that of one linear layer or 1x1 convolution")
        return None

    def _behind_pool(self, node: fx.Node) -> bool:
        source = nodes.sole_input(node)
        while source is not None and (
            nodes.is_dropout(source, self.modules) or nodes.is_identity(source, self.modules)
        ):
            source = nodes.sole_input(source)
        return source is not None and nodes.global_average(source, self.modules) is not None

    def _plan_head(self, linear: fx.Node | None) -> _Head | None:
        if self.recipe.head == "after_pool" or linear is None:
            return None
        plan = self._head_or_reason(linear)
        if isinstance(plan, str):
            module = self.modules[str(linear.target)]
            self.notes.append(f"head: {linear.target} ({type(module).__name__}) stays where it is: {plan}")
            return None
        return plan

    def _head_or_reason(self, layer: fx.Node) -> _Head | str:
        module = self.modules[str(layer.target)]
        is_conv = isinstance(module, nn.Conv2d)
        if isinstance(module, nn.Conv2d):
            if not self._behind_pool(layer):
                return "a convolution, before the pool already"
            if (module.kernel_size, module.stride, module.groups) != ((1, 1), (1, 1), 1) or any(module.padding):
                return "a convolution other than 1x1"
        elif not isinstance(module, nn.Linear):
            return "no linear layer"
        if not self.rewritable:
            return "the forward cannot be rewritten"
        if self._is_kept(module):
            return "matches Recipe.keep"
        why = self._why_not_bcos(module)
        if why:
            return why
        if len(self.trace.calls[str(layer.target)]) > 1 or len(self.names[id(module)]) > 1:
            return "it is used more than once"
        after: fx.Node = layer
        while (user := next(iter(after.users))).op != "output":
            moves = nodes.is_identity(user, self.modules) or (is_conv and nodes.is_flatten(user, self.modules, None))
            if len(after.users) > 1 or not moves:
                return f"{nodes.describe_node(user, self.modules)} follows it"
            after = user
        between: list[fx.Node] = []
        moved: list[fx.Node] = []
        features = None if is_conv else module.in_features
        node = nodes.sole_input(layer)
        while node is not None:
            if not nodes.single_use(node):
                return f"the result of {nodes.describe_node(node, self.modules)} is used elsewhere too"
            flattens = nodes.global_average(node, self.modules)
            if flattens is not None:
                if nodes.sole_input(node) is None:
                    return "the pool has no single input"
                norm = next((n for n in moved if not nodes.is_dropout(n, self.modules)), None)
                if norm is not None and not nodes.pools_channels_last(node, self.modules):
                    return self._what_stands_between(norm)
                channels_last = nodes.pools_channels_last(node, self.modules)
                return _Head(layer, tuple(between), tuple(moved), node, flattens or is_conv, channels_last)
            if nodes.is_dropout(node, self.modules) or nodes.is_layer_norm(node, self.modules):
                moved.append(node)
            elif not (nodes.is_identity(node, self.modules) or nodes.is_flatten(node, self.modules, features)):
                return self._what_stands_between(node)
            between.append(node)
            node = nodes.sole_input(node)
        return "no global average pool before it"

    def _what_stands_between(self, node: fx.Node) -> str:
        before: fx.Node | None = node
        while before is not None and nodes.global_average(before, self.modules) is None:
            before = nodes.sole_input(before)
        text = nodes.describe_node(node, self.modules)
        if before is None:
            return f"its input comes from {text}, no global average pool before it"
        return f"{text} stands between it and the global average pool"

    # --- rewriting the graph -------------------------------------------------------------------------------------

    def _rewrite(
        self,
        head: _Head | None,
        activations: list[fx.Node],
        pool: fx.Node | None,
        writing: Mapping[fx.Node, tuple[Any, dict[str, Any]]],
    ) -> fx.GraphModule:
        if self.graph is None:
            raise InvalidArgumentError("model", "no graph", "a traceable model")
        graph = self.graph
        self._install_constants(graph)
        for node, call in writing.items():
            node.target, node.kwargs = call
        for node in activations:
            source = nodes.sole_input(node)
            if source is None:
                source = node.all_input_nodes[0]
            node.replace_all_uses_with(source)
            graph.erase_node(node)
        if pool is not None:
            self._rewrite_pool(graph, pool)
        if head is not None:
            self._rewrite_head(graph, head)
        self._dropout_modules(graph)
        graph.lint()
        modes = {name: m.training for name, m in self.modules.items()}
        result = fx.GraphModule(self.root, graph, type(self.root).__name__)
        for name, module in result.named_modules(remove_duplicate=False):
            module.training = modes.get(name, self.root.training)
        return result

    def _install_constants(self, graph: fx.Graph) -> None:
        """Tensors the forward made become buffers, so that they follow the network's device."""
        renamed = {name: self._new_name(name.strip("_")) for name in self.trace.constants}
        for name, value in self.trace.constants.items():
            self.root.register_buffer(renamed[name], value, persistent=False)
        for node in graph.nodes:
            if node.op == "get_attr" and node.target in renamed:
                node.target = renamed[node.target]

    def _new_name(self, base: str) -> str:
        name, i = base, 0
        while hasattr(self.root, name):
            i += 1
            name = f"{base}_{i}"
        return name

    def _rewrite_pool(self, graph: fx.Graph, node: fx.Node) -> None:
        options = nodes.max_pool_options(node, self.modules) or {}
        values = (options["kernel_size"], options["stride"], options["padding"], options["ceil_mode"])
        same = node.op == "call_module" and type(self.modules[str(node.target)]) in nodes.timm_classes("MaxPool2dSame")
        cls = nodes.timm_classes("AvgPool2dSame")[0] if same else nn.AvgPool2d
        name = self._new_name("stem_pool")
        new = cls(*values)
        new.training = self.root.training
        self.root.add_module(name, new)
        self.add(
            nodes.node_name(node),
            "pool",
            nodes.describe_node(node, self.modules),
            nodes.describe(new),
            "stem_pool='average'",
        )
        with graph.inserting_before(node):
            call = graph.call_module(name, (nodes.sole_input(node),))
        node.replace_all_uses_with(call)
        graph.erase_node(node)

    def _rewrite_head(self, graph: fx.Graph, head: _Head) -> None:
        with graph.inserting_before(head.pool):
            features = head.pool.all_input_nodes[0]
            value = features
            for node in reversed(head.moved):
                if node.op == "call_module":
                    value = graph.call_module(str(node.target), (value,))
                else:
                    value = graph.call_function(node.target, (value, *node.args[1:]), dict(node.kwargs))  # type: ignore[arg-type]
            value = graph.call_module(str(head.layer.target), (value,))
        head.pool.replace_input_with(features, value)
        with graph.inserting_after(head.pool):
            flat = head.pool if head.keep_pool_shape else graph.call_function(torch.flatten, (head.pool, 1))
        head.layer.replace_all_uses_with(flat)
        graph.erase_node(head.layer)
        for node in head.between:
            nodes.erase_with_sizes(graph, node)
        for user in list(head.pool.users):
            if nodes.is_shape_query(user) and user is not flat:
                nodes.erase_with_sizes(graph, user)

    def _dropout_modules(self, graph: fx.Graph) -> None:
        """Functional dropout has its training flag baked into the graph; a module follows train() and eval()."""
        for node in list(graph.nodes):
            if node.op == "call_function" and node.target in nodes.DROPOUTS:
                source, p = nodes.dropout_arguments(node)
                name = self._new_name("dropout_call")
                new = nodes.DROPOUTS[node.target](p)
                new.training = self.root.training
                self.root.add_module(name, new)
                with graph.inserting_before(node):
                    call = graph.call_module(name, (source,))
                node.replace_all_uses_with(call)
                graph.erase_node(node)


# --- tensors ---------------------------------------------------------------------------------------------------------


def _present(value: Tensor | None) -> Tensor:
    if value is None:
        raise InvalidArgumentError("model", "a norm without statistics", "running statistics")
    return value


def _is_parameter(model: nn.Module, name: str) -> bool:
    owner, _, leaf = name.rpartition(".")
    return leaf in model.get_submodule(owner)._parameters


def _set_tensor(model: nn.Module, name: str, value: Tensor | None) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, value)


def _channel_factors(recipe: Recipe) -> tuple[Tensor, str]:
    """By what a first layer's weights are multiplied for the channels of ``[x, 1 - x]``, [6] in float64; in words.

    Normalised, ``(x - m) w/2s - ((1-x) - (1-m)) w/2s = (x - m) w/s``; plain, ``x (1-m) w/s - (1-x) m w/s`` is that too.
    """
    if recipe.input_normalization == "source":
        return torch.tensor([0.5] * 3 + [-0.5] * 3, dtype=torch.float64), "[w, -w]/2"
    mean, std = (torch.tensor(v, dtype=torch.float64) for v in (recipe.mean, recipe.std))
    return torch.cat([(1 - mean) / std, -mean / std]), "[(1 - mean) w, -mean w]/std"


def _widened(weight: Tensor, factors: Tensor) -> nn.Parameter:
    value = weight.detach()
    value = torch.cat([value, value], dim=1) * factors.to(value)[:, None, None]
    return nn.Parameter(value, requires_grad=weight.requires_grad)


def _drop_norm_bias(module: nn.Module) -> bool:
    """Take a norm's bias away; where a forward of its own cannot do without, freeze it at zero and return False."""
    bias = _present(module._parameters["bias"])
    if not type(module).__module__.startswith("torch.nn"):
        probe = copy.deepcopy(module).eval()
        channels = bias.numel()
        inputs = [bias.new_ones(s) for s in ((2, channels, 4, 4), (2, 4, 4, channels), (2, 4, channels), (2, channels))]
        fitting = [x for x in inputs if _runs(probe, x)]
        probe.register_parameter("bias", None)
        if not fitting or not all(_runs(probe, x) for x in fitting):
            zeros = nn.Parameter(torch.zeros_like(bias), requires_grad=False)
            module.register_parameter("bias", zeros)
            return False
    module.register_parameter("bias", None)
    return True


def _runs(module: nn.Module, x: Tensor) -> bool:
    try:
        with torch.no_grad():
            module(x)
    except Exception:
        return False
    return True
