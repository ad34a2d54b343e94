"""Tokens to streamed text: never half a character, never a part of a stop string."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from hybrid.text.parts import overlap

_REPLACEMENT = "\ufffd"
_CHAR_TOKENS = 4  # a UTF-8 character has four bytes at most, so four tokens
_KEEP = 16  # tokens that surely hold every byte of three undecided characters
_WINDOW = 64
_STAND_IN = 0xD800  # the first of the lone surrogates, which no decoded text holds


class Decoder(Protocol):
    specials: Mapping[str, int]

    def decode(self, token_ids: Sequence[int]) -> str: ...


class StreamDecoder:
    """Decodes a growing list of tokens piece by piece; the pieces join to the text of the whole list.

    It decodes a window of the last tokens: those already given out, which the tokenizer needs to place
    spaces, and those whose text may still change because it ends within a character.

    before: the tokens that the list continues; their text and the pieces join to the text of all. whole: whether
    their text is whole characters; otherwise the pieces begin with the character that it ends within.
    """

    def __init__(self, decoder: Decoder, before: Sequence[int] = (), whole: bool = False) -> None:
        self._decoder = decoder
        self._special_ids = frozenset(decoder.specials.values())
        self._window = [token for token in before[-_WINDOW:] if token not in self._special_ids][-_KEEP:]
        self._settled = 0  # leading tokens of the window whose text was given out
        text = decoder.decode(self._window) if self._window else ""
        # Leading characters of the window's text that were given out.
        self._given = len(text) - (0 if whole else self._undecided(text))
        if self._given == len(text):
            self._settled = len(self._window)

    def push(self, token: int) -> str:
        """The text that is certain now and was not given out yet; often empty."""
        if token in self._special_ids:  # they have no text, and would only widen the window
            return ""
        self._window.append(token)
        text = self._decoder.decode(self._window)
        certain = len(text) - self._undecided(text)
        piece = text[self._given : certain]
        self._given += len(piece)
        if piece and certain == len(text):
            self._restart(self._settled, settled=len(self._window) - self._settled)
        elif len(self._window) > _WINDOW:
            self._restart(len(self._window) - _KEEP, settled=0)
        return piece

    def finish(self) -> str:
        """What was held back; an unfinished character becomes U+FFFD. The text may go on."""
        text = self._decoder.decode(self._window)
        piece = text[self._given :]
        if piece:  # tokens to come must not finish the character
            self._window, text = [], ""
        self._settled, self._given = len(self._window), len(text)
        return piece

    def _undecided(self, text: str) -> int:
        """How many last characters may change. Bytes that are no UTF-8 must not hold text for ever."""
        run = len(text) - len(text.rstrip(_REPLACEMENT))
        pending = len(self._window) - self._settled
        return run if pending <= _CHAR_TOKENS else min(run, _CHAR_TOKENS - 1)

    def _restart(self, start: int, settled: int) -> None:
        self._window, self._settled = self._window[start:], settled
        text = self._decoder.decode(self._window)
        self._given = len(text) - self._undecided(text)


class StopMatcher:
    """Passes text on up to the first stop string that completes; holds back what may still become one.

    Of two stop strings the one whose last character comes first counts, then the longer one: so the cut does
    not depend on how the text was split into pieces. A stand-in for a special token counts where a stop string has it,
    and is passed over by the others.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(stop)
        self._held = ""
        self.stopped = False

    def push(self, piece: str) -> str:
        """The text that can be passed on. Nothing after the stop string."""
        if self.stopped:
            return ""
        text, ends = self._held + piece, []
        certain = len(text)
        for stop in self._stop:
            view, places = _view(text, stop)
            found = view.find(stop)
            if found >= 0:
                ends.append((places[found + len(stop) - 1], -len(stop), places[found]))
            elif held := overlap(view, stop):
                certain = min(certain, places[len(view) - held])
        if ends:
            self.stopped, self._held = True, ""
            return text[: min(ends)[2]]
        self._held = text[certain:]
        return text[:certain]

    def finish(self) -> str:
        """The text that was held back and did not become a stop string."""
        held, self._held = self._held, ""
        return held


class TextStream:
    """Tokens in, text out: a StreamDecoder followed by a StopMatcher.

    A stop string may hold the text of special tokens, though the text that comes out has none but those in `shown`, as
    what that says.
    before, whole: as `StreamDecoder` has them.
    """

    def __init__(
        self,
        decoder: Decoder,
        stop: Sequence[str],
        before: Sequence[int] = (),
        whole: bool = False,
        shown: Mapping[str, str] = {},  # noqa: B006  it is only read
    ) -> None:
        self._decoder = StreamDecoder(decoder, before, whole)
        wanted = [text for text in decoder.specials if text and (text in shown or any(text in s for s in stop))]
        stand_ins = {text: chr(_STAND_IN + i) for i, text in enumerate(sorted(wanted, key=len, reverse=True))}
        self._stand_ins = {decoder.specials[text]: stand_in for text, stand_in in stand_ins.items()}
        self._texts = {ord(stand_in): shown.get(text, "") for text, stand_in in stand_ins.items()}
        self._matcher = StopMatcher([form for text in stop for form in _forms(text, stand_ins)])

    @property
    def stopped(self) -> bool:
        """Whether a stop string has completed."""
        return self._matcher.stopped

    def push(self, token: int) -> str:
        stand_in = self._stand_ins.get(token)
        return self._pass_on(self._decoder.finish() + stand_in if stand_in else self._decoder.push(token))

    def finish(self) -> str:
        return self._pass_on(self._decoder.finish()) + self._matcher.finish().translate(self._texts)

    def _pass_on(self, piece: str) -> str:
        return self._matcher.push(piece).translate(self._texts)


def _forms(stop: str, stand_ins: Mapping[str, str]) -> set[str]:
    """A stop string as plain text makes it, and as its special tokens do."""
    form = stop
    for text, stand_in in stand_ins.items():
        form = form.replace(text, stand_in)
    return {stop, form}


def _view(text: str, stop: str) -> tuple[str, Sequence[int]]:
    """What a stop string sees of a text, and the place of each of its characters."""
    passed_over = {c for c in text if _STAND_IN <= ord(c) < 0xE000} - {*stop}
    if not passed_over:
        return text, range(len(text))
    places = [place for place, character in enumerate(text) if character not in passed_over]
    return "".join(text[place] for place in places), places
