"""What a measurement ran on, and the two rates that its floors are computed from."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Callable
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from ..registry import cpu_capability, multiply_registers

_READ_BYTES = 256 * 2**20  # larger than last-level caches
_MATRIX = 2048
_ROUNDS = 500_000  # of products in registers, some milliseconds
_REPEATS = 7


def describe_machine(device: str = "cpu") -> dict[str, Any]:
    """Describe this machine and measure it; takes about a second.

    Args:
        device: where the bandwidth and the matrix rate are measured, "cpu" or "cuda".

    Returns:
        cpu, cores (logical), threads (of torch), load_average (last minute: times taken beside
        other work are worth little), memory_gib, isa (of our CPU kernels), gpu (name or None),
        bandwidth_gbs and bf16_gflops (see `measure_rates`), versions (package -> version), commit
        (None outside a checkout).
    """
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2),
        "memory_gib": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**30,
        "isa": cpu_capability(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        **measure_rates(device),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            **{name: _version(name) for name in ("transformers", "specdec_kernels")},
        },
        "commit": _commit(),
    }


def measure_rates(device: str = "cpu") -> dict[str, float]:
    """The two rates that bound a kernel, by the roofline model (Williams et al. 2009).

    Returns:
        bandwidth_gbs (10^9 bytes read per second), bf16_gflops (10^9 operations per second of a
        bfloat16 matrix product, of a float32 one, or on a CPU of products in registers, whichever
        is most).
    """
    gflops = max(_matrix_rate(device), _register_rate(device)) / 1e9
    return {
        "bandwidth_gbs": round(_read_bandwidth(device) / 1e9, 2),
        "bf16_gflops": round(gflops, 1),
    }


def synchronize(device: str) -> None:
    """Wait until the device has done all work queued on it."""
    if device != "cpu":
        torch.cuda.synchronize()


def _read_bandwidth(device: str) -> float:
    """Bytes per second of a reduction over a tensor that no cache holds."""
    values = torch.ones(_READ_BYTES // 4, device=device)
    return _READ_BYTES / _fastest(values.amax, device)


def _matrix_rate(device: str) -> float:
    """CPUs without bfloat16 products emulate them, some a hundred times as slowly as they multiply
    float32; there the float32 units set the limit, and a small product tells.
    """
    dtypes = [torch.bfloat16, torch.float32]
    if device == "cpu":
        dtypes = [min(dtypes, key=partial(_product_seconds, _MATRIX // 8, device))]
    seconds = min(_product_seconds(_MATRIX, device, dtype) for dtype in dtypes)
    return 2 * _MATRIX**3 / seconds


def _register_rate(device: str) -> float:
    """What a library's product of matrices does not reach on every CPU: MKL on others than
    Intel's not by a third.
    """
    if device != "cpu":
        return 0.0
    return multiply_registers(_ROUNDS) / _fastest(partial(multiply_registers, _ROUNDS), device)


def _product_seconds(size: int, device: str, dtype: torch.dtype) -> float:
    matrix = torch.ones((size, size), dtype=dtype, device=device)
    return _fastest(partial(torch.mm, matrix, matrix), device)


def _fastest(function: Callable[[], Any], device: str) -> float:
    seconds = []
    for _ in range(_REPEATS):
        synchronize(device)
        start = time.perf_counter()
        function()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # a checkout on the path, not installed
        return None


def _commit() -> str | None:
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    try:
        git = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (FileNotFoundError, subprocess.CalledProcessError):
        return None
    return git.stdout.strip()
