"""Fingerprints of memory: the same as in PyTorch on every backend, and another after every edit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from specdec_kernels.fingerprint import fingerprint, reference

SIZES = (0, 1, 7, 8, 9, 63, 64, 65, 1000, 8 * 8192, 3 * 8 * 8192 + 5)


def _bytes(size: int) -> Tensor:
    return torch.randint(0, 256, (size,), generator=torch.Generator().manual_seed(size)).byte()


@pytest.mark.parametrize("size", SIZES)
def test_the_native_one_is_the_reference(size: int) -> None:
    values = _bytes(size)
    assert fingerprint(values) == reference(values) == _by_hand(bytes(values.tolist()))


def _by_hand(data: bytes) -> int:
    """Of Python integers; signed, as an int64 holds it."""
    padded = data + bytes(8 - len(data) % 8)
    halves = [int.from_bytes(padded[i : i + 4], "little") for i in range(0, len(padded), 4)]
    keyed = [(half + 0x9E3779B1 * (i + 1)) % 2**32 for i, half in enumerate(halves)]
    total = sum(a * b for a, b in zip(keyed[::2], keyed[1::2], strict=True)) % 2**64
    return total - 2**64 if total >= 2**63 else total


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_strides_do_not_matter_but_order_does(dtype: torch.dtype) -> None:
    values = torch.randn(33, 70).to(dtype)[:, :65]
    assert fingerprint(values) == fingerprint(values.contiguous()) == reference(values)
    assert fingerprint(values.T) == reference(values.T) != fingerprint(values)


def test_weights_and_threads_do_not_matter() -> None:
    weight = torch.nn.Parameter(torch.randn(3000, 17))
    expected = reference(weight)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert fingerprint(weight) == expected
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("call", [fingerprint, reference])
def test_every_bit_counts(call) -> None:
    values = _bytes(75)
    seen = {call(values)}
    for place in range(len(values)):
        for bit in range(8):
            values[place] ^= 1 << bit
            seen.add(call(values))
            values[place] ^= 1 << bit
    assert len(seen) == 1 + 8 * len(values)


@pytest.mark.parametrize("call", [fingerprint, reference])
def test_edits_of_whole_weights_are_seen(call) -> None:
    weight = torch.randn(64, 48, generator=torch.Generator().manual_seed(0)).bfloat16()
    swapped = torch.arange(64)
    swapped[[3, 40]] = swapped[[40, 3]]
    edits = [
        weight,
        -weight,
        weight.flip(0),
        weight.flip(1),
        weight.roll(1, 0),
        weight.roll(2, 1),
        weight.roll(4, 1),
        weight[swapped],
        weight * 2,
        weight * 0,
        torch.full_like(weight, -0.0),
        weight.view(48, 64),
        weight + weight.abs().amax() * 2**-9,
    ]
    edits = [edit.contiguous() for edit in edits]
    different = len({bytes(edit.view(torch.uint8).flatten().tolist()) for edit in edits})
    assert different == len(edits) - 1  # the other shape has the same bytes
    assert len({call(edit) for edit in edits}) == different
