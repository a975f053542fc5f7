"""The GPU run without a GPU: its logic with made-up times, and all of it once in Triton's interpreter."""

import csv
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bcos_rt.errors import InvalidArgumentError
from bench.gpu import benchmark, environment, program, stages
from bench.gpu.benchmark import Ceilings, Table, measure, totals, work_list
from bench.gpu.cases import TOY_SHAPES, Case, Shape, merge, ordered
from bench.gpu.contenders import Contender, Prepared, UnsupportedError
from bench.gpu.files import read_json, read_rows, write_json
from bench.gpu.options import FAILED, PASSED, SKIPPED, STAGES, TIMEOUT, Options, Outcome
from bench.gpu.timing import Timing

ROOT = Path(__file__).resolve().parents[2]
CEILINGS = Ceilings(copy_gbps=1000.0, gemm_tflops={"fp32": 10.0})


def command(*arguments, **environ):
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"} | environ,
        capture_output=True,
        text=True,
        timeout=150,
    )


# --- the command ------------------------------------------------------------------------------------------------------


def test_without_a_gpu_it_says_so_writes_nothing_and_exits_3(tmp_path):
    done = command("-m", "bench.gpu", "--output", str(tmp_path), CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 3, done.stderr
    assert "no GPU" in done.stderr
    assert "Nothing was run" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_needs_a_folder_of_its_own():
    done = command("-m", "bench.gpu", "--dry-run")
    assert done.returncode == 2
    assert "--output" in done.stderr


def test_a_dry_run_refuses_the_folder_of_results():
    with pytest.raises(InvalidArgumentError, match="outside bench/results"):
        Options(folder=ROOT / "bench" / "results" / "nvidia-h100", dry_run=True)


@pytest.mark.parametrize(
    ("field", "value"), [("stages", ("benchmrak",)), ("dtypes", ("fp8",)), ("modes", ("backward",)), ("minutes", 0.0)]
)
def test_options_name_what_is_wrong(tmp_path, field, value):
    with pytest.raises(InvalidArgumentError, match=field):
        Options(folder=tmp_path, **{field: value})


def test_options_survive_json(tmp_path):
    options = Options(folder=tmp_path, stages=("graph",), dtypes=("fp16", "fp32"), contenders=("plain",), minutes=2.5)
    assert Options.from_json(json.loads(json.dumps(options.as_json()))) == options


DRIVER = """
import sys
from pathlib import Path
from bench.gpu.options import Options
from bench.gpu.program import in_process, run
quick = ("bcos_rt", "bcos_rt+multiplier", "plain", "plain_fused", "cudnn_graph", "published")
options = Options(
    folder=Path(sys.argv[1]), dtypes=("fp32",), contenders=quick, models=("resnet50", "vit_b_16"), dry_run=True,
)
sys.exit(run(options, in_process))
"""


def test_the_whole_program_in_the_interpreter(tmp_path):
    done = command("-c", DRIVER, str(tmp_path), TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout + done.stderr
    summary = read_json(tmp_path / "summary.json")
    assert summary["status"] == "passed"
    assert summary["dry_run"] is True
    assert {name: entry["status"] for name, entry in summary["stages"].items()} == dict.fromkeys(STAGES, PASSED)
    for name in ("environment.json", "correctness.xml", "layers.csv", "totals.png", "roofline.png"):
        assert (tmp_path / name).stat().st_size > 0, name

    rows = read_rows(tmp_path / "layers.csv")
    assert {row["dry_run"] for row in rows} == {"True"}
    for row in rows:
        # No time of an interpreter may look like a result.
        assert row["ms"] == row["tflops"] == row["gbps"] == row["launched_ms"] == "", row
        assert row["status"] == ("unsupported" if row["contender"] in ("plain_fused", "cudnn_graph") else "ok"), row
        if row["status"] == "ok":
            assert float(row["error"]) <= float(row["error_limit"])
    assert {(row["model"], row["mode"]) for row in rows} == {
        (model, mode) for model in ("resnet50", "vit_b_16") for mode in ("forward", "explain", "train")
    }
    assert summary["stages"]["benchmark"]["totals"] == []
    assert all(entry["ms"] is None for entry in summary["stages"]["onnx"]["files"].values())
    assert "conv2d, training fp32" in summary["stages"]["sanitizer"]["ops"]


# --- the benchmark ----------------------------------------------------------------------------------------------------


def contender(name="ours", modes=("forward",), *, ours=True, slow=False, error=0.0, raises=None, calls=None):
    def build(case):
        if raises is not None:
            raise raises
        expected = torch.ones(2, 2, dtype=torch.float64)
        run = (lambda: calls.append(case.shape)) if calls is not None else (lambda: None)
        return Prepared(run, lambda: [("y", (expected + error).float(), expected)])

    return Contender(name, dict.fromkeys(modes, build), ours=ours, slow=slow)


class FakeTimer:
    def __init__(self, ms=2.0):
        self.ms, self.calls = ms, 0

    def __call__(self, run):
        self.calls += 1
        run()
        return Timing(self.ms, self.ms - 1, self.ms + 1, 2 * self.ms, "graph")


def measured(tmp_path, contenders, *, shapes=TOY_SHAPES[:2], timer=None, resume=False, **settings):
    table = Table(tmp_path / "layers.csv", resume)
    works = work_list(list(shapes), ["fp32"], ["forward"], contenders)
    result = measure(works, table, timer or FakeTimer(), CEILINGS, "cpu", say=lambda _: None, **settings)
    return result, read_rows(tmp_path / "layers.csv")


def test_a_row_holds_time_rates_and_shares_of_the_ceilings(tmp_path):
    _, rows = measured(tmp_path, [contender()], shapes=TOY_SHAPES[:1])
    (row,), shape = rows, TOY_SHAPES[0]
    flops, moved = shape.flops("forward"), shape.bytes("forward", torch.float32)
    assert flops == 2 * (2 * 16 * 5 * 5) * (8 * 3 * 3)
    assert moved == 4 * (2 * 8 * 81 + 16 * 8 * 9 + 2 * 16 * 25 + 2 * 81 + 2 * 25)
    assert (row["status"], row["how"], float(row["ms"]), float(row["launched_ms"])) == ("ok", "graph", 2.0, 4.0)
    assert float(row["tflops"]) == pytest.approx(flops / 2e-3 / 1e12, rel=1e-4)
    assert float(row["gbps"]) == pytest.approx(moved / 2e-3 / 1e9, rel=1e-4)
    assert float(row["percent_of_gemm"]) == pytest.approx(100 * flops / 2e-3 / 10e12, rel=1e-4)
    assert float(row["percent_of_copy"]) == pytest.approx(100 * moved / 2e-3 / 1000e9, rel=1e-4)
    assert float(row["percent_of_bound"]) == pytest.approx(100 * moved / 1000e9 / 2e-3, rel=1e-4)


def test_who_disagrees_is_not_timed(tmp_path):
    timer = FakeTimer()
    result, rows = measured(tmp_path, [contender(error=0.01), contender("bcos_rt", error=0.5)], timer=timer)
    assert timer.calls == 0
    assert {row["status"] for row in rows} == {"wrong"}
    assert all(row["ms"] == "" for row in rows)
    # Only our own disagreement fails the run.
    assert len(result["failures"]) == 2
    assert all(failure.startswith("bcos_rt forward") for failure in result["failures"])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_disagree(value):
    assert benchmark.error_of(torch.tensor([1.0, value]), torch.tensor([1.0, 1.0])) == float("inf")
    assert benchmark.error_of(torch.ones(2), torch.ones(3)) == float("inf")


def test_one_contenders_failure_is_a_row(tmp_path):
    group = [
        contender("a", raises=UnsupportedError("no such engine")),
        contender("b", raises=RuntimeError("broken\nin two lines")),
        contender("c"),
    ]
    result, rows = measured(tmp_path, group, shapes=TOY_SHAPES[:1])
    assert [(r["status"], r["note"]) for r in rows] == [
        ("unsupported", "no such engine"),
        ("error", "RuntimeError: broken in two lines"),
        ("ok", ""),
    ]
    assert result["rows"] == {"unsupported": 1, "error": 1, "ok": 1}


def test_what_is_measured_is_kept_and_what_crashed_is_not_tried_again(tmp_path):
    def crash(case):
        raise KeyboardInterrupt

    calls = []
    first, bad, last = (contender(n, calls=calls) for n in ("a", "b", "c"))
    bad = replace(bad, builders={"forward": crash})
    with pytest.raises(KeyboardInterrupt):
        measured(tmp_path, [first, bad, last], shapes=TOY_SHAPES[:1])
    assert [row["status"] for row in read_rows(tmp_path / "layers.csv")] == ["ok", "running"]
    timer = FakeTimer()
    _, rows = measured(tmp_path, [first, bad, last], shapes=TOY_SHAPES[:1], timer=timer, resume=True)
    assert [(row["contender"], row["status"]) for row in rows] == [("a", "ok"), ("b", "crashed"), ("c", "ok")]
    assert timer.calls == 1
    assert float(rows[0]["ms"]) == 2.0


def test_every_row_is_on_disk_before_the_next_measurement(tmp_path):
    seen = []

    class Looking(FakeTimer):
        def __call__(self, run):
            with open(tmp_path / "layers.csv", newline="") as file:
                seen.append([row["status"] for row in csv.DictReader(file)])
            return super().__call__(run)

    measured(tmp_path, [contender("a"), contender("b")], shapes=TOY_SHAPES[:1], timer=Looking())
    assert seen == [["running"], ["ok", "running"]]
    assert not list(tmp_path.glob("*.tmp"))


def test_the_deadline_ends_it_and_says_what_is_left(tmp_path):
    ticks = iter(range(100))
    result, rows = measured(
        tmp_path, [contender("a"), contender("b")], deadline=3, clock=lambda: next(ticks), shapes=TOY_SHAPES
    )
    assert len(rows) == 3
    assert result["left"] == 2 * len(TOY_SHAPES) - 3


def test_work_comes_by_importance():
    shapes = ordered(
        [Shape(m, f"l{i}", (2, 8, 4, 4), (8 * (i + 1), 8, 1, 1), count=1) for m in ("m", "n") for i in range(6)]
    )
    assert [(s.model, s.layer) for s in shapes[:4]] == [("m", "l5"), ("n", "l5"), ("m", "l4"), ("n", "l4")]
    both = [contender("a", ("forward", "train")), contender("s", ("forward",), slow=True)]
    works = work_list(shapes, ["fp32"], ["forward", "train"], both)
    assert len(works) == 12 * 3
    steps = [(w.contender.name, w.mode, w.shape.layer in ("l0", "l1")) for w in works]
    assert list(dict.fromkeys(steps)) == [
        ("a", "forward", False), ("a", "train", False), ("s", "forward", False),
        ("a", "forward", True), ("a", "train", True), ("s", "forward", True),
    ]  # fmt: skip


def test_equal_layers_are_measured_once():
    a = Shape("m", "first", (2, 8, 4, 4), (8, 8, 1, 1))
    merged = merge([a, replace(a, layer="second"), replace(a, layer="other", stride=(2, 2)), replace(a, layer="third")])
    assert [(s.layer, s.count) for s in merged] == [("first", 3), ("other", 1)]


def test_sums_are_over_layers_that_both_have():
    def row(name, layer, ms, count=2, status="ok"):
        return {
            "model": "m", "dtype": "bf16", "mode": "forward", "contender": name, "layer": layer, "shape": layer,
            "count": count, "ms": ms, "status": status, "how": "graph",
        }  # fmt: skip

    rows = [
        row("bcos_rt", "a", 1.0), row("bcos_rt", "b", 2.0), row("published", "a", 5.0), row("published", "c", 9.0),
        row("plain", "a", "", status="error"),
    ]  # fmt: skip
    found = {r["contender"]: r for r in totals(rows)}
    assert set(found) == {"bcos_rt", "published"}
    assert found["bcos_rt"]["ms"] == 6.0
    assert (found["published"]["ms"], found["published"]["bcos_rt_ms"]) == (10.0, 2.0)
    assert (found["published"]["times_bcos_rt"], found["published"]["layers"]) == (5.0, 1)


def test_a_layers_transpose_is_its_gradient():
    case = Case(TOY_SHAPES[0], torch.float64, "cpu")
    x = case.x.detach().requires_grad_()
    y = torch.nn.functional.conv2d(x, case.weight, None, *(case.geometry.values()))
    (expected,) = torch.autograd.grad(y, x, case.grad)
    torch.testing.assert_close(case.transpose(case.grad, case.weight), expected)


def test_layers_of_a_network():
    from bench.gpu.networks import layer_shapes

    shapes = layer_shapes("resnet18", 4, 64)
    assert len(shapes) == 21  # 20 convolutions and the classifier
    assert (shapes[0].x, shapes[0].weight, shapes[0].out) == ((4, 8, 64, 64), (64, 8, 7, 7), (4, 64, 32, 32))
    assert (shapes[-1].x, shapes[-1].out) == ((4, 1, 512), (4, 1, 1000))


def test_plots_of_measured_rows(tmp_path):
    group = [contender("bcos_rt"), contender("published"), contender("plain")]
    measured(tmp_path, group, shapes=TOY_SHAPES)
    write_json(tmp_path / "measured_with.json", {"ceilings": {"copy_gbps": 1000.0, "gemm_tflops": {"fp32": 10.0}}})
    assert stages.plots(Options(folder=tmp_path, dtypes=("fp32",)), 0.0).status == PASSED
    for name in ("totals.png", "roofline.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    empty = tmp_path / "empty"
    assert stages.plots(Options(folder=empty), 0.0).status == SKIPPED


# --- the program ------------------------------------------------------------------------------------------------------


def test_a_failing_stage_is_recorded_and_the_others_go_on(tmp_path):
    seen = []

    def execute(stage, options, seconds):
        seen.append(stage)
        assert read_json(tmp_path / "summary.json")["stages"][stage]["status"] == "running"
        if stage == "graph":
            raise RuntimeError("no capture")
        return Outcome({"onnx": SKIPPED, "correctness": TIMEOUT}.get(stage, PASSED), "said", {"value": stage})

    code = program.run(Options(folder=tmp_path), execute, say=lambda _: None)
    assert code == 1
    assert seen == list(STAGES)
    summary = read_json(tmp_path / "summary.json")
    assert summary["status"] == "failed"
    assert summary["stages"]["graph"]["status"] == FAILED
    assert summary["stages"]["graph"]["message"] == "RuntimeError: no capture"
    assert summary["stages"]["plots"]["value"] == "plots"


def test_a_run_of_one_stage_keeps_what_is_known_of_the_others(tmp_path):
    write_json(tmp_path / "summary.json", {"stages": {"correctness": {"status": PASSED, "message": "earlier"}}})
    code = program.run(
        Options(folder=tmp_path, stages=("plots",)), lambda *_: Outcome(SKIPPED, "no rows"), say=lambda _: None
    )
    assert code == 0
    entries = read_json(tmp_path / "summary.json")["stages"]
    assert entries["correctness"]["message"] == "earlier"
    assert entries["plots"]["status"] == SKIPPED


def test_stages_share_the_time(tmp_path):
    options = Options(folder=tmp_path, minutes=8)
    others = sum(program.seconds_for(s, options, 480) for s in ("environment", "correctness", "graph", "onnx"))
    assert others < 0.9 * 480
    assert program.seconds_for("benchmark", options, 200) == 200 - 0.25 * 200
    assert program.seconds_for("benchmark", options, -5) <= 0
    alone = Options(folder=tmp_path, minutes=9, stages=("correctness",))
    assert program.seconds_for("correctness", alone, 540) == 540
    assert program.seconds_for("plots", options, -5) > 0


def test_the_benchmark_goes_on_behind_what_ended_its_process(tmp_path, monkeypatch):
    folder = tmp_path
    attempts = []

    def run_command(arguments, log, seconds, environ=None, *, progress=None, patience=0.0):
        log.parent.mkdir(exist_ok=True)
        log.write_text("illegal memory access")
        job = read_json(Path(arguments[-2]))
        attempts.append(job["options"]["resume"])
        (folder / "layers.csv").write_text("model\nresnet50\n")
        if len(attempts) < 3:
            return -6 if len(attempts) == 1 else None
        write_json(Path(arguments[-1]), Outcome(PASSED, "done", {"left": 0}).as_json())
        return 0

    monkeypatch.setattr(program, "run_command", run_command)
    options = Options(folder=folder, resume=False)
    outcome = program.in_subprocess("benchmark", options, 300, say=lambda _: None)
    assert (outcome.status, outcome.details["restarts"]) == (PASSED, 2)
    assert attempts == [False, True, True]
    # Another stage is not tried again.
    attempts.clear()
    outcome = program.in_subprocess("graph", options, 300, say=lambda _: None)
    assert (outcome.status, attempts) == (FAILED, [False])
    assert outcome.details["tail"] == "illegal memory access"


def test_what_hangs_is_ended(tmp_path):
    log, begun = tmp_path / "log.txt", time.monotonic()
    sleeper = [sys.executable, "-c", "print('here', flush=True); import time; time.sleep(60)"]
    assert stages.run_command(sleeper, log, 1.5) is None
    assert stages.run_command(sleeper, log, 60, progress=tmp_path / "rows.csv", patience=1.0) is None
    assert time.monotonic() - begun < 30
    assert log.read_text() == "here\n"
    assert stages.run_command([sys.executable, "-c", "raise SystemExit(7)"], log, 30) == 7


def test_measurements_of_other_sources_are_not_mixed():
    found = environment.describe()
    assert found["packages"]["torch"]
    mark = environment.fingerprint(found)
    assert mark["sources"] == found["sources_sha256"]
    assert environment.fingerprint(found | {"sources_sha256": "other"}) != mark


def test_correctness_without_a_test_that_ran_is_a_failure(tmp_path, monkeypatch):
    report = '<testsuites><testsuite tests="{}" failures="{}" errors="0" skipped="{}"/></testsuites>'

    def outcome(code, *counts):
        def run_command(arguments, log, seconds, environ=None):
            assert environ["BCOS_RT_TEST_DEVICE"] == "cuda"
            assert "TRITON_INTERPRET" not in environ
            log.parent.mkdir(exist_ok=True)
            log.write_text("tests/triton/test_a.py::test_b PASSED\ntests/triton/test_a.py::test_c FAILED\n")
            if counts:
                (tmp_path / "correctness.xml").write_text(report.format(*counts))
            return code

        monkeypatch.setattr(stages, "run_command", run_command)
        return stages.correctness(Options(folder=tmp_path), time.monotonic() + 10)

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(stages, "ROOT", tmp_path)
    assert outcome(0, 3, 0, 0).status == FAILED  # no such folders
    for name in ("triton", "kernels"):
        (tmp_path / "tests" / name).mkdir(parents=True)
    assert outcome(0, 3, 0, 1) == Outcome(
        PASSED, "2 passed, 0 failed, 1 skipped", {"counts": {"passed": 2, "failed": 0, "skipped": 1}}
    )
    assert outcome(0, 3, 0, 3).status == FAILED
    assert outcome(1, 3, 1, 0).status == FAILED
    assert outcome(2).status == FAILED
    assert outcome(None).message == "ended at its time limit after 1 passed, 1 failed"
