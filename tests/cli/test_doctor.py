"""bcos-rt doctor."""

import tomllib
from pathlib import Path

import torch

from bcos_rt.cli import doctor
from bcos_rt.kernels import cpu

ROOT = Path(__file__).resolve().parents[2]


def test_json_says_what_is_there(bcos):
    result = bcos("doctor", "--json")
    assert result.code == 0
    data = result.json
    assert data["versions"]["torch"] == torch.__version__
    assert data["machine"]["torch_threads"] == torch.get_num_threads()
    assert data["machine"]["cuda_available"] == torch.cuda.is_available()
    assert set(data["extras"]) == set(doctor.EXTRAS)
    assert data["kernels"]["cpu"] == "plain PyTorch"
    if not torch.cuda.is_available():
        assert data["kernels"]["cuda"] == "no CUDA device"
    built = "built, using " if cpu.available() else "missing ("
    assert data["kernels"]["cpp"].startswith(built)
    assert data["self_check"]["ok"] is True
    assert data["self_check"]["completeness_error"] < 1e-4
    assert data["writable"]["current folder"]["writable"] is True


def test_shown(bcos):
    result = bcos("doctor")
    assert result.code == 0
    for text in (torch.__version__, "self-check", "passed", "optional parts", "C++ kernels: "):
        assert text in result.out


def test_extras_are_those_of_pyproject():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]

    def distributions(extra):
        found = set()
        for requirement in extras[extra]:
            name = requirement.split(">")[0]
            if name.startswith("bcos-rt["):
                for inner in name.removeprefix("bcos-rt[").removesuffix("]").split(","):
                    found |= distributions(inner)
            else:
                found.add(name)
        return found

    assert {extra: set(names) for extra, names in doctor.EXTRAS.items()} == {
        extra: distributions(extra) for extra in extras if extra not in ("test", "dev")
    }


def _pretend(monkeypatch, **versions):
    """Make these distributions installed in this version, or missing (None)."""
    installed = doctor._installed
    names = {name.replace("_", "-"): version for name, version in versions.items()}
    monkeypatch.setattr(doctor, "_installed", lambda name: names[name] if name in names else installed(name))


def test_missing_extras_say_how_to_install(bcos, monkeypatch):
    _pretend(monkeypatch, timm=None, onnxruntime="1.0", onnxruntime_gpu=None)
    data = bcos("doctor", "--json").json
    assert data["extras"]["timm"]["missing"] == ["timm"]
    assert data["extras"]["timm"]["install"] == "pip install 'bcos-rt[timm]'"
    # Beside onnxruntime, onnxruntime-gpu would break both.
    assert data["extras"]["onnx-gpu"]["install"].startswith("pip uninstall onnxruntime; ")
    assert "pip install 'bcos-rt[timm]'" in bcos("doctor").out


def test_both_onnxruntimes_are_a_conflict(bcos, monkeypatch):
    _pretend(monkeypatch, onnxruntime="1.0", onnxruntime_gpu="1.0")
    data = bcos("doctor", "--json").json
    assert data["onnxruntime"]["conflict"] is True
    assert any("break each other" in problem for problem in data["problems"])
    assert "problem: onnxruntime and onnxruntime-gpu" in bcos("doctor").out


def test_onnxruntime_gpu_alone_is_enough_for_onnx(bcos, monkeypatch):
    _pretend(monkeypatch, onnxruntime=None, onnxruntime_gpu="1.0", onnx="1.0", onnx_ir="1.0")
    data = bcos("doctor", "--json").json
    assert data["extras"]["onnx"]["missing"] == []
    assert data["onnxruntime"]["conflict"] is False


def test_without_onnxruntime(bcos, monkeypatch):
    _pretend(monkeypatch, onnxruntime=None, onnxruntime_gpu=None)
    data = bcos("doctor", "--json").json
    assert data["onnxruntime"] == {"installed": False, "conflict": False, "providers": []}
    assert "onnxruntime" in data["extras"]["onnx"]["missing"]


def test_a_failing_self_check_is_a_problem(bcos, monkeypatch):
    import bcos_rt.explanation

    def broken(*_):
        raise ValueError("no rule")

    monkeypatch.setattr(bcos_rt.explanation, "explain", broken)
    result = bcos("doctor", "--json")
    assert result.code == 0
    assert result.json["self_check"]["ok"] is False
    assert any("no rule" in problem for problem in result.json["problems"])
