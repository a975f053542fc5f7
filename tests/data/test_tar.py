"""Tar files: samples with their classes in several forms, several shards, and damage that must be seen."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from bcos_rt.data import open_data
from bcos_rt.errors import InvalidArgumentError, InvalidTypeError

from .test_splits import PNG, tar


def samples(path: Path, classes: list[Any], form: str = "cls", first: int = 0) -> Path:
    contents: dict[str, bytes] = {}
    for i, label in enumerate(classes, first):
        text = json.dumps({"label": label, "width": 4}) if form == "json" else f"{label}\n"
        contents |= {f"{i:05}.png": PNG, f"{i:05}.{form}": text.encode()}
    return tar(path, contents)


@pytest.mark.parametrize("form", ["cls", "cls.txt", "json"])
def test_classes_of_samples(form: str, tmp_path: Path) -> None:
    data = open_data(samples(tmp_path / "a.tar", [3, 0, 12], form))
    assert data.labels is not None
    assert data.labels.tolist() == [data[i][1] for i in range(3)] == [3, 0, 12]


def test_of_a_name_that_is_there_twice_the_last_counts(tmp_path: Path) -> None:
    path = tmp_path / "twice.tar"
    for side in (2, 5):
        image = io.BytesIO()
        Image.new("RGB", (side, side)).save(image, format="png")
        with tarfile.open(path, "a") as file:
            member = tarfile.TarInfo("cat/a.png")
            member.size = len(image.getvalue())
            file.addfile(member, io.BytesIO(image.getvalue()))
    with pytest.warns(UserWarning, match="1 members have names that come again"):
        data = open_data(path)
    assert len(data) == 1
    assert data[0][0].shape == (3, 5, 5)


def test_several_shards(tmp_path: Path) -> None:
    paths = [samples(tmp_path / f"s-{i:03}.tar", [i, i + 1], first=2 * i) for i in range(4)]
    expected = [0, 1, 1, 2, 2, 3, 3, 4]
    pattern = str(tmp_path / "s-{000..003}.tar")
    for spec in (pattern, paths, tuple(map(str, paths)), [str(tmp_path / "s-{000..001}.tar"), *paths[2:]]):
        assert open_data(spec).labels.tolist() == expected  # type: ignore[union-attr]
    assert len(open_data((str(paths[0]), str(paths[1])))) == 4, "two paths are no pair of arrays"
    for spec, message in (
        (str(tmp_path / "s-{003..000}.tar"), "FIRST at most LAST"),
        (str(tmp_path / "s-{000..004}.tar"), r"s-004\.tar', which does not exist"),
        ([paths[0], tmp_path], "path of a .tar file"),
        ([paths[0], paths[0]], "2 times"),
    ):
        with pytest.raises(InvalidArgumentError, match=message):
            open_data(spec)
    with pytest.raises(InvalidTypeError, match="data: got list"):
        open_data([])


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ({"1.png": PNG, "1.cls": b"0", "2.png": PNG}, r"'2\.png' of '.*a\.tar' without a class"),
        ({"1.png": PNG, "1.cls": b"0", "2.cls": b"1", "2.npy": b""}, r"a class and no image of '2'"),
        ({"1.png": PNG, "1.mask.png": PNG, "1.cls": b"0"}, r"'1\.png' of .* and '1\.mask\.png' of .* one image"),
        ({"1.png": PNG, "1.cls": b"cat"}, r"'cat' in '1\.cls' of"),
        ({"1.png": PNG, "1.cls": b"--1"}, "a class number"),
        ({"1.png": PNG, "1.json": b'{"label": "cat"}'}, r"class 'cat' in the JSON of '1\.png'"),
        ({"1.png": PNG, "1.json": b"{"}, r"'1\.json' of '.*a\.tar' \(.*\), expected JSON"),
        ({"1.png": PNG, "1.json": b'{"label": 1}', "2.png": PNG}, r"'2\.png' of .* without a class"),
    ],
)
def test_samples_that_are_not_whole_are_named(contents: dict[str, bytes], message: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        open_data(tar(tmp_path / "a.tar", contents))


def test_json_that_says_nothing_of_classes(tmp_path: Path) -> None:
    note = b'{"caption": "a cat"}'
    assert open_data(tar(tmp_path / "a.tar", {"1.png": PNG, "1.json": note}))[0][1] == -1
    named = tar(tmp_path / "b.tar", {"cat/1.png": PNG, "cat/1.json": b'{"label": "cat"}', "dog/2.png": PNG})
    assert open_data(named).class_names == ("cat", "dog")


def test_damage_in_the_middle_and_a_missing_end_are_seen(tmp_path: Path) -> None:
    path = tar(tmp_path / "a.tar", ("cat/1.png", "cat/2.png", "cat/3.png"))
    whole = path.read_bytes()
    with tarfile.open(path) as archive:
        second = archive.getmember("cat/2.png").offset
        end = archive.getmember("cat/3.png").offset + 1024
    path.write_bytes(whole[: second + 20] + b"\xff" * 100 + whole[second + 120 :])
    with pytest.raises(InvalidArgumentError, match=rf"a\.tar' \(a damaged header at byte {second}\)"):
        open_data(path)
    for cut in (second, second + 100, end):
        path.write_bytes(whole[:cut])
        with pytest.raises(InvalidArgumentError, match=rf"no mark of the end at byte {cut // 512 * 512}"):
            open_data(path)
    path.write_bytes(whole[: second + 520])
    with pytest.raises(InvalidArgumentError, match=r"a\.tar' \(unexpected end of data\)"):
        open_data(path)
    path.write_bytes(whole)
    assert len(open_data(path)) == 3


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE])
def test_links_in_tar_files_are_not_left_out(kind: bytes, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        member = tarfile.TarInfo("cat/1.png")
        member.size = len(PNG)
        archive.addfile(member, io.BytesIO(PNG))
        link = tarfile.TarInfo("cat/2.png")
        link.type, link.linkname = kind, "cat/1.png"
        archive.addfile(link)
    with pytest.raises(InvalidArgumentError, match=r"'cat/2\.png' of '.*a\.tar', a link"):
        open_data(tmp_path / "a.tar")
