"""What the generic suite does not show of the CUDA kernels: shapes that take other paths, what a
device does with contents that the host would refuse, and how many bytes move.
"""

from __future__ import annotations

import cuda_emulated
import pytest
import torch
from torch import Tensor

from specdec_kernels.registry import OPS

BACKEND = cuda_emulated.BACKEND
ORDERS = pytest.mark.parametrize("order", cuda_emulated.ORDERS)
INT = torch.int32


def test_the_emulated_kernels_are_built() -> None:
    assert cuda_emulated.MODULE.exists(), "run make setup"
    for name in (
        "tree_mask",
        "write_kv",
        "commit",
        "topk_logprobs",
        "build_tree",
        "tree_attention",
    ):
        assert OPS[name].why_absent(BACKEND) is None


def _int(*values: int) -> Tensor:
    return torch.tensor(values, dtype=INT)


@ORDERS
def test_topk_keeps_ties_in_order_and_survives_strange_rows(order: str) -> None:
    nan, inf = float("nan"), float("inf")
    rows = torch.randn((6, 9001), generator=torch.Generator().manual_seed(0))
    rows[1] = 3.0  # every token ties
    rows[2] = -inf
    rows[3, ::2] = nan
    rows[4, 17] = inf
    rows[5] = torch.where(rows[5] > 0, 0.0, -0.0)  # equal, whatever their sign
    with cuda_emulated.in_order(order):
        for k in (1, 64, 100):
            got, want = (OPS["topk_logprobs"](rows, k, backend=b) for b in (BACKEND, "reference"))
            assert torch.equal(got[1], want[1])
            torch.testing.assert_close(got[0], want[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_topk_of_rows_at_every_alignment(dtype: torch.dtype) -> None:
    values = torch.randn(3 * 8195 + 16, generator=torch.Generator().manual_seed(1)).to(dtype)
    for offset in range(9):
        logits = values[offset : offset + 3 * 8195].view(3, 8195)
        got, want = (OPS["topk_logprobs"](logits, 40, backend=b) for b in (BACKEND, "reference"))
        assert torch.equal(got[1], want[1])


def test_topk_where_k_threads_hold_all_that_is_large() -> None:
    """The longest list that must be sorted: all scores of 63 threads, and one of a 64th."""
    logits = torch.randn((1, 8192), generator=torch.Generator().manual_seed(2)).bfloat16()
    of_thread = logits.view(4, 256, 8)
    of_thread[:, : 63 * 4 : 4] = of_thread[:, : 63 * 4 : 4].abs() + 20
    of_thread[:, 255] = 10
    got, want = (OPS["topk_logprobs"](logits, 64, backend=b) for b in (BACKEND, "reference"))
    assert torch.equal(got[1], want[1])


def test_topk_reads_each_logit_once() -> None:
    rows, vocab, k, segment = 3, 20000, 8, 8192
    logits = torch.randn(rows, vocab, dtype=torch.bfloat16)
    cuda_emulated.emulated.take_counters()
    OPS["topk_logprobs"](logits, k, backend=BACKEND)
    counters = cuda_emulated.emulated.take_counters()
    segments = -(-vocab // segment)
    merged = rows * segments * (8 * k + 12)
    assert counters["loaded_bytes"] == 2 * rows * vocab + merged
    assert counters["stored_bytes"] == merged + 12 * rows * k
    assert counters["launches"] == 2


def test_a_bad_parent_counts_as_the_root() -> None:
    parents, num_nodes = torch.tensor([[7, 0, 5, 2, -3]], dtype=INT), _int(9)
    good = torch.tensor([[-1, 0, 1, 2, 0]], dtype=INT)
    got = OPS["tree_mask"](parents, num_nodes, backend=BACKEND)
    want = OPS["tree_mask"](good, _int(5), backend="reference")
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


def test_a_tree_larger_than_shared_memory() -> None:
    nodes = 4100
    parents = ((torch.arange(nodes) - 1) // 7).int()[None]
    parents[0, 0] = -1
    got, want = (OPS["tree_mask"](parents, _int(nodes), backend=b) for b in (BACKEND, "reference"))
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


@ORDERS
def test_nodes_without_a_slot_are_dropped(order: str) -> None:
    k = torch.arange(1.0, 17).view(2, 1, 4, 2)
    cache, pages = torch.zeros(2, 1, 5, 2), torch.zeros(3, 1, 2, 2)
    lengths, num_nodes = _int(3, -1), _int(4, 9)
    with cuda_emulated.in_order(order):
        OPS["write_kv"](k, k, cache, cache.clone(), lengths, num_nodes, backend=BACKEND)
        table = torch.tensor([[0, 7, 1], [2, 2, -1]], dtype=INT)
        OPS["write_kv"](k, k, pages, pages.clone(), _int(1, 2), num_nodes, table, backend=BACKEND)
    expected = torch.zeros(2, 1, 5, 2)
    expected[0, :, 3:5] = k[0, :, :2]
    expected[1, :, :3] = k[1, :, 1:]
    assert torch.equal(cache, expected)
    expected = torch.zeros(3, 1, 2, 2)
    expected[0, :, 1] = k[0, :, 0]  # slot 1; slots 2 and 3 are on page 7
    expected[1, :, 0] = k[0, :, 3]  # slot 4
    expected[2] = k[1, :, :2]  # slots 2 and 3; 4 and 5 are on page -1
    assert torch.equal(pages, expected)


@pytest.mark.parametrize("dim", [1, 5, 6, 20, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_any_length_and_alignment_arrive(dim: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(dim)
    new = torch.randn((2, 2, 3, dim), generator=generator).to(dtype)
    for offset in (0, 1):
        flat = torch.zeros(2 * 2 * 9 * dim + 1, dtype=dtype)
        caches = [flat.clone()[offset : offset + 36 * dim].view(2, 2, 9, dim) for _ in range(2)]
        spread = torch.zeros(2, 2, 9, dim, 2, dtype=dtype)[..., 0]  # elements do not touch
        for target in (*caches, spread):
            other = target.clone()
            for backend, cache in ((BACKEND, target), ("reference", other)):
                OPS["write_kv"](
                    new, new, cache, cache.clone(), _int(0, 5), _int(3, 2), backend=backend
                )
            assert torch.equal(target, other)


@ORDERS
def test_commit_moves_more_layers_than_a_launch_holds(order: str) -> None:
    layers, generator = 130, torch.Generator().manual_seed(3)
    caches = [torch.randn((1, 1, 24, 4), generator=generator) for _ in range(2 * layers)]
    mine, theirs = ([c.clone() for c in caches] for _ in range(2))
    path = torch.tensor([[0, 1, 3, 4, 6, 7, 8, 10, 11, 13, 14, 17, 18, 19, 0, 0, 0, 0, 0, 0]])
    lengths = {backend: _int(4) for backend in (BACKEND, "reference")}
    cuda_emulated.emulated.take_counters()
    with cuda_emulated.in_order(order):
        for backend, copy in ((BACKEND, mine), ("reference", theirs)):
            OPS["commit"](
                copy[:layers], copy[layers:], lengths[backend], path.int(), _int(14),
                backend=backend,
            )  # fmt: skip
    counters = cuda_emulated.emulated.take_counters()
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    assert lengths[BACKEND].tolist() == [18]
    assert counters["launches"] == 3  # 256 caches, 4 caches, lengths
    assert counters["loaded_bytes"] == counters["stored_bytes"] == 2 * layers * 12 * 16


def test_commit_without_caches_advances_and_gathers() -> None:
    hidden, lengths = torch.randn(2, 3, 4), _int(1, 2)
    path = torch.tensor([[0, 2, -1], [0, -1, -1]], dtype=INT)
    out = OPS["commit"]([], [], lengths, path, _int(2, 1), None, hidden, backend=BACKEND)
    assert lengths.tolist() == [3, 3]
    zero = torch.zeros(4)
    expected = torch.stack([hidden[0, 0], hidden[0, 2], zero, hidden[1, 0], zero, zero])
    assert torch.equal(out, expected.view(2, 3, 4))


@pytest.mark.parametrize("sizes", [{"B": 0}, {"N": 0}])
def test_empty_calls_launch_nothing_that_matters(sizes: dict[str, int]) -> None:
    batch, nodes = sizes.get("B", 2), sizes.get("N", 3)
    parents, some = torch.zeros((batch, nodes), dtype=INT), torch.zeros(batch, dtype=INT)
    ancestors, depths = OPS["tree_mask"](parents, some, backend=BACKEND)
    assert ancestors.shape[:2] == depths.shape == (batch, nodes)
    cache, new = torch.ones(batch, 2, 4, 8), torch.zeros(batch, 2, nodes, 8)
    OPS["write_kv"](new, new, cache, cache.clone(), some, some, backend=BACKEND)
    OPS["commit"]([cache], [cache.clone()], some, parents, some.clone(), backend=BACKEND)
    assert bool((cache == 1).all()) and not bool(some.any())
    assert OPS["topk_logprobs"](torch.zeros(0, 5), 2, backend=BACKEND)[0].shape == (0, 2)


def test_a_wrong_k_is_refused_as_the_reference_does() -> None:
    for k in (0, 6):
        messages = []
        for backend in (BACKEND, "reference"):
            with pytest.raises(ValueError, match=r"k must be in \[1, V\] = \[1, 5\]") as caught:
                OPS["topk_logprobs"](torch.zeros(1, 5), k, backend=backend)
            messages.append(str(caught.value))
        assert messages[0] == messages[1]


def test_an_order_must_be_known() -> None:
    with pytest.raises(ValueError, match="order must be forward, reverse or random:<seed>, got up"):
        cuda_emulated.emulated.set_order("up")
