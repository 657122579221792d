"""The glossary of sizes, and the shape table that every operator declares once.

A declaration reads ``"logits: B N V float, tokens: B N int64, num_nodes: B int32"``: names, sizes,
dtype class. `B` requests, `N` tree nodes (root included), `V` vocabulary, `H` query heads, `G`
key/value heads, `D` head dim of queries and keys, `E` head dim of values, `S` cache slots, `C` =
`B` rows of a contiguous cache or pages of a paged one, `M` pages per request, `L` layers, `W` =
ceil(N/64) mask words, `K` candidates, `T` tree depths, `R` rows, `F` features, `Q`
draft laws per request, `U` draft vocabulary. `_` is any size;
`[...]` marks a list of tensors. Dtype `float` is bfloat16, float16 or float32 and the same for
every `float` argument of a call. The same text is checked here and, for the native operators, in
csrc/shape_table.hpp.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

PAD = -1
"""Marks an unused entry in every integer output."""

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
_DTYPES = {
    "float": FLOATS,
    "bfloat16": (torch.bfloat16,),
    "float32": (torch.float32,),
    "float64": (torch.float64,),
    "int32": (torch.int32,),
    "int64": (torch.int64,),
    "int8": (torch.int8,),
    "bool": (torch.bool,),
}


def num_words(num_nodes: int) -> int:
    """Mask words of a tree with `num_nodes` nodes: W = ceil(N/64)."""
    return (num_nodes + 63) // 64


@dataclass(frozen=True, slots=True)
class ArgShape:
    """One argument of a shape table: ``name: dims dtype``."""

    name: str
    dims: tuple[str, ...]
    dtype: str
    is_list: bool

    def __str__(self) -> str:
        dims = " ".join(self.dims)
        return f"{self.name}: {f'[{dims}]' if self.is_list else dims} {self.dtype}"


def parse(table: str) -> tuple[ArgShape, ...]:
    """Parse a declaration; see the module docstring for its grammar.

    Raises:
        ValueError: a malformed entry.
    """
    entries = []
    for entry in filter(None, (part.strip() for part in table.split(","))):
        match = re.fullmatch(r"(\w+): (\[)?((?:[A-Z_] ?)+)\]? (\w+)", entry)
        if match is None or match[4] not in _DTYPES:
            raise ValueError(f"malformed shape declaration {entry!r}")
        entries.append(ArgShape(match[1], tuple(match[3].split()), match[4], match[2] is not None))
    return tuple(entries)


def check(op: str, table: Sequence[ArgShape], args: Mapping[str, Any]) -> dict[str, int]:
    """Check the tensors of one call against the table of its operator.

    Returns:
        The size bound to each letter.

    Raises:
        ValueError: a wrong shape, dtype or device, naming op, argument, rule and values.
        TypeError: an argument that is not a tensor (or list of tensors).
    """
    sizes: dict[str, int] = {}
    first: dict[str, tuple[str, Any]] = {}
    for spec in table:
        value = args.get(spec.name)
        if value is None:
            continue
        for tensor in value if spec.is_list else (value,):
            _check_tensor(op, spec, tensor, sizes, first)
    return sizes


def _check_tensor(
    op: str, spec: ArgShape, tensor: Any, sizes: dict[str, int], first: dict[str, tuple[str, Any]]
) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{op}: {spec.name} must be a tensor, got {type(tensor).__name__}")
    shape = tuple(tensor.shape)
    fits = len(shape) == len(spec.dims) and all(
        d == "_" or sizes.setdefault(d, s) == s for d, s in zip(spec.dims, shape, strict=True)
    )
    if not fits:
        want = ", ".join(str(sizes.get(d, d)) for d in spec.dims)
        raise ValueError(
            f"{op}: {spec.name} must be [{', '.join(spec.dims)}] = [{want}], got {list(shape)}"
        )
    if tensor.dtype not in _DTYPES[spec.dtype]:
        names = " or ".join(_name(d) for d in _DTYPES[spec.dtype])
        raise ValueError(f"{op}: {spec.name} must be {names}, got {_name(tensor.dtype)}")
    for kind, value in (("dtype", tensor.dtype), ("device", tensor.device)):
        if kind == "dtype" and spec.dtype != "float":
            continue
        owner, expected = first.setdefault(kind, (spec.name, value))
        if value != expected:
            verb = "be" if kind == "dtype" else "be on"
            raise ValueError(
                f"{op}: {spec.name} must {verb} {_name(expected)} like {owner}, got {_name(value)}"
            )


def _name(value: Any) -> str:
    return str(value).removeprefix("torch.")
