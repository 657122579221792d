"""The CUDA kernels' C++ under AddressSanitizer with UndefinedBehaviorSanitizer, and under
ThreadSanitizer; and mutants of them. Tests that use it belong to the xdist group "sanitizers".
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
KERNELS = ROOT / "csrc" / "cuda"
BUILD = ROOT / "build" / "cmake"
TOOLS = {"address": "address,undefined", "thread": "thread"}
"""Name -> what the compiler calls it."""


@pytest.fixture(scope="module")
def programs() -> None:
    """The programs built with each tool; a second build is instant."""
    cmake = shutil.which("cmake", path=str(Path(sys.executable).parent)) or shutil.which("cmake")
    assert cmake is not None and (BUILD / "CMakeCache.txt").exists(), "run make setup"
    targets = [f"sanitized_{tool}" for tool in TOOLS]
    built = subprocess.run(
        [cmake, "--build", BUILD, "--target", *targets], capture_output=True, text=True, check=False
    )
    assert built.returncode == 0, built.stdout[-4000:]


def program_of(tool: str) -> Path:
    """The program that runs every kernel, once the fixture has built it."""
    return BUILD / "tests" / f"sanitized_{tool}"


def run(program: Path, name: str, order: str, *, until_race: bool = False) -> tuple[int, str]:
    """Run a kernel or planted fault in an order of threads; exit code and output.

    Args:
        until_race: end at the first data race, not at the end of the kernel.
    """
    command = [str(program), name, order]
    # Leaks are not looked for: fibers are never freed.
    options = {
        "ASAN_OPTIONS": "detect_leaks=0",
        "TSAN_OPTIONS": f"halt_on_error={until_race:d}",
    }
    env = {**os.environ, **options}
    result = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if "unexpected memory mapping" in result.stderr:  # of address randomisation, with older tools
        command = ["setarch", "-R", *command]
        result = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    return result.returncode, result.stdout + result.stderr


def build_mutant(tool: str, operator: str, edit: Callable[[Path], None], folder: Path) -> Path:
    """The program with `csrc/cuda/<operator>.cu` compiled from sources that were edited.

    Args:
        edit: changes files in the folder of kernels that it is given.
        folder: empty, for sources and program.
    """
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    kernels = folder / "csrc" / "cuda"
    edit(kernels)
    objects = list((BUILD / "CMakeFiles" / f"sanitized_{tool}.dir").rglob("*.o"))
    others = [path for path in objects if path.name != f"{operator}.cpp.o"]
    assert len(others) == len(objects) - 1
    program = folder / "mutant"
    subprocess.run(
        ["c++", "-std=c++20", "-O1", "-g1", f"-fsanitize={TOOLS[tool]}", "-Wno-unknown-pragmas",
         "-ffp-contract=off", "-x", "c++", kernels / f"{operator}.cu", "-x", "none", *others,
         "-o", program],
        check=True,
    )  # fmt: skip
    return program


def replace_once(path: Path, before: str, after: str) -> None:
    """Replace a text that stands exactly once in a file."""
    text = path.read_text("utf-8")
    assert text.count(before) == 1
    path.write_text(text.replace(before, after), "utf-8")
