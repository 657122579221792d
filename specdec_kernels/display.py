"""Show tokens as text while they are being generated."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich.console import Console

ACCEPTED_STYLE = "bold green"
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
    """A listener for `SpeculativeDecoder`: writes the text, accepted draft tokens in a colour.

    Plain text where the console is not a terminal or wants no colour.

    Args:
        console: where to write.
        decode: the text of a list of tokens.
    """

    def __init__(self, console: Console, decode: Callable[[Sequence[int]], str]) -> None:
        self._console = console
        self._text = TokenText(decode)
        self._has_colour = console.is_terminal and not console.no_color

    def __call__(self, row: int, tokens: list[int], num_accepted: int) -> None:
        """Show the tokens of one step; see `decoding.Listener`."""
        self._write(self._text.push(tokens[:num_accepted]), is_accepted=True)
        self._write(self._text.push(tokens[num_accepted:]), is_accepted=False)

    def end(self) -> None:
        """Show what was held back, and end the line."""
        self._write(self._text.finish() + "\n", is_accepted=False)

    def _write(self, text: str, *, is_accepted: bool) -> None:
        if not text:
            return
        if self._console.is_terminal:
            text = text.translate(_TERMINAL_CONTROLS)
        style = ACCEPTED_STYLE if is_accepted and self._has_colour else None
        self._console.out(text, style=style, highlight=False, end="")
