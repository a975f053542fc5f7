"""The tile table is complete and within each architecture's limits; tuned choices survive files, broken ones do not."""

import json
import os

import pytest
import torch

pytest.importorskip("triton")

from triton.runtime.errors import OutOfResources

from bcos_rt.errors import InvalidArgumentError
from bcos_rt.kernels.triton import tune
from bcos_rt.kernels.triton.launch import Config, recording

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
SHARED = {"sm_80": 163, "sm_90": 227, "sm_100": 227, "sm_120": 99, "gfx942": 64}  # KB a program may use
PROBLEM = ("conv2d", "sm_90", 6272, 256, 2304, torch.bfloat16)


@pytest.fixture(autouse=True)
def forget(monkeypatch):
    """Every test starts, and leaves the next one, without tuned entries."""
    monkeypatch.delenv(tune.ENVIRONMENT_VARIABLE, raising=False)
    tune.clear()
    yield
    tune.clear()


def entry(**changes):
    op, arch, m, n, k, _ = PROBLEM
    config = {"block_m": 64, "block_n": 32, "block_k": 64, "num_warps": 4, "num_stages": 2, "group_m": 4}
    return {
        "op": op,
        "arch": arch,
        "m": m,
        "n": n,
        "k": k,
        "dtype": "bf16",
        "config": config,
        "milliseconds": 0.5,
    } | changes


def written(path, **changes):
    """A valid file of one entry, with some of its keys changed."""
    content = {"format": "bcos-rt tile configurations", "version": 1, "triton": "3.8.0", "entries": [entry()]}
    path.write_text(json.dumps(content | changes))
    return path


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("arch", tune.FAMILIES)
@pytest.mark.parametrize("op", tune.OPS)
def test_table_is_complete_and_fits_the_hardware(op, arch, dtype):
    entries = tune.table(op, arch, dtype)
    assert tuple(entries) == tune.SHAPE_CLASSES
    assert len(set(entries.values())) <= 4
    for config in entries.values():
        for size in (config.block_m, config.block_n, config.block_k):
            assert size >= 16
            assert size & (size - 1) == 0
        operands = (config.block_m + config.block_n) * config.block_k * dtype.itemsize
        # Every stage in flight may hold one pair of operand tiles.
        assert operands * config.num_stages <= SHARED[arch] * 1024
        assert config.num_warps in (4, 8)
        if arch == "gfx942":
            assert config.num_stages == 2


@pytest.mark.parametrize(
    ("arch", "expected"),
    [
        *((name, name) for name in tune.FAMILIES),
        ("sm_86", "sm_120"),
        ("sm_87", "sm_80"),
        ("sm_89", "sm_120"),
        ("sm_75", "sm_120"),
        ("sm_103", "sm_100"),
        ("sm_103a", "sm_100"),
        ("sm_110", "sm_100"),
        ("sm_121", "sm_120"),
        ("sm_200", "sm_120"),
        ("gfx90a", "gfx942"),
        ("gfx950", "gfx942"),
        ("gfx1201", "gfx942"),
        ("a new machine", "sm_120"),
    ],
)
def test_other_architectures_use_a_relative(arch, expected):
    assert tune.family(arch) == expected
    assert tune.pick("linear", arch, 4096, 512, 512, torch.float16) == tune.pick(
        "linear", expected, 4096, 512, 512, torch.float16
    )


@pytest.mark.parametrize(
    ("m", "n", "expected"),
    [
        (1, 1000, "few"),
        (32, 64, "few"),
        (33, 1000, "small"),
        (10**6, 64, "narrow"),
        (10**6, 65, "wide"),
        (1568, 512, "small"),
    ],
)
def test_shape_class(m, n, expected):
    assert tune.shape_class(m, n) == expected


def test_a_weight_gradient_is_split_not_small():
    assert tune.shape_class(256, 256, op="grad_weight") == "wide"
    assert tune.shape_class(256, 64, op="grad_weight") == "narrow"
    assert tune.shape_class(16, 64, op="grad_weight") == "few"


def test_interpreter_gets_one_small_tile():
    assert len({tune.pick(op, "interpreter", m, 512, 64, torch.float32) for op in tune.OPS for m in (1, 10**6)}) == 1
    assert tune.pick("conv2d", "interpreter", 1, 1, 1, torch.float32).block_m == 32


def test_unknown_op_is_named():
    with pytest.raises(InvalidArgumentError, match=r"op: got 'conv2b', expected .* 'conv2d'"):
        tune.pick("conv2b", "sm_90", 1, 1, 1, torch.float32)


def autotune(times, failing=(), runs=None):
    """Autotune PROBLEM with made-up times by configuration; ``failing`` maps a configuration to its error."""

    def run(config):
        if runs is not None:
            runs.append(config)
        if config in failing:
            raise failing[config]
        run.last = config

    def timer(function):
        function()
        return times(run.last)

    op, arch, *rest = PROBLEM
    return tune.autotune(op, run, arch, *rest, timer=timer)


def test_autotune_keeps_the_fastest():
    op, arch, m, n, _, dtype = PROBLEM
    tried = tune.candidates(op, arch, m, n, dtype)
    assert tried[0] == tune.pick(*PROBLEM)
    wanted = tried[-1]
    runs = []
    assert autotune(lambda config: 0.1 if config == wanted else 1.0, runs=runs) == wanted
    assert runs == list(tried)
    assert tune.pick(*PROBLEM) == wanted
    # Another problem of the same shape class is not concerned, and this one is not measured twice.
    assert tune.pick(op, arch, m + 1, *PROBLEM[3:]) == tried[0]
    assert autotune(lambda config: 1.0, runs=runs) == wanted
    assert len(runs) == len(tried)


def test_autotune_passes_over_what_cannot_be_launched():
    op, arch, m, n, _, dtype = PROBLEM
    first, second, third, *_ = tune.candidates(op, arch, m, n, dtype)
    failing = {
        first: OutOfResources(300000, 232448, "shared memory"),
        second: RuntimeError("PassManager::run failed"),
    }
    assert autotune(lambda config: {third: 1.0}.get(config, 2.0), failing) == third


def test_autotune_hides_no_other_error():
    first = tune.pick(*PROBLEM)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        autotune(lambda config: 1.0, {first: RuntimeError("CUDA error: an illegal memory access was encountered")})
    with pytest.raises(ValueError, match="wrong argument"):
        autotune(lambda config: 1.0, {first: ValueError("wrong argument")})
    assert tune.tuned() == {}


def test_autotune_without_a_usable_candidate_says_why():
    op, arch, m, n, _, dtype = PROBLEM
    failing = {c: OutOfResources(300000, 1, "shared memory") for c in tune.candidates(op, arch, m, n, dtype)}
    with pytest.raises(OutOfResources, match="shared memory"):
        autotune(lambda config: 1.0, failing)
    assert tune.pick(*PROBLEM) in failing


def test_autotune_measures_nothing_where_it_cannot():
    def never(function):
        pytest.fail("measured")

    assert tune.autotune("conv2d", print, "interpreter", 9, 9, 9, torch.float32, timer=never).block_m == 32
    with recording("sm_90"):
        assert tune.autotune("conv2d", print, *PROBLEM[1:], timer=never) == tune.pick(*PROBLEM)


def test_autotuning_is_opt_in():
    def enabled_then_fail():
        with tune.autotuning():
            assert tune.autotuning_enabled()
            raise KeyError

    assert not tune.autotuning_enabled()
    with pytest.raises(KeyError):
        enabled_then_fail()
    assert not tune.autotuning_enabled()


def test_saved_choices_come_back(tmp_path):
    wanted = autotune(lambda config: 0.1 if config.block_m == 256 else 1.0)
    table = tune.pick(*PROBLEM[:2], 1, *PROBLEM[3:])
    path = tune.save(tmp_path / "new" / "tiles.json")
    before = tune.tuned()
    assert [p.name for p in path.parent.iterdir()] == ["tiles.json"]
    tune.clear()
    assert tune.tuned() == {}
    assert tune.load(path) == 1
    assert tune.tuned() == before
    assert tune.pick(*PROBLEM) == wanted
    assert tune.pick(*PROBLEM[:2], 1, *PROBLEM[3:]) == table
    # Saving replaces the file and leaves nothing else behind.
    tune.save(path)
    assert os.listdir(path.parent) == ["tiles.json"]


def test_save_names_the_path_it_cannot_write(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidArgumentError, match=r"path: got '.*tiles.json'.*expected a path that can be written"):
        tune.save(tmp_path / "file" / "tiles.json")


def test_environment_variable_is_read_at_first_use(tmp_path, monkeypatch):
    monkeypatch.setattr(tune, "_environment_read", False)
    monkeypatch.setenv(tune.ENVIRONMENT_VARIABLE, str(written(tmp_path / "tiles.json")))
    assert tune.pick(*PROBLEM) == Config(64, 32, 64, 4, 2, 4)


def test_environment_variable_with_a_broken_file_fails_every_time(tmp_path, monkeypatch):
    monkeypatch.setattr(tune, "_environment_read", False)
    monkeypatch.setenv(tune.ENVIRONMENT_VARIABLE, str(tmp_path / "missing.json"))
    for _ in range(2):
        with pytest.raises(InvalidArgumentError, match=r"missing\.json"):
            tune.pick(*PROBLEM)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"format": "other"}, "format"),
        ({"version": 2}, "version"),
        ({"entries": {}}, "entries"),
        ({"entries": [[]]}, r"entries\[0\]"),
        ({"entries": [entry(), entry(op="conv2x")]}, r"entries\[1\]\.op"),
        ({"entries": [entry(op=["conv2d"])]}, r"entries\[0\]\.op"),
        ({"entries": [entry(arch="nine")]}, r"entries\[0\]\.arch"),
        ({"entries": [entry(dtype="fp8")]}, r"entries\[0\]\.dtype"),
        ({"entries": [entry(m=True)]}, r"entries\[0\]\.m"),
        ({"entries": [entry(k=-1)]}, r"entries\[0\]\.k"),
        ({"entries": [entry(milliseconds="fast")]}, r"entries\[0\]\.milliseconds"),
        ({"entries": [entry(milliseconds=float("nan"))]}, r"entries\[0\]\.milliseconds"),
        ({"entries": [entry(config=None)]}, r"entries\[0\]\.config"),
        ({"entries": [entry(config=entry()["config"] | {"block_n": 48})]}, r"entries\[0\]\.config\.block_n"),
        ({"entries": [entry(config=entry()["config"] | {"num_warps": 3})]}, r"entries\[0\]\.config\.num_warps"),
        ({"entries": [entry(config={"block_m": 64})]}, r"entries\[0\]\.config\.block_n"),
    ],
)
def test_broken_file_is_refused_whole_and_named(tmp_path, changes, key):
    path = written(tmp_path / "tiles.json", **changes)
    with pytest.raises(InvalidArgumentError, match=rf"^{key}: got .*tiles\.json', expected "):
        tune.load(path)
    assert tune.tuned() == {}


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe{}"])
def test_file_that_is_no_such_json(tmp_path, content):
    path = tmp_path / "tiles.json"
    path.write_bytes(content)
    with pytest.raises(InvalidArgumentError, match=r"tiles\.json"):
        tune.load(path)
