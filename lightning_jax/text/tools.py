"""Tool calls as models write them: reading them out of a reply, and writing them for templates that cannot.

| family | a call in the reply's text | models |
|---|---|---|
| hermes | `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, or a list of them | Qwen, SmolLM2, builtin:tiny |
| llama3 | the whole reply is `{"name": ..., "parameters": {...}}`, several joined by `;` | Llama 3.1 and later |
| mistral | `[TOOL_CALLS]` and a list of `{"name": ..., "arguments": {...}}` | Mistral |
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from lightning_jax.text.tokenizer import Tokenizer

Family = Literal["hermes", "llama3", "mistral"]

# Tokens that mark calls. Some vocabularies flag them as special; a reply's text must keep them all the same.
TOOL_MARKERS = frozenset({"<tool_call>", "</tool_call>", "<|python_tag|>", "[TOOL_CALLS]"})

_BLOCK = re.compile(r"<tool_call>.*?</tool_call>", re.DOTALL)
# The same where the end is not in a string of its JSON. It is looked for so many characters behind the first end: long
# replies are seen again and again.
_JSON_BLOCK = re.compile(
    r'<tool_call>((?:[^"<]++|<(?!/tool_call>)|"[^"\\]*+(?:\\.[^"\\]*+)*+")*+)</tool_call>', re.DOTALL
)
_FARTHEST_END = 1 << 15


def family_of(tokenizer: Tokenizer) -> Family:
    """How this model writes tool calls, judged by its chat template."""
    template = tokenizer.tool_template or ""
    if "<tool_call>" in template:
        return "hermes"
    if "[TOOL_CALLS]" in template:
        return "mistral"
    if "<|python_tag|>" in template or "ipython" in template:
        return "llama3"
    return "hermes"  # what `without_tool_support` asks for


@dataclasses.dataclass(frozen=True)
class CallPiece:
    """What is new of a tool call.

    Attributes:
        begun: the call's id and name, in its first piece.
        arguments: what its arguments' JSON text goes on with.
        complete: there is no more of it.
    """

    begun: tuple[str, str] | None
    arguments: str
    complete: bool


def parse_reply(text: str, family: Family, call_key: str = "") -> tuple[str, list[dict]]:
    """Splits a sampled reply into its text and its tool calls: `ReplyParser` for a reply that is there as a whole."""
    parser = ReplyParser(family, call_key)
    parser.push(text)
    parser.finish()
    return parser.content, parser.calls


class ReplyParser:
    """Splits a reply into its text and its tool calls as it arrives.

    However the reply is cut into pieces, the sum of what `push` and `finish` return is the same. A call is returned
    once it is complete: until then it may turn out malformed, and what is no well-formed call stays in the text. White
    space before and after calls is dropped; with no calls the content is the reply unchanged.

    Args:
        family: see `family_of`.
        call_key: makes the calls' ids unique, for example attempt and call number: ids are a hash of it, the call's
            position and its name, so that the same sample always gets the same ids. Nine letters and digits, the only
            form that Mistral's templates accept.

    Attributes:
        content: the text so far.
        calls: the calls so far in OpenAI's form, `arguments` as JSON text.
        call_spans: where they stand in the reply, as (start, end); what is beside them begins with the content.
    """

    def __init__(self, family: Family, call_key: str = ""):
        self.content = ""
        self.calls: list[dict] = []
        self.call_spans: list[tuple[int, int]] = []
        self._split = {"hermes": _split_hermes, "llama3": _split_llama3, "mistral": _split_mistral}[family]
        self._call_key = call_key
        self._position = 0  # of the rest in the reply
        self._rest = ""  # not known yet to be text or a call
        self._space = ""  # at the end of the text so far
        self._is_text = False  # so will be all that follows

    def push(self, text: str) -> tuple[str, list[dict]]:
        """Takes the next piece of the reply; returns the text and the calls that are certain with it."""
        return self._take(text, final=False)

    def finish(self) -> tuple[str, list[dict]]:
        """Returns what is left when the reply is over."""
        text, calls = self._take("", final=True)
        if not self.calls:
            self.content += self._space
            text, self._space = text + self._space, ""
        return text, calls

    def _take(self, text: str, final: bool) -> tuple[str, list[dict]]:
        if self._is_text:
            parts = [text]
        else:
            parts, self._rest, self._is_text = self._split(self._rest + text, final)
        shown, calls = "", []
        for part in parts:
            start = self._position
            if isinstance(part, str):
                shown += part
                self._position += len(part)
            else:
                found, length = part
                first = len(self.calls) + len(calls)
                calls += [_call(self._call_key, first + n, *call) for n, call in enumerate(found)]
                self._position += length
                self.call_spans.append((start, self._position))
        shown = self._space + shown
        kept = shown.rstrip()
        self._space = shown[len(kept) :]
        self.content += kept
        self.calls += calls
        return kept, calls


class PieceParser:
    """Splits a reply whose calls a grammar holds to their form (`guided.Guide.tool_call`), arguments in pieces.

    That a call is well-formed is certain from its beginning, so its arguments are given as they are sampled, in the
    model's own spelling. A reply that ends in the middle of a call leaves it incomplete. Arguments and attributes as
    for `ReplyParser`; the ids are the same as well.
    """

    def __init__(self, family: Literal["hermes", "llama3"], call_key: str = ""):
        self.content = ""
        self.calls: list[dict] = []
        self._family, self._call_key = family, call_key
        self._head, self._tail = _CALL_FORMS[family]
        self._rest = ""  # not known yet to be text or a call
        self._space = ""  # at the end of the text so far
        self._is_text = False  # so will be all that follows
        self._unread = ""  # what comes behind a call's arguments
        self._depth = 0  # of open brackets in a call's arguments; 0 is outside of them
        self._in_string = self._escaped = False

    def push(self, text: str) -> tuple[str, list[CallPiece]]:
        """Takes the next piece of the reply; returns the text and the pieces of calls that are new with it."""
        self._rest += text
        shown, pieces = "", []
        while True:
            if self._depth:
                piece = self._arguments()
                if piece.arguments:
                    pieces.append(piece)
            skipped = min(len(self._unread), len(self._rest)) if not self._depth else 0
            self._rest, self._unread = self._rest[skipped:], self._unread[skipped:]
            if self._depth or self._unread:
                break
            start = self._text_end()
            shown, self._rest = shown + self._rest[:start], self._rest[start:]
            head = self._head.match(self._rest)
            if self._is_text or head is None:
                break
            self._rest = self._rest[head.end() :]
            call = _call(self._call_key, len(self.calls), json.loads(head[1]), "{")
            self.calls.append(call)
            pieces.append(CallPiece((call["id"], call["function"]["name"]), "{", False))
            self._depth = 1
        return self._show(shown), pieces

    def finish(self) -> tuple[str, list[CallPiece]]:
        """Returns what is left when the reply is over."""
        rest, self._rest = self._rest, ""
        return self._show(rest, final=not self.calls), []

    def _text_end(self) -> int:
        """How much of the rest is text for certain."""
        if self._family == "hermes":
            return _marker_start(self._rest, "<tool_call>")
        begun = self._rest.lstrip()
        self._is_text |= not self.calls and bool(begun) and begun[0] != "{" and not _begins(begun, "<|python_tag|>")
        return len(self._rest) if self._is_text else 0

    def _arguments(self) -> CallPiece:
        """Takes as much of the rest as belongs to the arguments of the call in hand."""
        end = 0
        for character in self._rest:
            end += 1
            if self._escaped:
                self._escaped = False
            elif self._in_string:
                self._escaped, self._in_string = character == "\\", character != '"'
            else:
                self._in_string = character == '"'
                self._depth += (character in "{[") - (character in "}]")
                if not self._depth:
                    self._unread = self._tail
                    break
        written, self._rest = self._rest[:end], self._rest[end:]
        self.calls[-1]["function"]["arguments"] += written
        return CallPiece(None, written, not self._depth)

    def _show(self, text: str, final: bool = False) -> str:
        shown = self._space + text
        kept = shown if final else shown.rstrip()
        self._space = shown[len(kept) :]
        self.content += kept
        return kept


def _begins(text: str, marker: str) -> bool:
    """Whether the text begins with the marker, as far as it goes."""
    return text.startswith(marker) or marker.startswith(text)


def _call(key: str, position: int, name: str, arguments: str) -> dict:
    """A call in OpenAI's form, with the id that `ReplyParser` tells of."""
    digest = hashlib.blake2b(f"{key}\0{position}\0{name}".encode(), digest_size=15).digest()
    call_id = base64.b32encode(digest).decode("ascii")[:9].lower()
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


# What `guided` has a call begin with, up to its arguments' first bracket, and what ends it behind their last.
_NAME = r'\{"name": ("(?:[^"\\]|\\.)*"), '
_CALL_FORMS = {
    "hermes": (re.compile(rf'<tool_call>\n{_NAME}"arguments": \{{'), "}\n</tool_call>"),
    "llama3": (re.compile(rf'(?:<\|python_tag\|>|; ?)?{_NAME}"parameters": \{{'), "}"),
}


def without_tool_support(messages: Sequence[dict], tools: Sequence[dict] | None) -> list[dict]:
    """Rewrites messages for a chat template that knows no tools: all of it becomes text, in the Hermes form.

    The tools go into the system message, calls into the assistant's content, results into a user message.
    """
    rewritten: list[dict] = []
    previous_role = None
    for message in messages:
        role, content = message["role"], message["content"]
        if role == "tool":
            content = f"<tool_response>\n{content}\n</tool_response>"
            if previous_role == "tool":  # several results are one turn
                rewritten[-1] = {"role": "user", "content": rewritten[-1]["content"] + "\n" + content}
            else:
                rewritten.append({"role": "user", "content": content})
        elif message.get("tool_calls"):
            written = [f"<tool_call>\n{_call_text(call)}\n</tool_call>" for call in message["tool_calls"]]
            rewritten.append({"role": role, "content": "\n".join(([content] if content else []) + written)})
        else:
            rewritten.append(message)
        previous_role = role
    if not tools:
        return rewritten
    system = _tools_text(tools)
    if rewritten and rewritten[0]["role"] == "system":
        return [{"role": "system", "content": rewritten[0]["content"] + "\n\n" + system}, *rewritten[1:]]
    return [{"role": "system", "content": system}, *rewritten]


def _tools_text(tools: Sequence[dict]) -> str:
    functions = "\n".join(json.dumps(tool.get("function", tool), ensure_ascii=False) for tool in tools)
    return (
        f"You can call these functions, given as one JSON object a line:\n<tools>\n{functions}\n</tools>\n"
        "To call one, write a JSON object with its name and arguments between these tags:\n"
        '<tool_call>\n{"name": "FUNCTION", "arguments": {"ARGUMENT": "VALUE"}}\n</tool_call>'
    )


def _call_text(call: dict) -> str:
    name = json.dumps(call["function"]["name"], ensure_ascii=False)
    return f'{{"name": {name}, "arguments": {call["function"]["arguments"] or "{}"}}}'


# The splitters below take what is not yet split, and whether it is all. They return the parts that are certain, each a
# text or a list of calls and the length of what they are written as; what must be seen again with more behind it; and
# whether all that follows is text.
_Parts = list[str | tuple[list[tuple[str, str]], int]]


def _split_hermes(text: str, final: bool) -> tuple[_Parts, str, bool]:
    parts: _Parts = []
    position = 0
    while block := _BLOCK.search(text, position):
        farthest = block.end() + _FARTHEST_END
        whole = _JSON_BLOCK.match(text, block.start(), farthest)
        if whole is None and not final and len(text) < farthest:
            break  # its end is in a string so far
        value = _load(whole[1].strip()) if whole else None
        calls = [_as_call(item) for item in (value if isinstance(value, list) else [value])]
        is_text = not calls or None in calls
        parts += [text[position : block.start()], block[0] if is_text else (calls, whole.end() - block.start())]
        position = block.end() if is_text else whole.end()
    rest = text[position:]
    start = len(rest) if final else _marker_start(rest, "<tool_call>")
    return [*parts, rest[:start]], rest[start:], False


def _split_llama3(text: str, final: bool) -> tuple[_Parts, str, bool]:
    rest = text.strip()
    python_tag = "<|python_tag|>"
    if final:
        calls = _llama3_calls(rest)
        return [(calls, len(text)) if calls else text], "", True
    if not rest or python_tag.startswith(rest):
        return [], text, False
    rest = rest.removeprefix(python_tag).lstrip()
    if rest and not rest.startswith("{"):
        return [text], "", True
    return [], text, False  # what follows the last call decides


def _llama3_calls(text: str) -> list[tuple[str, str]]:
    rest = text.removeprefix("<|python_tag|>").strip()
    found = []
    while rest:
        if not rest.startswith("{"):
            return []
        try:
            value, end = _DECODER.raw_decode(rest)
        except (ValueError, RecursionError):
            return []
        call = _as_call(value)
        if call is None or not {"parameters", "arguments"} & value.keys():
            return []
        found.append(call)
        rest = rest[end:].lstrip().removeprefix(";").lstrip()
    return found


def _split_mistral(text: str, final: bool) -> tuple[_Parts, str, bool]:
    start = _marker_start(text, "[TOOL_CALLS]")
    if not final:
        return [text[:start]], text[start:], False
    content, marker, body = text.partition("[TOOL_CALLS]")
    value = _load(body.strip()) if marker else None
    calls = [_as_call(item) for item in value] if isinstance(value, list) else []
    is_text = not calls or None in calls
    return ([text] if is_text else [content, (calls, len(text) - len(content))]), "", True


def _marker_start(text: str, marker: str) -> int:
    """Where the marker begins in the text, or may begin with what comes next; the text's length where it does not."""
    found = text.find(marker)
    if found >= 0:
        return found
    return next(
        (i for i in range(max(0, len(text) - len(marker) + 1), len(text)) if marker.startswith(text[i:])), len(text)
    )


def _as_call(value: Any) -> tuple[str, str] | None:
    """The name and the JSON text of the arguments, or None when `value` is not a call."""
    if not isinstance(value, dict):
        return None
    name, arguments = value.get("name"), value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, str):  # some models write the arguments as JSON inside a string
        arguments = _load(arguments)
    if not isinstance(name, str) or not name or not isinstance(arguments, dict):
        return None
    try:
        written = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
        (name + written).encode("utf-8")
    except (ValueError, RecursionError):  # no reply could carry 1e999, nor half of a surrogate pair
        return None
    return name, written


def _load(text: str) -> Any:
    try:
        return _DECODER.decode(text)
    except (ValueError, RecursionError):
        return None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)  # NaN and Infinity could not be sent on
