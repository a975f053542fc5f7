"""The estimate's arithmetic on made-up compile results, and the plan's output on toy shapes."""

import io
import json
import math

import pytest
import torch

pytest.importorskip("triton")

from bcos_rt.errors import InvalidArgumentError
from bcos_rt.kernels.static import plan as planning
from bcos_rt.kernels.static.plan import Compiled, LayerShape, Problem, estimate, plan, rank, resident_programs
from bcos_rt.kernels.static.targets import TARGETS
from bcos_rt.kernels.triton.launch import Config

H100 = TARGETS["sm_90"]
TILE = Config(128, 128, 64, 8, 3)
MODEST = Compiled(registers=128, spills=0, shared=96 * 1024, loop=100, rest=400)
BIG = Problem("conv2d", m=128 * 132 * 4, n=128, k=1024, groups=1, dtype=torch.bfloat16, places=1, bytes=10**6)
SHAPES = {
    LayerShape(False, 2, 14, 14, 32, 64, (3, 3), (1, 1), (1, 1)): ["body.0", "body.1"],
    LayerShape(True, 2, 1, 1, 64, 16): ["head"],
    LayerShape(False, 2, 14, 14, 64, 64, (3, 3), (1, 1), (1, 1), (1, 1), 64): ["depthwise"],
}


@pytest.mark.parametrize(
    ("compiled", "config", "expected"),
    [
        (MODEST, TILE, 2),  # 65536 / (128 * 256) registers, 228 KB / (96 + 1) KB
        (Compiled(136, 0, 0, 1, 1), TILE, 1),
        (Compiled(32, 0, 113 * 1024, 1, 1), TILE, 2),
        (Compiled(32, 0, 114 * 1024, 1, 1), TILE, 1),  # twice (114 + 1) KB is more than 228
        (Compiled(32, 0, 228 * 1024, 1, 1), TILE, 0),
        (Compiled(16, 0, 0, 1, 1), Config(16, 16, 16, 4, 1), 16),  # 64 warps
        (Compiled(32, 0, 0, 1, 1, tensor_columns=256), TILE, 2),
    ],
)
def test_resident_programs(compiled, config, expected):
    assert resident_programs(config, compiled, H100) == expected


def test_estimate_follows_its_equations():
    e = estimate(BIG, TILE, MODEST, H100)
    assert (e.programs, e.resident, e.waves, e.busy) == (528, 2, 2.0, 1.0)
    assert e.occupancy == pytest.approx(2 * 8 / 64)
    steps, load, per_us = 16, 4, 1830
    assert e.issue_us == pytest.approx(load * steps * 8 * 100 / 4 / per_us)
    assert e.l2_us == pytest.approx(load * steps * 256 * 64 * 2 / 64 / per_us)
    # 528 tiles of 128 x 128 x 1024 multiply-adds at the peak rate.
    assert e.mma_us == pytest.approx(2 * 528 * 128 * 128 * 1024 / 989.4e6)
    assert e.memory_us == pytest.approx(1e6 / 3350e3)
    around = (load * 8 * 400 / 4 + 2 * 1000) / per_us
    assert e.time_us == pytest.approx(max(e.issue_us, e.mma_us, e.l2_us) + around)
    assert e.bound == max(("issue", "mma", "l2"), key=lambda name: getattr(e, f"{name}_us"))


def test_bytes_can_be_the_bound():
    e = estimate(Problem("linear", 4096, 128, 64, 1, torch.bfloat16, 1, 10**9), TILE, MODEST, H100)
    assert e.bound == "memory"
    assert e.time_us == e.memory_us == pytest.approx(1e9 / 3350e3)


def test_a_tail_leaves_multiprocessors_idle():
    one_more = Problem("conv2d", 128 * 133, 128, 1024, 1, torch.bfloat16, 1, 10**6)
    full = Problem("conv2d", 128 * 132, 128, 1024, 1, torch.bfloat16, 1, 10**6)
    assert estimate(full, TILE, MODEST, H100).busy == 1
    assert estimate(one_more, TILE, MODEST, H100).busy == pytest.approx(133 / 264)


def test_each_place_takes_its_channels_by_itself():
    problem = Problem("conv2d", 1024, 64, 9 * 96, 1, torch.bfloat16, 9, 1)
    assert problem.steps(TILE) == 18
    assert problem.steps(Config(64, 64, 32)) == 27


def test_rank_puts_spills_last_then_time():
    slow, spilling, unfit = Config(64, 64, 64), Config(128, 256, 64, 8), Config(256, 256, 64, 8)
    compiled = {
        TILE: MODEST,
        slow: Compiled(128, 0, 65536, 900, 400),
        spilling: Compiled(64, 8, 1024, 1, 1),
        unfit: Compiled(255, 0, 300 * 1024, 1, 1),
    }
    ranked = rank(BIG, [unfit, spilling, slow, TILE], compiled.__getitem__, H100)
    assert [e.config for e in ranked] == [TILE, slow, spilling, unfit]
    assert ranked[-1].resident == 0
    assert math.isinf(ranked[-1].time_us)


def by_size(launch):
    """A compiler whose loop is long for all but the smallest tiles."""
    config = launch.config
    area = config.block_m * config.block_n
    return Compiled(64, 0, 16 * 1024, 50 if area <= 64 * 64 else 5000, 100)


def shown(as_json, one=by_size, **changes):
    """The plan of SHAPES; ``one`` says what the compiler makes of a launch."""
    stream = io.StringIO()

    def compiler(launches, arch):
        return [one(launch) for launch in launches]

    plan(**{"arch": "sm_90", "model": "toy", "batch": 2, "layers": SHAPES, "compiler": compiler} | changes,
         as_json=as_json, stream=stream)  # fmt: skip
    return stream.getvalue()


def test_json():
    content = json.loads(shown(True))
    assert content["measured"] is False
    assert (content["arch"], content["batch"], content["dtype"]) == ("sm_90", 2, "bf16")
    assert content["depthwise_layers"] == 1
    body, head = content["layers"]
    assert (body["op"], body["m"], body["n"], body["k"], body["count"]) == ("conv2d", 2 * 14 * 14, 64, 9 * 32, 2)
    assert (head["op"], head["m"], head["n"], head["k"], head["count"]) == ("linear", 2, 16, 64, 1)
    assert head["shape_class"] == "few"
    for layer in (body, head):
        assert layer["best"]["time_us"] <= layer["table"]["time_us"]
        assert layer["agrees"] == (layer["table"]["time_us"] <= 1.05 * layer["best"]["time_us"])
        assert layer["reason"]


def test_table_names_what_differs_and_measures_nothing():
    def prefer_large(launch):
        config = launch.config
        return Compiled(64, 0, 16 * 1024, 10 if config.block_m >= 128 else 100000, 100)

    text = shown(False, one=prefer_large)
    assert "392 x 64 x 288" in text
    assert "body.0 and 1 more" in text
    assert "NOT THE TABLE'S" in text
    assert "nothing was measured" in text
    assert "1 depthwise layers" in text


def test_the_tables_spills_are_named():
    chosen = next(iter(SHAPES)).record("sm_90", torch.bfloat16, None).config

    def spill_chosen(launch):
        return Compiled(64, 64 if launch.config == chosen else 0, 16 * 1024, 100, 100)

    body = json.loads(shown(True, one=spill_chosen))["layers"][0]
    assert body["table"]["compiled"]["spills"] == 64
    assert body["best"]["compiled"]["spills"] == 0
    assert not body["agrees"]
    assert body["reason"] == "table's choice spills 64"


def test_folded_stem_counts_one_place_per_kernel_row():
    stem = LayerShape(False, 2, 32, 32, 6, 64, (7, 7), (2, 2), (3, 3))
    launch = stem.record("sm_90", torch.bfloat16, None)
    problem = stem.problem(launch, torch.bfloat16)
    assert (problem.m, problem.n, problem.k) == (2 * 16 * 16, 64, 7 * 7 * 6)
    assert problem.steps(launch.config) == 7


@pytest.mark.parametrize(("argument", "value"), [("arch", "sm_91"), ("dtype", "fp8")])
def test_unknown_names_are_refused(argument, value):
    with pytest.raises(InvalidArgumentError, match=f"^{argument}: got '{value}'"):
        shown(True, **{argument: value})


def test_model_layers_of_a_small_network():
    layers = planning.model_layers("resnet18", 2)
    stem = LayerShape(False, 2, 224, 224, 6, 64, (7, 7), (2, 2), (3, 3))
    assert layers[stem] == ["conv1"]
    assert layers[LayerShape(True, 2, 1, 1, 512, 1000)] == ["fc"]
    assert sum(map(len, layers.values())) == 21
    with pytest.raises(InvalidArgumentError, match=r"^batch"):
        planning.model_layers("resnet18", 0)
    with pytest.raises(InvalidArgumentError, match=r"resnet18"):
        planning.model_layers("resnet81", 2)


def test_what_does_not_compile_comes_last_and_says_why():
    chosen = next(iter(SHAPES)).record("sm_90", torch.bfloat16, None).config

    def fail_chosen(launch):
        return Compiled(0, 0, 0, 0, 0, error="out of fuel") if launch.config == chosen else by_size(launch)

    body = json.loads(shown(True, one=fail_chosen))["layers"][0]
    assert body["table"]["time_us"] is None
    assert body["reason"] == "table's choice does not compile: out of fuel"


@pytest.mark.parametrize("arch", ["sm_80", "gfx942"])
def test_compiler_reports_the_main_loop(arch, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    launch = LayerShape(True, 4096, 1, 1, 256, 256).record(arch, torch.bfloat16, Config(64, 64, 64, 4, 2))
    (compiled,) = planning.compile_all([launch], arch)
    assert not compiled.error
    assert compiled.spills == 0
    assert 16 < compiled.registers <= 255
    assert compiled.shared >= 64 * 64 * 2
    # One step holds at least its matrix instructions: 64 x 64 x 64 / 4 warps of 16 x 8 x 16, or 32 x 32 x 8 on AMD.
    assert (32 if arch == "sm_80" else 8) <= compiled.loop < 400
    assert compiled.rest > compiled.loop
