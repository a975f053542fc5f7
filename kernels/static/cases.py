"""The launches that are compiled ahead of time: what the launchers ask for, on representative problems.

The real launchers are called on ``meta`` tensors, so that types, specialisation and tile are theirs. Every kernel that
multiplies matrices is built at every tile of the table, for every storage type, with the epilogue that needs most
registers; epilogues that are code of their own are added at one tile, and there fp16, whose code differs from bf16's
in conversions only, is left out. Each B-cos and transposed kernel comes with the
plain convolution of the same source, tile, type and shape of sum, which its main loop is compared with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bcos_rt.kernels.static.targets import TARGETS
from bcos_rt.kernels.triton import tune
from bcos_rt.kernels.triton.launch import Config, Launch, recording

__all__ = ["Case", "cases"]

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
DTYPES = (BF16, FP16, FP32)
_FEWER = (BF16, FP32)
_ONE = (BF16,)


@dataclass(frozen=True)
class Case:
    """One launch to compile.

    Attributes:
        arch: the target. variant: shape and epilogue, in words.
        launch: what is compiled; plain: the plain convolution that its main loop is compared with, or None.
    """

    arch: str
    variant: str
    launch: Launch
    plain: Launch | None = None


# Calls a launcher; the configuration is one of the table's, or None where the launcher's own rule is to decide.
Build = Callable[[torch.dtype, Config | None], object]


@dataclass(frozen=True)
class _Problem:
    """A call of a launcher, and where it is tried.

    Attributes:
        op: the table's op, "" for kernels that choose their tile themselves.
        classes: shape classes of the table whose tiles are built.
        build: calls the launcher; plain: calls the plain convolution with the tile that the launcher used.
    """

    op: str
    variant: str
    build: Build
    plain: Build | None = None
    classes: Sequence[str] = ("wide",)
    dtypes: Sequence[torch.dtype] = _FEWER


def _tensor(*shape: int, dtype: torch.dtype = FP32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _image(n: int, c: int, h: int, w: int, dtype: torch.dtype = FP32) -> Tensor:
    return _tensor(n, h, w, c, dtype=dtype).permute(0, 3, 1, 2)


def _is_plain(b: float | Tensor) -> bool:
    return not isinstance(b, Tensor) and b == 1


@dataclass(frozen=True)
class _Conv:
    """A convolution's shape; calls the launchers of the forward and the transposed kernel on it."""

    channels: int = 256
    filters: int = 256
    size: int = 28
    kernel: int = 3
    stride: int = 1
    padding: int = 1
    groups: int = 1
    batch: int = 32

    @property
    def out_size(self) -> int:
        return (self.size + 2 * self.padding - self.kernel) // self.stride + 1

    @property
    def geometry(self) -> dict[str, Any]:
        return {
            "stride": (self.stride, self.stride),
            "padding": (self.padding, self.padding),
            "dilation": (1, 1),
            "groups": self.groups,
        }

    def input(self, dtype: torch.dtype, per_image: int = 1) -> Tensor:
        return _image(self.batch * per_image, self.channels, self.size, self.size, dtype)

    def output(self, dtype: torch.dtype, per_image: int = 1) -> Tensor:
        return _image(self.batch * per_image, self.filters, self.out_size, self.out_size, dtype)

    def weight(self, dtype: torch.dtype) -> Tensor:
        return _image(self.filters, self.channels // self.groups, self.kernel, self.kernel, dtype)

    def forward(
        self, *, residual: bool = False, b: float | Tensor = 2.0, activation: str = "relu", bias: bool = False,
        scaled: bool = True, want: bool = True, squares: bool = True, map_tiles: int = 2,
    ) -> Build:  # fmt: skip
        """``want``: multiplier and gate; ``map_tiles``: entries per group of the producer's sum-of-squares map."""

        def build(dtype: torch.dtype, config: Config | None) -> object:
            from bcos_rt.kernels.triton.conv import conv2d_fused

            vector = _tensor(self.filters)
            return conv2d_fused(
                self.input(dtype), self.weight(dtype),
                None if _is_plain(b) else _image(self.batch, map_tiles * self.groups, self.size, self.size),
                vector if bias else None, vector if scaled else None, vector if scaled else None,
                self.output(dtype) if residual else None, **self.geometry, b=b, activation=activation,
                want_multiplier=want, want_gate=want, want_squares=squares, config=config,
            )  # fmt: skip

        return build

    def plain(self) -> Build:
        """The convolution with scale, shift and ReLU, as in a plain network."""
        return self.forward(b=1.0, want=False, squares=False)

    def transposed(
        self,
        *,
        classes: int = 3,
        multiplier: bool = True,
        identity: bool = False,
        gate: str = "",
        training: bool = False,
    ) -> Build:
        """``gate``: "" (and no raw gradient), "bits" or "tensor"; ``training``: grad_x with the norm's gradient."""

        def build(dtype: torch.dtype, config: Config | None) -> object:
            from bcos_rt.kernels.triton.conv_transposed import conv2d_transposed

            per_image = 1 if training else classes
            bits = _image(self.batch, -(-self.channels // 8), self.size, self.size, torch.uint8)
            return conv2d_transposed(
                self.output(dtype, per_image), self.weight(dtype), (self.size, self.size), **self.geometry,
                multiplier=self.input(dtype) if multiplier else None,
                identity=self.input(dtype, per_image) if identity else None,
                gate={"": None, "bits": bits, "tensor": self.input(dtype)}[gate], want_raw=bool(gate),
                x=self.input(dtype) if training else None,
                norm_grad=_image(self.batch, self.groups, self.out_size, self.out_size) if training else None,
                config=config,
            )  # fmt: skip

        return build

    def reversed_plain(self) -> Build:
        """The plain convolution whose sum is this one's adjoint: as many channels as this has filters."""
        if self.kernel == self.stride and self.padding == 0:
            return _Conv(self.filters, self.channels * self.kernel**2, self.out_size, 1, 1, 0).plain()
        return _Conv(self.filters, self.channels, self.size, self.kernel, 1, self.padding, self.groups).plain()


@dataclass(frozen=True)
class _Linear:
    """A linear layer on tokens [32, 197, channels]; calls the launchers of the forward and transposed kernel."""

    channels: int = 768
    filters: int = 3072

    def forward(
        self, *, residual: bool = False, b: float | Tensor = 2.0, activation: str = "gelu", want: bool = True
    ) -> Build:
        def build(dtype: torch.dtype, config: Config | None) -> object:
            from bcos_rt.kernels.triton.linear import linear_fused

            vector = _tensor(self.filters)
            return linear_fused(
                _tensor(32, 197, self.channels, dtype=dtype), _tensor(self.filters, self.channels, dtype=dtype),
                None if _is_plain(b) else _tensor(32, 197, 6), None, vector, vector,
                _tensor(32, 197, self.filters, dtype=dtype) if residual else None, b=b, activation=activation,
                want_multiplier=want, want_gate=want, want_squares=not _is_plain(b), config=config,
            )  # fmt: skip

        return build

    def plain(self) -> Build:
        return self.forward(b=1.0, want=False)

    def transposed(self, *, identity: bool = False, gate: bool = False, training: bool = False) -> Build:
        def build(dtype: torch.dtype, config: Config | None) -> object:
            from bcos_rt.kernels.triton.conv_transposed import linear_transposed

            batch = 32 if training else 96
            saved = _tensor(32, 197, self.channels, dtype=dtype)
            return linear_transposed(
                _tensor(batch, 197, self.filters, dtype=dtype), _tensor(self.filters, self.channels, dtype=dtype),
                None if training else saved,
                _tensor(batch, 197, self.channels, dtype=dtype) if identity else None, saved if gate else None, gate,
                saved if training else None, _tensor(32, 197, 1) if training else None, config,
            )  # fmt: skip

        return build

    def reversed_plain(self) -> Build:
        return _Linear(self.filters, self.channels).plain()


_ALL = tune.SHAPE_CLASSES


def _gemms() -> Iterator[_Problem]:
    conv, point = _Conv(), _Conv(kernel=1, padding=0)
    # Every tile, with everything that an explanation's forward pass can ask for.
    yield _Problem("conv2d", "3x3, all outputs", conv.forward(residual=True), conv.plain(), _ALL, DTYPES)
    some = ("wide", "narrow")
    yield _Problem("linear", "1x1, all outputs", point.forward(residual=True), point.plain(), some)
    tokens = _Linear()
    yield _Problem("linear", "tokens, all outputs", tokens.forward(residual=True), tokens.plain(), _ALL, DTYPES)
    yield _Problem(
        "conv2d_transposed", "3x3, identity, multiplier, raw with bit mask",
        conv.transposed(identity=True, gate="bits"), conv.reversed_plain(), _ALL, DTYPES,
    )  # fmt: skip
    yield _Problem(
        "linear_transposed", "1x1, identity, multiplier, raw with bit mask",
        point.transposed(identity=True, gate="bits"), point.reversed_plain(), some,
    )  # fmt: skip
    yield _Problem(
        "linear_transposed", "tokens, identity, multiplier, raw with gate", tokens.transposed(identity=True, gate=True),
        tokens.reversed_plain(), _ALL, DTYPES,
    )  # fmt: skip

    # Forward: inference; other B; other activations; other shapes.
    yield _Problem("conv2d", "3x3, inference", conv.forward(residual=True, want=False), conv.plain())
    yield _Problem("linear", "tokens, inference", tokens.forward(want=False), tokens.plain())
    yield _Problem("conv2d", "3x3, B = 1.5, GELU", conv.forward(b=1.5, activation="gelu", bias=True), conv.plain())
    yield _Problem(
        "conv2d", "3x3, B in memory, SiLU", conv.forward(b=_tensor(1), activation="silu"), conv.plain(), dtypes=_ONE
    )
    for activation in ("none", "relu6", "hardswish"):
        yield _Problem("conv2d", f"3x3, {activation}", conv.forward(activation=activation), conv.plain(), dtypes=_ONE)
    stem = _Conv(8, 64, 224, 7, 2, 3)
    yield _Problem("conv2d", "7x7 stem, stride 2", stem.forward(map_tiles=1), stem.plain(), ("narrow",))
    patch = _Conv(8, 768, 224, 16, 16, 0)
    yield _Problem("conv2d", "16x16 patches", patch.forward(map_tiles=1), patch.plain(), dtypes=_ONE)
    down = _Conv(256, 512, 56, 1, 2, 0)
    yield _Problem("conv2d", "1x1, stride 2", down.forward(), down.plain())
    grouped = _Conv(groups=8)
    yield _Problem("conv2d", "3x3, 8 groups", grouped.forward(map_tiles=1), grouped.plain(), ("narrow",))
    uneven = _Conv(channels=40, filters=328)
    yield _Problem("conv2d", "3x3, channels no tile divides", uneven.forward(map_tiles=1), uneven.plain())
    odd = _Conv(channels=33, filters=37)
    yield _Problem("conv2d", "3x3, odd channels", odd.forward(map_tiles=1), odd.plain(), ("small",))

    # Transposed: other strides, epilogues and shapes; training.
    halved = _Conv(size=56, stride=2)
    yield _Problem("conv2d_transposed", "3x3, stride 2, multiplier", halved.transposed(), halved.reversed_plain())
    yield _Problem(
        "conv2d_transposed",
        "3x3, multiplier, raw with gate",
        conv.transposed(gate="tensor"),
        conv.reversed_plain(),
        dtypes=_ONE,
    )
    yield _Problem(
        "conv2d_transposed", "3x3, nothing else", conv.transposed(multiplier=False), conv.reversed_plain(), dtypes=_ONE
    )
    yield _Problem(
        "conv2d_transposed", "3x3, training", conv.transposed(multiplier=False, training=True), conv.reversed_plain()
    )
    tiles = _Conv(64, 256, 112, 4, 4, 0)
    yield _Problem("linear_transposed", "4x4 patches, multiplier", tiles.transposed(), tiles.reversed_plain())
    yield _Problem("conv2d_transposed", "3x3, 8 groups", grouped.transposed(), grouped.reversed_plain(), ("narrow",))
    yield _Problem(
        "conv2d_transposed",
        "3x3, channels no tile divides",
        uneven.transposed(),
        uneven.reversed_plain(),
    )
    yield _Problem("linear_transposed", "tokens, training", tokens.transposed(training=True), tokens.reversed_plain())


def _contributions() -> Iterator[_Problem]:
    def build(conv: _Conv, channels: int, image_type: torch.dtype, want_weights: bool) -> Build:
        def run(dtype: torch.dtype, config: Config | None) -> object:
            from bcos_rt.kernels.triton.contributions import conv2d_contributions

            geometry = {key: value for key, value in conv.geometry.items() if key != "groups"}
            image = _tensor(conv.batch, 3, conv.size, conv.size, dtype=image_type)
            return conv2d_contributions(
                conv.output(dtype, 3), _image(conv.filters, channels, conv.kernel, conv.kernel, dtype), image,
                _tensor(channels), **geometry, want_weights=want_weights, config=config,
            )  # fmt: skip

        return run

    stem, patch = _Conv(6, 64, 224, 7, 2, 3), _Conv(6, 768, 224, 16, 16, 0)
    yield _Problem(
        "conv2d_transposed", "7x7 stem, with weights", build(stem, 6, FP32, True), classes=("narrow", "small")
    )
    yield _Problem("conv2d_transposed", "16x16 patches", build(patch, 6, torch.uint8, False))
    yield _Problem("conv2d_transposed", "7x7 stem, 3 channels", build(stem, 3, FP32, False), dtypes=_ONE)


def _untiled(variant: str, call: Callable[[torch.dtype], object], dtypes: Sequence[torch.dtype] = DTYPES) -> _Problem:
    """A kernel that chooses its tile by its own rule."""
    return _Problem("", variant, lambda dtype, _: call(dtype), dtypes=dtypes)


def _square_sums() -> Iterator[_Problem]:
    from bcos_rt.kernels.triton.square_sum import row_square_sum

    yield _untiled("256 channels", lambda dtype: row_square_sum(_tensor(32 * 28 * 28, 256, dtype=dtype)))
    yield _untiled("64 channels", lambda dtype: row_square_sum(_tensor(32 * 56 * 56, 64, dtype=dtype)), _ONE)


def _stem() -> Iterator[_Problem]:
    from bcos_rt.kernels.triton.stem import encode_image

    def call(image_type: torch.dtype, six: bool) -> Callable[[torch.dtype], object]:
        channels = 6 if six else 3
        image = _tensor(32, 3, 224, 224, dtype=image_type)
        return lambda dtype: encode_image(image, _tensor(channels), _tensor(channels), six, dtype)

    yield _untiled("uint8, 6 channels", call(torch.uint8, True))
    yield _untiled("float, 6 channels", call(FP32, True), _ONE)
    yield _untiled("float, 3 channels", call(FP32, False), _ONE)


def _pools() -> Iterator[_Problem]:
    from bcos_rt.kernels.triton import pool

    def x(dtype: torch.dtype, size: int, images: int = 32) -> Tensor:
        return _image(images, 256, size, size, dtype)

    bits = _image(32, 32, 56, 56, torch.uint8)
    index = _image(32, 256, 28, 28, torch.uint8)
    square, two, one, none = (3, 3), (2, 2), (1, 1), (0, 0)
    yield _untiled("3x3, stride 2, squares", lambda d: pool.avg_pool2d(x(d, 56), square, two, one, want_squares=True))
    yield _untiled(
        "2x2, 4 groups", lambda d: pool.avg_pool2d(x(d, 56), two, two, none, want_squares=True, groups=4), _ONE
    )
    yield _untiled("global", lambda d: pool.avg_pool2d(x(d, 7), (7, 7), one, none, want_squares=True))
    yield _untiled(
        "3x3, stride 2, index, squares",
        lambda d: pool.max_pool2d(x(d, 56), square, two, one, want_index=True, want_squares=True),
    )
    yield _untiled("3x3, stride 2", lambda d: pool.max_pool2d(x(d, 56), square, two, one), _ONE)
    yield _untiled(
        "average, identity, multiplier, raw with bit mask",
        lambda d: pool.avg_pool2d_transposed(
            x(d, 28, 96),
            (56, 56),
            square,
            two,
            one,
            multiplier=x(d, 56),
            identity=x(d, 56, 96),
            gate=bits,
            want_raw=True,
        ),
    )
    yield _untiled(
        "maximum, identity, multiplier, raw with bit mask",
        lambda d: pool.max_pool2d_transposed(
            x(d, 28, 96), index, (56, 56), square, two, one, multiplier=x(d, 56), identity=x(d, 56, 96), gate=bits,
            want_raw=True,
        ),
    )  # fmt: skip
    yield _untiled(
        "maximum, multiplier",
        lambda d: pool.max_pool2d_transposed(x(d, 28, 96), index, (56, 56), square, two, one, multiplier=x(d, 56)),
        _ONE,
    )


def _pointwise() -> Iterator[_Problem]:
    from bcos_rt.kernels.triton.scale_act import scale_act, scale_act_transposed

    def x(dtype: torch.dtype, images: int = 32) -> Tensor:
        return _image(images, 256, 28, 28, dtype)

    v = _tensor(256)
    yield _untiled("ReLU, squares", lambda d: scale_act(x(d), v, v, "relu", True))
    yield _untiled("GELU, squares of 4 groups", lambda d: scale_act(x(d), v, v, "gelu", True, 4), _ONE)
    yield _untiled("ReLU, identity", lambda d: scale_act_transposed(x(d, 96), x(d), v, v, "relu", x(d, 96)))
    yield _untiled("GELU", lambda d: scale_act_transposed(x(d, 96), x(d), v, v, "gelu"), _ONE)


def _norms() -> Iterator[_Problem]:
    from bcos_rt.kernels.triton import norms

    def tokens(dtype: torch.dtype, samples: int = 32, width: int = 768) -> Tensor:
        return _tensor(samples, 197, width, dtype=dtype)

    def x(dtype: torch.dtype, images: int = 32) -> Tensor:
        return _image(images, 256, 28, 28, dtype)

    v, wide, c, rstd, group_rstd = _tensor(768), _tensor(4096), _tensor(256), _tensor(32, 197), _tensor(32, 32)
    yield _untiled("768 channels, squares", lambda d: norms.layer_norm(tokens(d), v, v, 1e-6, True))
    yield _untiled("4096 channels", lambda d: norms.layer_norm(tokens(d, 32, 4096), wide, wide, 1e-6), _ONE)
    yield _untiled(
        "768 channels, identity", lambda d: norms.layer_norm_transposed(tokens(d, 96), rstd, v, tokens(d, 96))
    )
    yield _untiled("32 groups, squares", lambda d: norms.group_norm(x(d), 32, c, c, 1e-5, True))
    yield _untiled("32 groups, identity", lambda d: norms.group_norm_transposed(x(d, 96), group_rstd, c, 32, x(d, 96)))


def _attention() -> Iterator[_Problem]:
    """Head sizes from 32 to 128; one and three classes of an image; masks."""
    from bcos_rt.kernels.triton import attention

    def parts(dtype: torch.dtype, size: int, heads: int) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values as one projection of the tokens gives them."""
        query, key, value = _tensor(32, 197, 3, heads, size, dtype=dtype).permute(2, 0, 3, 1, 4).unbind(0)
        return query, key, value

    def forward(size: int, heads: int, mask: Tensor | None = None) -> Callable[[torch.dtype], object]:
        return lambda dtype: attention.attention(*parts(dtype, size, heads), mask, size**-0.5)

    def transposed(
        size: int, heads: int, classes: int, mask: Tensor | None = None, forward_dtype: torch.dtype | None = None
    ) -> Callable[[torch.dtype], object]:
        def call(dtype: torch.dtype) -> object:
            query, key, _ = parts(forward_dtype or dtype, size, heads)
            grad = _tensor(32 * classes, 197, heads, size, dtype=dtype).transpose(1, 2)
            return attention.attention_transposed(grad, query, key, _tensor(32, heads, 197), mask, size**-0.5)

        return call

    def pool(dtype: torch.dtype) -> object:
        """Sizes of 1 are constants to the compiler (which leaves no loop of the adjoint's)."""
        key = _tensor(32, 1, 50, 64, dtype=dtype)
        return attention.attention(_tensor(32, 1, 1, 64, dtype=dtype), key, key)

    mask = _tensor(12, 197, 197)
    yield _untiled("one head, one query", pool, _ONE)
    yield _untiled("64 channels a head", forward(64, 12))
    yield _untiled("64 channels a head, mask", forward(64, 12, mask))
    yield _untiled("128 channels a head, mask", forward(128, 6, mask[:6]))
    yield _untiled("32 channels a head, mask", forward(32, 12, mask), _FEWER)
    yield _untiled("80 channels a head", forward(80, 12), _ONE)
    yield _untiled("64 channels a head, 1 class", transposed(64, 12, 1))
    yield _untiled("64 channels a head, 3 classes, mask", transposed(64, 12, 3, mask))
    yield _untiled("128 channels a head, 3 classes, mask", transposed(128, 6, 3, mask[:6]))
    yield _untiled("32 channels a head, 3 classes, mask", transposed(32, 12, 3, mask), _FEWER)
    yield _untiled("80 channels a head, 1 class", transposed(80, 12, 1), _ONE)
    yield _untiled("64 channels a head, 3 classes, fp32 forward pass", transposed(64, 12, 3, None, FP32), _ONE)


def _training() -> Iterator[_Problem]:
    """Weight gradients, on the table's tiles, and what turns grad_y into grad_z; see also "training" above."""
    from bcos_rt.kernels.triton import training

    def weights(conv: _Conv) -> Build:
        def run(dtype: torch.dtype, config: Config | None) -> object:
            g = conv.geometry
            kernel = (conv.kernel, conv.kernel)
            grad, x = (t.permute(0, 2, 3, 1) for t in (conv.output(dtype), conv.input(dtype)))
            return training.grad_weight(
                grad, x, kernel, g["stride"], g["padding"], g["dilation"], conv.groups, config=config
            )

        return run

    def response(conv: _Conv, b: float | Tensor, kept: str, row_norm: bool) -> Callable[[torch.dtype], object]:
        def run(dtype: torch.dtype) -> object:
            g, out = conv.geometry, conv.output(dtype).permute(0, 2, 3, 1)
            y, z = (out, None) if kept == "y" else (None, out)
            squares = _tensor(conv.batch, conv.size, conv.size, conv.groups)
            size, kernel = (conv.size, conv.size), (conv.kernel, conv.kernel)
            return training.grad_response(
                out, y, z, squares, size, kernel, g["stride"], g["padding"], g["dilation"], b, 1e-6, row_norm
            )

        return run

    conv, point, stem = _Conv(), _Conv(kernel=1, padding=0), _Conv(8, 64, 224, 7, 2, 3)
    yield _Problem("grad_weight", "3x3", weights(conv), None, _ALL, DTYPES)
    yield _Problem("grad_weight", "1x1", weights(point))
    yield _Problem("grad_weight", "7x7 stem", weights(stem), None, ("narrow",))
    yield _untiled("3x3, B = 2 from y", response(conv, 2.0, "y", False))
    yield _untiled("3x3, learned B from z", response(conv, _tensor(1), "z", False), _ONE)
    yield _untiled("rows, B = 2 from y", response(point, 2.0, "y", True), _ONE)


def _depthwise() -> Iterator[_Problem]:
    conv = _Conv(groups=256)
    halved = _Conv(size=56, kernel=5, stride=2, padding=2, groups=256)
    for name, shape in (("3x3", conv), ("5x5, stride 2", halved)):
        forward, plain = shape.forward(residual=True, map_tiles=1), shape.plain()
        back = shape.transposed(identity=True, gate="bits")
        dtypes = DTYPES if shape is conv else _ONE
        yield _Problem("", f"{name}, all outputs", forward, dtypes=dtypes)
        yield _Problem("", name, plain, dtypes=dtypes)
        yield _Problem("", f"{name}, identity, multiplier, raw with bit mask", back, dtypes=dtypes)

    def weights(dtype: torch.dtype) -> object:
        from bcos_rt.kernels.triton.depthwise import depthwise_grad_weight

        return depthwise_grad_weight(conv.output(dtype), conv.input(dtype), (3, 3), (1, 1), (1, 1), (1, 1))

    yield _untiled("3x3, weight gradient", weights)


_SOURCES: tuple[Callable[[], Iterator[_Problem]], ...] = (
    _gemms, _contributions, _training, _depthwise, _square_sums, _stem, _pools, _pointwise, _norms,
    _attention,
)  # fmt: skip


def cases(archs: Iterable[str] = tuple(TARGETS)) -> list[Case]:
    """Everything that is compiled for ``archs``, each distinct piece of code once; plain convolutions are cases too."""
    found: dict[tuple[Any, ...], Case] = {}
    for arch in archs:
        for source in _SOURCES:
            for problem in source():
                for case in _expand(problem, arch):
                    found.setdefault((arch, case.launch.key), case)
    return list(found.values())


def _expand(problem: _Problem, arch: str) -> Iterator[Case]:
    for dtype in problem.dtypes:
        table = tune.table(problem.op, arch, dtype) if problem.op else {}
        for name in problem.classes if problem.op else ("",):
            # A transposed tile is told by its own launch: launchers cut it to the shape.
            for launch in _recorded(arch, problem.build, dtype, table.get(name)):
                if problem.plain is None or not launch.gemm:
                    yield Case(arch, problem.variant, launch)
                    continue
                plain = [p for p in _recorded(arch, problem.plain, dtype, launch.config) if p.gemm]
                if len(plain) != 1 or plain[0].config != launch.config or not plain[0].plain:
                    raise RuntimeError(f"{problem.variant}: no plain convolution with the tile {launch.config}")
                yield Case(arch, problem.variant, launch, plain[0])
                yield Case(arch, problem.variant.split(",")[0], plain[0])


def _recorded(arch: str, build: Build, dtype: torch.dtype, config: Config | None) -> list[Launch]:
    with recording(arch) as launches:
        build(dtype, config)
    return launches
