"""Trees of the native kernels where the order of growth is delicate: ties, twins, strange scores,
and sizes at which the CUDA kernel takes another path.
"""

from __future__ import annotations

from typing import Any

import cuda_emulated
import pytest
import torch
from torch import Tensor

from specdec_kernels.registry import OPS

BUILD = OPS["build_tree"]
INT = torch.int32
NATIVE = [
    "cpu",
    *(pytest.param(order, id=f"cuda-emulated-{order}") for order in cuda_emulated.ORDERS),
]


def _build(where: str, **inputs: Any) -> tuple[Tensor, ...]:
    if where == "cpu":
        return BUILD(**inputs, backend="cpu")
    with cuda_emulated.in_order(where):
        return BUILD(**inputs, backend=cuda_emulated.BACKEND)


def _assert_equals_the_reference(where: str, inputs: dict[str, Any]) -> tuple[Tensor, ...]:
    got, want = _build(where, **inputs), BUILD(**inputs, backend="reference")
    for name, mine, theirs in zip(("tokens", "parents", "sizes", "scores"), got, want, strict=True):
        assert torch.equal(mine, theirs), name  # also -inf of padding
    return got


def _inputs(logprobs: Tensor, candidates: Tensor, nodes: int, **options: Any) -> dict[str, Any]:
    batch = len(logprobs)
    return {
        "roots": torch.arange(batch) - 3,
        "candidates": candidates,
        "logprobs": logprobs,
        "budgets": torch.full((batch,), nodes, dtype=INT),
        "max_nodes": nodes,
        **options,
    }


@pytest.mark.parametrize("where", NATIVE)
@pytest.mark.parametrize("beams", [False, True], ids=["marginals", "beams"])
def test_ties_and_twins_grow_as_in_the_reference(where: str, beams: bool) -> None:
    generator = torch.Generator().manual_seed(int(beams))
    draw = {"generator": generator}
    for shape in ((6, 3, 4), (3, 4, 40), (2, 6, 2)):
        logprobs = -torch.randint(0, 3, shape, **draw) / 4  # most sums tie
        candidates = torch.randint(-1, 5, shape, **draw)  # absent ones and twins
        parents = torch.randint(-2, shape[2] + 2, shape, **draw).int()
        options = {"candidate_parents": parents} if beams else {}
        _assert_equals_the_reference(where, _inputs(logprobs, candidates, 37, **options))


@pytest.mark.parametrize("where", NATIVE)
def test_sums_that_round_to_the_same_number_tie(where: str) -> None:
    """The likelier child has the higher number, and comes second: sums are equal in float64."""
    gains = torch.tensor([[[-1.0, -2.0, -3.0], [-3e-20, -2e-20, -1e-20], [-1e-30, 0.0, -0.0]]])
    candidates = torch.arange(9).view(1, 3, 3)
    inputs = _inputs(gains, candidates, 30)
    _, parents, *_ = _assert_equals_the_reference(where, inputs)
    tokens = _build(where, **inputs)[0]
    assert tokens[0, 1:5].tolist() == [0, 3, 4, 5] and parents[0, 2:5].tolist() == [1, 1, 1]


@pytest.mark.parametrize("where", NATIVE)
def test_strange_scores_and_budgets(where: str) -> None:
    nan, inf = float("nan"), float("inf")
    gains = torch.tensor([[nan, 0.5, inf, -inf], [-0.0, -3e38, -1e-45, nan]])
    logprobs = gains.repeat(7, 2, 1)
    candidates = torch.arange(16).view(4, 4).expand(7, 4, 4)
    inputs = _inputs(logprobs, candidates, 20)
    inputs["budgets"] = torch.tensor([-(2**31), -1, 0, 1, 19, 20, 2**31 - 1], dtype=INT)
    sizes = _assert_equals_the_reference(where, inputs)[2]
    assert sizes.tolist() == [0, 0, 0, 1, 19, 20, 20]
    assert _build(where, **inputs)[2].dtype == INT


@pytest.mark.parametrize("where", NATIVE)
@pytest.mark.parametrize("shape", [(2, 0, 3), (2, 3, 0), (0, 2, 2)], ids=str)
def test_without_candidates_only_the_root_grows(where: str, shape: tuple[int, int, int]) -> None:
    empty = torch.zeros(shape)
    sizes = _assert_equals_the_reference(where, _inputs(empty, empty.long(), 4))[2]
    assert sizes.tolist() == [1] * shape[0]


@pytest.mark.parametrize("where", NATIVE[:2])
def test_a_tree_or_candidates_larger_than_shared_memory(where: str) -> None:
    generator = torch.Generator().manual_seed(5)
    for depths, width, nodes in ((6, 5, 1300), (2, 1700, 12)):
        logits = torch.randn((2, depths, width), generator=generator)
        candidates = torch.arange(depths * width).view(depths, width).expand(2, depths, width)
        _assert_equals_the_reference(where, _inputs(logits.log_softmax(-1), candidates, nodes))


def test_inputs_are_read_once_and_results_written_once() -> None:
    inputs = BUILD.inputs(B=3, T=5, K=6, N=24, beams=True)
    cuda_emulated.emulated.take_counters()
    results = BUILD(**inputs, backend=cuda_emulated.BACKEND)
    counters = cuda_emulated.emulated.take_counters()
    assert counters["loaded_bytes"] == 3 * 5 * 6 * (8 + 4 + 4)
    assert counters["stored_bytes"] == sum(result.nbytes for result in results)
    assert counters["launches"] == 1 and counters["blocks"] == 3


@pytest.mark.parametrize("where", NATIVE[:2])
def test_a_tree_has_room_for_its_root(where: str) -> None:
    inputs = _inputs(torch.zeros(1, 1, 1), torch.zeros(1, 1, 1, dtype=torch.int64), 0)
    with pytest.raises(ValueError, match="build_tree: max_nodes must be >= 1, got 0"):
        _build(where, **inputs)
