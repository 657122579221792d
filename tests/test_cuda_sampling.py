"""What the generic suite does not show of the CUDA kernels of `sample` and `verify`: exact laws,
every plan and alignment alike, what a device does with contents that the host would refuse, how
often logits are read, and mistakes planted in their sources.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cuda_emulated
import pytest
import torch
from laws import SMALL_LAWS, assert_law_is_exact
from sanitized import build_mutant, programs, replace_once, run
from torch import Tensor

from specdec_kernels.registry import OPS

BACKEND = cuda_emulated.BACKEND

__all__ = ["programs"]  # a fixture
PLANS = [(16, 2), (1, 1), (64, 8)]
"""Processors of the GPU that is pretended and its largest cluster: rows are summarised ahead or as
they are visited, and shared by 1 to 8 blocks.
"""
TESTING_RULES = ("token", "block", "traversal", "gd_traversal")


@pytest.fixture(autouse=True)
def _device() -> Iterator[None]:
    yield
    _pretend(8, 2)  # as the emulator begins


def _pretend(processors: int, cluster: int) -> None:
    cuda_emulated.emulated.set_processors(processors)
    cuda_emulated.emulated.set_largest_cluster(cluster)


def _on_every_plan(name: str, **inputs: Any) -> list[tuple[Tensor, ...]]:
    answers = []
    for plan in PLANS:
        _pretend(*plan)
        answers.append(OPS[name](**inputs, backend=BACKEND))
    return answers


def _assert_same(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> None:
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", SMALL_LAWS)
def test_the_law_of_what_a_rule_emits_is_the_target_s(name: str) -> None:
    assert_law_is_exact(name, BACKEND)


@pytest.mark.parametrize("rule", ["walk", *TESTING_RULES, "typical"])
def test_every_plan_of_verify_gives_the_same_bits(rule: str) -> None:
    inputs = OPS["verify"].inputs(B=3, N=6, V=1301, rule=rule, seed=11)
    inputs["return_law"] = inputs["return_logprobs"] = True
    first, *others = _on_every_plan("verify", **inputs)
    for other in others:
        _assert_same(other, first)
    for mine, theirs in zip(first[:4], OPS["verify"](**inputs, backend="reference"), strict=False):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("draws", [1, 4])
def test_every_plan_of_sample_gives_the_same_bits(draws: int) -> None:
    inputs = OPS["sample"].inputs(R=7, V=1301, draws=draws, seed=11)
    inputs["return_probs"] = True
    first, *others = _on_every_plan("sample", **inputs)
    for other in others:
        _assert_same(other, first)
    assert torch.equal(first[0], OPS["sample"](**inputs, backend="reference")[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rows_at_every_alignment_have_the_same_law(dtype: torch.dtype) -> None:
    """And the row ends where its memory does, so that nothing beyond can be read unseen."""
    inputs = OPS["sample"].inputs(R=1, V=1301, seed=5)
    logits = inputs.pop("logits").to(dtype).contiguous()
    inputs |= {"temperature": torch.ones(1), "top_p": torch.full((1,), 0.9), "return_probs": True}
    answers = []
    for offset in range(16 // logits.element_size() + 1):
        memory = torch.full((1301 + offset,), 99.0, dtype=dtype)
        memory[offset:] = logits[0]
        answers.append(OPS["sample"](memory[offset:][None], **inputs, backend=BACKEND))
    for answer in answers[1:]:
        _assert_same(answer, answers[0])


def test_filters_keep_what_the_reference_keeps() -> None:
    """Ties at the edge, one distinct score, steep and flat rows, every size of top-k."""
    generator = torch.Generator().manual_seed(2)
    steep = torch.randn((4, 600), generator=generator) * 20
    flat = torch.randn((4, 600), generator=generator) * 1e-3
    ties = torch.randint(-3, 4, (8, 600), generator=generator).float()
    wide = torch.randn((4, 600), generator=generator).exp().exp().clamp_max(1e30)
    logits = torch.cat([steep, flat, ties, wide, torch.zeros(2, 600)])
    rows = len(logits)
    for top_k, top_p, min_p in (
        (1, 1.0, 0.0), (7, 1.0, 0.0), (599, 0.9, 0.0), (10**9, 0.999, 0.0), (0, 0.5, 0.0),
        (0, 1e-6, 0.0), (0, 1.0, 0.1), (50, 0.9, 0.05), (0, 0.0, 1.0),
    ):  # fmt: skip
        inputs = {
            "logits": logits,
            "temperature": torch.ones(rows),
            "top_k": torch.full((rows,), top_k, dtype=torch.int32),
            "top_p": torch.full((rows,), top_p),
            "min_p": torch.full((rows,), min_p),
            "seeds": torch.arange(rows),
            "positions": torch.arange(rows),
            "return_probs": True,
        }
        got, want = (OPS["sample"](**inputs, backend=backend) for backend in (BACKEND, "reference"))
        assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
        assert torch.equal(got[2] > 0, want[2] > 0)
        torch.testing.assert_close(got[2], want[2], rtol=1e-6, atol=1e-9)


def _bytes_of(name: str, plan: tuple[int, int], **inputs: Any) -> tuple[int, tuple[Tensor, ...]]:
    _pretend(*plan)
    cuda_emulated.emulated.take_counters()
    answer = OPS[name](**inputs, backend=BACKEND)
    return cuda_emulated.emulated.take_counters()["loaded_bytes"], answer


def _summaries(rows: int, vocab: int, blocks: int) -> int:
    """Bytes of summaries that each block of a group reads, to find the largest and the best."""
    return rows * (vocab // 512) * 12 * blocks


@pytest.mark.parametrize(("plan", "blocks"), list(zip(PLANS, (2, 1, 8), strict=True)))
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_sample_reads_each_logit_once(
    temperature: float, plan: tuple[int, int], blocks: int
) -> None:
    rows, vocab = 3, 2048
    inputs = {
        "logits": torch.randn((rows, vocab), generator=torch.Generator().manual_seed(0)).bfloat16(),
        "temperature": torch.full((rows,), temperature),
        "seeds": torch.arange(rows),
        "positions": torch.arange(rows),
    }
    loaded, _ = _bytes_of("sample", plan, **inputs)
    logits = 2 * rows * vocab
    is_lazy = rows >= plan[0]
    if is_lazy and temperature > 0:  # and again where noise could win
        assert logits < loaded <= 2 * logits + _summaries(rows, vocab, blocks)
    else:
        assert loaded == logits + _summaries(rows, vocab, blocks)
    shifted = torch.zeros(rows * vocab + 1, dtype=torch.bfloat16)[1:].view(rows, vocab)
    shifted.copy_(inputs["logits"])
    twice, _ = _bytes_of("sample", plan, **{**inputs, "logits": shifted})
    assert loaded < twice <= 2 * loaded  # unaligned: each vector by two lanes


def test_filters_read_again_only_the_tiles_that_can_hold_their_edge() -> None:
    vocab, tile = 32 * 512, 2 * 512
    logits = torch.randn((1, vocab), generator=torch.Generator().manual_seed(0)).bfloat16()
    logits[0, 5000:5008] += 30.0
    inputs = {
        "logits": logits,
        "temperature": torch.ones(1),
        "seeds": torch.zeros(1, dtype=torch.int64),
        "positions": torch.zeros(1, dtype=torch.int64),
        "top_k": torch.full((1,), 4, dtype=torch.int32),
    }
    loaded, _ = _bytes_of("sample", PLANS[0], **inputs)
    # Summarised once; the first pass of the search sees all tiles, the others and the draw one.
    passes = (loaded - 2 * 2 * vocab) / tile
    assert 1 < passes < 8


@pytest.mark.parametrize("rule", ["walk", "token"])
def test_verify_reads_the_rows_that_it_visits(rule: str) -> None:
    vocab, nodes = 2048, 8
    inputs = OPS["verify"].inputs(B=2, N=nodes, V=vocab, rule=rule, seed=1, dtype=torch.bfloat16)
    inputs = {k: v for k, v in inputs.items() if not k.startswith(("draft", "kinds", "return"))}
    inputs["logits"] = inputs["logits"].contiguous()
    inputs["num_nodes"] = torch.tensor([nodes, 5], dtype=torch.int32)
    inputs["temperature"] = torch.zeros(2)
    loaded, answer = _bytes_of("verify", (1, 1), **inputs)
    visited = int(answer[1].sum()) + 2
    assert loaded == 2 * vocab * visited + _summaries(visited, vocab, 1)
    ahead, same = _bytes_of("verify", (16, 2), **inputs)
    assert ahead == 2 * vocab * (nodes + 5) + _summaries(visited, vocab, 2)
    _assert_same(same, answer)


def test_what_a_device_cannot_refuse_has_a_defined_answer() -> None:
    """A kind that is none, a sampled node without a law, and draft ids outside the vocabulary."""
    laws = torch.tensor([[[0.5, 0.25, 0.25]]])
    inputs: dict[str, Any] = {
        "logits": torch.zeros((1, 2, 4)),
        "tokens": torch.tensor([[0, 1]]),
        "parents": torch.tensor([[-1, 0]], dtype=torch.int32),
        "num_nodes": torch.tensor([2], dtype=torch.int32),
        "temperature": torch.ones(1),
        "coins": torch.zeros((1, 2), dtype=torch.float64),
        "kinds": torch.ones((1, 2), dtype=torch.int8),
        "draft_rows": torch.zeros((1, 2), dtype=torch.int32),
        "draft_probs": laws,
        "rule": "token",
        "return_law": True,
    }
    for changed in (
        {"kinds": torch.full((1, 2), 9, dtype=torch.int8)},
        {"draft_rows": torch.full((1, 2), 1, dtype=torch.int32)},
        {"draft_rows": torch.full((1, 2), -1, dtype=torch.int32)},
    ):
        answer = OPS["verify"](**{**inputs, **changed}, backend=BACKEND)
        assert [a[0].tolist() for a in answer[:4]] == [[0, -1], 0, 0, 2]
    offsets = torch.tensor([0, 0, 9])  # the third is outside
    answer = OPS["verify"](**inputs, draft_offsets=offsets, backend=BACKEND)
    assert answer[6][0, 1] == 1.0 and answer[1].item() == 1
    inputs["coins"] = torch.full((1, 2), 0.999, dtype=torch.float64)
    inputs["draft_probs"] = torch.tensor([[[0.0, 1.0, 0.0]]])
    answer = OPS["verify"](**inputs, draft_offsets=offsets, backend=BACKEND)
    assert answer[6][0, 1] == 0.25
    torch.testing.assert_close(answer[7][0], torch.tensor([1, 0, 1, 1]).double() / 3)


def test_empty_calls_have_empty_answers() -> None:
    inputs = OPS["verify"].inputs(B=2, N=2, V=5)
    inputs["num_nodes"] = torch.zeros(2, dtype=torch.int32)
    for batch in (2, 0):
        some = {k: v[:batch] if isinstance(v, Tensor) else v for k, v in inputs.items()}
        got, want = (OPS["verify"](**some, backend=backend) for backend in (BACKEND, "reference"))
        _assert_same(got, want)
    none = {name: inputs[name][:, :0] for name in ("logits", "tokens", "parents")}
    flags = {"return_law": True, "return_logprobs": True}
    answer = OPS["verify"](**{**inputs, **none, **flags}, backend=BACKEND)
    assert [answer[i].tolist() for i in (0, 1, 2, 3)] == [[[], []], [0, 0], [-1, -1], [0, 0]]
    assert not answer[7].any()
    drawn = OPS["sample"](torch.zeros(0, 5), backend=BACKEND)
    assert drawn[0].shape == (0, 1)


MISTAKES = {
    # mistake: file, text, what stands there instead, tool, report
    "missing_barrier": (
        "group.cuh", "mine[thread() / kWarpSize] = key;\n    __syncthreads();",
        "mine[thread() / kWarpSize] = key;", "thread",
        r"data race(?s:.)*?#0 .*specdec::cuda::(open_row|Group::block_largest)",
    ),
    "write_after_read": (
        "group.cuh", "return block_turn_ ^= 1;", "return 0;", "thread",
        r"data race .* in specdec::cuda::Group::",
    ),
    "missing_cluster_barrier": (
        "row_law.cuh", "  group.sync();\n  double total = 0.0;",
        "  __syncthreads();\n  double total = 0.0;", "thread",
        r"data race(?s:.)*?#[01] double specdec::cuda::(sum_tiles|measure)",
    ),
    "out_of_bounds": (
        "logit_row.cuh", "if (first + i < vocab) values[i] = widened(",
        "if (first + i <= vocab) values[i] = widened(", "address",
        r"heap-buffer-overflow (?s:.)*specdec::cuda::LogitRow",
    ),
    "misaligned": (
        "logit_row.cuh", "lead(static_cast<int32_t>(reinterpret_cast<uintptr_t>(logits) % 16",
        "lead(static_cast<int32_t>(0 * reinterpret_cast<uintptr_t>(logits) % 16", "address",
        r"logit_row\.cuh:\d+: global access: \S+ is not aligned to 16 bytes",
    ),
}  # fmt: skip


@pytest.mark.xdist_group("sanitizers")
@pytest.mark.usefixtures("programs")
@pytest.mark.parametrize(
    ("file", "text", "replacement", "tool", "report"), MISTAKES.values(), ids=MISTAKES
)
def test_a_mistake_in_the_kernels_is_reported(
    file: str, text: str, replacement: str, tool: str, report: str, tmp_path: Path
) -> None:
    def edit(kernels: Path) -> None:
        replace_once(kernels / file, text, replacement)

    status, output = run(build_mutant(tool, "sample", edit, tmp_path), "sample", "reverse")
    assert status != 0
    assert re.search(report, output), output[:4000]
