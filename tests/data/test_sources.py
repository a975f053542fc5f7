"""Every kind of data set gives the same images, labels and names."""

import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from bcos_rt.data import Augmentation, Augmented, ImageData, Mixing, derived_seed, loader, open_data, shard
from bcos_rt.errors import InvalidArgumentError, InvalidTypeError

CLASSES = ("cat", "dog")


def arrays(count: int = 6, side: int = 12) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    return generator.integers(0, 256, (count, side, side, 3), dtype=np.uint8), np.array([0, 1] * (count // 2))


def png(image: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


def add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))


def folder(path: Path) -> Path:
    images, labels = arrays()
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        target = path / CLASSES[label] / f"{i}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(png(image))
    (path / "cat" / ".hidden.png").write_bytes(b"no image")
    (path / "cat" / "notes.txt").write_text("no image")
    return path


def class_tar(path: Path, prefix: str = "") -> Path:
    images, labels = arrays()
    with tarfile.open(path, "w") as archive:
        for i, (image, label) in enumerate(zip(images, labels, strict=True)):
            add(archive, f"{prefix}{CLASSES[label]}/{i}.png", png(image))
    return path


def shards(path: Path) -> str:
    """Webdataset samples in two files, images before and after their classes."""
    images, labels = arrays()
    for number in range(2):
        with tarfile.open(path / f"part-{number:02}.tar", "w") as archive:
            for i in range(3 * number, 3 * number + 3):
                pair = [(f"s.d/{i:03}.png", png(images[i])), (f"s.d/{i:03}.cls", str(labels[i]).encode())]
                for name, data in pair if i % 2 else pair[::-1]:
                    add(archive, name, data)
    return str(path / "part-{00..01}.tar")


def hugging_face(path: Path) -> Any:
    datasets = pytest.importorskip("datasets")
    images, labels = arrays()
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=list(CLASSES))})
    rows = {"img": [Image.fromarray(image) for image in images], "label": labels.tolist()}
    return datasets.Dataset.from_dict(rows, features=features)


def saved_hugging_face(path: Path) -> str:
    import datasets

    datasets.DatasetDict({"train": hugging_face(path), "test": hugging_face(path).select([0])}).save_to_disk(
        path / "hf"
    )
    return str(path / "hf")


SOURCES: dict[str, Any] = {
    "folder": folder,
    "split folder": lambda path: folder(path / "train").parent,
    "tar": lambda path: class_tar(path / "a.tar"),
    "split tar": lambda path: class_tar(path / "a.tar", "./train/"),
    "shards": shards,
    "hugging face": hugging_face,
    "saved hugging face": saved_hugging_face,
    "uint8 array": lambda _: arrays(),
    "float tensor": lambda _: (torch.from_numpy(arrays()[0]).permute(0, 3, 1, 2) / 255, torch.from_numpy(arrays()[1])),
}


def by_label(data: Any) -> list[list[Tensor]]:
    """The images of each label, in a canonical order."""
    found: dict[int, list[Tensor]] = {0: [], 1: []}
    for i in range(len(data)):
        image, label = data[i]
        found[label].append(image)
    return [sorted(images, key=lambda image: image.flatten().tolist()) for images in found.values()]


@pytest.mark.parametrize("kind", SOURCES)
def test_sources_agree(kind: str, tmp_path: Path) -> None:
    data = open_data(SOURCES[kind](tmp_path), split="train")
    assert isinstance(data, ImageData)
    assert len(data) == 6
    image, label = data[0]
    assert image.dtype == torch.float32
    assert image.shape == (3, 12, 12)
    assert isinstance(label, int)
    expected: list[list[Tensor]] = [[], []]
    for array, i in zip(*arrays(), strict=True):
        expected[i].append(torch.from_numpy(array).permute(2, 0, 1).float() / 255)
    for ours, theirs in zip(by_label(data), expected, strict=True):
        for a, b in zip(ours, sorted(theirs, key=lambda image: image.flatten().tolist()), strict=True):
            assert torch.equal(a, b)
    assert data.labels is not None
    assert data.labels.tolist() == [data[i][1] for i in range(len(data))]
    if kind not in ("shards", "uint8 array", "float tensor"):
        assert data.class_names == CLASSES
    with pytest.raises(IndexError):
        data[6]


@pytest.mark.parametrize("kind", ["folder", "tar", "shards", "hugging face"])
@pytest.mark.parametrize("workers", [0, 2])
def test_loading_gives_the_same_for_any_number_of_workers(kind: str, workers: int, tmp_path: Path) -> None:
    transform = Augmentation.cifar(12).train_transform()
    data = Augmented(open_data(SOURCES[kind](tmp_path), transform=transform), seed=3)
    data.set_epoch(1)
    alone = [data[i][0] for i in range(len(data))]
    for _ in range(2):  # persistent workers see the next epoch too
        batches = list(loader(data, shard(len(data), 4), workers=workers))
        loaded = torch.cat([images for images, _ in batches])
        assert torch.equal(loaded, torch.stack(alone))
    data.set_epoch(2)
    assert not torch.equal(torch.stack([data[i][0] for i in range(len(data))]), loaded)


def test_workers_that_live_on_see_the_next_epoch(tmp_path: Path) -> None:
    data = Augmented(open_data(folder(tmp_path), transform=Augmentation.cifar(12).train_transform()), seed=0)
    loading = loader(data, shard(6, 6), workers=1)
    for epoch in range(3):
        data.set_epoch(epoch)
        images = next(iter(loading))[0]
        assert torch.equal(images, torch.stack([data[i][0] for i in range(6)])), epoch


@pytest.mark.parametrize(
    "augmentation",
    [Augmentation.cifar(12), Augmentation.imagenet_strong(10), Augmentation.cifar(12, policy="trivial_augment")],
)
def test_augmentation_is_torchs_with_the_items_seed(augmentation: Augmentation) -> None:
    images, labels = arrays()
    transform = augmentation.train_transform()
    data = Augmented(open_data((images, labels), transform=transform), seed=4)
    data.set_epoch(3)
    for i, image in enumerate(images):
        torch.manual_seed(derived_seed(4, 3, i))
        expected = transform(torch.from_numpy(image).permute(2, 0, 1))
        torch.manual_seed(77)
        assert torch.equal(data[i][0], expected)


def test_random_numbers_outside_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    data = Augmented(open_data(arrays(), transform=Augmentation.cifar(12).train_transform()), seed=0)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    # What torch.manual_seed calls for the generators of GPUs, in the presence of one or for when there is one.
    seeds: list[int] = []
    for name in ("manual_seed", "manual_seed_all"):
        monkeypatch.setattr(torch.cuda, name, seeds.append)
    data[0]
    Mixing(mixup=1.0)(torch.rand(2, 3, 4, 4, generator=torch.Generator()), torch.tensor([0, 1]), 2, seed=1)
    assert torch.equal(torch.rand(3), expected)
    assert seeds == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_random_numbers_of_a_gpu_are_left_alone() -> None:
    data = Augmented(open_data(arrays(), transform=Augmentation.cifar(12).train_transform()), seed=0)
    torch.cuda.manual_seed_all(9)
    torch.rand(3, device="cuda")
    before = torch.cuda.get_rng_state_all()
    data[0]
    images = torch.rand(4, 3, 6, 6, device="cuda", generator=torch.Generator("cuda"))
    mixed = Mixing(mixup=0.3, cutmix=1.0)(images, torch.arange(4, device="cuda"), 4, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(before, torch.cuda.get_rng_state_all(), strict=True))
    torch.manual_seed(10)
    again = Mixing(mixup=0.3, cutmix=1.0)(images, torch.arange(4, device="cuda"), 4, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(mixed, again, strict=True)), "a function of the seed alone"


def test_size_is_load_images(tmp_path: Path) -> None:
    from bcos_rt.images import load_image

    path = folder(tmp_path)
    data = open_data(path, size=8)
    assert torch.equal(data[0][0], load_image(path / "cat" / "0.png", 8))


def test_deep_and_transparent_images(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    Image.fromarray(np.full((4, 5), 65535, np.uint16)).save(tmp_path / "a" / "deep.png")
    Image.new("RGBA", (5, 4), (0, 0, 0, 0)).save(tmp_path / "a" / "none.png")
    data = open_data(tmp_path, transform=Augmentation.none().eval_transform())
    assert torch.equal(data[0][0], torch.ones(3, 4, 5))
    assert torch.equal(data[1][0], torch.ones(3, 4, 5)), "transparency lies over white"


def test_images_alone_are_unlabelled(tmp_path: Path) -> None:
    for i, image in enumerate(arrays()[0]):
        (tmp_path / f"{i}.png").write_bytes(png(image))
    data = open_data(tmp_path)
    assert data.class_names is None
    assert [data[i][1] for i in range(len(data))] == [-1] * 6
    assert open_data((arrays()[0], None))[3][1] == -1


def test_gray_arrays_become_rgb() -> None:
    image, _ = open_data((arrays()[0][..., 0], arrays()[1]))[2]
    assert torch.equal(image[0], image[2])
    assert image.shape == (3, 12, 12)


def black(image: Tensor) -> Tensor:
    return torch.zeros_like(image, dtype=torch.float32)


@pytest.mark.parametrize("kind", ["folder", "tar", "uint8 array", "float tensor", "hugging face"])
def test_open_data_takes_a_transform_too(kind: str, tmp_path: Path) -> None:
    data = open_data(SOURCES[kind](tmp_path))
    assert open_data(data) is data
    augmentation = Augmentation.imagenet_strong(7)
    transform = augmentation.train_transform()
    later, at_once = open_data(data, transform=transform), open_data(SOURCES[kind](tmp_path), transform=transform)
    for i in range(len(data)):
        torch.manual_seed(i)
        expected = at_once[i]
        torch.manual_seed(i)
        found = later[i]
        assert torch.equal(found[0], expected[0]), "as if opened with it"
        assert found[1] == expected[1]
    assert data.transform is None, "left as it was"
    assert open_data(data, size=5)[0][0].shape == (3, 5, 5)
    # What data already does comes first, and is not dropped.
    dark = open_data(data, transform=black)
    assert torch.equal(open_data(dark, transform=Augmentation.none(8).eval_transform())[1][0], torch.zeros(3, 8, 8))
    assert open_data(open_data(data, size=9), transform=Augmentation.none().eval_transform())[1][0].shape == (3, 9, 9)
    again = open_data(dark, size=6)
    assert (again.class_names, len(again)) == (data.class_names, len(data))
    assert again.labels is data.labels
    with pytest.raises(InvalidArgumentError, match="size, transform: got 8 and a transform, expected one of them"):
        open_data(data, size=8, transform=transform)


def test_a_users_own_data_set_is_augmented_too() -> None:
    images, labels = arrays()
    own = torch.utils.data.TensorDataset(torch.from_numpy(images).permute(0, 3, 1, 2) / 255, torch.from_numpy(labels))
    assert open_data(own)[1][1] == 1
    assert open_data(own, transform=Augmentation.none(8).train_transform())[0][0].shape == (3, 8, 8)


def test_damaged_files_are_named(tmp_path: Path) -> None:
    path = folder(tmp_path / "f")
    (path / "cat" / "0.png").write_bytes((path / "cat" / "0.png").read_bytes()[:40])
    with pytest.raises(InvalidArgumentError, match=r"0\.png"):
        open_data(path)[0]
    archive = tmp_path / "bad.tar"
    with tarfile.open(archive, "w") as file:
        add(file, "cat/x.png", b"nothing")
    with pytest.raises(InvalidArgumentError, match=r"'cat/x\.png' of .*bad\.tar"):
        open_data(archive)[0]
    (tmp_path / "cut.tar").write_bytes(class_tar(tmp_path / "a.tar").read_bytes()[:700])
    with pytest.raises(InvalidArgumentError, match=r"cut\.tar"):
        open_data(tmp_path / "cut.tar")


class Items(torch.utils.data.Dataset[Any]):
    """Items of a user's own."""

    def __init__(self, *items: Any) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        return self.items[index]


GRAY = torch.full((3, 4, 4), 0.5)


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([(GRAY, 0), (GRAY[:1], 1)], r"images of shape \(1, 4, 4\), torch.float32 \(item 1\)"),
        ([(GRAY, 0), (GRAY, 1.5)], "label 1.5 of item 1"),
        ([(GRAY, 0), (GRAY, None)], "label None of item 1"),
        ([(GRAY, 0), (GRAY, torch.tensor([0.0, 1.0]))], "label tensor.* of item 1"),
        ([(GRAY, 0), (GRAY, -3)], "label -3 of item 1"),
        ([(GRAY, 0), (GRAY, 1, 2)], "items of type tuple"),
        ([(GRAY, 0), (GRAY.numpy(), 1)], "images of type ndarray"),
        ([((GRAY - 0.485) / 0.229 - 1, 0)] * 2, "networks normalise them themselves"),
    ],
)
def test_items_of_users_are_checked(items: list[Any], message: str) -> None:
    with pytest.raises((InvalidArgumentError, InvalidTypeError), match=message):
        open_data(Items(*items))[1]


def test_labels_of_users_come_in_several_types() -> None:
    data = open_data(Items(*((GRAY, label) for label in (1, np.int64(2), torch.tensor(3), 4.0, torch.tensor([5]), -1))))
    assert [data[i][1] for i in range(6)] == [1, 2, 3, 4, 5, -1]


def test_a_users_module_may_be_called_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Items, "__module__", "datasets.mine")
    assert open_data(Items((GRAY, 1)))[0][1] == 1


@pytest.mark.parametrize("workers", [0, 1])
def test_errors_come_out_of_the_processes_that_read(workers: int, tmp_path: Path) -> None:
    path = folder(tmp_path)
    (path / "dog" / "1.png").write_bytes(b"no image")
    with pytest.raises(InvalidArgumentError, match=r"^path: got '.*dog/1\.png', which is no image") as caught:
        list(loader(Augmented(open_data(path), seed=0), shard(6, 2), workers=workers))
    assert caught.value.argument == "path"
    sizes = Items((GRAY, 0), (GRAY[:, :2], 1))
    with pytest.raises(InvalidArgumentError, match=r"images of several sizes, 2 x 4, 4 x 4.*\(give a size\)"):
        list(loader(open_data(sizes), shard(2, 2), workers=workers))


def test_orientation_gray_palette_and_more(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    pixels = np.arange(6, dtype=np.uint8).reshape(2, 3) * 40
    exif = Image.Exif()
    exif[274] = 6  # the camera was turned
    Image.fromarray(pixels).save(tmp_path / "a" / "turned.png", exif=exif)
    Image.fromarray(np.stack([pixels, pixels // 2], 2), "LA").save(tmp_path / "a" / "gray_alpha.png")
    Image.fromarray(pixels).convert("P").save(tmp_path / "a" / "palette.gif")
    Image.fromarray(pixels).convert("CMYK").save(tmp_path / "a" / "print.tif")
    data = open_data(tmp_path)
    gray_alpha, palette, printed, turned = (data[i][0] for i in range(4))
    expected = torch.from_numpy(pixels).float().div(255).expand(3, -1, -1)
    assert torch.equal(turned, expected.rot90(-1, (1, 2)))
    assert torch.equal(palette, expected)
    assert torch.equal(printed, expected)
    alpha = expected / 2
    torch.testing.assert_close(gray_alpha, expected * alpha + 1 - alpha, rtol=0, atol=1.5 / 255)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("/nowhere/at/all", "which does not exist"),
        ("/nowhere/part-{0..1}.tar", "existing tar files"),
        ("images.tar.gz", "gunzip"),
        ((np.zeros((2, 4, 4, 4), np.uint8), None), r"shape \(2, 4, 4, 4\)"),
        ((np.full((2, 3, 4, 4), 7.0), None), "images from 7 to 7"),
        ((np.zeros((2, 3, 4, 4), np.uint8), [1]), "one label an image"),
        ((np.zeros((2, 3, 4, 4), np.uint8), [1, -2]), "label -2"),
        (torch.utils.data.TensorDataset(torch.zeros(3, 1, 4, 4), torch.zeros(3)), r"shape \(1, 4, 4\)"),
    ],
)
def test_bad_data_is_named(spec: Any, message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        open_data(spec)


def test_wrong_types_are_named() -> None:
    names = (np.zeros((2, 3, 4, 4), np.uint8), ["cat", "dog"])
    for spec in (
        3,
        [1, 2],
        names,
        (np.zeros((2, 3, 4, 4), np.int64), None),
        (np.zeros((2, 3, 4, 4), np.uint8), [0.5, 1.0]),
    ):
        with pytest.raises(InvalidTypeError, match="data: got"):
            open_data(spec)


def test_splits_are_chosen_and_named(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "two.tar", "w") as archive:
        for split, count in (("train", 4), ("test", 2)):
            for i in range(count):
                add(archive, f"{split}/{CLASSES[i % 2]}/{i}.png", png(arrays()[0][i]))
    assert len(open_data(tmp_path / "two.tar", split="train")) == 4
    assert len(open_data(tmp_path / "two.tar", split="val")) == 2
    with pytest.raises(InvalidArgumentError, match="one of test, train"):
        open_data(tmp_path / "two.tar")
