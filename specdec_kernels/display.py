"""Show tokens as text while they are being generated."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from rich.console import Console

from .statistics import DecodeStats

ACCEPTED_STYLE = "bold green"
_FEWEST_LINES = 4
"""A lower terminal shows no statistics."""
_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
# A model may write escape sequences; a terminal must not obey them.
_TERMINAL_CONTROLS = dict.fromkeys({*range(32), 127, *range(128, 160)} - {ord("\n"), ord("\t")})


class TokenText:
    """Turns tokens into text as they come; a character is held back until its last byte is there.

    Args:
        decode: the text of a list of tokens.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._tokens: list[int] = []
        # Tokens are decoded after a few earlier ones, as some tokenizers drop a leading space.
        self._window = 0
        self._shown = 0

    def push(self, tokens: Sequence[int]) -> str:
        """The text that these tokens complete; may be empty."""
        self._tokens += tokens
        text = self._unseen()
        if not text or text.endswith(_INCOMPLETE):
            return ""
        self._window, self._shown = self._shown, len(self._tokens)
        return text

    def finish(self) -> str:
        """What is still held back: bytes that never became a character."""
        text = self._unseen()
        self._window = self._shown = len(self._tokens)
        return text

    def _unseen(self) -> str:
        before = self._decode(self._tokens[self._window : self._shown])
        return self._decode(self._tokens[self._window :])[len(before) :]


class StreamingDisplay:
    """A listener for `SpeculativeDecoder`: writes the text, accepted draft tokens in a colour, and
    keeps the statistics so far on the last line of the terminal until its `with` block ends.

    Plain text where the console is not a terminal or wants no colour.

    Args:
        console: where to write.
        decode: the text of a list of tokens.
        stats: the statistics of the running call; None shows none.
    """

    def __init__(
        self,
        console: Console,
        decode: Callable[[Sequence[int]], str],
        stats: Callable[[], DecodeStats | None] = lambda: None,
    ) -> None:
        self._console = console
        self._text = TokenText(decode)
        self._has_colour = console.is_terminal and not console.no_color
        self._stats = stats
        self._lines = 0  # of the terminal, while its last one is kept
        self._start = time.perf_counter()

    def __call__(self, row: int, tokens: list[int], num_accepted: int) -> None:
        """Show the tokens of one step; see `decoding.Listener`."""
        self._write(self._text.push(tokens[:num_accepted]), is_accepted=True)
        self._write(self._text.push(tokens[num_accepted:]), is_accepted=False)
        stats = self._stats()
        if stats is not None and self._console.is_terminal:
            self._write_below(_status_line(stats, time.perf_counter() - self._start))

    def __enter__(self) -> StreamingDisplay:
        return self

    def __exit__(self, *_: object) -> None:
        """Show what was held back, end the line, and give the terminal's last line back."""
        self._write(self._text.finish() + "\n", is_accepted=False)
        if self._lines:
            self._control(f"\x1b7\x1b[r\x1b[{self._lines};1H\x1b[K\x1b8")
            self._lines = 0

    def _write(self, text: str, *, is_accepted: bool) -> None:
        if not text:
            return
        if self._console.is_terminal:
            text = text.translate(_TERMINAL_CONTROLS)
        style = ACCEPTED_STYLE if is_accepted and self._has_colour else None
        self._console.out(text, style=style, highlight=False, end="")

    def _write_below(self, line: str) -> None:
        """Show a line under the text. The text scrolls above it (DECSTBM), its cursor is kept."""
        width, lines = self._console.size
        if lines < _FEWEST_LINES:
            return
        if lines != self._lines:
            # First a line down and back up: on the last line, the text would be overwritten.
            room = "" if self._lines else "\x1bD\x1b[A"
            self._control(f"{room}\x1b7\x1b[1;{lines - 1}r\x1b8")
            self._lines = lines
        line = line[: width - 1]
        shown = f"\x1b[2m{line}\x1b[0m" if self._has_colour else line
        self._control(f"\x1b7\x1b[{lines};1H\x1b[K{shown}\x1b8")

    def _control(self, sequence: str) -> None:
        self._console.file.write(sequence)
        self._console.file.flush()


def _status_line(stats: DecodeStats, seconds: float) -> str:
    tokens, steps = sum(stats.num_tokens), sum(stats.num_steps)
    if not steps:
        return ""
    depths = " ".join(f"{share:.0%}" for share in stats.acceptance.by_depth()[:4])
    draft, forward, verify = (
        f"{total / steps * 1e3:.1f}"
        for total in (stats.draft_seconds, stats.forward_seconds, stats.verify_seconds)
    )
    return (
        f"{tokens} tokens, {tokens / seconds:.1f} tok/s, {tokens / steps:.2f} per step, "
        f"by depth {depths or '-'}; ms: {draft} draft, {forward} model, {verify} verify"
    )
