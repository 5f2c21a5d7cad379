"""Sampled ids to what the agent sees of them, in one piece or in many."""

import collections
from collections.abc import Collection, Sequence

from lightning_jax.text import tools
from lightning_jax.text.tokenizer import StreamDecoder, Tokenizer


class ReplyText:
    """The text and the tool calls of one sample, as its ids arrive.

    Never half a character, nothing of a stop string, and no text that may yet become a tool call. However the ids are
    cut into pieces, the sum of what `push` and `finish` return is the same.

    Args:
        end_ids: ids that end a turn; the last id of a sample that stopped is no text if it is one of them.
        stop: the stop strings.
        parser: takes tool calls out of the text; None leaves them there.
        continues: the text goes on from another, see `Tokenizer.decode`.
        min_tokens: see `StopStrings`.
        with_positions: fill in `content_positions`, which takes time.

    Attributes:
        content: the text so far.
        content_positions: of the ids that it came of, which those of a tool call are not.
        tool_calls: the calls so far, in OpenAI's form.
        num_text_tokens: how many of the ids so far are text.
        stop_string: the stop string that ended it, if one did.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        end_ids: Collection[int],
        stop: Sequence[str] = (),
        parser: tools.ReplyParser | tools.PieceParser | None = None,
        *,
        continues: bool = False,
        min_tokens: int = 0,
        with_positions: bool = False,
    ):
        self.content = ""
        self.content_positions: list[int] = []
        self.num_text_tokens = 0
        self.stop_string: str | None = None
        self._tokenizer = tokenizer
        self._decoder = StreamDecoder(tokenizer, skip_special=True, continues=continues)
        self._end_ids = end_ids
        self._stop = stop
        self._min_tokens = min_tokens
        self._parser = parser
        self._with_positions = with_positions
        self._length = 0  # of the decoded text, calls included
        self._unplaced: collections.deque[tuple[int, int, int]] = collections.deque()  # (position, its text's span)
        self._end: list[int] = []  # an end-of-turn id that may be the last id
        self._newest: Sequence[int] = ()  # the last id that is text
        self._held = ""  # text that may be the beginning of a stop string
        self._early = 0  # how much of the held text and the next is of the first `min_tokens` ids

    @property
    def tool_calls(self) -> list[dict]:
        return [] if self._parser is None else self._parser.calls

    def push(self, ids: Sequence[int]) -> tuple[str, list[tools.CallPiece]]:
        """Takes the next ids; returns the text and the pieces of calls that are certain with them."""
        ids = [*self._end, *ids]
        self._end = ids[-1:] if ids and ids[-1] in self._end_ids else []
        return self._show(self._decode(ids[: len(ids) - len(self._end)]), final=False)

    def finish(self, finish_reason: str) -> tuple[str, list[tools.CallPiece]]:
        """Returns what is left when the sample is over."""
        text = "" if finish_reason == "stop" else self._decode(self._end)
        shown = self._show(text + self._decoder.flush(), final=True)
        if finish_reason == "stop" and self.stop_string is None and not self._end:
            self.stop_string = _hidden_stop(self._tokenizer, self._newest, self._stop)
        return shown

    def _decode(self, ids: Sequence[int]) -> str:
        self._newest = ids[-1:] or self._newest
        if not self._with_positions and self.num_text_tokens >= self._min_tokens:
            self.num_text_tokens += len(ids)
            return self._decoder.push(ids)
        pieces = []
        for index in ids:
            pieces.append(self._decoder.push([index]))
            start, self._length = self._length, self._length + len(pieces[-1])
            self._unplaced.append((self.num_text_tokens, start, self._length))
            self.num_text_tokens += 1
            if self.num_text_tokens <= self._min_tokens:
                self._early += len(pieces[-1])
        return "".join(pieces)

    def _show(self, text: str, final: bool) -> tuple[str, list[tools.CallPiece]]:
        if self._stop:
            text = self._before_stop(text, final)
        calls: list[dict | tools.CallPiece] = []
        if self._parser is not None:
            text, calls = self._parser.push(text)
            if final:
                more_text, more_calls = self._parser.finish()
                text, calls = text + more_text, calls + more_calls
        self.content += text
        if self._with_positions:
            self._place(final)
        return text, [call if isinstance(call, tools.CallPiece) else _whole(call) for call in calls]

    def _place(self, final: bool) -> None:
        """Takes in which ids the content came of, as far as that is certain."""
        spans = self._parser.call_spans if isinstance(self._parser, tools.ReplyParser) else []  # else calls come last
        end = len(self.content)
        for start, stop in spans:
            if start < end:
                end += stop - start
        if final and not self.tool_calls:
            end = self._length + 1  # the last ids may have no text
        while self._unplaced:
            position, first, last = self._unplaced[0]
            in_call = any(start <= first < stop and last <= stop for start, stop in spans)
            if not in_call and first >= end:
                break
            self._unplaced.popleft()
            if not in_call:
                self.content_positions.append(position)

    def _before_stop(self, text: str, final: bool) -> str:
        if self.stop_string is not None:
            return ""
        text, self.stop_string = cut_at_stop(self._held + text, self._stop, self._early)
        held = 0 if final or self.stop_string is not None else _possible_stop(text, self._stop)
        shown = text[: len(text) - held]
        self._held = text[len(shown) :]
        self._early = max(0, self._early - len(shown))
        return shown


class StopStrings:
    """Tells, as ids are sampled, when the text that the agent sees of them first holds one of the stop strings.

    A special token is no part of that text, but ends the sample where its own spelling holds one. As in vLLM, a string
    that is complete with the first `min_tokens` ids stops nothing.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str], *, continues: bool = False, min_tokens: int = 0):
        self._tokenizer = tokenizer
        self._decoder = StreamDecoder(tokenizer, skip_special=True, continues=continues)
        self._stop = stop
        self._min_tokens = min_tokens
        self._seen = 0
        self._tail = ""
        self._keep_chars = max(map(len, stop)) - 1

    def check(self, ids: Sequence[int]) -> int | None:
        """How many of `ids` to keep once a stop string is complete; None before. Called with ever longer `ids`."""
        while self._seen < len(ids):
            new = ids[self._seen : self._seen + 1]
            text, before = self._decoder.push(new), len(self._tail)
            self._tail += text
            self._seen += 1
            if self._seen > self._min_tokens:
                if cut_at_stop(self._tail, self._stop, before)[1] is not None:
                    return self._seen
                if not text and _hidden_stop(self._tokenizer, new, self._stop) is not None:
                    return self._seen
            self._tail = self._tail[max(0, len(self._tail) - self._keep_chars) :]
        return None


def cut_at_stop(text: str, stop: Sequence[str], early: int = 0) -> tuple[str, str | None]:
    """`text` up to the first stop string in it, and that string; the longest where several begin at one place.

    One that ends within the first `early` characters is none.
    """
    found = [
        (position, -len(candidate), candidate)
        for candidate in stop
        if (position := text.find(candidate, max(0, early + 1 - len(candidate)))) >= 0
    ]
    if not found:
        return text, None
    position, _, candidate = min(found)
    return text[:position], candidate


def _hidden_stop(tokenizer: Tokenizer, ids: Sequence[int], stop: Sequence[str]) -> str | None:
    """The stop string in the spelling of an id that the text leaves out; None of one that it shows."""
    if tokenizer.decode(ids, skip_special=True, continues=True):
        return None
    return cut_at_stop(tokenizer.decode(ids), stop)[1]


def _whole(call: dict) -> tools.CallPiece:
    function = call["function"]
    return tools.CallPiece((call["id"], function["name"]), function["arguments"], True)


def _possible_stop(text: str, stop: Sequence[str]) -> int:
    """How many characters at the end of `text` may be the beginning of a stop string."""
    longest = min(len(text), max(map(len, stop)) - 1)
    return next((n for n in range(longest, 0, -1) if any(s.startswith(text[-n:]) for s in stop)), 0)
