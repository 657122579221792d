"""What is installed, and the layering that keeps it readable."""

from __future__ import annotations

import ast
import importlib
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import cuda_emulated
import pytest

import specdec_kernels
from specdec_kernels import registry

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "specdec_kernels"


def test_the_native_library_is_built() -> None:
    assert registry.NATIVE_LIBRARY.exists(), "run make setup"
    assert registry.cpu_capability() in ("avx512_bf16", "avx512", "avx2", "default")
    native = [op for op, backends in specdec_kernels.available().items() if backends["cpu"] is None]
    assert {
        "tree_mask", "write_kv", "tree_attention", "sample", "verify", "commit", "topk_logprobs"
    } <= set(native)  # fmt: skip


def test_the_native_library_needs_nothing_newer_than_torch_2_10() -> None:
    """The list is what libtorch_cpu of 2.10.0, the oldest that we promise, exports of torch's C
    interface; a missing symbol would end the import there, with C++ ones other versions too.
    """
    known = (ROOT / "tests" / "torch_2_10_symbols.txt").read_text("utf-8").split()
    listing = subprocess.run(
        ["nm", "-D", "--undefined-only", registry.NATIVE_LIBRARY],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    needed = re.findall(r" U ((?:aoti_)?torch_\w+)$", listing, re.MULTILINE)
    assert len(needed) > 40 and set(needed) <= set(known)
    assert not re.findall(r" U _Z\w*(?:2at|3c10|5torch)\w*", listing)


@pytest.mark.parametrize("capability", ["avx512", "avx2", "default"])
def test_every_instruction_set_passes_the_operator_tests(capability: str) -> None:
    """In a child process: the choice is made when the library is loaded."""
    names = ("ops", "reference", "fingerprint")
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider",
         "-k", "cpu or fingerprint", *(str(ROOT / "tests" / f"test_{name}.py") for name in names)],
        env={**os.environ, "SPECDEC_CPU_CAPABILITY": capability},
        capture_output=True, text=True, cwd=ROOT, check=False,
    )  # fmt: skip
    if "SPECDEC_CPU_CAPABILITY must be one of" in result.stdout + result.stderr:
        pytest.skip(f"this CPU has no {capability}")
    assert result.returncode == 0, result.stdout[-3000:]
    assert re.search(r"\b\d{2,} passed", result.stdout)


def test_the_default_kernels_need_no_header_of_an_instruction_set() -> None:
    """They are what ARM has, too. Which headers a source includes, its compiler tells."""
    for source in sorted((ROOT / "csrc" / "cpu").glob("*.cpp")):
        made = subprocess.run(
            [os.environ.get("CXX", "c++"), "-std=c++20", "-DSPECDEC_ISA=isa_default", "-M", source],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        headers = made.stdout.replace("\\\n", " ").split()
        assert str(source) in headers
        assert not [header for header in headers if header.endswith("intrin.h")]


def test_the_wheel_installs_one_top_level_package(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", str(ROOT), "--no-build-isolation", "--no-deps",
         "--quiet", "--wheel-dir", str(tmp_path)],
        check=True, cwd=tmp_path,
    )  # fmt: skip
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.startswith(f"specdec_kernels-{specdec_kernels.__version__}-py3-none-")
    names = zipfile.ZipFile(wheel).namelist()
    dist_info = f"specdec_kernels-{specdec_kernels.__version__}.dist-info"
    assert {name.split("/")[0] for name in names} == {"specdec_kernels", dist_info}
    for needed in (
        "_C.so",
        "py.typed",
        "bench/prompts.jsonl",
        "weights/smollm2-135m-instruct-eagle/model.safetensors",
        "triton_kernels/__init__.py",
        "cli.py",
    ):
        assert f"specdec_kernels/{needed}" in names


def test_the_kernel_folder_cannot_be_imported_under_its_bare_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    sys.modules.pop("triton_kernels", None)
    with pytest.raises(ImportError, match=r"source of specdec_kernels\.triton_kernels"):
        importlib.import_module("triton_kernels")
    importlib.import_module("specdec_kernels.triton_kernels")


def _imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module.split(".")[0])
    return found


def test_only_the_hf_folder_imports_transformers() -> None:
    files = [p for p in PACKAGE.rglob("*.py") if p.parent.name != "hf"]
    assert len(files) > 15
    assert [str(p) for p in files if "transformers" in _imports(p)] == []
    assert "transformers" in _imports(PACKAGE / "hf" / "generate.py")


def test_importing_the_package_does_not_import_transformers() -> None:
    code = "import sys, specdec_kernels; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_kernels_know_no_framework() -> None:
    folders = ("cpu", "core", "cuda", "emu")
    files = [p for folder in folders for p in (ROOT / "csrc" / folder).iterdir()]
    assert len(files) > 10
    for path in files:
        assert not re.search(r"#include <(torch|ATen|c10)/", path.read_text("utf-8")), path.name


def test_every_operator_has_one_file_per_floor() -> None:
    for name, backends in specdec_kernels.available().items():
        assert (PACKAGE / "ops" / f"{name}.py").exists()
        if backends["cpu"] is None:
            assert (ROOT / "csrc" / "cpu" / f"{name}.cpp").exists()
        if backends.get(cuda_emulated.BACKEND, "not built") is None:
            assert (ROOT / "csrc" / "cuda" / f"{name}.cu").exists()
