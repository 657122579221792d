"""Tree sizes from costs: the curve, the choice, the rest, the file, and the best fixed tree."""

from __future__ import annotations

import itertools
import json
import time
from pathlib import Path
from random import Random

import pytest
from byte_model import save_byte_model

from specdec_kernels import Acceptance, Budget, CostCurve, best_static_tree
from specdec_kernels.budget import CONSERVATIVE, cost_file, load_cost, save_cost
from specdec_kernels.cli import main
from specdec_kernels.statistics import DecodeStats, DraftFailure, TotalStats

FLAT = CostCurve((1, 64), (1.0, 1.0))
STEEP = CostCurve((1, 64), (1.0, 64.0))


def _record(budget: Budget, computed: int, *, num_accepted: int = 0, **seconds: float) -> None:
    """Of a batch of one row."""
    budget.record(running=1, computed=computed, plain=1, num_accepted=num_accepted, **seconds)


def test_a_curve_is_linear_between_its_points_and_beyond() -> None:
    curve = CostCurve((1, 4, 8), (1.0, 4.0, 6.0))
    assert [curve(n) for n in (1, 2, 4, 6, 8, 12)] == [1.0, 2.0, 4.0, 5.0, 6.0, 8.0]


@pytest.mark.parametrize(
    ("nodes", "seconds"),
    [((1,), (1.0,)), ((2, 4), (1.0, 2.0)), ((1, 1), (1.0, 2.0)), ((1, 2), (1.0, 0.0)),
     ((1, 2), (1.0, float("nan"))), ((1, 2, 3), (1.0, 2.0))],
)  # fmt: skip
def test_what_is_no_curve_is_refused(nodes, seconds) -> None:
    with pytest.raises(ValueError, match=r"^CostCurve: "):
        CostCurve(nodes, seconds)


def test_the_size_is_the_one_with_the_most_tokens_per_second() -> None:
    scores = [0.9, 0.8, 0.5, 0.3, 0.1, 0.05]
    for cost in (CONSERVATIVE, FLAT, STEEP, CostCurve((1, 3, 4, 9), (1.0, 1.1, 2.0, 3.0))):
        rates = {n: (1 + sum(scores[: n - 1])) / cost(n) for n in range(1, 8)}
        best = max(rates, key=rates.get)
        assert Budget(cost).choose([scores]) == [best]
    assert Budget(FLAT).choose([scores]) == [7] and Budget(STEEP).choose([scores]) == [1]
    assert Budget(FLAT).choose([[]]) == [1] and Budget(FLAT).choose([]) == []


def test_padding_is_paid_for_every_row() -> None:
    cost = CostCurve((1, 2, 3, 64), (1.0, 1.2, 1.4, 14.0))
    assert Budget(cost).choose([[0.9, 0.9]]) == [3]
    assert Budget(cost).choose([[0.9, 0.9], [], [], [], []]) == [1] * 5
    assert Budget(cost).choose([[0.5]]) == [2]
    assert Budget(cost).choose([[0.5]], finished=4) == [1]


def test_without_padding_the_likeliest_nodes_of_all_rows_come_first() -> None:
    cost = CostCurve((1, 2, 3, 64), (1.0, 1.2, 1.4, 13.6))  # 0.2 a token
    rows = [[0.9, 0.9], [0.5, 0.1], [], [0.95]]
    assert Budget(cost).choose(rows, pads=False) == [3, 1, 1, 2]
    assert Budget(cost).choose(rows, pads=False, finished=60) == [3, 1, 1, 2]
    assert Budget(FLAT).choose(rows, pads=False) == [3, 3, 1, 2]
    assert Budget(cost).choose([[0.1]] * 4, pads=False) == [1] * 4
    alone = [0.9, 0.8, 0.5, 0.3, 0.1, 0.05]
    assert Budget(cost).choose([alone], pads=False) == Budget(cost).choose([alone])


def test_no_node_below_the_least_score_or_of_a_full_tree_is_chosen() -> None:
    """Whatever the curve, what drafting and drafts cost, and how far promises are trusted."""
    random = Random(0)
    dropped = unread = 0
    for _ in range(10_000):
        points = sorted(random.sample(range(2, random.choice([8, 40])), 3))
        seconds = [random.uniform(0.5, 2.0)]
        for a, b in itertools.pairwise((1, *points)):
            seconds.append(seconds[-1] + (b - a) * random.choice([0.0, 0.01, 0.05, 0.2, 1.0]))
        curve = CostCurve((1, *points), tuple(seconds))
        batch = random.choice([1, 1, 2, 5])
        rows = [
            sorted((random.random() ** 2 for _ in range(random.randrange(20))), reverse=True)
            for _ in range(batch)
        ]
        trust, draft = random.choice([0.3, 1.0, 1.25]), random.choice([0.0, 0.1, 1.0])
        added = random.choice([1.0, 1.0, 0.1, 30.0])  # of what the curve said would be 1

        def budget(curve=curve, trust=trust, draft=draft, added=added) -> Budget:
            made = Budget(curve)
            made._trust, made._draft_cost = trust, draft
            made._added, made._said = added, 1.0
            return made

        least = budget().least_score(batch, pads=False)
        some = [[score for score in row if score >= least] for row in rows]
        dropped += sum(map(len, rows)) - sum(map(len, some))
        assert budget().choose(rows, pads=False) == budget().choose(some, pads=False)
        if batch == 1:
            is_full, row, size = budget().is_full(), rows[0], 0
            while size < len(row) and not is_full(1 + size, sum(row[:size]), row[size]):
                size += 1
            unread += len(row) - size
            assert budget().choose(rows) == budget().choose([row[:size]])
    assert dropped > 500 and unread > 500
    assert Budget(FLAT).least_score(1) == Budget(STEEP).least_score(8) == 0
    assert Budget(STEEP).least_score(1, finished=1) == 0 < Budget(STEEP).least_score(1)
    assert Budget(STEEP).least_score(8, pads=False) == pytest.approx(1.0)
    linear = CostCurve((1, 64), (1.0, 2.0))  # here nodes of little more are all taken
    least = Budget(linear).least_score(1)
    assert Budget(linear).choose([[1.1 * least] * 40], pads=False) == [41]
    steep = Budget(linear)
    steep._added, steep._said = 9.0, 3.0
    assert steep.least_score(1) == pytest.approx(steep._steepness * least)


def test_promises_that_fail_are_trusted_less() -> None:
    budget = Budget(CONSERVATIVE)
    first = budget.choose([[0.5, 0.4, 0.3, 0.2]])
    for _ in range(20):
        budget.choose([[0.5, 0.4, 0.3, 0.2]])
        _record(budget, 5, forward_seconds=0.02, draft_seconds=0.0001)
    assert first > [1] == budget.choose([[0.5, 0.4, 0.3, 0.2]])


def test_a_slow_drafter_must_bring_more() -> None:
    """It is asked seldom; where it has drafted, the time is spent, and nodes that pay are taken."""

    def asked(draft_seconds: float) -> int:
        budget, count = Budget(FLAT), 0
        for _ in range(100):
            is_asked = not budget.rests()
            count += is_asked
            assert not is_asked or budget.choose([[0.3]]) == [2]
            spent = draft_seconds * is_asked
            _record(budget, 1 + is_asked, forward_seconds=0.02, draft_seconds=spent)
            budget._promised = budget._accepted = 4.0  # trust aside
            budget._trust = 1.0
        return count

    assert asked(0.0002) == 100 - 3, "after 8, 16 and 32 steps one to compare with"
    assert asked(0.02) < 30


def test_it_rests_ever_longer_and_wakes_up_when_drafts_are_good() -> None:
    budget = Budget(CONSERVATIVE)
    asked = [step for step in range(200) if not budget.rests() and budget.choose([[0.01]]) == [1]]
    gaps = [b - a for a, b in itertools.pairwise(asked)]
    assert gaps[:4] == [1] * 4 and max(gaps) == gaps[-1] == 13
    while budget.rests():
        pass
    assert budget.choose([[0.9, 0.9]]) == [3]
    assert not budget.rests()


def test_trees_that_it_does_not_size_are_left_out_while_they_do_not_pay() -> None:
    def drafted(num_accepted: int) -> int:
        budget, count = Budget(CONSERVATIVE), 0
        for _ in range(100):
            nodes = 1 if budget.rests() else 16
            count += nodes > 1
            _record(
                budget,
                nodes,
                num_accepted=num_accepted * (nodes > 1),
                forward_seconds=0.02 * CONSERVATIVE(nodes),
                draft_seconds=0.001 * (nodes > 1),
            )
        return count

    assert drafted(2) == 100 - 3, "after 8, 16 and 32 steps one to compare with"
    assert drafted(0) < 45


def _speedup(budget: Budget, truth: CostCurve, rows: int) -> float:
    """Tokens per second against plain decoding: 400 steps of random guesses, right as often as they
    say, in passes that take what `truth` says and up to a fifth more.
    """
    random = Random(0)
    seconds = plain_seconds = 0.0
    tokens = 0
    for _ in range(400):
        scores = []
        for _ in range(rows):
            chance = min(0.95, max(0.05, random.gauss(0.6, 0.25)))
            scores.append([chance ** (depth + 1) for depth in range(12)])
        sizes = [1] * rows if budget.rests() else budget.choose(scores, pads=False)
        tokens += rows
        accepted = 0
        for row, size in zip(scores, sizes, strict=True):
            depth = 0
            while depth < size - 1 and random.random() < row[0]:
                depth += 1
            accepted += depth
        tokens += accepted
        pass_seconds = truth(sum(sizes)) * random.uniform(1.0, 1.2)
        plain_seconds += truth(rows) * random.uniform(1.0, 1.2)
        seconds += pass_seconds
        budget.record(
            running=rows,
            computed=sum(sizes),
            plain=rows,
            num_accepted=accepted,
            forward_seconds=pass_seconds,
            draft_seconds=1e-6,
        )
    return tokens / seconds * plain_seconds / (400 * rows)


@pytest.mark.parametrize(("rows", "least"), [(1, 2.1), (2, 1.65), (4, 1.2), (8, 0.96)])
def test_a_wrong_curve_is_seen_through(rows: int, least: float) -> None:
    """One far too flat, as without a measurement on two busy cores, does about as well."""
    truth = CostCurve((1, 4, 8, 12, 16, 32, 64), (0.027, 0.032, 0.044, 0.059, 0.076, 0.142, 0.273))
    for curve in (truth, CONSERVATIVE):
        assert _speedup(Budget(curve), truth, rows) > least


def test_what_drafts_add_to_a_pass_is_learned_from_neighbours() -> None:
    def after(times: float, unit: float = 0.02) -> Budget:
        budget = Budget(CONSERVATIVE)
        for step in range(80):
            has_drafts = step % 2 == 1
            unit *= 1.02  # the machine slows down all the time
            cost = 1.0 + has_drafts * times * (CONSERVATIVE(8) - 1.0)
            _record(budget, 1 + 7 * has_drafts, forward_seconds=unit * cost, draft_seconds=0.0)
        return budget

    assert after(1.0)._steepness == after(1.1)._steepness == 1.0
    assert after(2.0)._steepness == pytest.approx(2.0, rel=0.2)  # the curve counts for something
    assert after(0.5)._steepness == pytest.approx(0.5, rel=0.2)
    assert after(50.0)._steepness == 4.0
    budget = after(3.0)
    assert budget.choose([[0.25]]) == [1] and Budget(CONSERVATIVE).choose([[0.25]]) == [2]
    for _ in range(400):
        _record(budget, 1, forward_seconds=0.02, draft_seconds=0.0)
    assert budget._steepness == 1.0, "forgotten where nobody looks"


def test_costs_are_kept_by_model(tmp_path: Path) -> None:
    path = tmp_path / "costs.json"
    assert load_cost("a", path) is None
    save_cost("a", FLAT, path)
    save_cost("b", STEEP, path)
    assert (load_cost("a", path), load_cost("b", path)) == (FLAT, STEEP)
    assert load_cost("c", path) is None


@pytest.mark.parametrize("content", ["", "[1]", '{"a": 1}', '{"a": {"nodes": [1, 2]}}'])
def test_another_file_holds_no_costs(tmp_path: Path, content: str) -> None:
    path = tmp_path / "costs.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"costs\.json: (not JSON|must be|no cost curve)"):
        load_cost("a", path)


def test_tune_measures_and_generate_uses_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path / "cache"))
    save_byte_model(tmp_path / "model")
    model = ["--model", str(tmp_path / "model"), "--dtype", "fp32"]
    assert main(["tune", *model, "--repeats", "2", "--output", str(tmp_path / "own.json")]) == 0
    assert "against 1" in capsys.readouterr().out and not cost_file().exists()
    start = time.perf_counter()
    assert main(["tune", *model, "--repeats", "2"]) == 0
    elapsed = time.perf_counter() - start
    curves = json.loads(cost_file().read_text())
    ((key, curve),) = curves.items()
    assert key.startswith("llama-2x64-float32-cpu-") and curve["nodes"][0] == 1
    assert curve["seconds"] == sorted(curve["seconds"])
    assert 0 < sum(curve["seconds"]) < elapsed

    # costs that no draft can pay for
    curves[key] = {"nodes": [1, 2], "seconds": [1.0, 99.0]}
    cost_file().write_text(json.dumps(curves))
    request = ["generate", *model, "--prompt", "abcabcabc", "--max-new-tokens", "24", "--json"]
    capsys.readouterr()
    assert main(request) == 0
    assert json.loads(capsys.readouterr().out)["stats"]["num_drafted"] == 0
    curves[key] = {"nodes": [1, 2], "seconds": [1.0, 1.0]}
    cost_file().write_text(json.dumps(curves))
    assert main(request) == 0
    assert json.loads(capsys.readouterr().out)["stats"]["num_drafted"] > 20


def _trees(size: int, depth: int):
    """Every ordered tree of that many nodes, as nested tuples of children."""
    if size == 1:
        yield ()
        return
    if depth == 0:
        return
    for first in range(1, size):
        for child in _trees(first, depth - 1):
            for rest in _trees(size - first, depth):
                yield (child, *rest)


def _expected(tree, acceptance) -> float:
    return 1 + sum(
        (acceptance[k] if k < len(acceptance) else 0.0) * _expected(child, acceptance)
        for k, child in enumerate(tree)
    )


def _nested(parents: list[int], node: int = 0):
    return tuple(_nested(parents, i) for i, p in enumerate(parents) if p == node)


@pytest.mark.parametrize("acceptance", [(0.8, 0.1), (0.4, 0.3, 0.2), (0.5, 0.45), (0.9,), (0.1,)])
@pytest.mark.parametrize("depth", [1, 2, 6])
def test_the_static_tree_is_the_best_of_all(acceptance, depth: int) -> None:
    for size in range(1, 9):
        parents = best_static_tree(acceptance, size, max_depth=depth)
        best = max(
            _expected(tree, acceptance) for n in range(1, size + 1) for tree in _trees(n, depth)
        )
        assert len(parents) <= size
        assert _expected(_nested(parents), acceptance) == pytest.approx(best)


def test_the_static_tree_stops_where_nodes_cost_more_than_they_bring() -> None:
    assert best_static_tree((0.6, 0.2), 32, cost=STEEP) == [-1]
    assert len(best_static_tree((0.6, 0.2), 32, cost=FLAT)) == 32
    sizes = [
        len(best_static_tree((0.6, 0.2), 32, cost=CONSERVATIVE, draft_cost=d)) for d in (0, 0.3)
    ]
    assert 1 <= sizes[1] < sizes[0] < 32


@pytest.mark.parametrize(("acceptance", "size"), [((0.8, 0.4), 4), ((-0.1,), 4), ((0.5,), 0)])
def test_impossible_acceptance_is_refused(acceptance, size: int) -> None:
    with pytest.raises(ValueError, match=r"^best_static_tree: "):
        best_static_tree(acceptance, size)


def test_acceptance_counts_only_what_was_tested() -> None:
    acceptance = Acceptance()
    #      root -> 1, 2;  1 -> 3;  2 -> 4, 5;  kept: root, 2, 5
    acceptance.count([-1, 0, 0, 1, 2, 2], [0, 2, 5])
    assert acceptance.tested_by_depth == [1, 1] and acceptance.accepted_by_depth == [1, 1]
    assert acceptance.tested_by_rank == [2, 2] and acceptance.accepted_by_rank == [0, 2]
    acceptance.count([-1, 0], [0])
    assert acceptance.by_depth() == [0.5, 1.0]
    assert acceptance.by_rank() == [0.0, 1.0]


def test_totals_are_sums_over_calls() -> None:
    totals = TotalStats()
    for _ in range(3):
        stats = DecodeStats([4, 2], [6, 4], [9, 9], [2, 2], draft_seconds=0.5)
        stats.acceptance.count([-1, 0], [0, 1])
        for step in range(20):
            stats.fail(DraftFailure(step, "X", "y"))
        assert len(stats.failures) == 16
        totals.add(stats)
    assert (totals.num_calls, totals.num_rows, totals.num_tokens) == (3, 6, 30)
    assert totals.tokens_per_step == 30 / 18 and totals.draft_seconds == 1.5
    assert totals.num_failures == 60 and totals.as_dict()["acceptance_by_depth"] == [1.0]
    json.dumps(totals.as_dict())


def test_drafting_longer_pays_by_the_speed_that_was_promised() -> None:
    budget = Budget(CostCurve((1, 2), (1.0, 1.5)))
    assert budget.pays(0.0, 1e9), "nothing was measured yet"
    budget.choose([[0.8]])  # 1.8 tokens in 1.5 units
    for _ in range(3):
        _record(budget, 1, forward_seconds=0.01, draft_seconds=0.0)
    assert budget.pays(0.6, 0.0049) and not budget.pays(0.6, 0.0051)
