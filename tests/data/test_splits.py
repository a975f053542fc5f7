"""Folders and tar files: which part is read, what is a class, and that nothing is left out without a word."""

import tarfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from bcos_rt.data import ImageData, open_data
from bcos_rt.errors import InvalidArgumentError

from .test_sources import add, png

PNG = png(np.zeros((4, 4, 3), np.uint8))


def tree(root: Path, *names: str) -> Path:
    """Files of these names; those called like an image are one, a name with a slash at the end is an empty folder."""
    for name in names:
        path = root / name
        if name.endswith("/"):
            path.mkdir(parents=True, exist_ok=True)
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(PNG if path.suffix == ".png" else b"no image")
    return root


def tar(path: Path, names: Mapping[str, bytes] | tuple[str, ...]) -> Path:
    contents = names if isinstance(names, Mapping) else dict.fromkeys(names, PNG)
    with tarfile.open(path, "w") as archive:
        for name, data in contents.items():
            add(archive, name, data)
    return path


def opened(kind: str, root: Path, names: tuple[str, ...], split: str | None) -> ImageData:
    return open_data(
        tree(root / "photos", *names) if kind == "folder" else tar(root / "photos.tar", names), split=split
    )


def labelled(data: ImageData) -> list[tuple[str, int]]:
    """Class name and label of every image, from the path and from the data."""
    paths = [str(path) for path in data.paths] if hasattr(data, "paths") else [m.name for m in data.entries]  # type: ignore[attr-defined]
    assert data.labels is not None
    return [(Path(path).parts[-2], label) for path, label in zip(paths, data.labels.tolist(), strict=True)]


@pytest.mark.parametrize("kind", ["folder", "tar"])
@pytest.mark.parametrize("split", ["val", None])
def test_a_split_that_is_not_there_is_an_error(kind: str, split: str | None, tmp_path: Path) -> None:
    names = ("train/cat/1.png", "train/dog/2.png")
    if split is None:
        assert len(opened(kind, tmp_path, names, None)) == 2, "the only part there is"
        return
    with pytest.raises(InvalidArgumentError, match=r"split: got 'val' of '.*photos.*', expected one of train"):
        opened(kind, tmp_path, names, split)


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_data_without_splits_is_whole_for_training_and_validation(kind: str, tmp_path: Path) -> None:
    for split in ("train", "val", None):
        data = opened(kind, tmp_path, ("cat/1.png", "dog/2.png"), split)
        assert (len(data), data.class_names) == (2, ("cat", "dog"))
    with pytest.raises(InvalidArgumentError, match=r"split: got 'fold1' of .* expected one of cat, dog"):
        opened(kind, tmp_path, ("cat/1.png", "dog/2.png"), "fold1")


@pytest.mark.parametrize("kind", ["folder", "tar"])
@pytest.mark.parametrize("split", ["train", "val", None])
def test_a_class_may_be_called_like_a_split(kind: str, split: str | None, tmp_path: Path) -> None:
    data = opened(kind, tmp_path, ("car/1.png", "plane/2.png", "train/3.png"), split)
    assert data.class_names == ("car", "plane", "train")
    assert labelled(data) == [("car", 0), ("plane", 1), ("train", 2)]


@pytest.mark.parametrize("kind", ["folder", "tar"])
@pytest.mark.parametrize(
    "names",
    [
        ("train/cat/1.png", "val/cat/2.png", "more/cat/3.png"),
        ("train/cat/1.png", "samples/2.png"),
        ("train/1.png", "val/2.png", "car/3.png"),
    ],
)
def test_folders_that_can_be_read_in_two_ways_are_named(kind: str, names: tuple[str, ...], tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match=r"photos.*' with the folders .*, expected folders that are all"):
        opened(kind, tmp_path, names, "train")


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_several_splits_must_be_chosen_from(kind: str, tmp_path: Path) -> None:
    names = ("Train/cat/1.png", "test/cat/2.png", "test/cat/3.png")
    assert [len(opened(kind, tmp_path, names, split)) for split in ("train", "val", "test")] == [1, 2, 2]
    with pytest.raises(InvalidArgumentError, match=r"split: got None, of .*, expected one of Train, test"):
        opened(kind, tmp_path, names, None)


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_labels_are_the_training_splits_in_every_split(kind: str, tmp_path: Path) -> None:
    names = ("train/cat/1.png", "train/dog/2.png", "train/emu/3.png", "val/emu/4.png", "test/yak/5.png")
    validation = opened(kind, tmp_path, names, "val")
    assert labelled(validation) == [("emu", 2)]
    assert validation.class_names == opened(kind, tmp_path, names, "train").class_names == ("cat", "dog", "emu")
    with pytest.raises(InvalidArgumentError, match=r"classes yak, expected classes that the training split has"):
        opened(kind, tmp_path, names, "test")


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_splits_without_classes_are_unlabelled(kind: str, tmp_path: Path) -> None:
    names = ("train/cat/1.png", "test/2.png", "test/3.png")
    data = opened(kind, tmp_path, names, "test")
    assert (len(data), data.class_names, data[0][1]) == (2, None, -1)


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_a_split_of_ones_own_name(kind: str, tmp_path: Path) -> None:
    names = ("fold1/cat/1.png", "fold2/cat/2.png", "fold2/dog/3.png")
    assert labelled(opened(kind, tmp_path, names, "fold2")) == [("cat", 0), ("dog", 1)]


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_images_beside_class_folders_are_not_left_out(kind: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match=r"stray\.png.* beside"):
        opened(kind, tmp_path, ("cat/1.png", "stray.png"), "train")


def test_a_class_folder_without_images(tmp_path: Path) -> None:
    data = open_data(tree(tmp_path / "a", "cat/1.png", "dog/", "emu/2.png", "__MACOSX/cat/._1.png"))
    assert labelled(data) == [("cat", 0), ("emu", 2)]
    assert data.class_names == ("cat", "dog", "emu")
    with pytest.raises(InvalidArgumentError, match=r"b/dog', which has files and no image among them"):
        open_data(tree(tmp_path / "b", "cat/1.png", "dog/1.heic"))
    with pytest.raises(InvalidArgumentError, match=r"in which there is no image"):
        open_data(tree(tmp_path / "c", "train/cat/1.png", "val/cat/"), split="val")


def test_folders_without_images_are_no_part_of_splits(tmp_path: Path) -> None:
    path = tree(tmp_path, "train/cat/1.png", "val/cat/2.png", "annotations/cat.xml")
    assert open_data(path, split="train").class_names == ("cat",)


def test_hidden_folders_and_links(tmp_path: Path) -> None:
    path = tree(tmp_path / "a", "cat/.ipynb_checkpoints/1.png", "cat/1.png")
    (path / "cat" / "more").symlink_to(tree(tmp_path / "elsewhere", "2.png", "deep/3.png"))
    assert [p.name for p in open_data(path).paths] == ["1.png", "2.png", "3.png"]  # type: ignore[attr-defined]
    (path / "cat" / "up").symlink_to(path)
    with pytest.raises(InvalidArgumentError, match=r"cat/up', a link to a folder above it"):
        open_data(path)
    (path / "cat" / "up").unlink()
    (path / "cat" / "lost.png").symlink_to(tmp_path / "gone.png")
    with pytest.raises(InvalidArgumentError, match=r"lost\.png', a link to a file that is not there"):
        open_data(path)


def test_a_folder_around_everything_in_a_tar_file(tmp_path: Path) -> None:
    assert open_data(tar(tmp_path / "a.tar", ("all/cat/1.png", "all/dog/2.png"))).class_names == ("cat", "dog")
    splits = tar(tmp_path / "b.tar", ("all/train/cat/1.png", "all/val/cat/2.png", "all/val/cat/3.png"))
    assert len(open_data(splits, split="val")) == 2
