"""The compile job itself: rules that real compiled kernels break, the caches, the cases."""

from __future__ import annotations

import json
import pkgutil
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
import torch
import triton
from typer.testing import CliRunner

import bcos_rt.kernels.triton as kernels
from bcos_rt.errors import InvalidArgumentError
from bcos_rt.kernels.static import __main__ as command
from bcos_rt.kernels.static import compile as compiling
from bcos_rt.kernels.static.cases import Case, cases
from bcos_rt.kernels.static.compile import (
    Analysis,
    NarrowAccess,
    analyse,
    analyse_all,
    cache_key,
    narrow_accesses,
    operand_tiles,
)
from bcos_rt.kernels.static.disassembly import IDLE_KINDS, Access, TileAccess
from bcos_rt.kernels.static.report import KnownException, Result, rows, violations, write_report
from bcos_rt.kernels.static.targets import TARGETS
from bcos_rt.kernels.triton import tune
from bcos_rt.kernels.triton.conv import tile_for
from bcos_rt.kernels.triton.launch import Config
from tests.static.small_kernels import matmul


@pytest.fixture(autouse=True, scope="module")
def _triton_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


def broken(launch, analysis: Analysis, plain: Analysis | None = None, arch: str = "sm_90") -> list[str]:
    return [v.rule for v in Result(Case(arch, "test", launch), analysis, plain).broken()]


# Triton's AMD backend stores so bare a product straight from the matrix instructions' layout, 8 bytes at a time.
BARE = {"gfx942": ["vectors"]}


@pytest.mark.parametrize("arch", TARGETS)
def test_an_ordinary_product_breaks_no_rule(arch: str):
    launch = matmul(arch)
    found = analyse(launch, arch)
    assert broken(launch, found, found) == BARE.get(arch, [])
    assert found.registers > 16
    assert found.shared_bytes > 0
    assert 0 < found.occupancy <= 1
    assert found.loop is not None
    assert found.loop["mma"] > 0
    assert sum(n for kind, n in found.loop.items() if kind not in IDLE_KINDS) == found.loop_instructions
    assert found.tile_loads == 2
    assert found.tile_stores == 1


def test_spills_are_found_on_nvidia():
    launch = matmul("sm_80", config=Config(128, 128, 32, 4, 2))
    found = analyse(launch, "sm_80", maxnreg=64)
    assert found.spills > 0
    assert found.stack_bytes > 0
    assert "spills" in broken(launch, found)


def test_spills_are_found_on_amd():
    # One wavefront for 256 x 256 sums: 1024 registers for each thread, and there are 512.
    launch = matmul("gfx942", config=Config(256, 256, 16, 1, 1))
    found = analyse(launch, "gfx942")
    assert found.spills > 0
    assert "spills" in broken(launch, found)


@pytest.mark.parametrize("arch", ["sm_80", "gfx942"])
def test_a_product_without_matrix_instructions_is_found(arch: str):
    launch = matmul(arch, dot=False, config=Config(16, 16, 16, 4, 1))
    found = analyse(launch, arch)
    assert found.loop_instructions == found.mma_instructions == 0
    assert "tensor cores" in broken(launch, found)


@pytest.mark.parametrize("arch", ["sm_80", "sm_100", "gfx942"])
def test_narrow_accesses_are_found(arch: str):
    launch = matmul(arch, aligned=False)
    found = analyse(launch, arch)
    assert {n.direction for n in found.narrow} == {"load", "store"}
    assert all(n.size < n.expected == 16 for n in found.narrow)
    assert "vectors" in broken(launch, found)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "gfx942"])
def test_a_norm_inside_the_loop_is_found(arch: str):
    plain = analyse(matmul(arch), arch)
    launch = matmul(arch, squares=True)
    found = analyse(launch, arch)
    assert broken(launch, found, plain) == [*BARE.get(arch, []), "loop"]


def test_a_kernel_that_does_not_compile_is_found():
    launch = matmul("sm_90", config=Config(48, 64, 32, 4, 2))
    found = analyse(launch, "sm_90")
    assert "power of 2" in found.error
    assert broken(launch, found) == ["compiles"]


def test_loop_limit_is_three_per_cent():
    launch = matmul("sm_90")
    good = Analysis(registers=1, loop_instructions=103, loop={"mma": 4}, tile_loads=1, tile_stores=1)
    assert broken(launch, good, replace(good, loop_instructions=100)) == []
    assert broken(launch, good, replace(good, loop_instructions=99)) == ["loop"]
    # Twice unrolled.
    assert broken(launch, good, replace(good, loop_instructions=200, loop={"mma": 8})) == []
    assert broken(launch, good, replace(good, loop_instructions=199, loop={"mma": 8})) == ["loop"]


def test_vectors_need_tiles_to_check():
    launch = matmul("sm_90")
    blind = Analysis(loop_instructions=1, tile_stores=1)
    assert broken(launch, blind) == ["vectors"]
    assert broken(replace(launch, vector_operands=False), blind) == []


def test_narrow_access_depends_on_what_a_thread_has():
    tile = [TileAccess("store", "bf16", 1024, "f.py:1:1")]
    eight = [Access("store", 8, "f.py:1:1"), Access("store", 16, "f.py:9:9")]
    assert narrow_accesses(tile, eight, 128) == (NarrowAccess("store", "f.py:1:1", 8, 16),)
    assert narrow_accesses(tile, eight, 256) == ()
    assert narrow_accesses(tile, [], 128) == (NarrowAccess("store", "f.py:1:1", 0, 16),)


def test_tiles_of_other_types_are_no_operands():
    tiles = [TileAccess("store", element, 1024, "f.py:1:1") for element in ("bf16", "fp32", "u8")]
    assert [t.element for t in operand_tiles(tiles, "bf16")] == ["bf16"]
    assert [t.element for t in operand_tiles(tiles[1:], "bf16")] == ["fp32"]


def test_results_are_cached_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    wanted = [(matmul(arch), arch) for arch in ("sm_80", "gfx942")]
    steps: list[tuple[int, int]] = []
    first = analyse_all([*wanted, wanted[0]], tmp_path, 1, lambda done, total, _: steps.append((done, total)))
    assert steps == [(0, 2), (1, 2), (2, 2)]
    assert first[0] == first[2] == analyse(*wanted[0])

    def no_pool(*_: object) -> None:
        raise RuntimeError("compiles although everything is cached")

    monkeypatch.setattr(compiling, "ProcessPoolExecutor", no_pool)
    assert analyse_all(wanted, tmp_path) == first[:2]
    # A file cut off half-way is not believed.
    (tmp_path / "analysed" / f"{cache_key(*wanted[0])}.json").write_text('{"registers": 3', encoding="utf-8")
    with pytest.raises(RuntimeError, match="although"):
        analyse_all(wanted, tmp_path)


def test_cache_key_tells_launches_apart():
    base = matmul("sm_90")
    keys = {
        cache_key(base, "sm_90"),
        cache_key(base, "sm_80"),
        cache_key(matmul("sm_90", squares=True), "sm_90"),
        cache_key(matmul("sm_90", aligned=False), "sm_90"),
        cache_key(matmul("sm_90", config=Config(64, 64, 32, 8, 2)), "sm_90"),
        cache_key(base, "sm_90", {"maxnreg": 64}),
    }
    assert len(keys) == 6
    assert cache_key(matmul("sm_90"), "sm_90") in keys


def test_bad_arguments():
    with pytest.raises(InvalidArgumentError, match="sm_70"):
        analyse(matmul("sm_90"), "sm_70")
    with pytest.raises(InvalidArgumentError, match="workers"):
        analyse_all([], workers=0)


def test_exceptions_cover_and_are_counted():
    launch = matmul("sm_90")
    result = Result(
        Case("sm_90", "test", launch), Analysis(spills=3, loop_instructions=9, tile_loads=1, tile_stores=1), None
    )
    known = KnownException("spills", "small_*", "sm_90", "*", "*", "for the test")
    idle = KnownException("spills", "other", "*", "*", "*", "nothing")
    failed, excused = violations([result], (known, idle))
    assert failed == []
    assert [len(v) for v in excused.values()] == [1, 0]
    assert len(violations([result], (idle,))[0]) == 1


def test_check_exits_1_and_lists_each_violation(monkeypatch: pytest.MonkeyPatch):
    launch = matmul("sm_90")
    good = Result(Case("sm_90", "good", launch), Analysis(loop_instructions=9, tile_loads=1, tile_stores=1), None)
    bad = Result(Case("sm_90", "bad", launch), Analysis(tile_loads=1, tile_stores=1, stack_bytes=8), None)
    monkeypatch.setattr(command, "_compile", lambda *_: [good, bad])
    ran = CliRunner().invoke(command.app, ["check", "--arch", "sm_90", "--json"])
    assert ran.exit_code == 1
    listed = json.loads(ran.stdout)["violations"]
    assert [(v["rule"], v["kernel"], v["arch"], v["dtype"], v["config"], v["variant"]) for v in listed] == [
        ("spills", "small_matmul", "sm_90", "bf16", "64x64x32 w4 s2", "bad"),
        ("tensor cores", "small_matmul", "sm_90", "bf16", "64x64x32 w4 s2", "bad"),
    ]
    assert "spills" in CliRunner().invoke(command.app, ["check", "--arch", "sm_90"]).stdout
    monkeypatch.setattr(command, "_compile", lambda *_: [good])
    assert CliRunner().invoke(command.app, ["check", "--arch", "sm_90"]).exit_code == 0


def test_check_refuses_unknown_targets():
    ran = CliRunner().invoke(command.app, ["check", "--arch", "sm_70"])
    assert ran.exit_code == 2
    assert "sm_70" in ran.output


def test_report_writes_both_files(tmp_path: Path):
    launch = matmul("sm_90", squares=True)
    plain = Analysis(registers=40, loop_instructions=10, loop={"mma": 4, "integer": 6}, tile_loads=1, tile_stores=1)
    result = Result(Case("sm_90", "3x3, all outputs", launch), replace(plain, registers=50), plain)
    page, data = write_report([result], tmp_path)
    (row,) = json.loads(data.read_text())
    assert row == rows([result])[0]
    assert row["kernel"] == "small_matmul"
    assert row["registers"] == 50
    assert row["loop_instructions"] == 10
    assert "spills" not in row
    text = page.read_text()
    assert triton.__version__ in text
    assert "Nothing here ran on a GPU" in text
    assert "| small_matmul, 3x3 | bf16 | 64x64x32 w4 s2 | 10 | 10 | 4 | 6 |" in text


@pytest.fixture(scope="module")
def everything() -> list[Case]:
    return cases()


def test_every_kernel_is_compiled(everything: list[Case]):
    found = set()
    for module in pkgutil.iter_modules(kernels.__path__):
        for name, value in vars(import_module(f"{kernels.__name__}.{module.name}")).items():
            if isinstance(value, triton.JITFunction) and name.endswith("_kernel"):
                found.add(name)
    assert found == {case.launch.function.__name__ for case in everything}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("op", ["conv2d", "linear", "conv2d_transposed", "linear_transposed"])
def test_every_table_entry_is_compiled(op: str, dtype: torch.dtype, everything: list[Case]):
    name = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[dtype]
    for arch in TARGETS:
        built = {
            c.launch.config
            for c in everything
            if (c.arch, c.launch.name, c.launch.dtype, c.launch.plain) == (arch, op, name, False)
        }
        # Launchers may widen a tile to whole entries of the sum-of-squares map.
        assert {tile_for(config, 256, 256) for config in tune.table(op, arch, dtype).values()} <= built


def test_every_compared_kernel_has_its_plain_convolution(everything: list[Case]):
    for case in everything:
        compared = case.launch.gemm and not case.launch.plain and case.launch.name in (
            "conv2d", "linear", "conv2d_transposed", "linear_transposed"
        )  # fmt: skip
        assert (case.plain is not None) == compared
        if case.plain is not None:
            assert case.plain.plain
            assert (case.plain.config, case.plain.dtype) == (case.launch.config, case.launch.dtype)


def test_no_launch_is_compiled_twice(everything: list[Case]):
    keys = [(case.arch, case.launch.key) for case in everything]
    assert len(keys) == len(set(keys))
