"""What drafters learn from: the target's hidden states at every token, computed once."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import corpus
import torch
from rich.progress import track
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from specdec_kernels.drafters.eagle import eagle3_layers
from specdec_kernels.hf.fusing import fast_layers
from specdec_kernels.ops import topk_logprobs

TOKENS_PER_BATCH = 2048
HELD_OUT = 50
"""One conversation in so many is never learned, and measured at the end."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Some conversations, padded on the right. Features have the target's dtype.

    Attributes:
        tokens: [B, T] int64.
        is_learned: [B, T] bool, all but padding and the beginning that all conversations share.
        is_answer: [B, T] bool, the tokens that the target wrote as an answer.
        inputs: [B, T, 3, F], what goes into the target's layers 2, L / 2 and L - 3.
        hidden: [B, T, F], what goes into its head.
        logsumexp: [B, T] float32, of its logits.
        best: [B, T] int32, its likeliest next token.
    """

    tokens: Tensor
    is_learned: Tensor
    is_answer: Tensor
    inputs: Tensor
    hidden: Tensor
    logsumexp: Tensor
    best: Tensor

    def to(self, device: torch.device, dtype: torch.dtype) -> Batch:
        """On another device; hidden states in this dtype."""
        moved = {field.name: getattr(self, field.name).to(device) for field in fields(self)}
        return Batch(**moved | {name: moved[name].to(dtype) for name in ("inputs", "hidden")})


_FEATURES = ("inputs", "hidden", "logsumexp", "best")


def compute(model: Any, shards: Sequence[Path]) -> None:
    """Write the features of those shards that have none yet.

    Raises:
        ValueError: a model with too few layers, or whose logits are not its output head's alone.
    """
    missing = [path for path in shards if not _features_of(path).exists()]
    if missing:
        _check(model, corpus.read_shard(missing[0])[0].tokens)
    with fast_layers(model):
        for path in track(missing, "features"):
            _write_features(model, path)


def _write_features(model: Any, path: Path) -> None:
    conversations = corpus.read_shard(path)
    rows: list[dict[str, Tensor]] = [{} for _ in conversations]
    for indices in batches([len(c.tokens) for c in conversations]):
        computed = _forward(model, [conversations[i].tokens for i in indices])
        for row, i in enumerate(indices):
            length = len(conversations[i].tokens)
            rows[i] = {name: values[row, :length] for name, values in computed.items()}
    partial = path.with_suffix(".partial")
    save_file({name: torch.cat([row[name] for row in rows]) for name in _FEATURES}, partial)
    partial.rename(_features_of(path))


@torch.no_grad()
def _forward(model: Any, rows: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    tokens = _pad([torch.tensor(row) for row in rows]).to(model.device)
    # Padding comes last: no other token sees it.
    out = model.get_decoder()(input_ids=tokens, output_hidden_states=True, use_cache=False)
    states, last = out.hidden_states, out.last_hidden_state
    inputs = torch.stack([states[i] for i in eagle3_layers(len(states) - 1)], 2)
    logsumexp, best = [], []
    for row in last:
        logits = model.get_output_embeddings()(row)
        logprobs, tokens = topk_logprobs(logits, 1)
        logsumexp.append((logits.gather(1, tokens).float() - logprobs)[:, 0])
        best.append(tokens[:, 0].int())
    computed = (inputs, last, torch.stack(logsumexp), torch.stack(best))
    return {name: values.cpu() for name, values in zip(_FEATURES, computed, strict=True)}


@torch.no_grad()
def _check(model: Any, tokens: Sequence[int]) -> None:
    name, num_layers = type(model).__name__, model.config.num_hidden_layers
    if num_layers < 3:
        raise ValueError(f"{name}: must have at least 3 layers to take features from, {num_layers}")
    ids = torch.tensor([tokens], device=model.device)
    own = model.get_output_embeddings()(model.get_decoder()(input_ids=ids, use_cache=False)[0])
    logits = model(input_ids=ids, use_cache=False).logits
    if float((own - logits).abs().max()) > 0.05 * float(own.abs().max()):
        raise ValueError(f"{name}: scales or caps the logits of its head, which drafters learn by")


class Examples:
    """The conversations of a folder with their features.

    Args:
        folder: of the corpus.
        excluded: token sequences that must not be learned.

    Attributes:
        learned, held_out: indices of the conversations that are learned, and of the others.
        dtype: of the hidden states on disk.
        num_dropped: conversations that were copies, or had to do with excluded sequences.

    Raises:
        ValueError: too few conversations to hold one out.
    """

    def __init__(self, folder: Path, excluded: Sequence[Sequence[int]] = ()) -> None:
        self._files: list[Any] = []
        places: list[tuple[int, int]] = []  # (file, first row)
        conversations = []
        for number, path in enumerate(corpus.shards(folder)):
            self._files.append(safe_open(_features_of(path), framework="pt"))
            first = 0
            for conversation in corpus.read_shard(path):
                places.append((number, first))
                conversations.append(conversation)
                first += len(conversation.tokens)
        kept = corpus.distinct(conversations, excluded)
        self.dtype: torch.dtype = self._files[0].get_slice("hidden")[:1].dtype
        self.conversations = [conversations[i] for i in kept]
        self._places = [places[i] for i in kept]
        self._num_shared = _num_shared([c.tokens for c in self.conversations])
        self.num_dropped = len(conversations) - len(kept)
        if len(kept) < 2:
            raise ValueError(f"{folder}: must hold 2 conversations at least, found {len(kept)}")
        self.learned = [i for i in range(len(kept)) if i % HELD_OUT]
        self.held_out = [i for i in range(len(kept)) if i % HELD_OUT == 0]

    @property
    def num_tokens(self) -> int:
        """Of the conversations that are learned, prompts included."""
        return sum(len(self.conversations[i].tokens) for i in self.learned)

    def frequent_tokens(self, count: int, vocab_size: int) -> Tensor:
        """[U] int64 sorted, at most `count` tokens, the most frequent ones of the answers."""
        counts = torch.zeros(vocab_size, dtype=torch.int64)
        for i in self.learned:
            conversation = self.conversations[i]
            answer = torch.tensor(conversation.tokens[conversation.num_prompt :], dtype=torch.int64)
            counts += torch.bincount(answer, minlength=vocab_size)
        return counts.argsort(descending=True, stable=True)[:count].sort().values

    def epoch(self, indices: Sequence[int], seed: int, *, skip: int = 0) -> Iterator[Batch]:
        """Batches of these conversations, each once, in an order that the seed tells; the first
        `skip` ones are left out.
        """
        dice = random.Random(seed)
        shuffled = list(indices)
        dice.shuffle(shuffled)  # conversations of one length meet others in each epoch
        groups = batches([len(self.conversations[i].tokens) for i in shuffled])
        dice.shuffle(groups)
        for group in groups[skip:]:
            yield self._batch([shuffled[i] for i in group])

    def num_steps(self, indices: Sequence[int]) -> int:
        """Batches of an epoch."""
        return len(batches([len(self.conversations[i].tokens) for i in indices]))

    def _batch(self, indices: Sequence[int]) -> Batch:
        rows = [self.conversations[i] for i in indices]
        features = [self._features(i) for i in indices]
        tokens = [torch.tensor(row.tokens) for row in rows]
        answers = [torch.arange(len(row.tokens)) >= row.num_prompt for row in rows]
        return Batch(
            tokens=_pad(tokens),
            is_learned=_pad([torch.arange(len(row)) >= self._num_shared for row in tokens]),
            is_answer=_pad(answers),
            **{name: _pad([f[name] for f in features]) for name in _FEATURES},
        )

    def _features(self, index: int) -> dict[str, Tensor]:
        number, first = self._places[index]
        rows = slice(first, first + len(self.conversations[index].tokens))
        return {name: self._files[number].get_slice(name)[rows] for name in _FEATURES}


def batches(lengths: Sequence[int]) -> list[list[int]]:
    """Groups of similar lengths, of at most `TOKENS_PER_BATCH` tokens with their padding."""
    groups: list[list[int]] = [[]]
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if (len(groups[-1]) + 1) * lengths[i] > TOKENS_PER_BATCH and groups[-1]:
            groups.append([])
        groups[-1].append(i)
    return groups


def _num_shared(rows: Sequence[list[int]]) -> int:
    """How many tokens all begin with."""
    pairs = zip(min(rows), max(rows), strict=False)  # what these share the ones between do, too
    return len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)))


def _features_of(shard: Path) -> Path:
    return shard.with_name(shard.name.replace("shard", "features"))


def _pad(rows: Sequence[Tensor]) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
