"""Build: `kernels/` and `export/` install as `bcos_rt.kernels` and `bcos_rt.export`; CMake builds the CPU kernels.

Without a compiler the package installs all the same: the extension is optional, and `bcos-rt doctor` says that it is
missing. The rest is in pyproject.toml.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError


class CMakeBuild(build_ext):
    """Run CMake for the extension and put its module where setuptools expects it."""

    def build_extension(self, ext: Extension) -> None:
        root = Path(__file__).resolve().parent
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        folder = Path(self.build_temp).resolve() / "cmake"
        # Beside this Python first: a virtual environment that is not active has its own.
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        cmake, ninja = shutil.which("cmake", path=path), shutil.which("ninja", path=path)
        if cmake is None:
            raise CompileError("the CPU kernels need CMake (pip install cmake)")
        try:
            import pybind11
        except ImportError as error:
            raise CompileError("the CPU kernels need pybind11 (pip install pybind11)") from error
        configure = [
            cmake, "-S", str(root), "-B", str(folder), "-DCMAKE_BUILD_TYPE=Release",
            f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        ]  # fmt: skip
        if ninja is not None:
            configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        # A folder configured for another Python or from another place cannot be configured again.
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        try:
            subprocess.run(configure, check=True)
            subprocess.run([cmake, "--build", str(folder), "--parallel", str(os.cpu_count() or 1)], check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise CompileError(f"CMake could not build the CPU kernels: {error}") from error
        (built,) = [path for path in folder.glob("_native*") if path.suffix in (".so", ".pyd")]
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.new")
        shutil.copy2(built, temporary)
        os.replace(temporary, target)


packages = find_packages(include=["bcos_rt", "bcos_rt.*"])
for root, name in (("kernels", "bcos_rt.kernels"), ("export", "bcos_rt.export")):
    packages += [name, *(f"{name}.{sub}" for sub in find_packages(root))]

setup(
    packages=packages,
    package_dir={"bcos_rt.kernels": "kernels", "bcos_rt.export": "export"},
    ext_modules=[Extension("bcos_rt.kernels.cpu._native", sources=[], optional=True)],
    cmdclass={"build_ext": CMakeBuild},
)
