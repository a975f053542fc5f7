"""Which folders of a data set are its parts for training and evaluation, and which are classes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sequence

from bcos_rt.errors import InvalidArgumentError, did_you_mean

__all__ = ["check_numbers", "choose", "class_numbers", "is_split", "is_training", "numbered", "split_folder"]

# What people call a split, in the order of preference.
_SPLITS = {"train": ("train", "training"), "val": ("val", "valid", "validation", "test")}
_NAMES = frozenset(name for names in _SPLITS.values() for name in names)


def choose(found: Collection[str], split: str | None, data: str) -> str | None:
    """The name of ``split`` among a data set's parts ``found``; None where ``split`` is None and there are several.

    One part that is not called like a split, such as ``all``, is the data whichever split is asked for.

    Raises:
        InvalidArgumentError: ``split`` is not there.
    """
    wanted = _SPLITS.get(split or "", () if split is None else (split,))
    for name in wanted:
        same = [part for part in found if part == name] or sorted(part for part in found if part.lower() == name)
        if same:
            return same[0]
    if len(found) == 1:
        only = next(iter(found))
        if split is None or (split in _SPLITS and only.lower() not in _NAMES):
            return only
    if split is None:
        return None
    raise InvalidArgumentError(
        "split", f"{split!r} of {data}", f"one of {', '.join(sorted(found))}", did_you_mean(split, found)
    )


def split_folder(
    folders: Collection[str], split: str | None, data: str, *, holds_classes: Callable[[str], bool]
) -> str | None:
    """Which of the top folders is the split; None where they are the classes and the data has no splits.

    They are splits where all are called like one, or where ``split`` is the name of one. One folder called like a split
    beside others, with images and no folders in it, is a class.

    Args:
        folders: names of all top folders that hold images, or are called like a split.
        split: what was asked for.
        data: what to call the data in errors.
        holds_classes: whether the images of a folder are in folders of its own.

    Raises:
        InvalidArgumentError: the split is not there, was not said, or the folders can be read in both ways.
    """
    if split is not None and split.lower() not in _NAMES:
        # Somebody's own name for a part: never the default, so it must be there.
        if split in folders:
            return split
        expected = f"one of {', '.join(sorted(folders)) or 'its folders (it has none)'}"
        if folders and not any(holds_classes(name) for name in folders):
            expected += ", for images without labels, or no split, for the folders as classes"
        raise InvalidArgumentError("split", f"{split!r} of {data}", expected, did_you_mean(split, folders))
    called = [name for name in folders if name.lower() in _NAMES]
    if not called:
        return None
    if len(called) < len(folders):
        if len(called) == 1 and not holds_classes(called[0]):
            return None
        raise InvalidArgumentError(
            "data", f"{data} with the folders {', '.join(sorted(folders))}",
            "folders that are all splits (train, val, test) or all classes",
            " (give the folder of the split itself, or rename those that are called like a split)",
        )  # fmt: skip
    chosen = choose(called, split, data)
    if chosen is None:
        raise InvalidArgumentError("split", f"None, of {data}", f"one of {', '.join(sorted(called))}")
    return chosen


def numbered(classes: Sequence[str], of_training: Sequence[str], data: str) -> list[str]:
    """The classes in the order of their labels: those of the training split, where it has any.

    A split without an image of some class would otherwise number the classes after it differently.

    Raises:
        InvalidArgumentError: the training split lacks one of ``classes``.
    """
    if not of_training or not classes:
        return sorted(classes)
    unknown = sorted(set(classes) - set(of_training))
    if unknown:
        raise InvalidArgumentError(
            "data", f"{data} with the classes {_first_of(unknown, 5)}",
            "classes that the training split has", did_you_mean(unknown[0], of_training),
        )  # fmt: skip
    return sorted(of_training)


def check_numbers(names: Sequence[str] | None, others: Sequence[str] | None, argument: str, whose: str) -> None:
    """Check that a class has the same number in two lists of class names; None is a list that is not known.

    Lists as long without a name in common, such as WordNet's numbers and words, are taken to be in the same order.

    Raises:
        InvalidArgumentError: ``argument`` has ``names``, in which a class has another number than in ``others``, or
            which has no name in common with them and another length.
    """
    if names is None or others is None:
        return
    if names and others and len(names) != len(others) and set(names).isdisjoint(others):
        raise InvalidArgumentError(
            argument, f"{len(names)} classes with other names ({_first_of(names)})",
            f"some of the {len(others)} classes ({_first_of(others)}) by their names, as {whose}, or as many in their "
            "order",
        )  # fmt: skip
    numbers = {name: i for i, name in enumerate(others)}
    often = Counter(names) | Counter(others)  # ImageNet's words name two of its classes "crane"
    for i, name in enumerate(names):
        if often[name] == 1 and numbers.get(name, i) != i:
            found = f"{name!r} as class {i} of {len(names)}"
            raise InvalidArgumentError(argument, found, f"class {numbers[name]} of {len(others)}, as {whose}")


def _first_of(names: Sequence[str], count: int = 3) -> str:
    return ", ".join(names[:count]) + ", ..." * (len(names) > count)


def class_numbers(
    names: Sequence[str] | None, others: Sequence[str] | None, argument: str, whose: str
) -> tuple[int, ...] | None:
    """The number in ``others`` of each class of ``names``, where its names are all there; None where they are the same.

    Raises:
        InvalidArgumentError: as of :func:`check_numbers`, where names are missing there, or one stands for two classes.
    """
    if names is None or others is None:
        return None
    often, mine = Counter(others), Counter(names)
    if not all(often[name] == mine[name] == 1 for name in names):
        check_numbers(names, others, argument, whose)
        return None
    numbers = {name: i for i, name in enumerate(others)}
    found = tuple(numbers[name] for name in names)
    return None if found == tuple(range(len(found))) else found


def is_training(name: str) -> bool:
    """Whether a folder is called like the training split."""
    return name.lower() in _SPLITS["train"]


def is_split(name: str) -> bool:
    """Whether a folder is called like a split."""
    return name.lower() in _NAMES
