"""The wheel holds what it should: kernels/ and export/ inside bcos_rt, type information, and no other package."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def build_wheel(tmp_path_factory, **environment):
    """The wheel's path, built from a copy: a build writes beside the sources."""
    pytest.importorskip("setuptools", minversion="77", reason="setuptools builds the wheel")
    copy, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    ignore = shutil.ignore_patterns("__pycache__", "*.so", "build_failure.txt")
    for name in ("bcos_rt", "kernels", "export", "tests", "examples"):
        shutil.copytree(ROOT / name, copy / name, ignore=ignore)
    for name in ("pyproject.toml", "setup.py", "CMakeLists.txt", "MANIFEST.in", "LICENSE", "README.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, copy)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet", "-w", out, copy]
    result = subprocess.run(
        command, capture_output=True, text=True, cwd=out, timeout=300, env={**os.environ, **environment}
    )
    assert result.returncode == 0, result.stdout + result.stderr
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Its kernels not optimised, which compile several times as fast: what is tested is where they end up."""
    compiler = os.environ.get("CXX") or shutil.which("c++")
    if compiler is None or os.name == "nt":
        return build_wheel(tmp_path_factory)
    unoptimised = tmp_path_factory.mktemp("compiler") / "c++"
    unoptimised.write_text(f'#!/bin/sh\nexec {compiler} "$@" -O0\n')
    unoptimised.chmod(0o755)
    return build_wheel(tmp_path_factory, CXX=str(unoptimised))


@pytest.fixture(scope="module")
def names(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_mapped_packages_and_type_marker_are_in(names):
    for name in (
        "bcos_rt/__init__.py",
        "bcos_rt/__main__.py",
        "bcos_rt/cli/__init__.py",
        "bcos_rt/py.typed",
        "bcos_rt/kernels/__init__.py",
        "bcos_rt/kernels/ops.py",
        "bcos_rt/kernels/reference.py",
        "bcos_rt/export/__init__.py",
        "bcos_rt/packaged/cifar10-resnet20.safetensors",
        "bcos_rt/packaged/cifar10-resnet20.json",
    ):
        assert name in names


def test_the_cpu_kernels_are_in(names):
    assert any(re.fullmatch(r"bcos_rt/kernels/cpu/_native\..*\.(so|pyd)", name) for name in names)
    assert "bcos_rt/kernels/cpu/build_failure.txt" not in names


def test_without_a_compiler_the_wheel_builds_and_lacks_the_kernels(tmp_path_factory):
    path = build_wheel(tmp_path_factory, CXX=str(tmp_path_factory.mktemp("none") / "no-compiler"))
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        reason = archive.read("bcos_rt/kernels/cpu/build_failure.txt").decode()
    assert "bcos_rt/kernels/cpu/__init__.py" in names
    assert not [name for name in names if "_native" in name]
    assert "could not build" in reason
    assert "no-compiler" in reason


def test_every_module_of_the_sources_is_in(names):
    for folder, package in (("bcos_rt", "bcos_rt"), ("kernels", "bcos_rt/kernels"), ("export", "bcos_rt/export")):
        for path in (ROOT / folder).rglob("*.py"):
            assert f"{package}/{path.relative_to(ROOT / folder).as_posix()}" in names


def test_nothing_else_is_claimed_in_site_packages(names):
    top = {name.split("/")[0] for name in names}
    (info,) = (name for name in top if name.endswith(".dist-info"))
    assert top == {"bcos_rt", info}
    assert (f"{info}/licenses/LICENSE") in names


def test_the_wheel_is_importable_without_the_sources(wheel, tmp_path):
    """Unpacked, run from elsewhere and isolated from the installed package: its modules import one another."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    code = (
        "import sys; "
        "sys.meta_path[:] = [f for f in sys.meta_path if '__editable__' not in getattr(f, '__module__', '')]; "
        f"sys.path.insert(0, {str(tmp_path / 'site')!r}); "
        "import bcos_rt.kernels.ops, bcos_rt.export, bcos_rt.cli; "
        "print(bcos_rt.kernels.ops.__file__, bcos_rt.export.__file__, sep='\\n')"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert result.returncode == 0, result.stderr
    assert all(line.startswith(str(tmp_path / "site")) for line in result.stdout.split())


def test_metadata_agrees_with_the_package(wheel):
    import bcos_rt

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["version"] == bcos_rt.__version__
    assert wheel.name.startswith(f"bcos_rt-{project['version']}-")
    gpu = {requirement.split(">")[0] for requirement in project["optional-dependencies"]["onnx-gpu"]}
    cpu = {requirement.split(">")[0] for requirement in project["optional-dependencies"]["onnx"]}
    assert cpu - gpu == {"onnxruntime"}
    assert gpu - cpu == {"onnxruntime-gpu"}


def test_every_direct_requirement_is_pinned():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pinned = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            name, _, version = line.partition("==")
            pinned[name.lower().replace("_", "-")] = version
    extras = project["optional-dependencies"]
    requirements = [*project["dependencies"], *(r for e in extras if e != "onnx-gpu" for r in extras[e])]
    names = {r.split(">")[0].lower() for r in requirements if not r.startswith("bcos-rt")}
    assert len(names) > 10
    assert {name for name in names if not pinned.get(name)} == set()
