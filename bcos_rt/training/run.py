"""A run's folder: what is written there, and what a later process needs to go on.

=====================  ================================================================================
file                   what it holds
=====================  ================================================================================
``recipe.json``        the training recipe and what was trained on
``metrics.csv``        a row an epoch
``steps.csv``          a row every ``log_every`` steps, of the first process's part of the batch
``state.pt``           everything needed to go on: weights, optimisers, averages, the rows so far
``last.safetensors``   the network after the last finished epoch; of a B-cos network a checkpoint of its own
``best.safetensors``   the same after the best epoch
``ema.safetensors``    the averaged weights, where there are any
``explanations/``      a picture an epoch
``tensorboard/``       the same numbers, where TensorBoard is installed
=====================  ================================================================================
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn

from bcos_rt.checkpoint import save
from bcos_rt.errors import CheckpointError, InvalidArgumentError, InvalidTypeError
from bcos_rt.files import read_rows, remove_leftovers, replacing, write_csv, write_json
from bcos_rt.models.weights import classifier_metadata, read_torch_file
from bcos_rt.nn.conventional import ConventionalNetwork, inner_network
from bcos_rt.nn.network import BcosNetwork
from bcos_rt.training.recipe import TrainingRecipe

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = ["Progress", "RunFolder", "save_network"]

STATE_VERSION = 1
_NETWORKS = ("last.safetensors", "best.safetensors", "ema.safetensors")
# Fields in which a resumed run may differ from its beginning: they change no weight, nor which epoch is best.
FREE_FIELDS = ("log_every", "validate_every")


@dataclass
class Progress:
    """Where a run stands; with weights and optimisers all that a state file holds.

    Attributes:
        epoch, step: the next step is the ``step``-th of this epoch, both from 0.
        sums: of the unfinished epoch: weighted sums of the training metrics, and ``images``.
        history: a row an epoch.
        steps: rows of the step log.
        best: the best epoch's value of the selecting metric, None before the first.
        seconds: spent training so far.
    """

    epoch: int = 0
    step: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    steps: list[dict[str, Any]] = field(default_factory=list)
    best: float | None = None
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """The fields, plain values only."""
        return dict(vars(self))


class RunFolder:
    """Reads and writes a run's files.

    Args:
        path: the folder; made when something is written.

    Raises:
        InvalidArgumentError: a file of that name exists.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if self.path.exists() and not self.path.is_dir():
            raise InvalidArgumentError("output", f"{str(path)!r}, a file", "a folder, new or of an earlier run")
        self.state = self.path / "state.pt"

    def describe(self, recipe: TrainingRecipe, about: Mapping[str, Any]) -> None:
        """Write ``recipe.json``."""
        write_json(self.path / "recipe.json", {"recipe": recipe.to_dict(), **about})

    def check(self, resume: bool) -> None:
        """Refuse a folder that holds a run that is not to be resumed.

        Or its networks, which would be overwritten although no state says how far they are. A process killed in its
        first epoch, between writing its networks and its state, leaves one epoch.
        """
        if self.state.exists():
            if resume:
                return
            got = f"{str(self.path)!r}, which holds a run"
            raise InvalidArgumentError("output", got, "a new folder", " (or resume=True to go on)")
        found = [name for name in (*_NETWORKS, "metrics.csv") if (self.path / name).exists()]
        epochs = len(read_rows(self.path / "metrics.csv")) if "metrics.csv" in found else 0
        if found and not (resume and epochs <= 1):
            got = f"{str(self.path)!r}, which holds {', '.join(found)} of a run without its {self.state.name}"
            raise InvalidArgumentError("output", got, "a new folder")

    def lock(self, stack: ExitStack) -> str | None:
        """Keep other runs out until ``stack`` is left, or the process is gone; gives what is wrong, else None."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context((self.path / ".lock").open("a", encoding="utf-8"))
        except OSError as error:
            return f"which cannot be written ({error})"
        if fcntl is None:
            return None
        try:
            # A lock of the process, which its readers do not inherit and which ends with it.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            return f"which another run is writing (it holds {file.name})"
        except OSError as error:  # a network's file system
            warnings.warn(f"{self.path} cannot be locked ({error}): nothing keeps another run out of it", stacklevel=2)
        return None

    def tidy(self) -> None:
        """Remove what killed processes left of files they were writing."""
        for name in ("recipe.json", "metrics.csv", "steps.csv", "state.pt", *_NETWORKS):
            remove_leftovers(self.path / name)

    def read_state(self, recipe: TrainingRecipe) -> dict[str, Any]:
        """The state file, checked against the recipe.

        Raises:
            CheckpointError: unreadable, of another version, or not a state of a run.
            InvalidArgumentError: it was trained with another recipe; the message names the fields.
        """
        state = read_torch_file(self.state)
        if not isinstance(state, dict) or state.get("format") != "bcos-rt training":
            raise CheckpointError(f"{self.state}: not the state of a bcos-rt training run")
        if state.get("version") != STATE_VERSION:
            raise CheckpointError(f"{self.state}: version {state.get('version')}, expected {STATE_VERSION}")
        missing = [k for k in ("recipe", "progress", "sums", "precision", "targets", "model") if k not in state]
        if missing:
            raise CheckpointError(f"{self.state}: without {', '.join(missing)}, so not a whole state")
        held = state["progress"]
        if not isinstance(held, dict) or set(held) != {entry.name for entry in fields(Progress)}:
            raise CheckpointError(f"{self.state}: its progress is not that of a run")
        # Fields that a recipe did not have yet when the run began are at their defaults.
        try:
            began = TrainingRecipe.from_dict(state["recipe"])
        except (InvalidArgumentError, InvalidTypeError) as error:
            raise CheckpointError(f"{self.state}: its recipe is none of this version's ({error})") from error
        then, now = _plain(began.to_dict()), _plain(recipe.to_dict())
        other = [k for k in now if k not in FREE_FIELDS and then.get(k) != now[k]]
        if other:
            changed = ", ".join(f"{k}={now[k]!r} (was {then.get(k)!r})" for k in other)
            raise InvalidArgumentError(
                "recipe", changed, f"the recipe {self.path} began with", " (or another output folder)"
            )
        return state

    def state_values(self, recipe: TrainingRecipe, progress: Progress) -> dict[str, Any]:
        """The plain part of a state file."""
        return {
            "format": "bcos-rt training",
            "version": STATE_VERSION,
            "recipe": _plain(recipe.to_dict()),
            "progress": progress.to_dict(),
        }

    def write_logs(self, progress: Progress) -> None:
        """Write both CSV files anew from the rows of a state: a resumed run's rows follow without gap or repetition."""
        for name, rows in (("metrics.csv", progress.history), ("steps.csv", progress.steps)):
            write_csv(self.path / name, rows, _columns(rows))


def _columns(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    names: dict[str, None] = {}
    for row in rows:
        names.update(dict.fromkeys(row))
    return list(names)


def _plain(value: Any) -> Any:
    """Tuples as lists, as a file gives them back; texts as Python's own, which is all that torch loads."""
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, str):
        return str(value)
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value


def save_network(net: nn.Module, path: Path) -> None:
    """Write a network so that it can be used: a B-cos network as :func:`bcos_rt.save` does, another as its weights,
    a classifier's with its class names and the side of its images in the header.
    """
    if isinstance(net, BcosNetwork):
        save(net, path)
        return
    tensors = {k: v.detach().cpu().contiguous().clone() for k, v in inner_network(net).state_dict().items()}
    metadata = {"format": "pt"}
    if isinstance(net, ConventionalNetwork):
        metadata = classifier_metadata(net.class_names, net.image_size)
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata=metadata)
