"""What a compiled GPU kernel is made of, read without a GPU: registers, spills, shared memory,
occupancy, instructions.

NVIDIA code is read with `cuobjdump` and `nvdisasm`, from PATH or from inside the triton package;
AMD code from the assembler text.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

NVIDIA_GROUPS = {
    "tensor": r"(HMMA|HGMMA|UTCHMMA|DMMA)",
    "load": r"(LDG|LDGSTS|UTMALDG)",
    "load128": r"(LDG\S*\.128|LDGSTS\S*\.128|UTMALDG)",
    "copy128": r"LDGSTS\S*\.128",
    "matrix_load": r"LDSM",
    "store": r"STG",
    "store128": r"STG\S*\.128",
    "local": r"(LDL|STL)",
    "barrier": r"BAR",
    "fused": r"(FFMA|DFMA)",
}
"""What an instruction counts as, by the start of its name."""

AMD_GROUPS = {
    "tensor": r"v_mfma",
    "load": r"(buffer|global|flat)_load",
    "load128": r"(buffer|global|flat)_load_dwordx4",
    "store": r"(buffer|global|flat)_store",
    "store128": r"(buffer|global|flat)_store_dwordx4",
    "local": r"scratch_",
    "barrier": r"s_barrier",
    "fused": r"v_(pk_)?fma",
}


@dataclass(frozen=True, slots=True)
class Code:
    """One compiled kernel.

    Attributes:
        registers: per thread (AMD: vector registers, accumulators included).
        spills: bytes of stack per thread (AMD: spilled registers).
        shared: bytes of shared memory per block, dynamic included.
        occupancy: resident warps / most that a multiprocessor holds (0 on AMD: not modelled).
        counts: instructions by group, and "all".
    """

    registers: int
    spills: int
    shared: int
    occupancy: float
    counts: dict[str, int]


@dataclass(frozen=True, slots=True)
class _Multiprocessor:
    """Limits of one multiprocessor, as NVIDIA's occupancy tables give them."""

    shared: int
    shared_per_block: int
    warps: int = 64
    blocks: int = 32
    registers: int = 65536


_MULTIPROCESSORS = {
    80: _Multiprocessor(shared=167936, shared_per_block=166912),
    90: _Multiprocessor(shared=233472, shared_per_block=232448),
    100: _Multiprocessor(shared=233472, shared_per_block=232448),
}
_OPCODE = r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P[0-9T]+\s+)?([A-Z][A-Z0-9_.]*)"
_RESERVED_SHARED = 1024  # per block, by the system, since sm_80
_REGISTER_UNIT, _SHARED_UNIT, _PARTITIONS = 256, 128, 4


def occupancy(architecture: int, registers: int, shared: int, threads: int) -> float:
    """Resident warps of blocks of this size, as a share of what a multiprocessor holds."""
    limits = _MULTIPROCESSORS[architecture]
    if shared > limits.shared_per_block:
        return 0.0
    warps = -(-threads // 32)
    per_warp = -(-registers * 32 // _REGISTER_UNIT) * _REGISTER_UNIT
    by_registers = (limits.registers // _PARTITIONS // per_warp) * _PARTITIONS // warps
    per_block = -(-(shared + _RESERVED_SHARED) // _SHARED_UNIT) * _SHARED_UNIT
    blocks = min(limits.blocks, limits.warps // warps, by_registers, limits.shared // per_block)
    return blocks * warps / limits.warps


def read_cubin(path: Path, architecture: int, threads: int, dynamic_shared: int) -> Code:
    """Inspect a cubin of one kernel."""
    usage = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)", _run("cuobjdump", "-res-usage", path))
    if usage is None:
        raise ValueError(f"{path.name}: cuobjdump names no resources")
    registers, stack, static = map(int, usage.groups())
    if architecture >= 90:
        static = max(0, static - _RESERVED_SHARED)  # counted by the tool from sm_90 on
    opcodes = re.findall(_OPCODE, _disassemble(path), re.MULTILINE)
    shared = static + dynamic_shared
    return Code(
        registers,
        stack,
        shared,
        occupancy(architecture, registers, shared, threads),
        _count([o for o in opcodes if o != "NOP"], NVIDIA_GROUPS),
    )


def extract_cubins(library: Path, folder: Path) -> dict[int, list[Path]]:
    """Architecture -> cubins of a library with CUDA code, extracted into `folder`."""
    _run("cuobjdump", "-xelf", "all", library.resolve(), folder=folder)
    found: dict[int, list[Path]] = {}
    for path in sorted(folder.glob("*.cubin")):
        architecture = re.search(r"sm_(\d+)", path.name)
        if architecture is None:
            raise ValueError(f"{path.name} names no architecture")
        found.setdefault(int(architecture[1]), []).append(path)
    return found


def ptx_names(library: Path) -> list[str]:
    """`<source>.sm_<architecture>` of the PTX in a library."""
    return re.findall(r"(\S+\.sm_\d+)\.ptx", _run("cuobjdump", "-lptx", library))


def read_kernels(
    path: Path,
    architecture: int,
    threads: Callable[[str], int],
    dynamic_shared: Callable[[str], int] = lambda name: 0,
) -> dict[str, Code]:
    """Inspect a cubin of several kernels.

    Args:
        threads: name of a kernel -> threads of its blocks.
        dynamic_shared: name of a kernel -> bytes of shared memory that its launch adds.

    Returns:
        `name<arguments>` of each kernel -> its code.
    """
    usages = {
        mangled: [int(number) for number in numbers]
        for mangled, *numbers in re.findall(
            r"Function (\S+):\s*REG:(\d+) STACK:(\d+) SHARED:(\d+)",
            _run("cuobjdump", "-res-usage", path),
        )
    }
    sections = re.split(r"^\.text\.(\S+):", _disassemble(path), flags=re.MULTILINE)
    codes = {}
    for mangled, text in zip(sections[1::2], sections[2::2], strict=True):
        registers, stack, shared = usages[mangled]
        name = _readable(mangled)
        shared = max(0, shared - _RESERVED_SHARED) if architecture >= 90 else shared
        shared += dynamic_shared(name)
        opcodes = re.findall(_OPCODE, text, re.MULTILINE)
        codes[name] = Code(
            registers,
            stack,
            shared,
            occupancy(architecture, registers, shared, threads(name)),
            _count([o for o in opcodes if o != "NOP"], NVIDIA_GROUPS),
        )
    return codes


def _readable(mangled: str) -> str:
    """`kernel<arguments>` of a mangled name: types and whole numbers."""
    match = re.search(r"([a-z_]+_kernel)(I?)(.*)", mangled)
    if match is None:
        raise ValueError(f"{mangled} is not the name of a kernel")
    name, is_template, rest = match.groups()
    builtin = {"f": "float", "j": "uint32_t", "t": "uint16_t"}
    arguments = []
    while is_template and not rest.startswith("E"):
        if number := re.match(r"Li(\d+)E", rest):
            arguments.append(number[1])
            rest = rest[number.end() :]
        elif named := re.match(r"(NS_)?(\d+)", rest):  # its length, then the name
            end = named.end() + int(named[2])
            arguments.append(rest[named.end() : end])
            rest = rest[end + (named[1] is not None) :]
        else:
            arguments.append(builtin[rest[0]])
            rest = rest[1:]
    return f"{name}<{', '.join(arguments)}>" if arguments else name


def read_amdgcn(text: str, shared: int) -> Code:
    """Inspect the assembler text of one kernel."""
    fields = {
        name: int(value)
        for name, value in re.findall(r"\.(vgpr_count|vgpr_spill_count|agpr_count):\s+(\d+)", text)
    }
    opcodes = re.findall(
        r"^\s+([vs]_\w+|(?:buffer|global|flat|ds|scratch)_\w+)", text, re.MULTILINE
    )
    return Code(
        fields["vgpr_count"],
        fields["vgpr_spill_count"],
        shared,
        0.0,
        _count(opcodes, AMD_GROUPS),
    )


def _count(opcodes: list[str], groups: dict[str, str]) -> dict[str, int]:
    counts = Counter(dict.fromkeys(groups, 0))
    for opcode in opcodes:
        for group, pattern in groups.items():
            counts[group] += re.match(pattern, opcode) is not None
    return {**counts, "all": len(opcodes)}


def _disassemble(cubin: Path) -> str:
    """Code alone, without the dataflow analysis that only names labels: twice as fast."""
    return _run("nvdisasm", "-c", "-ndf", cubin)


def _run(tool: str, *arguments: str | Path, folder: Path | None = None) -> str:
    command = [_tool(tool), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=folder).stdout


def _tool(name: str) -> str:
    found = shutil.which(name)
    spec = importlib.util.find_spec("triton")
    if spec is not None and spec.origin is not None:
        bundled = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / name
        found = str(bundled) if bundled.exists() else found
    if found is None:
        raise FileNotFoundError(f"{name} is neither in the triton package nor on PATH")
    return found
