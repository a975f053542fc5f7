"""What a conversion did: every layer replaced or kept with the reason, and where every weight went."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

from bcos_rt.conversion.equivalence import EquivalenceResult

__all__ = ["ConversionReport", "LayerEntry", "WeightsCopied", "compare_weights"]

Kind = Literal["input", "conv", "linear", "norm", "activation", "pool", "head", "logit", "dropout", "other"]


@dataclass(frozen=True)
class LayerEntry:
    """One layer of the source model and what became of it.

    Attributes:
        name: Module name in the source model (``""`` is the model itself).
        kind: What the layer is.
        before, after: The layer as text; equal when it was kept.
        reason: Which recipe field asked for it, or why the layer was kept.
    """

    name: str
    kind: Kind
    before: str
    after: str
    reason: str

    @property
    def kept(self) -> bool:
        """Whether the layer is as it was."""
        return self.before == self.after


@dataclass(frozen=True)
class WeightsCopied:
    """Parameters and buffers of the source by what the comparison with the converted network found.

    Attributes:
        identical: Equal, entry by entry.
        widened: The source's for ``[x, 1 - x]``, ``[w, -w] / 2`` or ``[(1 - mean) w, -mean w] / std``.
        reshaped: The same numbers in another shape (a linear classifier as a 1x1 convolution).
        folded: A norm's bias with the running mean folded in, recomputed from the source.
        dropped: Not in the converted network because the recipe removes it, or because the forward never uses it.
        added: Names in the converted network that the source has not.
        unexplained: Names that are missing or differ for no stated reason; empty in a sound conversion.
    """

    identical: int
    widened: int
    reshaped: int
    folded: int
    dropped: int
    added: tuple[str, ...]
    unexplained: tuple[str, ...]

    @property
    def complete(self) -> bool:
        """Whether every weight is accounted for."""
        return not self.unexplained

    def __str__(self) -> str:
        parts = [f"{getattr(self, k)} {k}" for k in ("identical", "widened", "reshaped", "folded", "dropped")]
        text = "weights and buffers: " + ", ".join(p for p in parts if not p.startswith("0 "))
        if self.added:
            text += f", {len(self.added)} added"
        return text + (
            f"; NOT accounted for: {', '.join(self.unexplained)}" if self.unexplained else ", all accounted for"
        )


@dataclass(frozen=True)
class ConversionReport:
    """The result of :func:`bcos_rt.bcosify` in words.

    Attributes:
        model: Class or name of the source model.
        entries: One per layer that was replaced, or kept although the recipe could have replaced it.
        weights_copied: Where the weights went, from an actual comparison of the tensors.
        equivalence: Difference from the source model on the images given for verification, or None.
        notes: Everything else worth knowing, as sentences.
    """

    model: str
    entries: tuple[LayerEntry, ...]
    weights_copied: WeightsCopied
    equivalence: EquivalenceResult | None
    notes: tuple[str, ...]

    @property
    def replaced(self) -> tuple[LayerEntry, ...]:
        """Entries of layers that changed."""
        return tuple(e for e in self.entries if not e.kept)

    @property
    def kept(self) -> tuple[LayerEntry, ...]:
        """Entries of layers that were left as they are."""
        return tuple(e for e in self.entries if e.kept)

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON-ready values."""
        values = dataclasses.asdict(self)
        values["entries"] = [dataclasses.asdict(e) | {"kept": e.kept} for e in self.entries]
        values["weights_copied"] |= {"complete": self.weights_copied.complete}
        for key in ("added", "unexplained"):
            values["weights_copied"][key] = list(values["weights_copied"][key])
        values["notes"] = list(self.notes)
        return values

    def _rows(self) -> list[tuple[str, str, str, str, str]]:
        """Entries that differ only in their name, counted: kind, count, before, after, reason."""
        groups: dict[tuple[str, str, str, str], list[str]] = {}
        for e in self.entries:
            before, after = _class_name(e.before), "kept" if e.kept else _class_name(e.after)
            groups.setdefault((e.kind, before, after, e.reason), []).append(e.name)
        rows = []
        for (kind, before, after, reason), names in groups.items():
            where = names[0] if len(names) == 1 else f"{len(names)}: {names[0]} … {names[-1]}"
            rows.append((kind, where, before, after, reason))
        return rows

    def summary(self) -> str:
        """The report as plain text, layers of one kind on one line."""
        lines = [f"{self.model}: {len(self.replaced)} layers replaced, {len(self.kept)} kept"]
        for kind, where, before, after, reason in self._rows():
            lines.append(f"  {kind:<10} {where}  {before} -> {after}  ({reason})")
        lines.append(str(self.weights_copied))
        if self.equivalence is not None:
            lines.append(str(self.equivalence))
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.summary()

    def __rich__(self) -> Group:
        table = Table(title=f"{self.model}: {len(self.replaced)} layers replaced, {len(self.kept)} kept")
        for column in ("kind", "layer", "before", "after", "reason"):
            table.add_column(column, overflow="fold")
        for row in self._rows():
            table.add_row(*(Text(cell) for cell in row))
        lines = [str(self.weights_copied)] + ([str(self.equivalence)] if self.equivalence is not None else [])
        return Group(table, *(Text(line) for line in [*lines, *(f"note: {note}" for note in self.notes)]))

    def render(self, width: int = 120) -> str:
        """The rich table as text of ``width`` columns."""
        stream = io.StringIO()
        Console(file=stream, width=width).print(self)
        return stream.getvalue()


def _class_name(text: str) -> str:
    return text.split("(")[0]


def compare_weights(
    source: nn.Module,
    result: nn.Module,
    dropped: Callable[[str], bool],
    folded_bias: Mapping[str, Tensor],
    factors: Tensor,
    patch_channels: Mapping[str, Tensor],
) -> WeightsCopied:
    """Compare every parameter and buffer of ``source`` with its namesake in ``result``.

    Args:
        dropped: Whether the conversion meant to leave a name out.
        folded_bias: What each folded bias must be, by name.
        factors: What a first layer's weights are multiplied by for the channels of ``[x, 1 - x]``, [6].
        patch_channels: Of linear patch embeddings' weights by name: which colour each column is of, [in_features].
    """
    before, after = _tensors(source), _tensors(result)
    counts = dict.fromkeys(("identical", "widened", "reshaped", "folded", "dropped"), 0)
    unexplained = []
    for name, old in before.items():
        new = after.get(name)
        if dropped(name) and (new is None or not new.any()):
            verdict: str | None = "dropped"
        else:
            colours = patch_channels.get(name)
            verdict = _verdict(old, new, folded_bias.get(name), factors, colours) if new is not None else None
        if verdict is None:
            unexplained.append(name)
        else:
            counts[verdict] += 1
    added = []
    for name, new in after.items():
        if name not in before:
            added.append(name)
            expected = folded_bias.get(name)
            if expected is not None and not torch.equal(new, expected):
                unexplained.append(name)
    return WeightsCopied(**counts, added=tuple(added), unexplained=tuple(unexplained))


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    found = dict(module.named_parameters(remove_duplicate=False))
    return found | dict(module.named_buffers(remove_duplicate=False))


def _verdict(old: Tensor, new: Tensor, folded: Tensor | None, factors: Tensor, colours: Tensor | None) -> str | None:
    if folded is not None:
        return "folded" if _same(new, folded) else None
    if old.shape == new.shape:
        return "identical" if _same(old, new) else None
    if old.numel() == new.numel():
        return "reshaped" if _same(old.reshape(new.shape), new) else None
    if old.ndim == 4 and new.shape == (old.shape[0], 2 * old.shape[1], *old.shape[2:]):
        halves = [old * f[:, None, None] for f in factors.to(old).chunk(2)]
        return "widened" if _same(torch.cat(halves, dim=1), new) else None
    if old.ndim == 2 and new.shape == (old.shape[0], 2 * old.shape[1]) and colours is not None:
        # A patch embedding: the same columns in its own order of pixels and channels.
        halves = [old * f[colours] for f in factors.to(old).chunk(2)]
        return "widened" if _same(_sorted_columns(torch.cat(halves, dim=1)), _sorted_columns(new)) else None
    return None


def _sorted_columns(matrix: Tensor) -> Tensor:
    """The columns in an order that depends on their numbers alone."""
    order = np.lexsort(matrix.detach().double().cpu().numpy())
    return matrix[:, torch.from_numpy(order)]


def _same(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if torch.equal(a, b):
        return True
    # A broken checkpoint's NaN is copied too.
    return a.is_floating_point() and bool(((a == b) | (a.isnan() & b.isnan())).all())
