"""The explanation's last step against the reference in float64, the colour picture and the sum it must have."""

import pytest
import torch

from bcos_rt.explanation.picture import colour_picture
from bcos_rt.kernels import ops
from bcos_rt.kernels.triton.contributions import conv2d_contributions
from bcos_rt.kernels.triton.launch import Config
from tests.triton.cases import DTYPES, Geometry, compare, draw
from tests.triton.guard import check

NAMED_DTYPES = pytest.mark.parametrize("dtype", DTYPES, ids=("fp32", "fp16", "bf16"))
# The first layer's weight has the encoding's 6 channels, or 8 where it was padded.
STEMS = {
    "3x3": Geometry(8, 12, (3, 3), padding=(1, 1), size=(6, 5)),
    "3x3_stride_2": Geometry(6, 33, (3, 3), (2, 2), (1, 1), size=(7, 6)),
    "stem": Geometry(8, 16, (7, 7), (2, 2), (3, 3), size=(10, 9)),
    "patchify": Geometry(8, 24, (4, 4), (4, 4), size=(8, 12)),
    "patchify_uneven": Geometry(6, 10, (2, 3), (2, 3), size=(4, 9)),
    "patchify_rest": Geometry(6, 10, (4, 4), (4, 4), size=(9, 11)),
    "dilated": Geometry(6, 8, (3, 2), (2, 1), (2, 0), (2, 1), size=(8, 5)),
    "1x1": Geometry(6, 40, (1, 1), size=(3, 5)),
}
OPTIONS = ("stride", "padding", "dilation")


def tensors(geometry, dtype, images=2, classes=3, channels=6, pixels=torch.float32):
    image = torch.rand(images, 3, *geometry.size, generator=torch.Generator().manual_seed(3))
    return {
        "grad": geometry.y_like(images * classes, dtype),
        "weight": geometry.weight(dtype),
        "image": (image * 255).to(pixels) if pixels == torch.uint8 else image.to(pixels),
        "inverse_std": draw((channels,), torch.float32, 4).abs() + 1,
    }


def options(geometry):
    return {key: value for key, value in geometry.options.items() if key in OPTIONS}


@NAMED_DTYPES
@pytest.mark.parametrize("name", STEMS)
def test_stems(name, dtype, guards):
    g = STEMS[name]
    results = compare(guards, "conv2d_contributions", dtype, tensors(g, dtype), want_weights=True, **options(g))
    assert [tuple(r.shape) for r in results] == [(6, 6, *g.size), (6, *g.size), (6, 4, *g.size)]


@pytest.mark.parametrize("name", ["3x3", "patchify"])
@pytest.mark.parametrize("channels", [3, 6])
@pytest.mark.parametrize("want_weights", [False, True])
def test_options(name, channels, want_weights, guards):
    g = STEMS[name]
    given = tensors(g, torch.float16, channels=channels, pixels=torch.uint8)
    weights, _, colour = compare(
        guards, "conv2d_contributions", torch.float16, given, scale=1 / 64, want_weights=want_weights, **options(g)
    )
    assert (weights.numel() > 0) == want_weights
    assert (colour.numel() > 0) == (channels == 6)


@pytest.mark.parametrize(("images", "classes"), [(1, 1), (1, 4), (3, 1)])
@pytest.mark.parametrize("name", ["3x3_stride_2", "patchify_uneven"])
def test_batches_and_classes(name, images, classes, guards):
    g = STEMS[name]
    compare(guards, "conv2d_contributions", torch.float32, tensors(g, torch.float32, images, classes), **options(g))


@pytest.mark.parametrize("pixels", [torch.float16, torch.float32, torch.uint8], ids=str)
def test_images_in_any_type_and_layout(pixels, guards):
    g = STEMS["3x3"]
    given = tensors(g, torch.float32, pixels=pixels)
    results = [
        compare(guards, "conv2d_contributions", torch.float32, {**given, "image": image}, **options(g))
        for image in (given["image"], given["image"].contiguous(memory_format=torch.channels_last))
    ]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_nothing_explains_nothing(guards):
    """A gradient of zeros: contributions and colours are zeros, not NaN."""
    g = STEMS["stem"]
    given = tensors(g, torch.float16)
    given["grad"].zero_()
    results = compare(guards, "conv2d_contributions", torch.float16, given, want_weights=True, **options(g))
    assert not any(r.any() for r in results)


@pytest.mark.parametrize(("dtype", "size"), [(torch.float16, 1e-5), (torch.bfloat16, 1e-25), (torch.float32, 1e-25)])
def test_tiny_gradients_keep_their_opacity(dtype, size, guards):
    """Squares of such weights underflow even in fp32; the norm must not."""
    g = STEMS["3x3"]
    given = tensors(g, torch.float64)
    given["grad"] = (given["grad"] * size).to(dtype)
    given["weight"] = given["weight"].to(dtype)
    results = compare(guards, "conv2d_contributions", dtype, given, want_weights=True, **options(g))
    weights, contributions, colour = results
    # By themselves: beside the colours they are nothing.
    shown = (contributions > 0).double()
    check(colour[:, 3] * shown.float(), weights.double().norm(dim=1) * shown, torch.float32)


def test_sums_up_to_the_response(guards):
    """Contributions of W = conv^T(g) to g's linear response: they sum to <conv(encoded / std), g>."""
    g = STEMS["stem"]
    t = tensors(g, torch.float32, images=2, classes=1)
    with ops.use_backend("triton"):
        given = {key: guards.guarded(value) for key, value in t.items()}
        _, contributions, _ = ops.conv2d_contributions(**given, **options(g))
    encoded = torch.cat([t["image"], 1 - t["image"]], 1).double() * t["inverse_std"].double()[:, None, None]
    response = torch.nn.functional.conv2d(encoded, t["weight"][:, :6].double(), **options(g))
    total = (response * t["grad"].double()).sum((1, 2, 3))
    check(contributions.sum((1, 2)), total, torch.float32)


def test_colours_are_the_picture_s(guards):
    g = STEMS["3x3"]
    t = tensors(g, torch.float32, classes=1)
    with ops.use_backend("triton"):
        given = {key: guards.guarded(value) for key, value in t.items()}
        weights, _, colour = ops.conv2d_contributions(**given, want_weights=True, **options(g))
    encoded = torch.cat([t["image"], 1 - t["image"]], 1).double()
    picture = colour_picture(encoded, weights.cpu().double(), smooth=0, alpha_percentile=100).permute(0, 3, 1, 2)
    check(colour[:, :3], picture[:, :3], torch.float32)
    alpha = colour[:, 3].cpu().double()
    check((alpha / alpha.flatten(1).amax(1)[:, None, None]).float(), picture[:, 3], torch.float32)


@pytest.mark.parametrize("config", [Config(16, 16, 16), Config(128, 64, 64, 8)], ids=str)
@pytest.mark.parametrize("name", ["stem", "patchify"])
def test_tiles_do_not_change_the_result(name, config, guards):
    g = STEMS[name]
    t = tensors(g, torch.float16)
    expected = compare(guards, "conv2d_contributions", torch.float16, t, want_weights=True, **options(g))
    given = {key: guards.guarded(value) for key, value in t.items()}
    actual = conv2d_contributions(**given, want_weights=True, config=config, **options(g))
    for result, truth in zip(actual, expected, strict=True):
        check(result, truth.double(), torch.float32)
