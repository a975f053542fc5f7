"""What a contender is: something that loads a network, prepares itself, and can then be called."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = [
    "BCOS",
    "EXPLAIN",
    "FORWARD",
    "MODES",
    "PLAIN",
    "TRAIN",
    "Contender",
    "Prepared",
    "Setting",
    "UnsupportedError",
]

# What is timed: logits; logits, W and contribution map; forward, backward and a step of SGD.
FORWARD, EXPLAIN, TRAIN = "forward", "explain", "train"
MODES = (FORWARD, EXPLAIN, TRAIN)

# Whose results a contender must reproduce: the B-cos network's, or the network's it was made from.
# Of one with an embedding, explanations are of texts' scores, and the embedding is what its forward pass gives.
BCOS, PLAIN, EMBEDDING = "bcos", "plain", "embedding"


class UnsupportedError(Exception):
    """The contender cannot do this here; the message is the reason."""


@dataclass(frozen=True)
class Setting:
    """One situation in which contenders are compared.

    Attributes:
        folder: the network's files, see :mod:`bcos_rt.benchmark.subject`.
        batch: images.
        size: side of an image in pixels.
        classes: K, classes explained of each image; 1 is each image's top class, otherwise the first K classes.
        threads: threads of one operation.
    """

    folder: Path
    batch: int
    size: int
    classes: int
    threads: int

    def as_json(self) -> dict[str, Any]:
        """What :meth:`from_json` reads."""
        return {**self.__dict__, "folder": str(self.folder)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Setting:
        """The setting another process wrote."""
        return cls(**{**values, "folder": Path(values["folder"])})

    @property
    def reference_file(self) -> Path:
        """Images and expected results of this setting, ``.npz``."""
        return self.folder / f"reference-{self.batch}-{self.size}-{self.classes}.npz"

    def arrays(self, *names: str) -> dict[str, NDArray[np.generic]]:
        """Arrays of the reference file; those it does not have are left out."""
        import numpy as np

        with np.load(self.reference_file) as file:
            return {name: file[name] for name in names if name in file.files}

    def facts(self) -> dict[str, Any]:
        """What the network's maker noted: mean, std, seconds of its exports."""
        path = self.folder / "facts.json"
        facts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return facts


@dataclass(frozen=True)
class Prepared:
    """A contender ready in one mode.

    Attributes:
        run: what is timed.
        answer: its result as float arrays by name: logits [N, classes], weights and contributions of the explanation.
        reference: whose results these must be, ``BCOS`` or ``PLAIN``; empty for no check.
        facts: what a reader of its row should know; "note" is text, others are columns.
    """

    run: Callable[[], Any]
    answer: Callable[[Any], Mapping[str, Any]]
    reference: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)


class Contender:
    """Base of all contenders; lives in a worker process, one setting each.

    Args:
        setting: the situation.
        options: of this contender, JSON-ready.
    """

    def __init__(self, setting: Setting, options: Mapping[str, Any]) -> None:
        self.setting, self.options = setting, options

    def load(self) -> None:
        """Import what is needed and read the weights: what this takes is not part of the memory "above the weights"."""
        raise NotImplementedError

    def prepare(self, mode: str) -> Prepared:
        """Build or compile whatever calls need; no earlier than here, for this is what counts as start-up time.

        Raises:
            UnsupportedError: the contender has no such mode.
        """
        raise NotImplementedError

    def weight_bytes(self) -> int:
        """Bytes of weights that :meth:`load` did not read, because :meth:`prepare` reads them from a file."""
        return 0
