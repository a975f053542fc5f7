"""The record of what was compiled: what is taken from it, what is compiled anyway, and what makes it fail."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from typer.testing import CliRunner

from bcos_rt.errors import InvalidArgumentError
from bcos_rt.kernels.static import __main__ as command
from bcos_rt.kernels.static import record, report
from bcos_rt.kernels.static.cases import Case
from bcos_rt.kernels.static.compile import Analysis, analyse
from bcos_rt.kernels.static.disassembly import KINDS
from bcos_rt.kernels.triton.launch import Config, Launch
from tests.static import small_kernels
from tests.static.small_kernels import matmul

GOOD = Analysis(
    registers=50, shared_bytes=8192, occupancy=0.5, loop_instructions=9, tile_loads=2, tile_stores=1,
    loop={kind: 9 * (kind == "mma") for kind in KINDS},
)  # fmt: skip
SMALL = Config(64, 64, 64, 4, 2)


def small_cases() -> list[Case]:
    """Two targets; on each a plain product, one at another tile, and one that is compared with the first."""
    found = []
    for arch in ("sm_80", "sm_90"):
        found.append(Case(arch, "plain", matmul(arch)))
        found.append(Case(arch, "small", matmul(arch, config=SMALL)))
        found.append(Case(arch, "squares", matmul(arch, squares=True), matmul(arch)))
    return found


class Compiler:
    """Takes the compilers' place: says what it was asked to compile, and ``analysis`` of everything."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.analysis: Callable[[Launch], Analysis] = lambda launch: GOOD

    def __call__(self, launches: Sequence[tuple[Launch, str]], *_: Any) -> list[Analysis]:
        self.asked = [record.key(launch, arch) for launch, arch in launches]
        return [self.analysis(launch) for launch, _ in launches]


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Compiler:
    found = Compiler()
    monkeypatch.setattr(record, "analyse_all", found)
    monkeypatch.setattr(command, "cases", lambda archs: [case for case in small_cases() if case.arch in archs])
    # Those of the product's kernels would count as needed by nothing.
    monkeypatch.setattr(command, "violations", lambda results: report.violations(results, ()))
    return found


@pytest.fixture
def written(tmp_path: Path, compiler: Compiler) -> Path:
    """kernels.json of :func:`small_cases`, all of them good, and the page beside it."""
    report.write_report(report.compile_cases(small_cases()), tmp_path)
    return tmp_path / "kernels.json"


def edit(path: Path, change: Callable[[list[dict[str, Any]]], object]) -> None:
    lines = json.loads(path.read_text())
    change(lines)
    path.write_text(record.text(lines))


def check(path: Path, *more: str) -> tuple[int, dict[str, Any]]:
    ran = CliRunner().invoke(command.app, ["check", "--json", "--recorded", str(path), *more])
    return ran.exit_code, json.loads(ran.stdout)


def test_an_analysis_comes_back_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    arch = "sm_80"
    found = [Case(arch, "unaligned", matmul(arch, aligned=False)), Case(arch, "odd", matmul(arch, config=SMALL))]
    analyses = [analyse(found[0].launch, arch), Analysis(error="OutOfResources: shared memory")]
    assert analyses[0].narrow
    path = tmp_path / "kernels.json"
    path.write_text(record.text(map(record.row, found, analyses)))
    assert [one.analysis for one in record.read(path).values()] == analyses


def test_lines_are_short_and_one_per_launch(written: Path):
    lines = written.read_text().splitlines()
    assert len(lines) == len(small_cases()) + 2
    first = json.loads(lines[1].rstrip(","))
    assert first["loop"] == {"mma": 9}
    assert not {"spills", "narrow", "error", "tensor_columns", "compared_with"} & set(first)
    assert json.loads(lines[3].rstrip(","))["compared_with"] == first["key"]


def test_recorded_launches_are_not_compiled(written: Path, compiler: Compiler):
    code, said = check(written, "--sample-seed", "1")
    assert (code, said["launches"], said["violations"]) == (0, 6, [])
    assert said["recorded"] == {
        "sample_seed": 1, "compiled": 2, "sampled": 2, "differences": [], "missing": [], "obsolete": [],
        "stale_files": [],
    }  # fmt: skip
    # One of the kernel for each target.
    keys = {record.key(case.launch, case.arch): case.arch for case in small_cases()}
    assert sorted(keys[key] for key in compiler.asked) == ["sm_80", "sm_90"]


def test_the_seed_chooses_the_sample_and_every_launch_gets_its_turn():
    found = small_cases()
    drawn = [record.sample(found, seed) for seed in range(20)]
    assert drawn[3] == record.sample(found, 3)
    assert {record.key(case.launch, case.arch) for cases in drawn for case in cases} == {
        record.key(case.launch, case.arch) for case in found
    }


def test_without_a_seed_it_is_the_date_and_is_printed(written: Path):
    ran = CliRunner().invoke(command.app, ["check", "--recorded", str(written)])
    assert ran.exit_code == 0
    assert "--sample-seed 20" in " ".join(ran.output.split())


def test_a_target_can_be_checked_by_itself(written: Path, compiler: Compiler):
    code, said = check(written, "--arch", "sm_90")
    assert (code, said["launches"], said["recorded"]["obsolete"]) == (0, 3, [])
    assert len(compiler.asked) == 1


def test_without_the_record_everything_is_compiled(written: Path, compiler: Compiler):
    assert CliRunner().invoke(command.app, ["check"]).exit_code == 0
    assert len(compiler.asked) == len(small_cases())


def test_a_launch_that_is_not_recorded_is_compiled_and_fails(written: Path, compiler: Compiler):
    gone = record.key(small_cases()[1].launch, "sm_80")
    edit(written, lambda lines: lines.pop(1))
    compiler.analysis = lambda launch: replace(GOOD, spills=7) if launch.config == SMALL else GOOD
    code, said = check(written, "--sample-seed", "0")
    assert code == 1
    assert gone in compiler.asked
    assert said["recorded"]["missing"] == ["small_matmul sm_80 64x64x64 w4 s2 bf16 (small)"]
    # Its rules are judged all the same.
    assert ("spills", "sm_80") in {(v["rule"], v["arch"]) for v in said["violations"]}


def test_a_recorded_launch_that_the_source_lacks_fails_and_the_remedy_is_named(written: Path):
    edit(written, lambda lines: lines.append({**lines[0], "key": "0123456789abcdef", "variant": "of old"}))
    ran = CliRunner().invoke(command.app, ["check", "--recorded", str(written)])
    assert ran.exit_code == 1
    assert "small_matmul sm_80 64x64x32 w4 s2 bf16 (of old)" in ran.output
    assert f"renew the files with: {record.RENEW}" in ran.output


def test_a_wrong_number_of_a_sampled_launch_fails(written: Path):
    def falsify(lines: list[dict[str, Any]]) -> None:
        for line in lines:
            line["registers"] = 40

    edit(written, falsify)
    code, said = check(written)
    assert code == 1
    assert [d["fields"] for d in said["recorded"]["differences"]] == [{"registers": [40, 50]}] * 2
    shown = CliRunner().invoke(command.app, ["check", "--recorded", str(written)])
    assert "registers: recorded 40, compiled 50" in shown.output


def test_rules_are_asked_of_recorded_numbers(written: Path, compiler: Compiler):
    # Long enough for the loop's rule where it is compared; recorded so in the plain one, none is sampled.
    edit(
        written,
        lambda lines: [line.update(stack_bytes=8, loop_instructions=20) for line in lines if "plain" not in line],
    )
    seed = next(
        seed for seed in range(100) if all(case.launch.plain for case in record.sample(small_cases(), seed))
    )  # fmt: skip
    code, said = check(written, "--sample-seed", str(seed))
    assert code == 1
    assert said["recorded"]["differences"] == []
    assert [(v["rule"], v["arch"], v["variant"]) for v in said["violations"]] == [
        (rule, arch, "squares") for arch in ("sm_80", "sm_90") for rule in ("spills", "loop")
    ]


def test_a_recorded_failure_to_compile_is_tried_again(written: Path, compiler: Compiler):
    edit(written, lambda lines: [line.update(error="MemoryError: ") for line in lines])
    code, said = check(written)
    assert code == 1
    assert len(compiler.asked) == len(small_cases())
    assert len(said["recorded"]["differences"]) == len(small_cases())
    assert said["violations"] == []


@pytest.mark.parametrize("change", ["description", "order", "page"])
def test_files_are_held_to_the_source(change: str, written: Path):
    if change == "page":
        written.with_suffix(".md").write_text("# Another\n")
    elif change == "order":
        edit(written, lambda lines: lines.reverse())
    else:
        edit(written, lambda lines: lines[0].update(variant="renamed"))
    code, said = check(written)
    assert code == 1
    assert said["recorded"]["stale_files"] == [str(written.with_suffix(".md") if change == "page" else written)]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "No such file"),
        ('[\n{"kernel": "conv', "line 2"),
        ("{}", "no list"),
        ("[]", "no list"),
        ("[3]", "launch 1: no object"),
        ('[{"kernel": "conv2d"}]', "launch 1: no 'key'"),
        ({"key": "xyz"}, "key 'xyz'"),
        ({"warmth": 3}, "unknown field 'warmth'"),
        ({"registers": "many"}, "registers 'many'"),
        ({"registers": True}, "registers True"),
        ({"loop": {"dance": 3}}, "dance"),
        ({"narrow": [{"size": 8}]}, "launch 1"),
        ({"narrow": 4}, "launch 1"),
        ("twice", "for the second time"),
    ],
)
def test_a_damaged_record_is_an_error_with_exit_code_2(
    content: Any, said: str, written: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    if content is None:
        written.unlink()
    elif content == "twice":
        edit(written, lambda lines: lines.append(lines[0]))
    elif isinstance(content, dict):
        edit(written, lambda lines: lines[0].update(content))
    else:
        written.write_text(content)
    with pytest.raises(InvalidArgumentError, match=r"^recorded: got .*kernels\.json") as raised:
        record.read(written)
    assert said in str(raised.value)
    assert record.RENEW in str(raised.value)
    monkeypatch.setattr("sys.argv", ["static", "check", "--recorded", str(written)])
    with pytest.raises(SystemExit) as ended:
        command.main()
    assert ended.value.code == 2
    assert "error: recorded" in capsys.readouterr().err


def imported(path: Path) -> ModuleType:
    """A copy of the module of small kernels."""
    spec = importlib.util.spec_from_file_location("small_kernels_elsewhere", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_keys_depend_on_the_kernels_source_and_not_on_its_place(tmp_path: Path):
    source = Path(small_kernels.__file__).read_text()
    changed = source.replace("columns = columns_units * 16", "columns = columns_units * 32")
    assert changed != source
    keys = []
    for folder, content in (("a", source), ("some/where/else", source), ("c", changed)):
        path = tmp_path / folder / "small.py"
        path.parent.mkdir(parents=True)
        path.write_text(content)
        keys.append(record.key(imported(path).matmul("sm_90"), "sm_90"))
    assert keys[0] == keys[1] == record.key(matmul("sm_90"), "sm_90")
    assert keys[2] != keys[0]
