"""Drafters that need no second model: the output is plain decoding, memory has an end, and what one
request taught helps the next.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from prompts import greedy, left_pad, random_prompts
from toy_target import ToyTarget
from transformers import PreTrainedModel

from specdec_kernels import (
    AutoDrafter,
    Budget,
    CostCurve,
    DraftContext,
    Drafter,
    DraftNetwork,
    SpeculativeDecoder,
    SuccessorTable,
    TokenRecyclingDrafter,
    TokenTree,
)
from specdec_kernels.budget import CONSERVATIVE
from specdec_kernels.decoding import decode
from specdec_kernels.drafters import DRAFTERS, make_drafter
from specdec_kernels.drafters.adviser import Advice, level_of
from specdec_kernels.drafters.auto import _Node
from specdec_kernels.drafters.base import Verified
from specdec_kernels.drafters.memory import ContextTable, HitRates, keep_successors
from specdec_kernels.drafters.network import Level
from specdec_kernels.drafting import SamplingParams
from specdec_kernels.hf import EarlyExitModel
from specdec_kernels.hf.features import HFTargetView
from specdec_kernels.hf.target import HFTarget

VOCAB = 101
NEW = 40
NAMES = [name for name in DRAFTERS if name != "none"]


@pytest.fixture(scope="module")
def rows() -> list[torch.Tensor]:
    """The second one repeats itself."""
    first, second, third = random_prompts((21, 12, 26), VOCAB)
    return [first, torch.cat([second] * 3), third]


@pytest.mark.parametrize("budget", [False, True])
@pytest.mark.parametrize("nodes", [1, 2, 16, 70])
@pytest.mark.parametrize("name", NAMES)
def test_greedy_text_is_that_of_generate(tiny_model, rows, name, nodes, budget) -> None:
    """Twice: the second time, the drafter has seen it all."""
    decoder = SpeculativeDecoder(make_drafter(name, max_nodes=nodes), budget=budget)
    inputs = left_pad(rows)
    want = [greedy(tiny_model, row, NEW)[len(row) :] for row in rows]
    for _ in range(2):
        output = tiny_model.generate(**inputs, max_new_tokens=NEW, custom_generate=decoder)
        assert output[:, inputs["input_ids"].shape[1] :].tolist() == want
        assert decoder.stats.num_failures == 0
    if nodes == 1:
        assert sum(decoder.stats.num_drafted) == 0
    if nodes == 70 and name in ("auto", "suffix", "token_recycling") and not budget:
        least = 1.2 if name == "token_recycling" else 1.5  # a random model has no bigrams to learn
        assert decoder.stats.tokens_per_step > least, "the second time must be faster"


@pytest.mark.parametrize("name", NAMES)
def test_sampled_text_depends_on_the_seed_alone(tiny_model, rows, name: str) -> None:
    options = {"do_sample": True, "temperature": 0.6, "max_new_tokens": 24}
    decoder = SpeculativeDecoder(make_drafter(name, max_nodes=24), seed=[3, 4, 5], budget=True)
    plain = SpeculativeDecoder(None, seed=[3, 4, 5])
    want = tiny_model.generate(**left_pad(rows), custom_generate=plain, **options)
    for _ in range(2):
        got = tiny_model.generate(**left_pad(rows), custom_generate=decoder, **options)
        assert got.tolist() == want.tolist()
    assert sum(decoder.stats.num_drafted) > 0


def test_an_earlier_request_helps_and_a_saved_table_is_an_earlier_request(
    tiny_model, rows, tmp_path: Path
) -> None:
    def steps(drafter) -> int:
        decoder = SpeculativeDecoder(drafter, budget=False)
        tiny_model.generate(**left_pad(rows[:1]), max_new_tokens=NEW, custom_generate=decoder)
        return decoder.stats.num_steps[0]

    drafter = TokenRecyclingDrafter(24)
    cold, warm = steps(drafter), steps(drafter)
    assert warm < 0.9 * cold
    drafter.successors.save(tmp_path / "table.pt")
    assert steps(TokenRecyclingDrafter(24, successors=tmp_path / "table.pt")) <= warm + 2
    assert steps(AutoDrafter(24, successors=tmp_path / "table.pt")) < 0.9 * cold
    both = AutoDrafter(24, sources=("history",))
    assert steps(both) > 2 * steps(both)


@pytest.mark.parametrize("content", [b"", b"not a table", None])
def test_another_file_is_no_table(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "table.pt"
    if content is None:
        torch.save({"tokens": torch.zeros(2), "successors": torch.zeros(3, 1), "levels": 1}, path)
    else:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=r"table\.pt: not a saved SuccessorTable"):
        SuccessorTable.load(path)


def test_ten_thousand_requests_leave_memory_bounded() -> None:
    """Short rows over few tokens, small bounds: sizes after 1,000 requests are those after
    10,000.
    """
    target = ToyTarget(12)
    drafter = AutoDrafter(4, max_contexts=200)
    generator = torch.Generator().manual_seed(0)

    def serve(num_requests: int) -> tuple[int, int, int]:
        for first in range(0, num_requests, 500):
            prompts = torch.randint(0, 12, (500, 2), generator=generator).tolist()
            sampling = SamplingParams(torch.arange(first, first + 500), torch.full((500,), 2.0))
            decode(target, drafter, prompts, max_lengths=[5] * 500, sampling=sampling)
        return len(drafter.history), len(drafter.successors), len(drafter.rates)

    after_first = serve(1000)
    after_all = serve(9000)
    assert after_first[:2] == after_all[:2] == (200, 12)
    assert after_all[2] <= 400, "kinds of guesses are counted in advance, not by text"
    assert drafter._rows == []


def test_a_context_keeps_its_newest_continuations() -> None:
    table = ContextTable((1, 2), width=2)
    table.extend([1, 2, 3, 1, 2, 4, 1, 2, 3, 1, 2, 3], 1)
    assert table.after((1, 2)) == [3, 3, 4, 1]
    assert table.after((2,)) == [3, 3, 4, 1]
    table.extend([1, 2, 5], 2)
    assert table.after((1, 2)) == [5, 1, 3, 3]
    assert table.after((9,)) == []


def test_a_full_table_forgets_its_oldest_contexts() -> None:
    table = ContextTable((1,), max_contexts=3)
    table.extend([1, 2, 3, 4, 5], 1)
    assert len(table) == 3 and table.after((1,)) == [] and table.after((4,)) == [5, 1]


def test_hit_rates_approach_the_frequency_and_forget() -> None:
    rates = HitRates(prior=0.5, memory=20)
    assert rates.rate("new", 0.9) == rates.rate("new") == 0.9, "the first prior stays"
    assert rates.rate("x") == 0.5
    for i in range(400):
        rates.learn("x", i % 4 == 0)
    assert rates.rate("x") == pytest.approx(0.25, abs=0.05)
    for _ in range(60):
        rates.learn("x", True)
    assert rates.rate("x") > 0.9


class Generous(Budget):
    """Trees as large as they can be."""

    def __init__(self) -> None:
        super().__init__()
        self.scores: list[Sequence[float]] = []

    def choose(self, scores: Sequence[Sequence[float]], **options: Any) -> list[int]:
        self.scores += scores
        return [1 + len(row) for row in scores]


def _context(text: Sequence[int], max_depth: int, budget: Budget | None = None) -> DraftContext:
    sampling = SamplingParams(torch.tensor([0]), torch.tensor([0.0]))
    return DraftContext([text], [True], [max_depth], torch.device("cpu"), VOCAB, sampling, budget)


def test_the_tree_holds_the_continuation_of_the_longest_suffix_first() -> None:
    drafter = AutoDrafter(3, sources=("text",))
    drafter.begin(1)
    budget = Generous()
    tree = drafter.propose(_context([7, 1, 2, 5, 6, 9, 2, 8, 1, 2], 10, budget)).tree
    assert tree.tokens[0, :2].tolist() == [2, 5], "after 1 2 came 5, after 2 alone came 8"
    assert tree.parents[0, 1] == 0
    (scores,) = budget.scores
    assert scores == sorted(scores, reverse=True) and len(scores) == 2
    tree = drafter.propose(_context([7, 1, 2, 5, 6, 9, 2, 8, 1, 2], 0)).tree
    assert tree.num_nodes.tolist() == [1]


def test_what_follows_every_node_is_kept_and_the_accepted_path_has_the_last_word() -> None:
    logits = torch.randn((2, 3, 20), generator=torch.Generator().manual_seed(0)) * 3
    tree = TokenTree.from_rows([([5, 6, 5], [-1, 0, 0]), ([7], [-1])])
    table = SuccessorTable(4)
    keep_successors(table, Verified(tree, logits, [[0, 1], [0]], [[5, 6], [7]]))
    for token, (row, node) in {5: (0, 0), 6: (0, 1), 7: (1, 0)}.items():
        values, best = logits[row, node].log_softmax(0).topk(4)
        levels = [min(9, int(-1.5 * value)) for value in values.tolist()]
        assert len(set(levels)) > 1
        assert table.after(token) == (best.tolist(), levels)


def test_a_fixed_tree_is_filled_with_successors() -> None:
    table = SuccessorTable(2)
    table.put(1, [2, 3], [0, 1])
    table.put(2, [4, 5], [0, 1])
    drafter = TokenRecyclingDrafter(parents=[-1, 0, 0, 1, 1, 2], successors=table)
    assert drafter.propose_row(0, [1], 5) == ([2, 3, 4, 5], [0, 0, 1, 1])
    assert drafter.propose_row(0, [1], 1) == ([2, 3], [0, 0])
    assert drafter.propose_row(0, [9], 5) == ([], [])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AutoDrafter(sources=("web",)), r"sources must be among text, history, successors"),
        (lambda: AutoDrafter(orders=()), r"orders must be suffix lengths >= 1"),
        (lambda: AutoDrafter(0), r"AutoDrafter: max_nodes must be >= 1"),
        (lambda: TokenRecyclingDrafter(parents=[0, 1]), r"parents must start with -1"),
        (lambda: TokenRecyclingDrafter(parents=[-1, 2]), r"parents\[1\] must be in \[0, 1\)"),
    ],
)
def test_a_wrong_option_is_refused(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_text_without_repetition_is_soon_decoded_plainly() -> None:
    """A target that is all noise: the budget stops drafting."""
    target = ToyTarget(200)
    target.table.zero_()
    sampling = SamplingParams(torch.tensor([5]), torch.tensor([1.0]))
    sizes: list[int] = []
    forward = target.forward

    def spy(tree):
        sizes.append(tree.tokens.shape[1])
        return forward(tree)

    target.forward = spy
    budget = Budget()
    decode(target, AutoDrafter(16), [[1, 2]], max_lengths=[200], sampling=sampling, budget=budget)
    assert len(sizes) > 150
    assert sum(size == 1 for size in sizes[-100:]) >= 95


class Prophet(DraftNetwork):
    """Knows the sequences. At depths where it lies its favourite is another token.

    Args:
        sequences: whole ones.
        lies: depths, 0 for what follows the root.
    """

    def __init__(self, sequences: Sequence[Sequence[int]], lies: Sequence[int] = ()) -> None:
        self.sequences, self.lies = sequences, lies
        self.asked: list[int] = []  # nodes of each call

    def begin(self, batch: int, num_slots: int) -> None:
        self.num_slots = num_slots

    def start(self, context: DraftContext) -> torch.Tensor:
        self.before = [list(s) for s in context.sequences]
        self.paths: list[list[list[int]]] = [[] for _ in self.before]
        self.asked.append(sum(context.active))
        return torch.stack([self._logits(b, []) for b in range(len(self.before))])

    def extend(self, level: Level) -> torch.Tensor:
        self.asked.append(sum(map(len, level)))
        out = torch.zeros((len(level), max(map(len, level)), VOCAB))
        for b, nodes in enumerate(level):
            known = list(self.paths[b])
            for column, (token, parent) in enumerate(nodes):
                path = [*(known[parent] if parent >= 0 else []), token]
                self.paths[b].append(path)
                out[b, column] = self._logits(b, path)
            assert len(self.paths[b]) <= self.num_slots
        return out

    def _logits(self, row: int, path: Sequence[int]) -> torch.Tensor:
        at = len(self.before[row]) + len(path)
        text = self.sequences[row]
        logits = torch.zeros(VOCAB)
        if text[:at] == [*self.before[row], *path] and at < len(text):
            logits[(text[at] + (len(path) in self.lies)) % VOCAB] = 9.0
        return logits


def _steps(model: PreTrainedModel, rows: Sequence[torch.Tensor], drafter: Drafter) -> list[int]:
    decoder = SpeculativeDecoder(drafter, budget=False)
    output = model.generate(**left_pad(rows), max_new_tokens=NEW, custom_generate=decoder)
    assert output[:, -NEW:].tolist() == [greedy(model, row, NEW)[-NEW:] for row in rows]
    assert decoder.stats is not None and not decoder.stats.num_failures
    return decoder.stats.num_steps


def test_heads_that_know_the_text_are_followed_to_their_depth(tiny_model, rows) -> None:
    texts = [greedy(tiny_model, row, NEW) for row in rows]
    network = Prophet(texts)
    steps = _steps(tiny_model, rows, AutoDrafter(16, heads=network, heads_depth=4))
    # The first guesses are trusted as much as the heads trust them.
    assert all(n <= -(-(NEW - 1) // 5) + 1 for n in steps), steps
    assert max(network.asked) <= 3 * len(rows)


def test_heads_that_lie_are_soon_not_believed(tiny_model, rows) -> None:
    texts = [greedy(tiny_model, row, NEW) for row in rows]
    alone = _steps(tiny_model, rows, AutoDrafter(16, heads=None))
    network = Prophet(texts, lies=range(9))
    drafter = AutoDrafter(16, heads=network)
    for _ in range(2):
        misled = _steps(tiny_model, rows, drafter)
    assert sum(misled) <= sum(alone) + 3


class Stingy(Generous):
    """Asking pays so many times."""

    def __init__(self, num_paid: int) -> None:
        super().__init__()
        self.num_paid, self.offers = num_paid, []

    def pays(self, tokens: float, seconds: float) -> bool:
        self.offers.append((tokens, seconds))
        self.num_paid -= 1
        return self.num_paid >= 0


class Patient(Budget):
    """Looks on when the tree has all that is worth it."""

    def is_full(self) -> Any:
        return lambda nodes, promised, score: False


class Thorough(Patient):
    """Looks at every node."""

    def least_score(self, running: int, **options: Any) -> float:
        return 0.0


@pytest.mark.parametrize("curve", [CONSERVATIVE, CostCurve((1, 64), (1.0, 1.5))])
def test_nodes_that_cannot_be_worth_it_are_not_looked_at(curve: CostCurve) -> None:
    """The tree is the same."""
    text = [i * i % 23 for i in range(80)]
    trees, looked_at = [], []
    for kind in (Budget, Patient, Thorough):
        drafter = AutoDrafter(32, heads=None)
        drafter.begin(1)
        trees.append([])
        for end in range(10, len(text), 7):
            budget = kind(curve)
            budget._draft_cost = 0.1
            trees[-1].append(drafter.propose(_context(text[:end], 20, budget)).tree.tokens.tolist())
        looked_at.append(len(drafter.rates))
    assert trees[0] == trees[1] == trees[2] and max(len(tree[0]) for tree in trees[0]) > 3
    assert looked_at[0] < looked_at[2] and looked_at[0] <= looked_at[1] <= looked_at[2]


def test_a_second_guess_is_found_while_it_may_be_worth_it() -> None:
    drafter = AutoDrafter(8, sources=("text",), heads=None, min_probability=1e-6)
    drafter.begin(1)
    row = drafter._rows[0]
    row.text.extend([7, 1, 2, 5, 6, 9, 2, 8, 1, 2], 0)
    (_, _, first), (_, _, second) = drafter._candidates(row, (1, 2), None)
    for i in range(100):
        drafter.rates.learn(first, i % 10 < 7)
        drafter.rates.learn(second, i % 10 < 8)
    every = drafter._children(row, _Node(2, (1, 2)))
    assert [child.token for child in every] == [5, 8] and every[1].score > 0.2
    drafter._least = 0.2  # three fifths of what the first guess leaves
    assert [child.token for child in drafter._children(row, _Node(2, (1, 2)))] == [5, 8]
    drafter._least = 0.5
    assert [child.token for child in drafter._children(row, _Node(2, (1, 2)))] == [5]


class Asked(Generous):
    """Notes what it is asked for the least score."""

    def least_score(self, running: int, **options: Any) -> float:
        self.asked = (running, options)
        return 0.0


@pytest.mark.parametrize("pads", [False, True])
def test_the_budget_knows_the_batch(pads: bool) -> None:
    drafter, budget = AutoDrafter(8, heads=None), Asked()
    drafter.begin(2)
    sampling = SamplingParams(torch.tensor([0, 0]), torch.tensor([0.0, 0.0]))
    text, device = [1, 2, 1], torch.device("cpu")
    context = DraftContext(
        [text, text], [True, False], [5, 0], device, VOCAB, sampling, budget, pads
    )
    drafter.propose(context)
    assert budget.asked == (1, {"finished": 1, "pads": pads})


@pytest.mark.parametrize("num_paid", [0, 1, 2, 9])
def test_heads_are_asked_while_the_budget_pays(num_paid: int) -> None:
    text = list(range(40))
    network = Prophet([text])
    drafter = AutoDrafter(16, heads=network, heads_depth=4)
    drafter.begin(1)
    budget = Stingy(num_paid)
    tree = drafter.propose(_context(text[:5], 20, budget)).tree
    depth = min(num_paid, 4)
    assert len(network.asked) == depth
    path = tree.tokens[0].tolist()
    assert [token in path for token in text[5:10]] == [True] * depth + [False] * (5 - depth)
    for tokens, _ in budget.offers:
        assert 0 < tokens <= 0.3, "a token at most comes next"


def test_a_guess_of_the_text_is_as_likely_as_what_heads_say_of_it(tiny_model) -> None:
    """What is learned at one node tells apart the guesses that heads share from the others."""
    drafter = AutoDrafter(8, sources=("text",), orders=(2,), heads=Prophet([]))
    drafter.begin(1)
    row = drafter._rows[0]
    row.text.extend([6, 7, 8, 6, 7], 0)
    shared, alone = Advice({8: 0.9, 9: 0.05}), Advice({9: 0.9, 5: 0.05})
    for _ in range(50):
        for advice, next_token in ((shared, 8), (alone, 9)):
            for token, _, kind in drafter._candidates(row, (6, 7), advice):
                drafter.rates.learn(kind, token == next_token)
                if token == next_token:
                    break
    chances = [
        {token: chance for token, chance, _ in drafter._candidates(row, (6, 7), advice)}
        for advice in (shared, alone)
    ]
    assert chances[0][8] > 0.9 and chances[1][8] < 0.1 and chances[1][9] > 0.8
    assert all(sum(c.values()) <= 1.0 + 1e-9 for c in chances)


def test_a_share_leaves_out_what_is_refuted() -> None:
    advice = Advice({4: 0.6, 5: 0.3})
    assert advice.share(5, 0.0) == pytest.approx(0.3)
    assert advice.share(5, 0.6) == pytest.approx(0.75)
    assert advice.share(6, 0.6) == 0.0 and advice.share(4, 0.9) == 1.0
    assert [level_of(p) for p in (0.0, 0.02, 0.4, 0.97, 1.0)] == [0, 1, 5, 10, 10]


@pytest.mark.parametrize("sizes", [(0, 3), (4, 0)])
def test_heads_need_a_depth_and_a_width(sizes: tuple[int, int]) -> None:
    depth, width = sizes
    with pytest.raises(ValueError, match=rf"must be >= 1, got {depth}, {width} and 8"):
        AutoDrafter(heads=Prophet([]), heads_depth=depth, heads_width=width)


def test_networks_in_the_target_s_cache_are_not_merged() -> None:
    with pytest.raises(ValueError, match=r"EarlyExitModel keeps its nodes in the target's cache"):
        AutoDrafter(heads=EarlyExitModel(1))


def test_other_targets_have_no_shipped_heads(tiny_model) -> None:
    drafter = AutoDrafter()
    with drafter.attach(HFTargetView(HFTarget(tiny_model, 8))):
        assert drafter._adviser is None
