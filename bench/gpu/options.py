"""What a run is asked for, and how a stage answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from bcos_rt.errors import InvalidArgumentError, did_you_mean

__all__ = [
    "DTYPES",
    "EXIT_FAILED",
    "EXIT_NO_GPU",
    "EXIT_OK",
    "FAILED",
    "MODELS",
    "MODES",
    "PASSED",
    "SKIPPED",
    "STAGES",
    "TIMEOUT",
    "Options",
    "Outcome",
]

STAGES = ("environment", "correctness", "graph", "onnx", "benchmark", "sanitizer", "plots")
MODES = ("forward", "explain", "train")
MODELS = ("resnet50", "vit_b_16", "densenet121")
DTYPES = ("bf16", "fp16", "fp32")

EXIT_OK, EXIT_FAILED, EXIT_NO_GPU = 0, 1, 3

PASSED, FAILED, SKIPPED, TIMEOUT = "passed", "failed", "skipped", "timeout"


@dataclass(frozen=True)
class Options:
    """One run.

    Attributes:
        folder: where results go.
        stages: the stages to run, in the order of ``STAGES``.
        minutes: time for the whole run; the benchmark takes what the other stages leave, most important work first.
        models, dtypes, modes: what the benchmark goes through.
        contenders: only these (empty: all).
        batch, size: images per batch and their side in pixels.
        onnx_python: a Python that has onnxruntime-gpu, which cannot live beside onnxruntime.
        dry_run: go through everything on the CPU, at toy sizes, in Triton's interpreter, with a timer that measures
            nothing; every row says so.
        resume: keep measurements of the same GPU, versions and commit that are in ``folder``.
    """

    folder: Path
    stages: tuple[str, ...] = STAGES
    minutes: float = 8.0
    models: tuple[str, ...] = MODELS
    dtypes: tuple[str, ...] = ("bf16",)
    modes: tuple[str, ...] = MODES
    contenders: tuple[str, ...] = ()
    batch: int = 32
    size: int = 224
    onnx_python: str = ""
    dry_run: bool = False
    resume: bool = True

    def __post_init__(self) -> None:
        for name, known in (("stages", STAGES), ("dtypes", DTYPES), ("modes", MODES)):
            for value in getattr(self, name):
                if value not in known:
                    raise InvalidArgumentError(name, value, " | ".join(known), did_you_mean(value, known))
        for name in ("minutes", "batch", "size"):
            if getattr(self, name) <= 0:
                raise InvalidArgumentError(name, getattr(self, name), "a number above 0")
        if self.dry_run and _inside(self.folder, Path(__file__).resolve().parents[1] / "results"):
            raise InvalidArgumentError(
                "output", self.folder, "a folder outside bench/results: a dry run measures nothing"
            )

    @property
    def device(self) -> str:
        """Where tensors live."""
        return "cpu" if self.dry_run else "cuda"

    def as_json(self) -> dict[str, Any]:
        """What :meth:`from_json` reads."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return values | {"folder": str(self.folder)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Options:
        """The options another process wrote."""
        given: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**(given | {"folder": Path(given["folder"])}))


def _inside(path: Path, folder: Path) -> bool:
    return path.resolve().is_relative_to(folder.resolve())


@dataclass(frozen=True)
class Outcome:
    """How a stage ended.

    Attributes:
        status: passed, failed, skipped or timeout.
        message: one line for a person: the reason, or the result.
        details: everything else, for ``summary.json``.
    """

    status: str
    message: str = ""
    details: Mapping[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """What goes into ``summary.json``."""
        return {"status": self.status, "message": self.message, **self.details}
