"""Conversations that the target wrote alone: it opens the user's turn itself, then answers.

A shard holds the conversations of one batch. Shards are made in order, each from its own seeds and
the shards before it, so an interrupted run goes on where it stopped and gives the same corpus.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from safetensors.torch import load_file, save_file

from specdec_kernels.hf import SpeculativeDecoder
from specdec_kernels.hf.text import TextModel

BATCH = 64
MAX_PROMPT, MAX_ANSWER, MAX_DOCUMENT = 96, 128, 640
"""Most tokens that the target writes in a turn; most of the earlier answers that it is given."""
CYCLE = 6
"""One shard in so many quotes earlier ones: long to compute, and most of it was there before."""
NGRAM = 13
"""Tokens in a row that a conversation shares with another text only if it quotes it."""

OPENERS = (
    "", "", "", "What", "How", "Who", "Where", "When", "Why", "Is", "Write", "Explain", "Give",
    "Describe", "List", "Imagine", "Compare", "Create", "Suggest", "Help me", "Calculate",
    "A farmer", "A shop sells", "If a train", "Anna has", "Write a Python function", "Write a C++",
    "Rewrite the following", "Classify", "Translate", "Read the following", "{}", "{}", "{} {}",
    "What is {}", "Who was {}", "Where is {}", "When did {}", "Tell me about {}", "{} has",
    "If {} buys", "Write about {} and {}", "The {}", "In {}", "Question: {}", "Passage: {}",
    "Summarize: {}", "Summarize: The {}", "Summarize: {} and {}", "Translate German to English: {}",
    "Translate German to English: Die {}", "Translate German to English: Der {}",
)  # fmt: skip
"""How some user turns begin; the target goes on. {} is any word among its tokens: what the target
writes of its own accord is about few things.
"""
_SHORTEST_WORD = 3


@dataclass(frozen=True, slots=True)
class Conversation:
    """Attributes:
    tokens: the template's included, the end of the answer too if it came in time.
    num_prompt: how many of them come before the answer.
    """

    tokens: list[int]
    num_prompt: int


class Writer:
    """Writes shards.

    Args:
        target: writes both turns.
        folder: of the shards.

    Raises:
        ValueError: no chat template, or one that does not quote the user.
    """

    def __init__(self, target: TextModel, folder: Path) -> None:
        self.target = target
        self.folder = folder
        if target.tokenizer.chat_template is None:
            raise ValueError(f"{target.name} has no chat template, so it cannot write both turns")
        mark = "<mark>"
        chat = [{"role": "user", "content": mark}]
        template = str(
            target.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        )
        self._before, found, self._after = template.partition(mark)
        if not found:
            raise ValueError(f"{target.name}: its chat template leaves the user's turn out")
        texts = (str(target.tokenizer.decode([i])) for i in range(len(target.tokenizer)))
        words = {text.strip() for text in texts if text.startswith(" ")}
        self._words = sorted(w for w in words if w.isalpha() and len(w) >= _SHORTEST_WORD) or [""]

    def write(self, num_tokens: int, first: int = 0) -> list[Path]:
        """Add shards until those from number `first` on, without a gap, hold so many tokens.

        Processes that write far apart write different conversations, each by itself.

        Returns:
            those shards.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        earlier: list[Conversation] = []
        written: list[Path] = []
        count = 0
        with Progress() as progress:
            task = progress.add_task("tokens", total=num_tokens)
            for shard in itertools.count(first):
                if count >= num_tokens:
                    break
                path = self.folder / f"shard-{shard:05d}.safetensors"
                if not path.exists():
                    save_shard(self._shard(shard, earlier), path)
                written.append(path)
                earlier += read_shard(path)
                count = sum(len(c.tokens) for c in earlier)
                progress.update(task, completed=min(count, num_tokens))
        return written

    def _shard(self, shard: int, earlier: Sequence[Conversation]) -> list[Conversation]:
        """Every `CYCLE`th asks about earlier answers; half of all answers are greedy."""
        dice = random.Random(shard)
        if earlier and shard % CYCLE == CYCLE - 1:
            turns = [self._about(earlier, dice) for _ in range(BATCH)]
        else:
            openers = [self._opener(dice) for _ in range(BATCH)]
            starts = [self._before + opener for opener in openers]
            written = self._continue(starts, MAX_PROMPT, [1.0] * BATCH, shard)
            turns = [
                opener + self.target.decode(tokens)
                for opener, tokens in zip(openers, written, strict=True)
            ]
        prompts = [self._before + turn.strip() + self._after for turn in turns if turn.strip()]
        temperatures = [0.0 if dice.random() < 0.5 else 0.8 for _ in prompts]
        answers = self._continue(prompts, MAX_ANSWER, temperatures, shard)
        encoded = [self._encode(prompt) for prompt in prompts]
        return [
            Conversation(prompt + answer, len(prompt))
            for prompt, answer in zip(encoded, answers, strict=True)
        ]

    def _opener(self, dice: random.Random) -> str:
        """The first words of a user's turn."""
        form = dice.choice(OPENERS)
        return form.format(*(dice.choice(self._words) for _ in range(form.count("{}"))))

    def _about(self, earlier: Sequence[Conversation], dice: random.Random) -> str:
        """A user's turn that quotes one to four earlier answers and may ask what one answered."""
        chosen = dice.sample(earlier, dice.randint(1, 4))
        texts: list[str] = []
        for conversation in chosen:
            answer = conversation.tokens[conversation.num_prompt :]
            texts.append(self.target.decode(answer[: MAX_DOCUMENT // len(chosen)]).strip())
        quoted = "\n\n".join(texts)
        if dice.random() < 0.4:
            return f"Summarize: {quoted}"
        return f"{quoted}\n\n{self._question(dice.choice(chosen))}"

    def _question(self, conversation: Conversation) -> str:
        text = str(self.target.tokenizer.decode(conversation.tokens[: conversation.num_prompt]))
        turn = text[len(self._before) : len(text) - len(self._after)]
        return turn[-200:]

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self.target.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def _continue(
        self, texts: Sequence[str], most: int, temperatures: Sequence[float], seed: int
    ) -> list[list[int]]:
        """New tokens of each text, its end token included."""
        tokenizer: Any = self.target.tokenizer
        inputs = tokenizer(list(texts), return_tensors="pt", padding=True, add_special_tokens=False)
        decoder = SpeculativeDecoder(
            None,
            seed=[seed * BATCH + i for i in range(len(texts))],
            temperature=temperatures,
            top_p=[0.95] * len(texts),
        )
        model = self.target.model
        output = model.generate(
            **inputs.to(model.device), max_new_tokens=most, do_sample=True, custom_generate=decoder
        )
        end = model.generation_config.eos_token_id
        ends = {end} if isinstance(end, int) else set(end or ())
        return [_until(row, ends) for row in output[:, inputs["input_ids"].shape[1] :].tolist()]


def shards(folder: Path) -> list[Path]:
    """The shards of a folder, in order."""
    return sorted(folder.glob("shard-*.safetensors"))


def read(folder: Path) -> Iterator[Conversation]:
    """All conversations of a folder."""
    for path in shards(folder):
        yield from read_shard(path)


def read_shard(path: Path) -> list[Conversation]:
    """The conversations of one shard."""
    tensors = load_file(path)
    rows = tensors["tokens"].split(tensors["lengths"].tolist())
    prompts = tensors["num_prompt"].tolist()
    return [Conversation(row.tolist(), n) for row, n in zip(rows, prompts, strict=True)]


def distinct(
    conversations: Iterable[Conversation], excluded: Iterable[Sequence[int]] = ()
) -> list[int]:
    """Indices of those whose answer was not there before, and that share no `NGRAM` tokens in a row
    with an excluded text, nor hold a shorter one whole.
    """
    grams: dict[int, set[tuple[int, ...]]] = {}
    for text in excluded:
        if text:
            size = min(NGRAM, len(text))
            grams.setdefault(size, set()).update(_runs(text, size))
    seen: set[tuple[int, ...]] = set()
    kept = []
    for i, conversation in enumerate(conversations):
        tokens = conversation.tokens
        answer = tuple(tokens[conversation.num_prompt :])
        is_new = answer not in seen
        if is_new and all(known.isdisjoint(_runs(tokens, n)) for n, known in grams.items()):
            seen.add(answer)
            kept.append(i)
    return kept


def read_texts(paths: Iterable[Path], target: TextModel) -> list[list[int]]:
    """The tokens of the turns in files of JSON lines with `turns`, as Spec-Bench's."""
    lines = [line for path in paths for line in path.read_text("utf-8").splitlines() if line]
    turns = [turn for line in lines for turn in json.loads(line)["turns"]]
    encoded: list[list[int]] = [
        target.tokenizer(turn.strip(), add_special_tokens=False)["input_ids"] for turn in turns
    ]
    return encoded


def save_shard(conversations: Sequence[Conversation], path: Path) -> None:
    """Write a file for `read_shard`, whole or not at all."""
    partial = path.with_suffix(".partial")
    tensors = {
        "tokens": torch.tensor([t for c in conversations for t in c.tokens], dtype=torch.int32),
        "lengths": torch.tensor([len(c.tokens) for c in conversations]),
        "num_prompt": torch.tensor([c.num_prompt for c in conversations]),
    }
    save_file(tensors, partial)
    partial.rename(path)


def _runs(tokens: Sequence[int], size: int) -> set[tuple[int, ...]]:
    return {tuple(tokens[i : i + size]) for i in range(len(tokens) - size + 1)}


def _until(tokens: list[int], ends: set[int]) -> list[int]:
    """Up to the first end token, that included."""
    last = next((i for i, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[: last + 1]
