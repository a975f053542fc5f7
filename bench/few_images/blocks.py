"""A B-cos network without training from end to end: block by block, each fitted to what the source's block gives.

Every block of the converted network gets what the fitted blocks before it make of the photographs, and is to give what
the source's block gives for the source's own input, so that it makes up for their errors. First each convolution in it
is solved for: ``y = z |z / r|^(B-1)`` with ``z = w.p`` and ``r = ||p||`` for patches p is, for given results t, the
linear least-squares problem ``w.p = sign(t) (|t| r^(B-1))^(1/B)``. Then all of the block is trained for some steps.

Written for the networks of timm's EfficientNet family.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from rich.console import Console
from torch import Tensor, fx, nn
from torch.fx.passes.split_module import split_module
from torch.nn import functional as F

from bcos_rt import BcosNetwork
from bcos_rt.nn import BcosConv2d
from bcos_rt.nn.conventional import ConventionalNetwork

# Images at once where nothing is trained; patches of an image that a convolution is solved for.
_AT_ONCE, _PATCHES = 50, 64
# Of Adam, times the root mean square of a parameter; the next where a block comes out worse than it went in.
_STEPS = (0.02, 0.005, 0.001)
_SMALL = 1e-12


class _ReachedError(Exception):
    """The layer whose input is wanted was reached."""


@dataclass(frozen=True)
class _Layer:
    """A convolution of the converted network, the norm behind it and whether a ReLU6 follows."""

    conv: str
    norm: str | None
    clipped: bool


def fit_blocks(
    net: BcosNetwork, teacher: ConventionalNetwork, images: Tensor, *, steps: int, batch_size: int = 16,
    console: Console | None = None,
) -> list[tuple[str, float, float]]:  # fmt: skip
    """Fit ``net`` in place to ``teacher`` for images [N, 3, H, W] in [0, 1].

    Returns:
        For each block its name and the mean squared error against the variance of what it should give, before and
        after its training; of the last (the head) the mean KL divergence of the class probabilities.
    """
    source, backbone = teacher.model, net.backbone
    if not isinstance(backbone, fx.GraphModule):
        raise SystemExit("fit_blocks: the converted network has no graph to cut into blocks")
    names = ["bn1"] + [f"blocks.{i}.{j}" for i, stage in enumerate(source.blocks) for j in range(len(stage))]
    parts = _parts(backbone, names)
    report: list[tuple[str, float, float]] = []
    with torch.no_grad():
        # What the blocks get: of the converted network, and of the source.
        own = torch.cat([net.encoding(net.encode(x)) for x in images.split(_AT_ONCE)])
        given = images
    for index, part in enumerate(parts):
        head = index == len(names)
        name = "head" if head else names[index]
        block = _source_part(teacher, names, index)
        layers = _layers(source, name)
        skips = f"{name}.drop_path" in dict(backbone.named_modules())
        for layer in layers:
            patches, wanted = _samples(backbone, source, part, block, layer, own, given, skips and layer is layers[-1])
            _solve(backbone, layer, patches, wanted)
        with torch.no_grad():
            wanted = torch.cat([block(x) for x in given.split(_AT_ONCE)])
        error = _kl if head else _relative(wanted)
        before, after = _train(part, list(_trained(backbone, layers)), own, wanted, error, steps, batch_size)
        report.append((name, before, after))
        if console is not None:
            console.print(f"  {name} {before:.3f} -> {after:.3f}", highlight=False)
        if not head:
            with torch.no_grad():
                own = torch.cat([part(x) for x in own.split(_AT_ONCE)])
            own, given = own.contiguous(memory_format=torch.channels_last), wanted
    return report


def _parts(backbone: fx.GraphModule, names: list[str]) -> list[nn.Module]:
    """The converted network cut behind each of ``names``; they share its layers. The last part is the head."""
    last = 0

    def part_of(node: fx.Node) -> int:
        nonlocal last
        inside = [key.removeprefix("net.") for key in node.meta.get("nn_module_stack", {})]
        found = [i for i, name in enumerate(names) if name in inside]
        if found:
            last = found[0]
        elif {"conv_head", "bn2", "classifier"} & set(inside):
            last = len(names)
        return last

    split = split_module(backbone, backbone, part_of, keep_original_order=True)
    return [getattr(split, f"submod_{index}") for index in range(len(names) + 1)]


def _source_part(teacher: ConventionalNetwork, names: list[str], index: int) -> Callable[[Tensor], Tensor]:
    model = teacher.model
    if index == 0:
        return lambda images: model.bn1(model.conv_stem((images - teacher.mean) / teacher.std))
    if index == len(names):
        return lambda x: model.classifier(model.global_pool(model.bn2(model.conv_head(x))).flatten(1))
    block: nn.Module = model.get_submodule(names[index])
    return block


def _layers(source: nn.Module, block: str) -> list[_Layer]:
    if block == "bn1":
        return [_Layer("conv_stem", "bn1", True)]
    if block == "head":
        return [_Layer("conv_head", "bn2", True), _Layer("classifier", None, False)]
    separable = not hasattr(source.get_submodule(block), "conv_pwl")
    convs = ("conv_dw", "conv_pw") if separable else ("conv_pw", "conv_dw", "conv_pwl")
    return [_Layer(f"{block}.{c}", f"{block}.bn{i + 1}", i < len(convs) - 1) for i, c in enumerate(convs)]


@torch.no_grad()
def _samples(
    backbone: nn.Module, source: nn.Module, part: nn.Module, block: Callable[[Tensor], Tensor], layer: _Layer,
    own: Tensor, given: Tensor, skips: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Patches that a convolution gets, [n, groups, values], and what it and its norm should give for them, [n, C]."""
    conv = backbone.get_submodule(layer.conv)
    if not isinstance(conv, BcosConv2d):
        raise SystemExit(f"fit_blocks: {layer.conv} is no B-cos convolution")
    seen: dict[str, Tensor] = {}

    def reached(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen["input"] = args[0]
        raise _ReachedError

    def normalised(norm: nn.BatchNorm2d, args: tuple[Tensor, ...]) -> None:
        seen["wanted"] = F.batch_norm(
            args[0], norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps
        )

    def pooled(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        # The classifier before the pool, as in the converted network.
        seen["wanted"] = F.conv2d(args[0], source.classifier.weight[:, :, None, None], source.classifier.bias)

    watched = source.get_submodule(layer.norm or "global_pool")
    hooks = [conv.register_forward_pre_hook(reached),
             watched.register_forward_pre_hook(normalised if layer.norm else pooled)]  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    found: list[tuple[Tensor, Tensor]] = []
    try:
        for x, g in zip(own.split(_AT_ONCE), given.split(_AT_ONCE), strict=True):
            with contextlib.suppress(_ReachedError):
                part(x)
            block(g)
            wanted = seen["wanted"] + g - x if skips else seen["wanted"]
            places = torch.stack([torch.randperm(wanted[0, 0].numel(), generator=generator)[:_PATCHES] for _ in x])
            rows = wanted.flatten(2).transpose(1, 2)[torch.arange(len(x))[:, None], places]
            found.append((_patches(conv, seen["input"], places), rows.flatten(0, 1)))
    finally:
        for hook in hooks:
            hook.remove()
    return torch.cat([p for p, _ in found]), torch.cat([w for _, w in found])


def _patches(conv: BcosConv2d, x: Tensor, places: Tensor) -> Tensor:
    """Patches of x [N, C, H, W] at the outputs ``places`` [N, P], as [N P, groups, values]."""
    x, (rows, columns) = conv._padded(x)
    x = F.pad(x, (columns, columns, rows, rows)).permute(0, 2, 3, 1)
    (height, width), (down, across) = conv.kernel_size, conv.stride
    wide = (x.shape[2] - width) // across + 1
    top, left, image = places // wide * down, places % wide * across, torch.arange(len(x))[:, None]
    found = torch.stack([x[image, top + i, left + j] for i in range(height) for j in range(width)], dim=-1)
    return found.reshape(places.numel(), conv.groups, -1)


@torch.no_grad()
def _solve(backbone: nn.Module, layer: _Layer, patches: Tensor, wanted: Tensor) -> None:
    """Set a convolution's weights by least squares, and its norm so that it changes nothing."""
    conv, norm = backbone.get_submodule(layer.conv), backbone.get_submodule(layer.norm) if layer.norm else None
    biased = conv if norm is None else norm
    bias = torch.zeros(wanted.shape[1]) if biased.bias is None else biased.bias.detach()
    (n, groups, values), each, b = patches.shape, wanted.shape[1] // patches.shape[1], float(conv.b)
    lengths = patches.square().sum(2).clamp(min=_SMALL).sqrt().repeat_interleave(each, 1)
    p = patches.transpose(0, 1).contiguous()
    # Patches of the encoded image are exactly dependent, [x, 1 - x]: their sums of products need all digits.
    exact = p.double() if layer.conv == "conv_stem" else p
    gram = (exact.transpose(1, 2) @ exact).double()
    ridge = 1e-7 if layer.conv == "conv_stem" else 1e-3 if norm is None else 1e-4
    scale = gram.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-6 * n)[:, None, None]
    factor = torch.linalg.cholesky(gram + ridge * scale * torch.eye(values, dtype=torch.float64))
    target = wanted
    # Below 0 and above 6 all results are the same to ReLU6: there the target moves to what was reached.
    for _ in range(6 if layer.clipped else 1):
        t = target - bias
        z = t.sign() * (t.abs() * lengths.pow(b - 1)).pow(1 / b)
        products = p.transpose(1, 2) @ z.reshape(n, groups, each).transpose(0, 1)
        weights = torch.cholesky_solve(products.double(), factor).float()
        z = (p @ weights).transpose(0, 1).reshape(n, -1)
        result = z * (z.abs() / lengths).pow(b - 1)
        if layer.clipped:
            y = result + bias
            target = torch.where(wanted < 0, y.clamp(max=0), torch.where(wanted > 6, y.clamp(min=6), wanted))
    conv.weight.copy_(weights.transpose(1, 2).reshape(conv.weight.shape))
    if norm is not None:
        variance = result.var(0, unbiased=False)
        norm.running_mean.copy_(result.mean(0))
        norm.running_var.copy_(variance)
        norm.weight.copy_((variance + norm.eps).sqrt())


def _trained(backbone: nn.Module, layers: list[_Layer]) -> Iterator[nn.Parameter]:
    for layer in layers:
        yield from backbone.get_submodule(layer.conv).parameters()
        bias = backbone.get_submodule(layer.norm).bias if layer.norm else None
        if bias is not None:
            yield bias


def _train(
    part: nn.Module, parameters: list[nn.Parameter], own: Tensor, wanted: Tensor,
    error: Callable[[Tensor, Tensor], Tensor], steps: int, batch_size: int,
) -> tuple[float, float]:  # fmt: skip
    """Train a block, whose norms keep their statistics; its error before and after. It is never made worse."""
    part.eval()
    before = _error(part, own, wanted, error)
    values = [p.detach().clone() for p in parameters]
    for step in _STEPS if steps else ():
        _adam(part, parameters, own, wanted, error, steps, batch_size, step)
        after = _error(part, own, wanted, error)
        if after < before:
            return before, after
        # Patches of nearly no length have large gradients: Adam may leave for good.
        with torch.no_grad():
            for parameter, value in zip(parameters, values, strict=True):
                parameter.copy_(value)
    return before, before


def _adam(
    part: nn.Module, parameters: list[nn.Parameter], own: Tensor, wanted: Tensor,
    error: Callable[[Tensor, Tensor], Tensor], steps: int, batch_size: int, step: float,
) -> None:  # fmt: skip
    """Adam with one cycle of the step size."""
    sizes = [step * float(p.detach().square().mean().sqrt().clamp(min=1e-3)) for p in parameters]
    optimizer = torch.optim.Adam([{"params": [p], "lr": size} for p, size in zip(parameters, sizes, strict=True)])
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, sizes, total_steps=steps, pct_start=0.1)
    generator = torch.Generator().manual_seed(0)
    order: list[int] = []
    for _ in range(steps):
        if len(order) < batch_size:
            order = torch.randperm(len(own), generator=generator).tolist()
        chosen, order = order[:batch_size], order[batch_size:]
        loss = error(part(own[chosen].contiguous(memory_format=torch.channels_last)), wanted[chosen])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()


def _relative(wanted: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    variance = (wanted - wanted.mean((0, 2, 3), keepdim=True)).square().mean()
    return lambda y, t: (y - t).square().mean() / variance


def _kl(y: Tensor, t: Tensor) -> Tensor:
    return F.kl_div(y.log_softmax(1), t.log_softmax(1), log_target=True, reduction="batchmean")


@torch.no_grad()
def _error(part: nn.Module, own: Tensor, wanted: Tensor, error: Callable[[Tensor, Tensor], Tensor]) -> float:
    pairs = zip(own.split(_AT_ONCE), wanted.split(_AT_ONCE), strict=True)
    return sum(float(error(part(x), t)) * len(x) for x, t in pairs) / len(own)
