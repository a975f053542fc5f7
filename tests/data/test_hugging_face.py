"""Hugging Face data sets: damaged images are named, columns are checked, formats change nothing."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from bcos_rt.data import Augmented, loader, open_data, shard
from bcos_rt.errors import InvalidArgumentError, InvalidTypeError

from .test_sources import arrays, hugging_face, png

datasets = pytest.importorskip("datasets")


def rows(images: list[Any], labels: list[Any] | None = None, **columns: Any) -> Any:
    features = datasets.Features({"image": datasets.Image(), **columns})
    values: dict[str, list[Any]] = {"image": images}
    for name in columns:
        values[name] = [0] * len(images) if labels is None else labels
    return datasets.Dataset.from_dict(values, features=features)


@pytest.mark.parametrize("workers", [0, 1])
def test_damaged_images_are_named(workers: int, tmp_path: Path) -> None:
    good = png(arrays()[0][0])
    data = open_data(rows([{"bytes": good, "path": "a.png"}, {"bytes": good[:60], "path": "photos/b.png"}]))
    assert data[0][1] == -1
    with pytest.raises(InvalidArgumentError, match=r"got row 1 \(photos/b\.png\) of column 'image' \(.+\), expected"):
        list(loader(Augmented(data, 0), shard(2, 1), workers=workers))
    with pytest.raises(InvalidArgumentError, match=r"got row 0 of column 'image' \(cannot identify"):
        open_data(rows([{"bytes": b"nothing", "path": None}]))[0]
    with pytest.raises(InvalidArgumentError, match=r"got row 0 \(.*gone\.png\) of column 'image' \(.*No such file"):
        open_data(rows([{"bytes": None, "path": str(tmp_path / "gone.png")}]))[0]
    with pytest.raises(InvalidArgumentError, match=r"no image in row 0 of column 'image'"):
        open_data(rows([None]))[0]


def test_images_are_decoded_as_files_are(tmp_path: Path) -> None:
    pixels = np.arange(6, dtype=np.uint16).reshape(2, 3) * 10000
    Image.fromarray(pixels).save(tmp_path / "deep.png")
    turned = io.BytesIO()
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray((pixels // 256).astype(np.uint8)).save(turned, "PNG", exif=exif)
    data = open_data(rows([{"bytes": None, "path": str(tmp_path / "deep.png")}, {"bytes": turned.getvalue()}]))
    expected = torch.from_numpy(pixels.astype(np.float64) / 65535).float().expand(3, -1, -1)
    assert torch.equal(data[0][0], expected)
    assert data[1][0].shape == (3, 3, 2)


@pytest.mark.parametrize("format_", ["torch", "numpy", None])
def test_formats_change_nothing(format_: str | None, tmp_path: Path) -> None:
    plain = hugging_face(tmp_path)
    data, expected = open_data(plain.with_format(format_)), open_data(plain)
    for i in range(len(expected)):
        assert torch.equal(data[i][0], expected[i][0])
        assert data[i][1] == expected[i][1]
    undecoded = open_data(plain.cast_column("img", datasets.Image(decode=False)))
    assert torch.equal(undecoded[2][0], expected[2][0])


def test_a_transform_of_rows_stays(tmp_path: Path) -> None:
    def inverted(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        return {**batch, "img": [Image.eval(image, lambda value: 255 - value) for image in batch["img"]]}

    plain = hugging_face(tmp_path)
    data = open_data(plain.with_transform(inverted))
    torch.testing.assert_close(data[1][0], 1 - open_data(plain)[1][0])
    assert data[1][1] == 1


@pytest.mark.parametrize("shape", [(4, 5, 3), (3, 4, 5), (4, 5)])
@pytest.mark.parametrize("dtype", ["uint8", "int32", "float32"])
def test_columns_of_numbers(shape: tuple[int, ...], dtype: str) -> None:
    images = np.random.default_rng(0).integers(0, 256, (2, *shape)).astype(dtype)
    images = images / np.float32(255) if dtype == "float32" else images
    kind = {2: datasets.Array2D, 3: datasets.Array3D}[len(shape)]
    features = datasets.Features({"pixel_values": kind(shape, dtype)})
    data = open_data(datasets.Dataset.from_dict({"pixel_values": images}, features=features))
    expected = torch.from_numpy(images[1]).float()
    expected = expected if dtype == "float32" else expected / 255
    expected = expected.permute(2, 0, 1) if shape[-1] == 3 else expected.expand(3, 4, 5)
    assert torch.equal(data[1][0], expected)


def test_numbers_that_are_no_image_are_named() -> None:
    features = datasets.Features({"pixel_values": datasets.Array3D((2, 2, 3), "float32")})
    data = open_data(datasets.Dataset.from_dict({"pixel_values": np.full((1, 2, 2, 3), 7.0)}, features=features))
    with pytest.raises(InvalidArgumentError, match=r"row 0, of float.* from 7 to 7"):
        data[0]


@pytest.mark.parametrize(
    ("labels", "kind", "message"),
    [
        (["cat", "dog"], "string", r"'cat' in row 0 of column 'label'.*class_encode_column"),
        ([0, None], "int64", "None in row 1 of column 'label'"),
        ([0.0, 0.5], "float32", "0.0 in row 0 of column 'label'"),
        ([0, -4], "int64", "-4 in row 1"),
    ],
)
def test_labels_that_are_no_class_numbers_are_named(labels: list[Any], kind: str, message: str) -> None:
    images = [{"bytes": png(arrays()[0][0])}] * 2
    with pytest.raises(InvalidArgumentError, match=message):
        open_data(rows(images, labels, label=datasets.Value(kind)))


def test_columns_are_found_by_their_kind() -> None:
    image = png(arrays()[0][0])
    features = datasets.Features({"photo": datasets.Image(), "species": datasets.ClassLabel(names=["owl", "emu"])})
    data = open_data(datasets.Dataset.from_dict({"photo": [{"bytes": image}], "species": [1]}, features=features))
    assert (data[0][1], data.class_names) == (1, ("owl", "emu"))
    with pytest.raises(InvalidArgumentError, match="columns text, expected one with an image"):
        open_data(datasets.Dataset.from_dict({"text": ["a"]}))


def test_splits(tmp_path: Path) -> None:
    data = hugging_face(tmp_path)
    only = datasets.DatasetDict({"train": data})
    assert len(open_data(only, split="train")) == len(open_data(only)) == 6
    with pytest.raises(InvalidArgumentError, match="split: got 'val' of this DatasetDict, expected one of train"):
        open_data(only, split="val")
    assert len(open_data(datasets.DatasetDict({"all": data}), split="val")) == 6, "data without splits"
    both = datasets.DatasetDict({"train": data, "test": data.select([0])})
    assert len(open_data(both, split="val")) == 1
    with pytest.raises(InvalidArgumentError, match="split: got None, of this DatasetDict, expected one of train, test"):
        open_data(both)
    both.save_to_disk(tmp_path / "saved")
    with pytest.raises(InvalidArgumentError, match=r"split: got 'fold' of '.*saved'"):
        open_data(tmp_path / "saved", split="fold")


def test_streamed_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        InvalidTypeError, match=r"datasets\.IterableDataset, expected a datasets\.Dataset, not streamed"
    ):
        open_data(hugging_face(tmp_path).to_iterable_dataset())
