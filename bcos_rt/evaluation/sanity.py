"""The randomised-parameter check: an explanation of a network that has forgotten what it learned must change.

Parameters are replaced by random ones cumulatively, from the head to the stem, and after each stage maps are compared
with those of the trained network (Adebayo et al. 2018, arXiv 1810.03292, section 3.1). A method whose maps stay as they
were explains something else than the network, edges of the image for instance.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from bcos_rt.errors import InvalidArgumentError, InvalidTypeError, did_you_mean
from bcos_rt.evaluation.attribution import Method, named_methods
from bcos_rt.evaluation.checks import checked_logits, checked_maps
from bcos_rt.evaluation.saving import save_results
from bcos_rt.explanation.explain import class_ids_of
from bcos_rt.figures import without_math
from bcos_rt.nn.conventional import inner_network

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["ParameterRandomisation", "parameter_randomisation", "rank_correlation", "stages_of"]

# The stage of parameters that are in no module of their own, such as position embeddings.
REST = "(rest)"
# Modules that only hold others in a row: these others are the stages.
_ROWS = (nn.Sequential, nn.ModuleList)


@dataclass(frozen=True)
class ParameterRandomisation:
    """Results of :func:`parameter_randomisation`.

    Attributes:
        stages: names of what was randomised, in this order, each beside those before it.
        correlations: method -> Spearman's rank correlation with the trained network's maps, [stages, images].
        magnitudes: the same of the maps' absolute values, in which a map of opposite sign has not changed.
        constant: method -> how many of the trained network's maps are constant: they have no ranks, count as 0 at every
            stage, and pass no test.
    """

    stages: tuple[str, ...]
    correlations: dict[str, np.ndarray]
    magnitudes: dict[str, np.ndarray]
    constant: dict[str, int] = field(default_factory=dict)

    def summary(self) -> list[dict[str, Any]]:
        """A row a method and stage: means over the images."""
        return [
            {
                "method": name, "stage": stage, "images": values.shape[1], "correlation": float(values[i].mean()),
                "correlation_of_magnitudes": float(self.magnitudes[name][i].mean()),
                "constant": self.constant.get(name, 0),
            }
            for name, values in self.correlations.items()
            for i, stage in enumerate(self.stages)
        ]  # fmt: skip

    def save(self, folder: str | os.PathLike[str], name: str = "randomisation") -> Path:
        """Write ``NAME.csv`` (the summary), ``NAME.npz`` (all values) and ``NAME.png``."""
        folder = Path(folder)
        arrays = {"stages": np.array(self.stages)}
        for method, values in self.correlations.items():
            arrays[f"{method}/correlation"] = values
            arrays[f"{method}/correlation_of_magnitudes"] = self.magnitudes[method]
        save_results(folder, name, self.summary(), arrays, {"": self.plot()})
        return folder

    def plot(self) -> Figure:
        """Mean rank correlation after each stage, beginning at 1, the trained network's with itself."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(3 + 0.55 * len(self.stages), 4.2), layout="constrained")
        axis = figure.subplots()
        for method, values in self.correlations.items():
            axis.plot(range(len(self.stages) + 1), [1.0, *values.mean(1).tolist()], marker="o", label=method)
        axis.set_xticks(range(len(self.stages) + 1), ["none", *self.stages], rotation=60, ha="right", fontsize=8)
        axis.axhline(0, color="grey", linestyle="--", linewidth=0.8)
        axis.set_xlabel("randomised down to")
        axis.set_ylabel("rank correlation with the trained network's maps")
        axis.legend(fontsize=8)
        return without_math(figure)


@torch.no_grad()
def parameter_randomisation(
    net: nn.Module,
    methods: Sequence[str | Method],
    images: Tensor,
    targets: Any = None,
    *,
    stages: Sequence[str] | None = None,
    seed: int = 0,
    tell: Callable[[str, int, int], None] | None = None,
) -> ParameterRandomisation:
    """Randomise a network's parameters from the head to the stem, and compare its maps with the trained one's.

    Convolutions, linear layers and embeddings are drawn anew from a normal distribution of their present root mean
    square; vectors (biases, scales of norms) are shuffled: one of equal values stays as it is. Initial values in
    the strict sense have another scale, and norms, which divide by statistics of the trained network, would let the
    image fade on its way through a deep one. Statistics themselves are no parameters and stay.

    Args:
        net: a :class:`BcosNetwork`, a :class:`ConventionalNetwork` or a module that takes images in [0, 1]; a copy is
            randomised.
        methods: names or functions, see :mod:`bcos_rt.evaluation.attribution`.
        images: [N, 3, H, W] in [0, 1], on the network's device.
        targets: one class an image: None for the top class that the trained network gives, an int, or N ints.
        stages: names of modules, from head to stem, without ``backbone.`` or ``model.`` in front; None for all, see
            :func:`stages_of`.
        seed: of the random parameters.
        tell: called with what is being done, stages done and stages in all.

    Raises:
        InvalidTypeError: ``net`` is no module.
        InvalidArgumentError: unusable images, targets or stages; a network without parameters; a method whose maps do
            not fit the images, or values that are not finite.
    """
    if not isinstance(net, nn.Module):
        raise InvalidTypeError("net", type(net).__name__, "a torch.nn.Module")
    if images.ndim != 4 or images.shape[1] != 3 or images.numel() == 0:
        raise InvalidArgumentError("images", f"shape {tuple(images.shape)}", "[N, 3, H, W], at least one pixel")
    chosen = named_methods(methods)
    work = copy.deepcopy(net).eval()
    inner = inner_network(work)
    logits = checked_logits(work(images))
    classes = class_ids_of(targets, len(images), logits.shape[1], images.device)
    if classes.ndim != 1:
        raise InvalidArgumentError("targets", f"shape {tuple(classes.shape)}", f"one class an image, [{len(images)}]")
    classes = torch.where(classes < 0, logits.argmax(1), classes)
    names = stages_of(work, images[:1]) if stages is None else _checked(work, stages)
    if not names:
        raise InvalidArgumentError(
            "net", f"{type(inner).__name__}, which has no parameters", "a network with parameters"
        )
    trained = {name: _map(apply, name, work, images, classes) for name, apply in chosen.items()}
    correlations: dict[str, list[Tensor]] = {name: [] for name in chosen}
    magnitudes: dict[str, list[Tensor]] = {name: [] for name in chosen}
    generator = torch.Generator().manual_seed(seed)
    drawn: set[int] = set()
    for i, stage in enumerate(names):
        module = inner if stage == REST else inner.get_submodule(stage)
        _randomise(module, drawn, generator)
        for name, apply in chosen.items():
            found = _map(apply, name, work, images, classes)
            correlations[name].append(rank_correlation(found, trained[name]))
            magnitudes[name].append(rank_correlation(found.abs(), trained[name].abs()))
        if tell is not None:
            tell(stage, i + 1, len(names))
    return ParameterRandomisation(
        tuple(names),
        {name: torch.stack(values).numpy() for name, values in correlations.items()},
        {name: torch.stack(values).numpy() for name, values in magnitudes.items()},
        {name: int((maps.amax((1, 2)) == maps.amin((1, 2))).sum()) for name, maps in trained.items()},
    )


def rank_correlation(a: Tensor, b: Tensor) -> Tensor:
    """Spearman's rank correlation of maps [N, H, W] by image, float64 [N] on the CPU.

    Equal values share their mean rank. A constant map has no order to compare: 0.
    """
    ranks = []
    for maps in (a, b):
        rows = [_ranks(row) for row in maps.detach().flatten(1).double().cpu()]
        ranks.append(torch.stack(rows))
    x, y = (values - values.mean(1, keepdim=True) for values in ranks)
    scale = (x.square().sum(1) * y.square().sum(1)).sqrt()
    return torch.where(scale > 0, (x * y).sum(1) / scale.clamp(min=torch.finfo(torch.float64).tiny), 0.0)


def _ranks(values: Tensor) -> Tensor:
    """Ranks from 1 of [P], equal values at the mean of theirs."""
    _, where, counts = torch.unique(values, return_inverse=True, return_counts=True)
    # The last rank of each distinct value is the number of values up to it.
    mean: Tensor = counts.cumsum(0).double() - (counts.double() - 1) / 2
    return mean[where]


@torch.no_grad()
def stages_of(net: nn.Module, images: Tensor) -> list[str]:
    """The parts of a network that hold parameters, from head to stem, in the reverse of the order in which they run.

    These are the modules of the network (of a :class:`BcosNetwork` its backbone, of a :class:`ConventionalNetwork` its
    model) with rows of modules (``nn.Sequential``, ``nn.ModuleList``) taken apart: ``fc``, ``layer4.1``, ``layer4.0``,
    ..., ``conv1`` for a ResNet. Parameters that are in none of them come last, as ``(rest)``.

    Args:
        images: [N, 3, H, W] in [0, 1], to see the order.
    """
    inner = inner_network(net)
    parts = _parts(inner, "")
    last_call: dict[str, int] = {}
    handles = []
    calls = 0

    def noted(name: str) -> Callable[..., None]:
        def note(*_: object) -> None:
            nonlocal calls
            last_call[name] = calls = calls + 1

        return note

    for name in parts:
        # Inner modules count too: what is a module's code may call them without calling it.
        for module in inner.get_submodule(name).modules():
            handles.append(module.register_forward_hook(noted(name)))
    try:
        net(images)
    finally:
        for handle in handles:
            handle.remove()
    # Parts that never ran change nothing: they go last.
    ordered = sorted(parts, key=lambda name: last_call.get(name, 0), reverse=True)
    covered = {id(p) for name in parts for p in inner.get_submodule(name).parameters()}
    if any(id(p) not in covered for p in inner.parameters()):
        ordered.append(REST)
    return ordered


def _parts(module: nn.Module, prefix: str) -> list[str]:
    names: list[str] = []
    for name, child in module.named_children():
        if next(child.parameters(), None) is None:
            continue
        # Exactly these: a block that is written as a Sequential of its own class is a part.
        names += _parts(child, f"{prefix}{name}.") if type(child) in _ROWS else [f"{prefix}{name}"]
    return names


def _checked(net: nn.Module, stages: Sequence[str]) -> list[str]:
    inner = inner_network(net)
    known = dict(inner.named_modules())
    if isinstance(stages, str) or not stages:
        raise InvalidArgumentError("stages", repr(stages), "names of modules, from head to stem")
    if len(set(stages)) < len(stages):
        raise InvalidArgumentError("stages", repr(list(stages)), "each once: nothing is randomised twice")
    some = ", ".join(_parts(inner, "")[:4])
    for stage in stages:
        if stage != REST and (stage not in known or not stage):
            raise InvalidArgumentError(
                "stages", repr(stage), f"a module's name, such as {some}", did_you_mean(stage, known)
            )
        # Maps that stay as they are would be said to stay through its randomisation.
        if stage != REST and next(known[stage].parameters(), None) is None:
            raise InvalidArgumentError("stages", f"{stage!r}, which has none", "modules with parameters")
    done: set[int] = set()
    for i, stage in enumerate(stages):
        if stage == REST and i + 1 < len(stages):
            raise InvalidArgumentError("stages", f"{REST!r} before others", f"{REST!r} last: it is all that is left")
        module = inner if stage == REST else known[stage]
        mine = {id(parameter) for parameter in module.parameters()}
        if mine <= done:
            raise InvalidArgumentError(
                "stages", f"{stage!r}, all of whose parameters stages before it have", "nothing to be randomised twice"
            )
        done |= mine
    return list(stages)


def _randomise(module: nn.Module, drawn: set[int], generator: torch.Generator) -> None:
    """New values for the parameters of a module, apart from those already drawn (by ``id``), which are noted."""
    for parameter in module.parameters():
        if id(parameter) in drawn or not parameter.is_floating_point():
            continue
        drawn.add(id(parameter))
        values = parameter.detach().double().cpu()
        if values.ndim < 2:
            flat = values.reshape(-1)
            new = flat[torch.randperm(len(flat), generator=generator)].reshape(values.shape)
        else:
            noise = torch.randn(values.shape, generator=generator, dtype=torch.float64)
            new = noise * values.square().mean().sqrt()
        parameter.copy_(new.to(parameter.device, parameter.dtype))


def _map(apply: Method, name: str, net: nn.Module, images: Tensor, classes: Tensor) -> Tensor:
    """A method's maps; the caller's ``no_grad`` must not reach it."""
    with torch.enable_grad():
        return checked_maps(apply(net, images, classes), name, (len(images), *images.shape[2:]))
