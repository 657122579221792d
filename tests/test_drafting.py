"""Sampled drafts through the decoding loop: the output is the target's own, whatever the drafter,
the rule and the rest of the batch.
"""

from __future__ import annotations

import pytest
import torch
from laws import chi_square
from prompts import left_pad, random_prompts
from torch import Tensor
from toy_target import ToyDrafter, ToyTarget

import specdec_kernels.drafting as drafting
from specdec_kernels import ProposalBuilder, SamplingParams, SpeculativeDecoder
from specdec_kernels.decoding import DecodeStats, decode

VOCAB = 5
PROMPTS = [[1, 2], [0, 3, 4, 1], [2, 2, 2]]

# rule, children by depth, deterministic ones among them, options of the draws
CASES = {
    "token": ("token", (2, 2), (), {}),
    "token-with-replacement": ("token", (3, 2), (), {"replacement": True}),
    "block": ("block", (1, 1, 1), (), {}),
    "traversal": ("traversal", (2, 2, 1), (), {}),
    "gd_traversal": ("gd_traversal", (3, 2), (2, 1), {}),
    "default-rule-mixed-kinds": (None, (3, 2), (1, 0), {"draft_vocab": (0, 1, 2, 4)}),
    "default-rule-other-law": (
        None,
        (2, 1),
        (),
        {"replacement": True, "temperature": 2.0, "top_k": 4},
    ),
}


def _target(probs: tuple[float, ...] | None = None, **options: float) -> ToyTarget:
    """A target with random laws, or with the same law everywhere."""
    if probs is None:
        return ToyTarget(VOCAB, **options)
    target = ToyTarget(len(probs))
    target.table = torch.tensor(probs).log().expand_as(target.table).clone()
    return target


def _sampling(seeds: list[int], temperature: list[float], **filters: float) -> SamplingParams:
    size = len(seeds)
    made = {name: torch.full((size,), value) for name, value in filters.items()}
    return SamplingParams(torch.tensor(seeds), torch.tensor(temperature), **made)


def _decode(
    drafter: ToyDrafter | None,
    prompts: list[list[int]],
    seeds: list[int],
    temperature: list[float],
    rule: str | None,
    new: int = 9,
) -> tuple[list[list[int]], DecodeStats]:
    return decode(
        _target(),
        drafter,
        prompts,
        max_lengths=[len(p) + new for p in prompts],
        sampling=_sampling(seeds, temperature, top_p=0.95),
        rule=rule,
    )


def _drafter(name: str) -> ToyDrafter:
    _, widths, num_top, options = CASES[name]
    return ToyDrafter(_target(noise=1.0), widths, num_top, **options)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("name", CASES)
def test_rows_depend_on_their_seed_alone_and_greedy_rows_are_plain_decoding(
    name: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ragged prompts; the third row is greedy, among sampled ones."""
    monkeypatch.setenv("SPECDEC_BACKEND", backend)
    rule, seeds, temperature = CASES[name][0], [5, 6, 7], [0.8, 1.3, 0.0]
    together, stats = _decode(_drafter(name), PROMPTS, seeds, temperature, rule)
    assert sum(stats.num_accepted) > 3, "the drafter must exercise acceptance"
    for order in ([2, 0], [1], [0], [2]):
        some, _ = _decode(
            _drafter(name),
            [PROMPTS[i] for i in order],
            [seeds[i] for i in order],
            [temperature[i] for i in order],
            rule,
        )
        assert some == [together[i] for i in order]
    plain, _ = _decode(None, PROMPTS, seeds, temperature, None)
    assert together[2] == plain[2]
    assert [len(s) for s in together] == [len(s) for s in plain]


def test_without_a_rule_rows_without_sampled_drafts_stay_plain_sampling() -> None:
    """Row 1 drafts nothing at random, so it walks, although its neighbours are sampled."""

    class Hybrid(ToyDrafter):
        def parents(self, roots):
            return [root for root in roots if root.row != 1]

    seeds, temperature = [4, 5, 6], [1.5, 1.5, 1.5]
    drafter = Hybrid(_target(noise=1.0), (2, 2))
    mixed, stats = _decode(drafter, PROMPTS, seeds, temperature, None)
    plain, _ = _decode(None, PROMPTS, seeds, temperature, None)
    assert mixed[1] == plain[1] and stats.num_drafted[1] == 0
    assert mixed[0] != plain[0] and stats.num_drafted[0] > 0


def test_a_sampled_drafter_runs_inside_generate(tiny_model) -> None:
    rows = random_prompts((8, 5, 11), 101)
    drafter = ToyDrafter(ToyTarget(101), (3, 2, 1), (2, 1))
    options = {"max_new_tokens": 8, "do_sample": True, "temperature": 0.4, "top_k": 40}

    def run(order: list[int], **more: object) -> list[list[int]]:
        decoder = SpeculativeDecoder(drafter, seed=order, rule="gd_traversal")
        inputs = left_pad([rows[i] for i in order])
        output = tiny_model.generate(**inputs, custom_generate=decoder, **{**options, **more})
        assert sum(decoder.stats.num_drafted) > 50
        return output[:, inputs["input_ids"].shape[1] :].tolist()

    together = run([0, 1, 2])
    assert run([2, 0]) == [together[2], together[0]]
    greedy = {"do_sample": False, "temperature": None, "top_k": None}
    plain = tiny_model.generate(**left_pad(rows), max_new_tokens=8, do_sample=False)
    assert run([0, 1, 2], **greedy) == plain[:, -8:].tolist()


@pytest.mark.parametrize(
    ("drafter", "rule", "message"),
    [
        (None, "fast", r"rule must be None or one of walk, token, .*gd_traversal, got 'fast'"),
        (None, "typical", r"rule must be None or one of walk, .*, got 'typical'"),
        ("traversal", "walk", r"rule 'walk' tests one-hot drafts only"),
        ("traversal", "block", r"rule 'block' tests chains"),
        ("traversal", "gd_traversal", r"rule 'gd_traversal' tests one sampled child"),
    ],
)
def test_a_rule_that_does_not_fit_is_refused(drafter, rule: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _decode(drafter and _drafter(drafter), PROMPTS, [1, 2, 3], [1.0] * 3, rule)


@pytest.mark.parametrize("rule", ["fast", "typical"])
def test_a_wrong_rule_is_refused_before_generate_runs(rule: str) -> None:
    with pytest.raises(ValueError, match=f"rule must be None or one of .*, got '{rule}'"):
        SpeculativeDecoder(rule=rule)


def test_a_law_without_the_token_drawn_from_it_is_an_error_that_names_the_drafter() -> None:
    class Forger(ToyDrafter):
        def propose(self, context):
            proposal = super().propose(context)
            proposal.draft_probs[1] = 0.0
            return proposal

    with pytest.raises(ArithmeticError, match=r"Forger: row 1: a draft token .* has no mass in"):
        _decode(Forger(_target(), (2, 2)), PROMPTS, [1, 2, 3], [1.0] * 3, None)


def _exact_law(target: ToyTarget, prefix: list[int], num: int) -> Tensor:
    """Joint law of the next `num` tokens, [V] * num float64."""
    law = target.logits_after([prefix])[0].double().softmax(-1)
    if num == 1:
        return law
    rest = [_exact_law(target, [*prefix, token], num - 1) for token in range(len(law))]
    return torch.stack([p * q for p, q in zip(law, rest, strict=True)])


def _chi_square(
    target: ToyTarget, drafter: ToyDrafter, rule: str | None, num: int, num_rows: int
) -> tuple[float, float]:
    """Of the first `num` tokens (one from the prefill, the others from verify steps) over as many
    seeds as rows, and the bound that an exact sampler exceeds once in a million times.
    """
    prompt = [1, 1]
    sequences, _ = decode(
        target,
        drafter,
        [prompt] * num_rows,
        max_lengths=[12] * num_rows,
        should_stop=lambda row, sequence: len(sequence) == len(prompt) + num,
        sampling=_sampling(list(range(num_rows)), [1.0] * num_rows),
        rule=rule,
    )
    emitted = torch.tensor(sequences)[:, len(prompt) :]
    return chi_square(emitted, _exact_law(target, prompt, num))


@pytest.mark.parametrize("name", CASES)
def test_the_joint_law_of_three_tokens_is_the_target_s(name: str, report) -> None:
    measured, bound = _chi_square(_target(), _drafter(name), CASES[name][0], 3, 1500)
    report(f"joint law of 3 tokens, {name}: chi-square {measured:.0f}, bound {bound:.0f}")
    assert measured < bound


def _another_law_recorded(patch: pytest.MonkeyPatch) -> None:
    """The law at temperature 3 is recorded for tokens drawn at 1."""
    sample = drafting.sample

    def mutant(logits: Tensor, **options: object):
        tokens, status, _ = sample(logits, **options)
        hotter = {**options, "temperature": options["temperature"] * 3}
        return tokens, status, sample(logits, **hotter)[2]

    patch.setattr(drafting, "sample", mutant)


def _noise_of_a_fixed_position(patch: pytest.MonkeyPatch) -> None:
    init = ProposalBuilder.__init__

    def mutant(self: ProposalBuilder, *args: object, **options: object) -> None:
        init(self, *args, **options)
        self._positions = torch.zeros_like(self._positions)

    patch.setattr(ProposalBuilder, "__init__", mutant)


def _noise_of_the_drafted_position(patch: pytest.MonkeyPatch) -> None:
    """What plain sampling does, and what a draft must not do."""
    options = ProposalBuilder._options

    def mutant(self: ProposalBuilder, nodes, given):
        made = options(self, nodes, given)
        made["positions"] = made["positions"] + 1 + torch.tensor([n.depth for n in nodes])
        return made

    patch.setattr(ProposalBuilder, "_options", mutant)
    patch.setattr(
        ProposalBuilder, "_take_streams", lambda self, nodes, *_: torch.tensor([0] * len(nodes))
    )


@pytest.fixture(scope="module")
def honest() -> tuple[float, float]:
    """Without a planted mistake."""
    return _control()


def _control() -> tuple[float, float]:
    """The same laws after every token, so that noise used twice drafts the same token twice."""
    drafter = ToyDrafter(_target((0.7, 0.3)), (1, 1))
    return _chi_square(_target((0.3, 0.7)), drafter, "block", 4, 2000)


@pytest.mark.parametrize(
    "plant",
    [_another_law_recorded, _noise_of_a_fixed_position, _noise_of_the_drafted_position],
    ids=lambda plant: plant.__name__.strip("_"),
)
def test_a_planted_bias_is_found(plant, honest, report, monkeypatch: pytest.MonkeyPatch) -> None:
    measured, bound = honest
    plant(monkeypatch)
    biased, _ = _control()
    name = plant.__name__.strip("_").replace("_", " ")
    report(f"planted, {name}: chi-square {measured:.0f} -> {biased:.0f}, bound {bound:.0f}")
    assert measured < bound < biased
