"""Build: `kernels/` and `export/` install as `bcos_rt.kernels` and `bcos_rt.export`; CMake builds the CPU kernels.

Without a compiler the package installs all the same: the extension is optional. The reason is then left beside where
the kernels would be, for `bcos_rt.kernels.cpu.unavailable_reason` and `bcos-rt doctor`. The rest is in pyproject.toml.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

# Read by kernels/cpu/__init__.py.
FAILURE = "build_failure.txt"
# Lines of a failed command's output that are kept.
KEPT_LINES = 15


class CMakeBuild(build_ext):
    """Run CMake for the extension and put its module, or why there is none, where setuptools expects it."""

    failure: str | None = None

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            shutil.copy2(build_kernels(Path(self.build_temp).resolve() / "cmake"), target)
        except CompileError as error:
            self.failure = f"{error}"
            print(f"bcos-rt installs without its C++ kernels: {error}", file=sys.stderr)
            raise
        finally:
            self.leave_reason(target)

    def copy_extensions_to_source(self) -> None:
        """Of an installation in place: the other way to end up with kernels, or without."""
        super().copy_extensions_to_source()
        for ext in self.extensions:
            self.leave_reason(Path(self.get_ext_fullpath(ext.name)).resolve())

    def leave_reason(self, target: Path) -> None:
        note = target.with_name(FAILURE)
        if self.failure is None:
            note.unlink(missing_ok=True)
            return
        # Kernels of older sources would not fit the rest of the package.
        target.unlink(missing_ok=True)
        note.write_text(f"{self.failure}\n", encoding="utf-8")


def build_kernels(folder: Path) -> Path:
    """Configure and build in ``folder``; returns the module's file. Raises CompileError, saying why."""
    root = Path(__file__).resolve().parent
    # Beside this Python first: a virtual environment that is not active has its own.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    cmake, ninja = shutil.which("cmake", path=path), shutil.which("ninja", path=path)
    if cmake is None:
        raise CompileError("the C++ kernels need CMake (pip install cmake)")
    try:
        import pybind11
    except ImportError as error:
        raise CompileError("the C++ kernels need pybind11 (pip install pybind11)") from error
    configure = [
        cmake, "-S", str(root), "-B", str(folder), "-DCMAKE_BUILD_TYPE=Release",
        f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
    ]  # fmt: skip
    if ninja is not None:
        configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    # A folder configured for another Python or from another place cannot be configured again.
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for command in (configure, [cmake, "--build", str(folder), "--parallel", str(os.cpu_count() or 1)]):
        try:
            result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        except OSError as error:
            raise CompileError(f"CMake does not start: {error}") from error
        print(result.stdout)
        if result.returncode != 0:
            said = "\n".join(result.stdout.splitlines()[-KEPT_LINES:])
            raise CompileError(f"CMake could not build the C++ kernels (exit code {result.returncode}):\n{said}")
    (built,) = [path for path in folder.glob("_native*") if path.suffix in (".so", ".pyd")]
    return built


packages = find_packages(include=["bcos_rt", "bcos_rt.*"])
for root, name in (("kernels", "bcos_rt.kernels"), ("export", "bcos_rt.export")):
    packages += [name, *(f"{name}.{sub}" for sub in find_packages(root))]

setup(
    packages=packages,
    package_dir={"bcos_rt.kernels": "kernels", "bcos_rt.export": "export"},
    ext_modules=[Extension("bcos_rt.kernels.cpu._native", sources=[], optional=True)],
    cmdclass={"build_ext": CMakeBuild},
)
