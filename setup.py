"""Builds specdec_kernels/_C.so with CMake and Ninja; everything else is in pyproject.toml and
CMakeLists.txt.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class CMakeBuild(build_ext):
    """Environment: SPECDEC_CUDA=AUTO|ON|OFF, SPECDEC_CUDA_ARCHS="80;90;100", SPECDEC_WERROR=ON|OFF,
    MAX_JOBS.
    """

    def build_extension(self, ext: Extension) -> None:
        """Configure and build into a fixed folder, so that the next build is incremental."""
        torch = importlib.util.find_spec("torch")  # not imported: faster, and no GPU is asked
        if torch is None or not torch.submodule_search_locations:
            raise RuntimeError("install torch first, then: pip install --no-build-isolation .")
        options = {
            "TORCH_ROOT": torch.submodule_search_locations[0],
            "SPECDEC_OUTPUT": Path(self.get_ext_fullpath(ext.name)).resolve().parent,
            "SPECDEC_CUDA": os.environ.get("SPECDEC_CUDA", "AUTO"),
            "SPECDEC_CUDA_ARCHS": os.environ.get("SPECDEC_CUDA_ARCHS", "80;90;100"),
            "CMAKE_MAKE_PROGRAM": _tool("ninja"),
        }
        if "SPECDEC_WERROR" in os.environ:  # else as it was: other flags would compile all again
            options["SPECDEC_WERROR"] = os.environ["SPECDEC_WERROR"]
        build = ROOT / "build" / "cmake"
        cmake = _tool("cmake")
        defines = [f"-D{name}={value}" for name, value in options.items()]
        subprocess.check_call([cmake, "-S", ROOT, "-B", build, "-G", "Ninja", *defines])
        jobs = os.environ.get("MAX_JOBS", str(os.cpu_count()))
        subprocess.check_call([cmake, "--build", build, "--target", "_C", "-j", jobs])

    def get_ext_filename(self, ext_name: str) -> str:
        """No Python ABI tag: torch.ops loads the library, Python does not."""
        return ext_name.replace(".", "/") + ".so"


class AnyPythonWheel(bdist_wheel):
    """The library is bound to the platform and to torch's stable ABI, not to a Python."""

    def get_tag(self) -> tuple[str, str, str]:
        """py3-none-<platform>."""
        return "py3", "none", super().get_tag()[2]


def _tool(name: str) -> str:
    """The program beside this Python, else the one on PATH."""
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if found is None:
        raise RuntimeError(f"{name} not found; run: pip install {name}")
    return found


setup(
    ext_modules=[Extension("specdec_kernels._C", [])],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": AnyPythonWheel},
)
