"""What :func:`bcos_rt.export.to_onnx` returns."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

    from bcos_rt.export.parity import Parity

__all__ = ["ExportReport"]


@dataclass(frozen=True)
class ExportReport:
    """What was written, and how it compares with PyTorch.

    Attributes:
        path: the file.
        external_data: the file with the weights beside it, or None where the weights are inside.
        bytes: size of both.
        opset, precision: of the file.
        image_size: (H, W).
        inputs, outputs: names to shapes.
        nodes: ONNX nodes by op type, model-local functions counted as one.
        rewrites: what the export passes did, and how often.
        seed_scale: fp16: what the adjoint's seed was multiplied with; 1 otherwise.
        parity: the comparison with PyTorch, or None where it was switched off.
    """

    path: Path
    external_data: Path | None
    bytes: int
    opset: int
    precision: str
    image_size: tuple[int, int]
    inputs: dict[str, list[int | str]]
    outputs: dict[str, list[int | str]]
    nodes: dict[str, int]
    rewrites: dict[str, int] = field(default_factory=dict)
    seed_scale: float = 1.0
    parity: Parity | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        values = asdict(self)
        values["path"] = str(self.path)
        values["external_data"] = None if self.external_data is None else str(self.external_data)
        values["image_size"] = list(self.image_size)
        values["parity"] = None if self.parity is None else self.parity.to_dict()
        return values

    def _rows(self) -> list[tuple[str, str]]:
        megabytes = f"{self.bytes / 1e6:.1f} MB"
        rows = [
            ("file", f"{self.path} ({megabytes}, {self.precision}, opset {self.opset})"),
            ("inputs", ", ".join(f"{k} {v}" for k, v in self.inputs.items())),
            ("outputs", ", ".join(f"{k} {v}" for k, v in self.outputs.items())),
            ("nodes", str(sum(self.nodes.values()))),
        ]
        if self.external_data is not None:
            rows.insert(1, ("weights", str(self.external_data)))
        if self.seed_scale != 1:
            rows.append(("seed scale", f"{self.seed_scale:g}"))
        rows += [(name, str(count)) for name, count in self.rewrites.items() if count]
        if self.parity is None:
            rows.append(("parity", "not verified"))
        else:
            rows += [(f"parity: {name}", text) for name, text in self.parity.lines()]
        return rows

    def __str__(self) -> str:
        return "\n".join(f"{name}: {text}" for name, text in self._rows())

    def __rich__(self) -> Table:
        from rich.table import Table

        table = Table(title="ONNX export", show_header=False)
        table.add_column(no_wrap=True)
        table.add_column()
        for name, text in self._rows():
            table.add_row(name, text)
        return table
