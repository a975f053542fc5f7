"""The explanation benchmark: contenders agree, the table is whole and resumable, targets follow from the CSV."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bcos_rt.benchmark.comparison import FAILED, OK, UNSUPPORTED, Entry, Plan, Workplace, compare, paired_ratio
from bcos_rt.benchmark.contender import FORWARD, Setting
from bcos_rt.benchmark.table import COLUMNS, read_rows, write_rows
from bcos_rt.benchmark.worker import differences
from bench.explain_bench import matrix, targets
from bench.explain_bench.driver import Table

ROOT = Path(__file__).resolve().parents[2]
ENGINE = "bcos_rt.benchmark.contenders:EngineContender"


def made_up_row(contender, mode, times, **other):
    row = dict.fromkeys(COLUMNS, "") | {
        "network": "resnet18", "batch": "1", "size": "224", "classes": "1", "threads": "2", "status": "ok",
        "contender": contender, "mode": mode, "session": "a", "round_ms": " ".join(map(str, times)),
        "median_ms": str(sorted(times)[len(times) // 2]),
    }  # fmt: skip
    return row | other


def by_figure(rows, **options):
    return {f.figure: f for f in targets.figures(rows, **options)}


def test_targets_of_made_up_rows():
    rows = [
        made_up_row("native", "forward", [22, 42, 21], memory_mib=""),
        made_up_row("native", "explain", [44, 84, 42], memory_mib="40"),
        made_up_row("plain_eager", "forward", [30, 60, 30]),
        made_up_row("plain_compiled", "forward", [20, 40, 20]),
        made_up_row("published", "explain", [100, 220, 100], memory_mib="100"),
    ]
    found = by_figure(rows)
    # Paired: the second round was slow for everyone, and changes nothing.
    forward = found["forward / best plain forward"]
    assert forward.value == pytest.approx(1.05)
    assert forward.met
    assert "plain_compiled" in forward.note
    assert found["forward+explanation / best plain forward"].value == pytest.approx(2.1)
    published = found["forward+explanation / published"]
    assert published.value == pytest.approx(0.42)
    assert published.target == 0.40
    assert published.met is False
    assert found["peak memory / published"].value == pytest.approx(0.4)
    missing = found["forward+explanation / published, compiled"]
    assert missing.value is None
    assert missing.met is None
    text = targets.markdown(list(found.values()))
    assert "| **no** |" in text
    assert "not measured" in text


def test_targets_depend_on_batch_and_never_mix_sessions():
    rows = [
        made_up_row("native", "explain", [60], batch="8"),
        made_up_row("published", "explain", [100], batch="8"),
        made_up_row("plain_onnx", "forward", [30], batch="8", session="b"),
    ]
    found = by_figure(rows)
    assert found["forward+explanation / published"].target == 0.70
    assert found["forward+explanation / published"].met
    assert found["forward+explanation / best plain forward"].value is None


def test_targets_leave_out_failed_rows_and_take_other_tables():
    rows = [
        made_up_row("native", "explain", [60]),
        made_up_row("published", "explain", [1], status="failed", median_ms="", round_ms=""),
    ]
    training = [
        made_up_row("training_ours", "train", [70, 71], saved_mib="40"),
        made_up_row("training_published", "train", [100, 100], saved_mib="100"),
    ]
    photographs = [{"network": "x", "photographs": "3", "cosine_min": "0.98", "cosine_median": "0.999"}]
    found = {f.figure: f for f in targets.figures(rows, training, photographs)}
    assert found["forward+explanation / published"].value is None
    assert found["training step, time / published"].value == pytest.approx(0.705)
    assert found["saved activations, bytes / published"].value == pytest.approx(0.4)
    assert found["bf16 contribution maps, cosine"].met is False


def test_paired_ratio_is_of_rounds_not_of_medians():
    assert paired_ratio([1, 10, 100], [2, 20, 200]) == (0.5, 0.5, 0.5)


def test_differences_say_what_differs():
    a = {"logits": [[0.0, 1.0], [2.0, 1.0]], "contributions": [[[1.0, 0.0]], [[0.0, 1.0]]]}
    b = {"logits": [[0.0, 1.0], [1.0, 2.0]], "contributions": [[[1.0, 0.0]], [[9.0, 9.0]]]}
    found = differences(a, b)
    # The second image has another top class: its map is of another class, and not compared.
    assert found["other_class"] == 1
    assert found["error_map"] == 0
    assert found["cosine_map"] == pytest.approx(1)
    assert found["error_logits"] == pytest.approx(0.5)
    assert differences({"logits": [[float("nan"), 1.0]]}, {"logits": [[0.0, 1.0]]})["error_logits"] == float("inf")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The tiny network's folder and a workplace."""
    pytest.importorskip("bcos")
    with Workplace([str(ROOT)]) as place:
        setting = Setting(tmp_path_factory.mktemp("tiny"), 2, 32, 1, 1)
        maker = "bcos_rt.benchmark.subject:"
        arguments = {"name": "tiny", "size": 32}
        place.call(
            f"{maker}make", 1, folder=str(setting.folder), function="bench.explain_bench.networks:subject",
            arguments=arguments,
        )  # fmt: skip
        place.call(f"{maker}reference", 1, setting=setting.as_json())
        place.call(f"{maker}export", 1, folder=str(setting.folder), size=32)
        yield place, setting


PLAN = Plan(rounds=2, least_rounds=2, seconds=0.0)


def test_contenders_compute_the_same_explanation(tiny):
    pytest.importorskip("onnxruntime")
    place, setting = tiny
    names = ("eager", "onnx", "published", "plain_eager", "plain_onnx")
    measured = compare([matrix.ENTRIES[n] for n in names], ("forward", "explain"), setting, PLAN, place.launch)
    assert [(m.entry.name, m.mode, m.status, m.note) for m in measured if m.status != OK] == []
    assert len(measured) == 2 * len(names) - 1
    for m in measured:
        assert len(m.rounds) == 2
        assert min(m.rounds) > 0
        assert m.differences["error_logits"] < 1e-5
        if m.mode == "explain":
            assert m.differences["error_weights"] < 1e-4
            assert m.differences["error_map"] < 1e-4
            assert m.differences["cosine_map"] > 0.9999


def test_training_is_the_same_step_and_ours_saves_less(tiny):
    place, setting = tiny
    names = ("training_ours", "training_published")
    ours, published = compare([matrix.ENTRIES[n] for n in names], ("train",), setting, PLAN, place.launch)
    assert (ours.status, published.status) == (OK, OK)
    assert ours.facts["saved_mib"] < published.facts["saved_mib"]
    # "loss 1.7, gradient norm 0.5 of 7 parameters": both layers have the same gradients.
    assert ours.note.partition("; ")[2] == published.note.partition("; ")[2]


def test_what_fails_is_a_row_and_the_others_go_on(tiny):
    place, setting = tiny
    entries = [
        Entry("wrong", ENGINE, (FORWARD,), {"backend": "no such backend"}),
        Entry("broken", "tests.bench.failing:Crashing", (FORWARD,)),
        matrix.ENTRIES["plain_eager"],
    ]
    wrong, broken, plain = compare(entries, (FORWARD,), setting, PLAN, place.launch)
    assert wrong.status == UNSUPPORTED
    assert "no such backend" in wrong.note
    assert broken.status == FAILED
    assert "ended" in broken.note
    assert plain.status == OK


def test_a_hung_contender_is_ended(tiny):
    place, setting = tiny
    plan = Plan(rounds=1, least_rounds=1, prepare_seconds=8.0)
    entry = Entry("hanging", "tests.bench.failing:Hanging", (FORWARD,))
    (hung,) = compare([entry], (FORWARD,), setting, plan, place.launch)
    assert hung.status == FAILED
    assert "within 8 s" in hung.note


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel ends workers with their driver on Linux")
def test_a_killed_driver_leaves_no_stopped_worker(tmp_path):
    code = (
        "import sys, time, pathlib\n"
        "from bcos_rt.benchmark.process import Worker\n"
        "w = Worker(1, pathlib.Path(sys.argv[1]))\n"
        "w.ask('call', function='os:getpid', arguments={})\n"
        "w.suspend()\n"
        "print(w._process.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    driver = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "log")], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    pid = int(driver.stdout.readline())
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    for _ in range(100):
        state = Path(f"/proc/{pid}/stat")
        if not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.1)
    pytest.fail(f"worker {pid} outlived its driver")


def command(*arguments):
    result = subprocess.run(
        [sys.executable, "-m", "bench.explain", *map(str, arguments)], capture_output=True, text=True, cwd=ROOT,
        timeout=600,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]
    return json.loads(result.stdout)


def test_the_command_writes_a_whole_table_and_goes_on_where_it_stopped(tmp_path):
    names = ("eager",)
    chosen = [word for n in names for word in ("--contender", n)]
    given = (
        "main",
        "-o",
        tmp_path,
        "--network",
        "tiny",
        "--size",
        "32",
        "--threads",
        "1",
        "--quick",
        "--json",
        *chosen,
    )
    first = command(*given, "--batch", "1")
    assert (first["measured"], first["kept"]) == (1, 0)
    rows = read_rows(tmp_path / "main.csv")
    assert {(r["contender"], r["mode"]) for r in rows} == {
        (n, mode) for n in names for mode in matrix.ENTRIES[n].modes
    }  # fmt: skip
    for row in rows:
        assert row["status"] == "ok"
        assert float(row["q1_ms"]) <= float(row["median_ms"]) <= float(row["q3_ms"])
        assert len(row["round_ms"].split()) == int(row["rounds"]) >= 3
        assert row["commit"]
        assert row["sources"]
    again = command(*given, "--batch", "1", "--batch", "2")
    assert (again["measured"], again["kept"]) == (1, 1)
    both = read_rows(tmp_path / "main.csv")
    assert both[: len(rows)] == rows
    assert len(both) == 2 * len(rows)
    described = json.loads((tmp_path / "main.json").read_text())
    assert described["cpu"]["model"]
    assert described["packages"]["torch"] == str(torch.__version__)
    assert not list(tmp_path.glob(".*"))


def test_what_is_kept(tmp_path):
    cell = matrix.Cell("resnet18", 1, 2, ("native", "plain_compiled"))
    assert cell.rows() == {("native", "forward"), ("native", "explain"), ("plain_compiled", "forward")}
    given = {"sources": "code", "rounds": "5"}
    rows = [made_up_row(c, m, [10], **given) for c, m in sorted(cell.rows())]

    def done(rows, code="code", rounds=5):
        write_rows(tmp_path / "main.csv", rows)
        return Table(tmp_path / "main.csv").done(cell, code, rounds)

    assert done(rows)
    assert not done(rows[1:])
    assert not done(rows, code="other code")
    assert not done(rows, rounds=6)
    # A cell of two sessions would compare times of different hours.
    assert not done([rows[0] | {"session": "b"}, *rows[1:]])
    failed = {"status": "failed", "rounds": "", "round_ms": ""}
    assert done([rows[0] | failed, *rows[1:]])
    other = [made_up_row("native", "explain", [10], batch="8", **given)]
    table = Table(tmp_path / "main.csv")
    table.put(cell, rows)
    assert len(table.rows) == len(rows)
    write_rows(tmp_path / "main.csv", [*rows, *other])
    table = Table(tmp_path / "main.csv")
    table.put(cell, rows[:1])
    assert [r["batch"] for r in table.rows if r["mode"] == rows[0]["mode"]] == ["8", "1"]


def test_plots_of_made_up_rows(tmp_path):
    plots = pytest.importorskip("bench.explain_bench.plots")
    quartiles = {"q1_ms": "9", "q3_ms": "12"}
    rows = [made_up_row(c, m, [10], **quartiles) for c in ("native", "published") for m in ("forward", "explain")]
    plots.bars(rows, tmp_path / "time.png", 2, "a machine")
    plots.growth([*rows, made_up_row("native", "explain", [20], batch="2", **quartiles)], tmp_path / "growth.png", "a")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["growth.png", "time.png"]
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in tmp_path.iterdir())
