"""Programs in one file: what an engine saves, so that the next process starts without tracing the network.

An engine file is an uncompressed zip: ``manifest.json``, the graphs as JSON (``programs/<name>.json``, see
:mod:`bcos_rt.graph.program_json`), their constants (``constants.safetensors``; what two programs share is stored once)
and other files (``files/<name>``), such as packages that were compiled ahead of time. There is no pickle in it, and
loading one neither traces nor runs its graphs. It is no protection from someone who means harm: a graph can ask for any
memory, and a compiled package among the files is code.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.fx import Node

from bcos_rt.errors import CheckpointError, InvalidArgumentError
from bcos_rt.files import check_format, ordinary_mode
from bcos_rt.graph.program import Program
from bcos_rt.graph.program_json import DTYPES, FormatError, program_from_json, program_to_json

__all__ = ["FORMAT", "FORMAT_VERSION", "EngineFile", "dump", "is_engine_file", "load"]

FORMAT = "bcos-rt-engine"
FORMAT_VERSION = 1
MANIFEST, CONSTANTS = "manifest.json", "constants.safetensors"
DEVICES = ("cpu", "cuda")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,100}")
# Every entry has this time, so that equal engines give equal files.
_TIME = (1980, 1, 1, 0, 0, 0)


T = TypeVar("T")


@dataclass(frozen=True)
class EngineFile:
    """What a file holds.

    Attributes:
        path: the file.
        programs: by name; constants of equal value are one tensor in all of them.
        image_size: (H, W) the programs are made for.
        dtype: what they store activations and weights in.
        device: where the constants are now.
        saved_device: the kind of device they were saved for, ``"cpu"`` or ``"cuda"``.
        backend: name of the backend the engine ran.
        meta: whatever else was given to :func:`dump` (recipe, class names).
        bcos_rt_version, torch_version: of the process that wrote it.
        files: names of the other files; see :meth:`read` and :meth:`extract`.
    """

    path: Path
    programs: dict[str, Program]
    image_size: tuple[int, int]
    dtype: torch.dtype
    device: torch.device
    saved_device: str
    backend: str
    meta: dict[str, Any]
    bcos_rt_version: str
    torch_version: str
    files: tuple[str, ...] = field(default=())

    def read(self, name: str) -> bytes:
        """Contents of one of ``files``.

        Raises:
            InvalidArgumentError: no such name; CheckpointError: the file is damaged or gone.
        """
        self._check(name)
        return _reading(self.path, lambda file: _member(file, f"files/{name}"))

    def extract(self, name: str, folder: str | os.PathLike[str]) -> Path:
        """Write one of ``files`` into a folder; its path there. Errors as :meth:`read`."""
        target = Path(folder) / name
        target.write_bytes(self.read(name))
        return target

    def _check(self, name: str) -> None:
        if name not in self.files:
            raise InvalidArgumentError("name", repr(name), f"one of {', '.join(map(repr, self.files)) or 'none'}")


# --- writing ---------------------------------------------------------------------------------------------------------


def dump(
    programs: Mapping[str, Program],
    path: str | os.PathLike[str],
    *,
    backend: str,
    dtype: torch.dtype,
    meta: Mapping[str, Any] | None = None,
    files: Mapping[str, bytes | Path] | None = None,
) -> Path:
    """Write programs into one file. A reader sees the old file or the new one, and an error leaves the old one.

    Args:
        programs: of one image size and on one device, by name.
        path: the file; folders above it are made.
        backend, dtype: see :class:`EngineFile`.
        meta: anything that JSON can hold.
        files: other files by name, as bytes or as the path to copy from; names of letters, digits and ``._-``.

    Returns:
        ``path``.

    Raises:
        InvalidArgumentError: a program with an op that is neither aten's nor ours, or with another symbolic size;
            programs that do not go together; ``meta`` that JSON cannot hold; a path that cannot be written.
    """
    path, files = Path(path), files or {}
    for name in (*programs, *files):
        if not _NAME.fullmatch(name):
            raise InvalidArgumentError("name", repr(name), "letters, digits and ._- alone")
    manifest, constants, graphs = _described(programs, backend, dtype, meta, sorted(files))
    try:
        target = path.resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.is_dir():
            raise InvalidArgumentError("path", f"{str(path)!r}, a directory", "a file name")
        temporary = target.with_name(f".{target.name}.{secrets.token_hex(6)}.tmp")
        try:
            with zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as file:
                _add(file, MANIFEST, json.dumps(manifest, indent=1).encode())
                for name, graph in graphs.items():
                    _add(file, f"programs/{name}.json", json.dumps(graph, separators=(",", ":")).encode())
                _add(file, CONSTANTS, safetensors.torch.save(constants))
                for name, content in sorted(files.items()):
                    _add(file, f"files/{name}", content)
            ordinary_mode(temporary)
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:
        raise InvalidArgumentError("path", f"{str(path)!r} ({error})", "a path that can be written") from error
    return path


def _add(file: zipfile.ZipFile, name: str, content: bytes | Path) -> None:
    entry = zipfile.ZipInfo(name, _TIME)
    entry.external_attr = 0o644 << 16
    with file.open(entry, "w", force_zip64=True) as sink:
        if isinstance(content, bytes):
            sink.write(content)
            return
        with open(content, "rb") as source:
            shutil.copyfileobj(source, sink, 1 << 20)


def _described(
    programs: Mapping[str, Program],
    backend: str,
    dtype: torch.dtype,
    meta: Mapping[str, Any] | None,
    files: list[str],
) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Any]]:
    """The manifest, the constants as they are stored, and the graphs."""
    from bcos_rt import __version__

    values = [program.image.meta["val"] for program in programs.values()]
    sizes = {tuple(value.shape[2:]) for value in values}
    devices = {value.device for value in values}
    if len(sizes) != 1 or len(devices) != 1:
        found = f"image sizes {sorted(sizes)} on {sorted(map(str, devices))}"
        raise InvalidArgumentError("programs", found, "programs of one image size on one device")
    if next(iter(devices)).type not in DEVICES:
        raise InvalidArgumentError("programs", f"on {next(iter(devices))}", f"on {' or '.join(DEVICES)}")
    if str(dtype).removeprefix("torch.") not in DTYPES:
        raise InvalidArgumentError("dtype", dtype, f"one of {', '.join(DTYPES)}")
    store = _Store()
    graphs = {}
    for name, program in programs.items():
        try:
            graphs[name] = program_to_json(program, partial(store.key, program))
        except FormatError as error:
            raise InvalidArgumentError(f"programs[{name!r}]", error, "a graph that the file format holds") from error
    manifest = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "bcos_rt_version": __version__,
        "torch_version": str(torch.__version__),
        "image_size": [int(s) for s in next(iter(sizes))],
        "dtype": str(dtype).removeprefix("torch."),
        "device": next(iter(devices)).type,
        "backend": backend,
        "programs": list(programs),
        "layouts": store.layouts,
        "files": files,
        "meta": dict(meta or {}),
    }
    try:
        json.dumps(manifest, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidArgumentError("meta", f"{type(error).__name__}: {error}", "values that JSON can hold") from error
    return manifest, store.tensors, graphs


class _Store:
    """Constants under the names they are stored by, equal ones (bit for bit, and in memory order) once.

    Attributes:
        tensors: contiguous, on the CPU.
        layouts: the dimensions from the outermost in memory to the innermost, of those that are stored in another order
            than their dimensions'.
    """

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.layouts: dict[str, list[int]] = {}
        self._by_value: dict[Any, str] = {}
        self._by_memory: dict[Any, str] = {}
        self._taken: set[int] = set()
        self._alive: list[Tensor] = []  # so that no address is met twice

    def key(self, program: Program, node: Node) -> str:
        """The name that a constant's value is stored under."""
        value = program.constants[node].detach()
        memory = (value.data_ptr(), tuple(value.shape), value.stride(), value.dtype, value.device)
        if value.numel() and memory in self._by_memory:
            return self._by_memory[memory]
        if str(value.dtype).removeprefix("torch.") not in DTYPES:
            raise ValueError(f"a constant of dtype {value.dtype}")
        order = _memory_order(value)
        stored = value.permute(order).contiguous().cpu()
        content_bytes: Any = stored.reshape(-1).view(torch.uint8).numpy()
        digest = hashlib.blake2b(content_bytes, digest_size=32).digest()
        content = (value.dtype, tuple(value.shape), tuple(order), digest)
        if content not in self._by_value:
            name = self._free_name(program.names[node])
            self._by_value[content] = name
            # safetensors takes no two tensors in one memory, and no parts of one.
            memory_of = stored.untyped_storage()
            if memory_of.nbytes() != stored.nbytes or memory_of.data_ptr() in self._taken:
                stored = stored.clone()
            self._taken.add(stored.untyped_storage().data_ptr())
            self.tensors[name] = stored
            if order != sorted(order):
                self.layouts[name] = order
        self._alive.append(value)
        self._by_memory[memory] = self._by_value[content]
        return self._by_value[content]

    def _free_name(self, label: str) -> str:
        name, n = label, 1
        while name in self.tensors or name == "__metadata__":
            n += 1
            name = f"{label}#{n}"
        return name


def _memory_order(value: Tensor) -> list[int]:
    """Dimensions by stride, largest first, where that makes the tensor contiguous; else as they are."""
    strides = value.stride()
    order = sorted(range(value.ndim), key=lambda d: (-strides[d], d))
    dense = value.permute(order).is_contiguous() and not value.is_contiguous()
    return order if dense else list(range(value.ndim))


# --- reading ---------------------------------------------------------------------------------------------------------


def load(path: str | os.PathLike[str], device: str | torch.device | None = None) -> EngineFile:
    """Read what :func:`dump` wrote.

    Args:
        device: where to; None: the kind of device it was saved for.

    Raises:
        CheckpointError: no such file, no engine file, damaged, of a newer version, or for a device that is not here.
    """
    path = Path(path)
    manifest, entries = _reading(path, _read)
    check_format(path, manifest, FORMAT, FORMAT_VERSION, "engine file")
    try:
        given = _Manifest(manifest, set(entries))
    except ValueError as error:
        raise CheckpointError(f"{path}: damaged, {MANIFEST}: {error}") from error
    target = _device(path, given.device, device)
    try:
        stored = safetensors.torch.load(entries.pop(CONSTANTS))
    except (SafetensorError, ValueError) as error:
        raise CheckpointError(f"{path}: damaged, {CONSTANTS}: {error}") from error
    if not set(given.layouts) <= set(stored):
        raise CheckpointError(f"{path}: damaged, layouts of constants that are not there")
    constants = {}
    for key in list(stored):
        constants[key] = _laid_out(path, key, stored.pop(key), given.layouts.get(key), target)
    programs = {}
    for name in given.programs:
        try:
            data = json.loads(entries[f"programs/{name}.json"])
            programs[name] = program_from_json(data, constants, torch.device(given.device), target)
        except (FormatError, ValueError, RecursionError) as error:
            made = f"(written by bcos-rt {given.bcos_rt_version} with torch {given.torch_version})"
            raise CheckpointError(f"{path}: damaged, program {name!r}, {error} {made}") from error
        size = tuple(programs[name].image.meta["val"].shape[2:])
        if size != given.image_size:
            raise CheckpointError(f"{path}: damaged, program {name!r} is for images of {size}, not {given.image_size}")
    return EngineFile(
        path, programs, given.image_size, given.dtype, target, given.device, given.backend, given.meta,
        given.bcos_rt_version, given.torch_version, given.files,
    )  # fmt: skip


def is_engine_file(path: str | os.PathLike[str]) -> bool:
    """Whether :func:`dump` seems to have written ``path``; reads its manifest alone."""
    path = Path(path)
    try:
        manifest = _reading(path, lambda file: json.loads(_member(file, MANIFEST)))
    except (CheckpointError, ValueError, RecursionError):
        return False
    return isinstance(manifest, dict) and manifest.get("format") == FORMAT


def _reading(path: Path, work: Callable[[zipfile.ZipFile], T]) -> T:
    if not path.is_file():
        raise CheckpointError(f"{path}: {'a directory' if path.is_dir() else 'no such file'}, not an engine file")
    try:
        with zipfile.ZipFile(path) as file:
            return work(file)
    # What Python's zip reader raises for damaged files.
    except (zipfile.BadZipFile, NotImplementedError, EOFError, KeyError, OSError, RuntimeError) as error:
        reason = error.args[0] if isinstance(error, KeyError) else error
        raise CheckpointError(f"{path}: not an engine file, or damaged ({reason})") from error


def _read(file: zipfile.ZipFile) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The manifest and what it needs; nothing of another format is read further."""
    try:
        manifest = json.loads(_member(file, MANIFEST))
    except (ValueError, RecursionError) as error:
        raise zipfile.BadZipFile(f"{MANIFEST} does not parse: {error}") from error
    if not isinstance(manifest, dict):
        raise zipfile.BadZipFile(f"{MANIFEST} is a {type(manifest).__name__}")
    if manifest.get("format") != FORMAT or manifest.get("format_version") != FORMAT_VERSION:
        return manifest, {}
    wanted = [n for n in file.namelist() if n == CONSTANTS or n.startswith("programs/")]
    if CONSTANTS not in wanted:
        raise zipfile.BadZipFile(f"there is no {CONSTANTS}")
    entries = {name: _member(file, name) for name in wanted}
    entries |= {name: b"" for name in file.namelist() if name.startswith("files/")}
    return manifest, entries


def _member(file: zipfile.ZipFile, name: str) -> bytes:
    """One entry, its checksum verified."""
    if file.getinfo(name).compress_type != zipfile.ZIP_STORED:
        raise zipfile.BadZipFile(f"{name} is compressed")
    return file.read(name)


class _Manifest:
    """A manifest's entries, each of its type."""

    def __init__(self, data: Mapping[str, Any], entries: set[str]) -> None:
        def of(name: str, kind: type) -> Any:
            value = data.get(name)
            if not isinstance(value, kind):
                raise ValueError(f"{name} is a {type(value).__name__}, not a {kind.__name__}")
            return value

        self.bcos_rt_version: str = of("bcos_rt_version", str)
        self.torch_version: str = of("torch_version", str)
        self.device: str = of("device", str)
        self.backend: str = of("backend", str)
        self.meta: dict[str, Any] = of("meta", dict)
        self.layouts: dict[str, Any] = of("layouts", dict)
        self.programs: list[str] = of("programs", list)
        self.files: tuple[str, ...] = tuple(of("files", list))
        size = of("image_size", list)
        if len(size) != 2 or not all(type(s) is int and s > 0 for s in size):
            raise ValueError(f"image_size is {size}")
        self.image_size: tuple[int, int] = (size[0], size[1])
        if self.device not in DEVICES:
            raise ValueError(f"device is {self.device!r}")
        if of("dtype", str) not in DTYPES:
            raise ValueError(f"dtype is {data['dtype']!r}")
        self.dtype = DTYPES[data["dtype"]]
        for folder, ending, names in (("programs", ".json", self.programs), ("files", "", self.files)):
            for name in names:
                if not isinstance(name, str) or not _NAME.fullmatch(name):
                    raise ValueError(f"{name!r} is not a name")
                if f"{folder}/{name}{ending}" not in entries:
                    raise ValueError(f"{folder}/{name}{ending} is missing")


def _device(path: Path, saved: str, wanted: str | torch.device | None) -> torch.device:
    device = torch.device(saved if wanted is None else wanted)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise CheckpointError(f"{path}: for a CUDA device, and there is none here (device='cpu' loads it onto the CPU)")
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    return device


def _laid_out(path: Path, key: str, stored: Tensor, order: Any, device: torch.device) -> Tensor:
    """A constant in its dimensions' order, in aligned memory of its own."""
    value = stored.to(device) if device.type != "cpu" else stored.clone()
    if order is None:
        return value
    if (
        not isinstance(order, list)
        or any(type(d) is not int for d in order)
        or sorted(order) != list(range(value.ndim))
    ):
        raise CheckpointError(f"{path}: damaged, the layout of {key} is {str(order)[:40]}")
    back = [0] * value.ndim
    for place, dim in enumerate(order):
        back[dim] = place
    return value.permute(back)
