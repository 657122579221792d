"""The training example: same formulas as the drafters', resumable, and what it trains drafts."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import corpus
import features
import pytest
import torch
import training
from conftest import make_tiny_model
from corpus import Conversation
from distillation import cross_entropy, teacher_law
from draft_model import Draft
from eagle import Eagle
from medusa import Medusa
from mlp_speculator import Speculator
from prompts import greedy, left_pad, random_prompts
from safetensors.torch import load_file
from streaming import Streams
from torch import Tensor
from training import Schedule, System, train
from transformers import GraniteConfig, GraniteForCausalLM

from specdec_kernels import (
    DraftContext,
    ModelDrafter,
    SpeculativeDecoder,
    TopKTree,
    load_heads,
)
from specdec_kernels.drafting import GREEDY
from specdec_kernels.hf import load_draft_model
from specdec_kernels.hf.attention import tree_attention_in
from specdec_kernels.hf.features import HFTargetView
from specdec_kernels.hf.target import HFTarget
from specdec_kernels.shapes import PAD
from specdec_kernels.tree import TokenTree

SYSTEMS = {
    "eagle": Eagle,
    "mlp-speculator": Speculator,
    "medusa": Medusa,
    "streaming": Streams,
    "draft": Draft,
}
VOCAB, DRAFT_VOCAB, DEPTHS, LAYERS = 101, 60, 3, 7
PROMPT, ANSWER = 7, 24
NO_TOKENIZER: Any = None
PROMPTS = random_prompts((PROMPT,) * 5, VOCAB, seed=5)


@pytest.fixture(scope="module")
def model() -> Any:
    return make_tiny_model(LAYERS).requires_grad_(False)


@pytest.fixture(scope="module")
def view(model: Any) -> HFTargetView:
    return HFTargetView(HFTarget(model, capacity=1))


@pytest.fixture(scope="module")
def texts(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The corpus of the tiny model: greedy answers to five prompts, and their features."""
    folder = tmp_path_factory.mktemp("corpus")
    rows = [greedy(model, prompt, ANSWER) for prompt in PROMPTS]
    conversations = [Conversation(row, PROMPT) for row in rows]
    corpus.save_shard(conversations[:3], folder / "shard-00000.safetensors")
    corpus.save_shard(conversations[3:], folder / "shard-00001.safetensors")
    features.compute(model, corpus.shards(folder))
    return folder


@pytest.fixture
def examples(texts: Path) -> features.Examples:
    return features.Examples(texts)


def _make(name: str, view: HFTargetView, examples: features.Examples, folder: Path) -> System:
    ids = examples.frequent_tokens(DRAFT_VOCAB, VOCAB)
    return SYSTEMS[name](view, ids, folder, 1 if name == "draft" else DEPTHS)


def _load(name: str, folder: Path) -> Any:
    """The network that was saved there."""
    if name == "draft":
        return load_draft_model(folder, NO_TOKENIZER, dtype=torch.float32)
    return load_heads(folder)


def _assert_within(fraction: float, states: torch.Tensor, expected: torch.Tensor) -> None:
    """Of the largest state: inside of a layer they come to 100, which float32 holds to 1e-5, and
    sums of them round on each CPU in another order.
    """
    atol = fraction * float(expected.abs().max())
    torch.testing.assert_close(states, expected, atol=atol, rtol=0)


def test_features_are_the_targets_hidden_states(
    model: Any, examples: features.Examples, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(features, "TOKENS_PER_BATCH", 70)
    seen = []
    for batch in examples.epoch(range(len(examples.conversations)), 3):
        for b, row in enumerate(batch.tokens.tolist()):
            (i,) = [i for i, c in enumerate(examples.conversations) if c.tokens == row]
            seen.append(i)
            out = model(torch.tensor([row]), output_hidden_states=True)
            states, logits = [s[0] for s in out.hidden_states], out.logits[0]
            for k, layer in enumerate((2, LAYERS // 2, LAYERS - 3)):
                inputs = batch.inputs[b, :, k]
                _assert_within(1e-5, inputs, states[layer])
            _assert_within(1e-5, batch.hidden[b], states[-1])
            torch.testing.assert_close(batch.logsumexp[b], logits.logsumexp(-1))
            assert batch.best[b].tolist() == logits.argmax(-1).tolist()
            assert batch.is_answer[b].tolist() == [i >= PROMPT for i in range(len(row))]
    assert sorted(seen) == list(range(5))


def test_all_but_padding_and_what_every_conversation_begins_with_is_learned(
    model: Any, tmp_path: Path
) -> None:
    rows = [[1, 2, 3, 4, 5, 6], [1, 2, 3, 9, 5], [1, 2, 7, 4, 5, 6, 8, 8]]
    corpus.save_shard([Conversation(row, 4) for row in rows], tmp_path / "shard-00000.safetensors")
    features.compute(model, corpus.shards(tmp_path))
    (batch,) = features.Examples(tmp_path).epoch([0, 1, 2], 0)
    for row, learned in zip(batch.tokens.tolist(), batch.is_learned.tolist(), strict=True):
        (own,) = [own for own in rows if own == row[: len(own)]]
        assert learned == [2 <= i < len(own) for i in range(8)]


def test_targets_that_drafters_cannot_learn_from_are_refused(texts: Path, tmp_path: Path) -> None:
    (tmp_path / "shard-00000.safetensors").write_bytes(
        (texts / "shard-00000.safetensors").read_bytes()
    )
    with pytest.raises(ValueError, match="must have at least 3 layers"):
        features.compute(make_tiny_model(2), corpus.shards(tmp_path))
    config = GraniteConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=32, num_hidden_layers=3,
        num_attention_heads=2, num_key_value_heads=2, logits_scaling=4.0,
    )  # fmt: skip
    with pytest.raises(ValueError, match="scales or caps the logits"):
        features.compute(GraniteForCausalLM(config).eval(), corpus.shards(tmp_path))


@pytest.mark.parametrize("is_frozen", [False, True])
def test_gradients_of_the_loss_are_autograd_s(
    is_frozen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distillation.ROWS", 4)
    torch.manual_seed(0)
    hidden, head, logits = torch.randn(11, 8), torch.randn(6, 8), torch.randn(11, 9)
    law = logits.softmax(-1)[:, :6]  # of the 9 tokens, 6 can be drafted
    best = torch.where(law.argmax(-1) > 0, law.argmax(-1), PAD)
    grads = []
    for compute in (cross_entropy, None):
        x, w = hidden.clone().requires_grad_(), head.clone().requires_grad_(not is_frozen)
        if compute is not None:
            loss, hit_rate = compute(x, w, law, best)
            assert float(hit_rate) == pytest.approx(
                float(((hidden @ head.T).argmax(-1) == best).float().mean())
            )
        else:
            loss = -(law * (x @ w.T).log_softmax(-1)).sum(-1).mean()
        (3 * loss).backward()
        grads.append((loss.detach(), x.grad, w.grad))
    for own, want in zip(*grads, strict=True):
        torch.testing.assert_close(own, want)


def test_the_teacher_s_law_is_the_target_s(model: Any, examples: features.Examples) -> None:
    ids = examples.frequent_tokens(DRAFT_VOCAB, VOCAB)
    (batch,) = examples.epoch([2], 0)
    law = teacher_law(batch.hidden[0], batch.logsumexp[0], model.lm_head.weight[ids])
    want = model(batch.tokens).logits[0].softmax(-1)[:, ids]
    torch.testing.assert_close(law, want, atol=1e-5, rtol=1e-3)


class _Given:
    """A `FeatureQueue` of features that are known beforehand."""

    def __init__(self, rows: Tensor) -> None:
        self.rows, self.known, self.taken = rows, 0, 0

    def take(self) -> list[Tensor]:
        rows = self.rows[self.taken : self.known]
        self.taken = self.known
        return [rows]


class _Watched(HFTargetView):
    """Gives features of the corpus."""

    def __init__(self, model: Any, batch: features.Batch) -> None:
        super().__init__(HFTarget(model, capacity=1))
        self._batch = batch

    @contextmanager
    def watch(self, layers: Sequence[int] = (), **_: object) -> Iterator[Any]:
        rows = self._batch.inputs[0].flatten(1) if layers else self._batch.hidden[0]
        self.queue = _Given(rows)
        yield self.queue


@pytest.mark.parametrize("name", [name for name in SYSTEMS if name != "streaming"])
def test_training_computes_what_the_heads_compute_when_they_draft(
    name: str, model: Any, view: HFTargetView, examples: features.Examples, tmp_path: Path
) -> None:
    system = _make(name, view, examples, tmp_path)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in system.parameters.values():
            parameter += 0.2 * torch.randn_like(parameter)
    system.save(tmp_path / "saved", view.dtype)
    (batch,) = examples.epoch([1], 0)
    tokens = batch.tokens[0].tolist()
    with torch.no_grad():
        trained = [(out @ head.T)[0] for out, head in system.outputs(batch)]
    trained *= DEPTHS // len(trained)
    network, watched = _load(name, tmp_path / "saved"), _Watched(model, batch)
    roots = (4, 5, 8, 9, 20)  # their numbers among the tokens; the second and fourth were drafts
    num_checked = 0
    with torch.no_grad(), network.attach(watched):
        network.begin(1, DEPTHS)
        for root in roots:
            if name != "draft":
                watched.queue.known = root
            context = DraftContext(
                [tokens[: root + 1]], [True], [60], torch.device("cpu"), VOCAB,
                GREEDY,
            )  # fmt: skip
            logits = [network.start(context)[0]]
            for depth in range(1, DEPTHS):
                logits.append(network.extend([[(tokens[root + depth], depth - 2)]])[0, 0])
            for depth, own in enumerate(logits):
                want = trained[depth][root - 1 + depth]
                torch.testing.assert_close(own, want, atol=2e-3, rtol=1e-4)
                num_checked += 1
    assert num_checked == len(roots) * DEPTHS
    spread = torch.stack([rows[6:] for rows in trained]).std()
    assert float(spread) > 0.2


def _steps(target: HFTarget, rows: Sequence[Sequence[int]], lengths: Sequence[int]) -> None:
    """Score a tree behind so many tokens of each row, whose second branch goes on as the row does,
    and keep that branch.
    """
    trees = []
    for row, length in zip(rows, lengths, strict=True):
        root, *path = row[length : length + 4]
        others = [(token + 1) % VOCAB for token in path[:2]]
        trees.append(([root, *others, *path], [PAD, 0, 1, 0, 3, 4]))
    tree = TokenTree.from_rows(trees, "cpu")
    target.forward(tree)
    path_nodes = torch.tensor([[0, 3, 4, 5, PAD, PAD]] * len(rows), dtype=torch.int32)
    target.commit(path_nodes, torch.full((len(rows),), 4, dtype=torch.int32))


def test_training_computes_what_streams_compute_when_they_draft(
    model: Any, view: HFTargetView, examples: features.Examples, tmp_path: Path
) -> None:
    """In rows of different lengths, behind the last node of a branch."""
    system = _make("streaming", view, examples, tmp_path)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in system.parameters.values():
            parameter += 0.1 * torch.randn_like(parameter)
    system.save(tmp_path / "saved", view.dtype)
    batches = [next(examples.epoch([i], 0)) for i in (1, 2)]
    rows = [batch.tokens[0].tolist() for batch in batches]
    with torch.no_grad():
        trained = [[(out @ head.T)[0] for out, head in system.outputs(b)] for b in batches]
    network: Any = load_heads(tmp_path / "saved")
    target = HFTarget(model, capacity=100)
    lengths = [7, 11]
    with torch.no_grad(), tree_attention_in(model), network.attach(HFTargetView(target)):
        target.prefill([row[:n] for row, n in zip(rows, lengths, strict=True)])
        context = DraftContext(rows, [True] * 2, [60] * 2, torch.device("cpu"), VOCAB, GREEDY)
        assert not network.start(context).any()  # no streams yet: all tokens alike
        for _ in range(3):
            _steps(target, rows, lengths)
            lengths = [n + 4 for n in lengths]
            logits = [network.start(context)]
            for _ in range(1, DEPTHS):
                logits.append(network.extend([[(0, PAD)]] * 2)[:, 0])
            for b, last in enumerate(n - 1 for n in lengths):
                for stream, own in enumerate(logits):
                    want = trained[b][stream][last + stream]
                    torch.testing.assert_close(own[b], want, atol=2e-3, rtol=1e-3)
    spread = torch.stack([entries[6:] for entries in trained[0]]).std()
    assert float(spread) > 0.2


@pytest.mark.parametrize("name", SYSTEMS)
def test_positions_too_early_to_be_that_deep_in_a_draft_are_not_learned(
    name: str, view: HFTargetView, examples: features.Examples, tmp_path: Path
) -> None:
    system = _make(name, view, examples, tmp_path)
    (batch,) = examples.epoch([1], 0)
    every = torch.ones_like(batch.is_answer)
    later = torch.arange(PROMPT + ANSWER)[None] >= system.num_depths + 1
    for some, fewer in zip(system.losses(batch, every), system.losses(batch, later), strict=True):
        assert torch.equal(some.loss, fewer.loss)


def _interrupt(
    system: System, stop: int, examples: features.Examples, folder: Path, schedule: Schedule
) -> None:
    """Train for so many steps only."""

    class Interrupted(Exception):
        pass

    losses, left = system.losses, iter(range(stop))

    def interrupted(*args: Any) -> Any:
        if next(left, None) is None:
            raise Interrupted
        return losses(*args)

    system.losses = interrupted  # type: ignore[method-assign]
    with pytest.raises(Interrupted):
        train(system, examples, folder, schedule)


@pytest.mark.parametrize("name", ["eagle", "mlp-speculator", "draft"])
def test_interrupted_training_resumes_to_the_same_weights(
    name: str,
    view: HFTargetView,
    examples: features.Examples,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(features, "TOKENS_PER_BATCH", 70)  # two steps an epoch
    monkeypatch.setattr(training, "SECONDS_BETWEEN_SAVES", 0.0)
    schedule = Schedule(epochs=4, rate=1e-2)
    whole = _make(name, view, examples, tmp_path / "whole")
    facts = train(whole, examples, tmp_path / "whole", schedule)
    assert facts["steps"] == 8

    folder = tmp_path / "parts"
    for stop in (3, 4):  # in the middle of an epoch, and of a later one
        _interrupt(_make(name, view, examples, folder), stop, examples, folder, schedule)
    system = _make(name, view, examples, folder)
    resumed = train(system, examples, folder, schedule)
    assert resumed["curve"] == facts["curve"]
    assert resumed["held_out"] == facts["held_out"]
    for key, weight in whole.parameters.items():
        assert torch.equal(weight, system.parameters[key]), key
    with pytest.raises(ValueError, match=r"was begun with rate = 0.01, now it is 0.02"):
        train(system, examples, folder, Schedule(epochs=4, rate=2e-2))


def test_eagle_begins_as_the_target_s_last_layer(
    model: Any,
    view: HFTargetView,
    examples: features.Examples,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(model.config.rope_parameters, "rope_theta", 500.0)
    _make("eagle", view, examples, tmp_path)
    initial = load_file(tmp_path / "initial" / "model.safetensors")
    last = model.model.layers[-1].state_dict()
    size = view.hidden_size
    for name in ("q", "k", "v"):
        own = initial[f"midlayer.self_attn.{name}_proj.weight"]
        assert torch.equal(own[:, size:], last[f"self_attn.{name}_proj.weight"])
        assert 0 < float(own[:, :size].std()) < 0.5 * float(size**-0.5)
    for name in ("self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"):
        assert torch.equal(initial[f"midlayer.{name}.weight"], last[f"{name}.weight"])
    config = json.loads((tmp_path / "initial" / "config.json").read_text())
    assert config["rope_theta"] == 500.0


def test_training_learns_prompts_too_and_is_measured_on_answers(
    view: HFTargetView, examples: features.Examples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    system = _make("mlp-speculator", view, examples, tmp_path)
    losses, masks = system.losses, []

    def seen(batch: features.Batch, is_learned: Tensor) -> Any:
        masks.append((is_learned, batch.is_learned, batch.is_answer))
        return losses(batch, is_learned)

    monkeypatch.setattr(system, "losses", seen)
    train(system, examples, tmp_path, Schedule(epochs=1, rate=1e-3))
    assert len(masks) == 2
    (learned, wanted, _), (measured, _, answers) = masks
    assert torch.equal(learned, wanted) and torch.equal(measured, answers)
    assert all(int(every.sum()) > int(some.sum()) for _, every, some in masks)


def _rounded(texts: Path, folder: Path) -> tuple[Any, Path]:
    """The tiny model in bfloat16, and the corpus with its features."""
    copied = folder / "corpus"
    copied.mkdir()
    for path in corpus.shards(texts):
        (copied / path.name).write_bytes(path.read_bytes())
    rounded = make_tiny_model(LAYERS).requires_grad_(False).bfloat16()
    features.compute(rounded, corpus.shards(copied))
    return rounded, copied


@pytest.mark.parametrize("name", SYSTEMS)
def test_bfloat16_targets_train_under_autocast_to_about_the_same(
    name: str, model: Any, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SYSTEMS[name], "muon", ())  # not in float32: not the same steps
    rounded, folder = _rounded(texts, tmp_path)
    curves, schedule = [], Schedule(epochs=8, rate=1e-2)
    for number, (whose, where) in enumerate(((model, texts), (rounded, folder))):
        examples = features.Examples(where)
        seen = HFTargetView(HFTarget(whose, capacity=1))
        system = _make(name, seen, examples, tmp_path / str(number))
        facts = train(system, examples, tmp_path / str(number), schedule)
        curves.append([loss for _, loss, *_ in facts["curve"]])
        assert all(p.dtype == torch.float32 for p in system.parameters.values())
    saved = load_file(tmp_path / "1" / "model.safetensors")
    assert {w.dtype for w in saved.values() if w.is_floating_point()} == {torch.bfloat16}
    assert curves[1] == pytest.approx(curves[0], rel=0.1)
    assert curves[1][-1] < curves[1][0]


@pytest.mark.parametrize(
    ("name", "rate", "matrices", "others"),
    [
        ("eagle", 1e-3, 8, [1, 1, 1, 1]),
        ("mlp-speculator", 2e-2, 2, [1, 1, 2]),  # the last is its own head
        ("medusa", 2e-2, 3, [1, 1, 1]),
        ("streaming", 1e-2, 2 * (1 + 3 * 7), [2]),  # the streams, no matrix
        ("draft", 1e-3, 4 * 7, [1] * 9 + [2, 2]),  # embeddings and head
    ],
)
def test_muon_trains_the_matrices_of_a_bfloat16_target_s_heads_and_resumes(
    name: str,
    rate: float,
    matrices: int,
    others: list[int],
    texts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rounded, folder = _rounded(texts, tmp_path)
    examples = features.Examples(folder)
    view = HFTargetView(HFTarget(rounded, capacity=1))
    schedule = Schedule(epochs=8, rate=rate)
    whole = _make(name, view, examples, tmp_path / "whole")
    adam, muon = training._optimizers(whole, schedule.rate)
    assert isinstance(muon, torch.optim.Muon)
    (group,), (rest,) = (o.param_groups for o in (muon, adam))
    assert [p.ndim for p in group["params"]] == [2] * matrices
    assert sorted(p.ndim for p in rest["params"]) == others
    assert group["largest"] == whole.muon_rate * rest["largest"]
    facts = train(whole, examples, tmp_path / "whole", schedule)
    assert facts["curve"][-1][1] < 0.8 * facts["curve"][0][1]

    monkeypatch.setattr(training, "SECONDS_BETWEEN_SAVES", 0.0)
    parts = tmp_path / "parts"
    _interrupt(_make(name, view, examples, parts), 3, examples, parts, schedule)
    system = _make(name, view, examples, parts)
    assert train(system, examples, parts, schedule)["curve"] == facts["curve"]
    for key, weight in whole.parameters.items():
        assert torch.equal(weight, system.parameters[key]), key


def _accepted(name: str, model: Any, folder: Path, prompts: Sequence[Tensor]) -> int:
    """Accepted draft tokens, after a check that the text is what the model alone writes."""
    decoder = SpeculativeDecoder(
        ModelDrafter(_load(name, folder), TopKTree(8, depth=DEPTHS)), budget=False
    )
    inputs = left_pad(list(prompts))
    output = model.generate(
        **inputs, max_new_tokens=ANSWER, do_sample=False, custom_generate=decoder
    )
    assert output.tolist() == [greedy(model, prompt, ANSWER) for prompt in prompts]
    assert decoder.stats is not None and not decoder.stats.num_failures
    return sum(decoder.stats.num_accepted)


@pytest.mark.parametrize("name", SYSTEMS)
def test_training_makes_drafts_better_and_leaves_the_text_alone(
    name: str, model: Any, view: HFTargetView, examples: features.Examples, tmp_path: Path, report
) -> None:
    system = _make(name, view, examples, tmp_path)
    facts = train(system, examples, tmp_path, Schedule(epochs=60, rate=1e-2))
    losses = [loss for _, loss, *_ in facts["curve"]]
    assert losses[-1] < 0.6 * losses[0]
    assert json.loads((tmp_path / "training.json").read_text()) == facts
    assert facts["parameters"] == sum(p.numel() for p in system.parameters.values())
    held_out = facts["held_out"]
    assert len(held_out["loss"]) == len(held_out["hit_rate"]) == system.num_depths
    learned = [PROMPTS[i] for i in examples.learned]
    before, after = (
        _accepted(name, model, path, learned) for path in (tmp_path / "initial", tmp_path)
    )
    assert after > 2 * before + 20
    report(f"{name}: {before} drafts accepted before training, {after} after")
