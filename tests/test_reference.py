"""The references against hand-worked examples and independent formulas."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from transformers.generation import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from specdec_kernels import (
    build_tree,
    commit,
    sample,
    topk_logprobs,
    tree_attention,
    tree_mask,
    verify,
)
from specdec_kernels.philox import Domain, gumbel, random_bits, uniforms
from specdec_kernels.sampling import filtered_scores
from specdec_kernels.shapes import PAD

REFERENCE = {"backend": "reference"}


def _int32(values: list) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def test_tree_mask_of_a_small_tree() -> None:
    ancestors, depths = tree_mask(_int32([[-1, 0, 0, 1, -1]]), _int32([4]), **REFERENCE)
    assert ancestors[0, :, 0].tolist() == [0b0001, 0b0011, 0b0101, 0b1011, 0]
    assert depths.tolist() == [[0, 1, 1, 2, 0]]


def test_tree_mask_of_a_long_chain_fills_every_word() -> None:
    chain = _int32([[-1, *range(129)]])
    ancestors, depths = tree_mask(chain, _int32([130]), **REFERENCE)
    assert ancestors.shape == (1, 130, 3)
    assert ancestors[0, 129].tolist() == [-1, -1, 0b11]
    assert ancestors[0, 64].tolist() == [-1, 1, 0]
    assert depths[0].tolist() == list(range(130))


@pytest.mark.parametrize(
    ("parents", "size", "message"),
    [
        ([-1, 1], 2, r"parents\[0, 1\] must be in \[0, 1\), got 1"),
        ([0, 0], 2, r"parents\[0, 0\] must be -1 \(the root\), got 0"),
        ([-1, -1], 2, r"parents\[0, 1\] must be in \[0, 1\), got -1"),
        ([-1, 0], 3, r"num_nodes\[0\] must be in \[0, 2\], got 3"),
    ],
)
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_tree_mask_refuses_a_wrong_topology(
    parents: list[int], size: int, message: str, backend: str
) -> None:
    with pytest.raises(ValueError, match=rf"^tree_mask: {message}$"):
        tree_mask(_int32([parents]), _int32([size]), backend=backend)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_attention_over_a_chain_is_causal_attention(backend: str) -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn((1, 4, 6, 16), generator=generator)
    k, v = torch.randn((2, 1, 2, 20, 16), generator=generator)
    ancestors, depths = tree_mask(_int32([[-1, 0, 1, 2, 3, 4]]), _int32([6]))
    out, lse = tree_attention(
        q, k, v, ancestors, depths, _int32([14]), _int32([6]),
        scale=0.25, return_lse=True, backend=backend,
    )  # fmt: skip
    mask = torch.ones(6, 20, dtype=torch.bool).tril(14)
    want = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, scale=0.25, enable_gqa=True
    )
    torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-5)
    logits = (q @ k.repeat_interleave(2, 1).mT * 0.25).masked_fill(~mask, -math.inf)
    torch.testing.assert_close(lse, logits.logsumexp(-1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_window_counts_positions_not_slots(backend: str) -> None:
    """Nodes 1, 2, 3 are siblings: equal positions, so equal windows, although their slots
    differ.
    """
    k = torch.zeros((1, 1, 8, 4))
    v = torch.arange(8.0)[None, None, :, None].expand(1, 1, 8, 4).contiguous()
    ancestors, depths = tree_mask(_int32([[-1, 0, 0, 0]]), _int32([4]))
    out, _ = tree_attention(
        torch.zeros((1, 1, 4, 4)), k, v, ancestors, depths, _int32([4]), _int32([4]),
        scale=1.0, window=3, backend=backend,
    )  # fmt: skip
    # The root sees positions 2, 3, 4; node i at position 5 sees position 3, the root (4) and itself
    # (value 4 + i).
    assert out[0, 0, :, 0].tolist() == pytest.approx([3.0, 4.0, 13 / 3, 14 / 3])


def test_philox_known_answers() -> None:
    zero = torch.tensor([0])
    assert random_bits(zero, zero, 4, 0).tolist() == [
        [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    ]


def test_philox_streams_are_disjoint_and_blocks_are_consistent() -> None:
    seeds, positions = torch.tensor([3, 3, 4]), torch.tensor([7, 2**40 + 7, 7])
    by_domain = [random_bits(seeds, positions, 1001, d) for d in Domain]
    words = torch.cat([bits.flatten() for bits in by_domain])
    assert len(words.unique()) > 0.99999 * len(words)
    assert torch.equal(random_bits(seeds, positions, 10, 2), by_domain[2][:, :10])
    assert all(0 <= int(w) < 2**32 for w in (words.min(), words.max()))


def test_uniforms_join_two_words_into_53_bits() -> None:
    seeds, positions = torch.tensor([3, 2**40 + 1]), torch.tensor([7, 2**33])
    bits = random_bits(seeds, positions, 6, Domain.ACCEPT)
    got = uniforms(seeds, positions, 3, Domain.ACCEPT)
    for row in range(2):
        for i in range(3):
            high, low = int(bits[row, 2 * i]), int(bits[row, 2 * i + 1])
            assert float(got[row, i]) == ((high >> 5) * 2**26 + (low >> 6)) / 2**53
    assert bool((got >= 0).all()) and bool((got < 1).all())


def test_streams_of_one_position_are_disjoint() -> None:
    seeds, positions = torch.tensor([5, 5, 5]), torch.tensor([9, 9, 9])
    long = random_bits(seeds[:1], positions[:1], 24, Domain.DRAFT)[0]
    rows = random_bits(seeds, positions, 7, Domain.DRAFT, torch.tensor([0, 1, 2]))
    for stream in range(3):  # a stream of 7 tokens takes two blocks of four
        assert torch.equal(rows[stream], long[8 * stream : 8 * stream + 7])


def test_gumbel_edges() -> None:
    edges = torch.tensor([0, 1, 2**31 - 1, 2**31, 2**32 - 1])
    v = ((edges.float() + 0.5) * 2.0**-32).clamp_max(1 - 2.0**-24).double()
    want = -torch.log(-torch.log1p(-v))
    torch.testing.assert_close(gumbel(edges).double(), want, rtol=2e-6, atol=2e-6)


def test_gumbel_draws_follow_the_softmax() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, 0.5])
    n = 20_000
    tokens, _, _ = sample(
        logits.expand(n, -1), torch.arange(n), torch.full((n,), 9), torch.full((n,), 0.8)
    )
    counts = torch.bincount(tokens[:, 0], minlength=5).double()
    want = (logits / 0.8).softmax(-1).double() * n
    chi_square = float(((counts - want) ** 2 / want).sum())
    assert chi_square < 30  # 4 degrees of freedom: 5e-6 by chance
    wrong = logits.softmax(-1).double() * n  # the control: without temperature the test must fail
    assert float(((counts - wrong) ** 2 / wrong).sum()) > 100


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.7},
        {"temperature": 1.3, "top_k": 7},
        {"temperature": 1.0, "top_p": 0.8},
        {"temperature": 0.6, "top_k": 40, "top_p": 0.9, "min_p": 0.05},
        {"temperature": 1.0, "min_p": 0.2},
    ],
)
def test_filters_equal_the_warpers_of_transformers(options: dict[str, float]) -> None:
    logits = torch.randn((50, 300), generator=torch.Generator().manual_seed(1)) * 3
    makers = {
        "temperature": TemperatureLogitsWarper,
        "top_k": TopKLogitsWarper,
        "top_p": TopPLogitsWarper,
        "min_p": MinPLogitsWarper,
    }
    warpers = LogitsProcessorList([makers[name](value) for name, value in options.items()])
    want = warpers(torch.zeros((50, 1), dtype=torch.int64), logits)
    rows = {n: torch.full((50,), float(v)) for n, v in options.items()}
    if "top_k" in rows:
        rows["top_k"] = rows["top_k"].int()
    names = ("temperature", "top_k", "top_p", "min_p")
    got = filtered_scores(logits, *(rows.get(n) for n in names), bias=None)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_hostile_rows_have_a_defined_answer(backend: str) -> None:
    inf, nan = math.inf, math.nan
    rows = torch.tensor(
        [
            [-inf, -inf, -inf],
            [nan, nan, nan],
            [nan, 1.0, 0.0],
            [0.0, inf, inf],
            [-inf, -inf, 5.0],
            [2.0, 2.0, 2.0],
        ]
    )
    tokens, status, _ = sample(rows, backend=backend)
    assert tokens[:, 0].tolist() == [0, 0, 1, 1, 2, 0]
    assert status.tolist() == [1, 1, 0, 0, 0, 0]
    many = 64
    hot = {
        "seeds": torch.arange(many),
        "positions": torch.zeros(many, dtype=torch.int64),
        "temperature": torch.ones(many),
        "top_p": torch.full((many,), 0.9),
    }
    for row, allowed in ((2, {1, 2}), (3, {1, 2}), (4, {2}), (0, {0})):
        drawn, status, _ = sample(rows[row].expand(many, -1), **hot, backend=backend)
        assert set(drawn[:, 0].tolist()) == allowed
        assert set(status.tolist()) == {int(row == 0)}


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_ties_at_the_edge_of_a_filter_are_kept(backend: str) -> None:
    n = 400
    row = torch.tensor([1.0, 0.0, 1.0, 1.0, -1.0]).expand(n, -1)
    common = {
        "seeds": torch.arange(n),
        "positions": torch.zeros(n, dtype=torch.int64),
        "temperature": torch.ones(n),
    }
    drawn, _, _ = sample(row, **common, top_k=torch.full((n,), 1).int(), backend=backend)
    assert set(drawn[:, 0].tolist()) == {0, 2, 3}
    drawn, _, _ = sample(row, **common, top_p=torch.full((n,), 0.2), backend=backend)
    assert set(drawn[:, 0].tolist()) == {0, 2, 3}


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_greedy_walk_follows_the_target(backend: str) -> None:
    """Tree: root -> {5, 6}, 6 -> {7, 8}; the target says 6, then 8, then 2."""
    tokens = torch.tensor([[1, 5, 6, 7, 8]])
    parents = _int32([[-1, 0, 0, 2, 2]])
    logits = torch.zeros((1, 5, 10))
    for node, token in ((0, 6), (1, 9), (2, 8), (3, 9), (4, 2)):
        logits[0, node, token] = 1.0
    path, num_accepted, next_tokens, status, *_ = verify(
        logits, tokens, parents, _int32([5]), backend=backend
    )
    assert path.tolist() == [[0, 2, 4, PAD, PAD]]
    assert (num_accepted.tolist(), next_tokens.tolist(), status.tolist()) == ([2], [2], [0])


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_walk_stops_at_a_row_without_a_finite_logit(backend: str) -> None:
    logits = torch.zeros((1, 2, 4))
    logits[0, 0, 3] = 1.0
    logits[0, 1] = math.nan
    path, num_accepted, next_tokens, status, *_ = verify(
        logits, torch.tensor([[0, 3]]), _int32([[-1, 0]]), _int32([2]), backend=backend
    )
    assert path.tolist() == [[0, 1]]
    assert (num_accepted.tolist(), next_tokens.tolist(), status.tolist()) == ([1], [0], [1])


_SAMPLED = {
    "rule": "token",
    "kinds": torch.tensor([[0, 1]], dtype=torch.int8),
    "draft_rows": _int32([[0, 0]]),
    "draft_probs": torch.full((1, 1, 4), 0.25),
}


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rule": "best"}, "verify: rule must be one of walk, token, .*, got 'best'"),
        (
            {"rule": "typical"},
            "verify: rule 'typical' is lossy and must be asked for with lossy=True",
        ),
        (
            {"kinds": torch.tensor([[0, 1]], dtype=torch.int8)},
            r"verify: rule 'walk' tests one-hot drafts only, got kinds\[0, 1\] = 1",
        ),
        (
            {"kinds": torch.tensor([[0, 3]], dtype=torch.int8)},
            r"verify: kinds\[0, 1\] must be 0, 1 or 2, got 3",
        ),
        (
            {"rule": "token", "kinds": torch.tensor([[0, 1]], dtype=torch.int8)},
            r"verify: draft_rows\[0, 0\] must name the draft law of its .*, got None",
        ),
        (
            {**_SAMPLED, "draft_rows": _int32([[2, 0]])},
            r"verify: draft_rows\[0, 0\] must name the draft law of its .*, got 2",
        ),
        (
            {**_SAMPLED, "draft_rows": None},
            "verify: draft_rows and a draft law must be given together, got one",
        ),
        (
            {**_SAMPLED, "draft_logits": torch.zeros((1, 1, 4))},
            "verify: draft_probs or draft_logits must be given, got both",
        ),
        (
            {**_SAMPLED, "draft_offsets": torch.tensor([0, 0, 0, 1])},
            r"verify: draft ids must map to distinct target ids in \[0, V\) = \[0, 4\)",
        ),
        (
            {**_SAMPLED, "draft_offsets": torch.tensor([1, 0, 0, 0])},
            r"verify: draft ids must map to distinct target ids in \[0, V\) = \[0, 4\)",
        ),
        (
            {**_SAMPLED, "draft_probs": torch.zeros((1, 1, 5))},
            r"verify: draft ids must map to distinct target ids in \[0, V\) = \[0, 4\)",
        ),
        (
            {"temperature": torch.ones(1)},
            "verify: seeds and positions must be given with temperature",
        ),
    ],
)
def test_verify_refuses_what_the_walk_cannot_test(
    arguments: dict, message: str, backend: str
) -> None:
    tree = (torch.tensor([[0, 3]]), _int32([[-1, 0]]), _int32([2]))
    with pytest.raises(ValueError, match=message):
        verify(torch.zeros((1, 2, 4)), *tree, **arguments, backend=backend)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize(
    ("rule", "parents", "kinds", "message"),
    [
        ("block", [-1, 0, 0], [0, 1, 1], r"rule 'block' tests chains, got parents\[0, 2\] = 0"),
        ("gd_traversal", [-1, 0, 0], [0, 0, 1], r"one sampled child, .* got kinds\[0, 2\] = 1"),
        ("gd_traversal", [-1, 0, 0], [0, 1, 2], r"one sampled child, .* got kinds\[0, 2\] = 2"),
    ],
)
def test_verify_refuses_trees_that_a_rule_cannot_test(
    rule: str, parents: list[int], kinds: list[int], message: str, backend: str
) -> None:
    with pytest.raises(ValueError, match=message):
        verify(
            torch.zeros((1, 3, 4)), torch.tensor([[0, 1, 2]]), _int32([parents]), _int32([3]),
            rule=rule, kinds=torch.tensor([kinds], dtype=torch.int8),
            draft_rows=_int32([[0, 0, 0]]), draft_probs=torch.full((1, 1, 4), 0.25),
            backend=backend,
        )  # fmt: skip


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_verify_equals_sample_at_every_node_of_the_walk(backend: str) -> None:
    """A chain whose tokens are what `sample` draws is accepted whole."""
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn((1, 9, 500), generator=generator) * 2
    seeds, temperature = torch.tensor([11]), torch.tensor([0.9])
    drawn = [
        int(
            sample(logits[:, i], seeds, torch.tensor([100 + i + 1]), temperature, backend=backend)[
                0
            ]
        )
        for i in range(9)
    ]
    tokens = torch.tensor([[0, *drawn[:-1]]])
    path, num_accepted, next_tokens, *_ = verify(
        logits, tokens, _int32([[-1, *range(8)]]), _int32([9]),
        seeds=seeds, positions=torch.tensor([100]), temperature=temperature, backend=backend,
    )  # fmt: skip
    assert path.tolist() == [list(range(9))]
    assert (int(num_accepted), int(next_tokens)) == (8, drawn[-1])


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_commit_moves_an_overlapping_path(backend: str) -> None:
    cache = torch.arange(12.0)[None, None, :, None].clone()
    lengths = _int32([3])
    path = _int32([[0, 2, 3, 6, 7, -1, -1, -1]])
    commit([cache], [cache.clone()], lengths, path, _int32([5]), backend=backend)
    assert cache.flatten().tolist()[:8] == [0, 1, 2, 3, 5, 6, 9, 10]
    assert lengths.tolist() == [8]


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize(
    ("path", "kept", "message"),
    [
        ([0, 2, 2], 3, r"path\[0, 2\] must be in \[3, 3\), got 2"),
        ([0, -1, -1], 2, r"path\[0, 1\] must be in \[1, 3\), got -1"),
        ([0, 1, 2], 4, r"num_kept\[0\] must be in \[0, 3\], got 4"),
    ],
)
def test_commit_refuses_a_path_that_is_none(
    path: list[int], kept: int, message: str, backend: str
) -> None:
    cache = torch.zeros((1, 1, 8, 2))
    lengths = _int32([2])
    with pytest.raises(ValueError, match=rf"^commit: {message}$"):
        commit([cache], [cache], lengths, _int32([path]), _int32([kept]), backend=backend)
    assert lengths.tolist() == [2]


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_topk_logprobs_breaks_ties_by_index_and_ignores_nan(backend: str) -> None:
    logits = torch.tensor([[1.0, 3.0, math.nan, 3.0, 0.0], [-math.inf] * 5])
    logprobs, tokens = topk_logprobs(logits, 3, backend=backend)
    assert tokens[0].tolist() == [1, 3, 0]
    want = torch.tensor([3.0, 3.0, 1.0]) - torch.tensor([1.0, 3.0, 3.0, 0.0]).logsumexp(0)
    torch.testing.assert_close(logprobs[0], want)
    assert logprobs[1].tolist() == [-math.inf] * 3


def test_build_tree_grows_the_likeliest_paths() -> None:
    """Marginals .6/.4, then .9/.1: the best paths are A, A-C, B, B-C."""
    logprobs = torch.tensor([[[0.6, 0.4], [0.9, 0.1]]]).log()
    candidates = torch.tensor([[[10, 20], [30, 40]]])
    tokens, parents, num_nodes, scores = build_tree(
        torch.tensor([1]), candidates, logprobs, _int32([5]), max_nodes=6
    )
    assert tokens.tolist() == [[1, 10, 30, 20, 30, 0]]
    assert parents.tolist() == [[-1, 0, 1, 0, 3, -1]]
    assert num_nodes.tolist() == [5]
    want = torch.tensor([1.0, 0.6, 0.54, 0.4, 0.36, 0.0]).log()
    torch.testing.assert_close(scores[0], want)


def test_build_tree_keeps_each_beam_on_its_own_parent() -> None:
    logprobs = torch.tensor([[[0.6, 0.4], [0.9, 0.8]]]).log()
    candidates = torch.tensor([[[10, 20], [30, 40]]])
    beams = _int32([[[0, 0], [1, 0]]])  # 30 continues 20, 40 continues 10
    tokens, parents, *_ = build_tree(
        torch.tensor([1]), candidates, logprobs, _int32([9]), beams, max_nodes=9
    )
    assert tokens.tolist()[0][:5] == [1, 10, 40, 20, 30]
    assert parents.tolist()[0][:5] == [-1, 0, 1, 0, 3]
