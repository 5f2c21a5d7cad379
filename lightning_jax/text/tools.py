"""Tool calls as models write them: reading them out of a reply, and writing them for templates that cannot.

| family | a call in the reply's text | models |
|---|---|---|
| hermes | `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, or a list of them | Qwen, SmolLM2, builtin:tiny |
| llama3 | the whole reply is `{"name": ..., "parameters": {...}}`, several joined by `;` | Llama 3.1 and later |
| mistral | `[TOOL_CALLS]` and a list of `{"name": ..., "arguments": {...}}` | Mistral |
"""

from __future__ import annotations

import base64
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

_BLOCK = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)


def family_of(tokenizer: Tokenizer) -> Family:
    """How this model writes tool calls, judged by its chat template."""
    template = tokenizer.chat_template or ""
    if "<tool_call>" in template:
        return "hermes"
    if "[TOOL_CALLS]" in template:
        return "mistral"
    if "<|python_tag|>" in template or "ipython" in template:
        return "llama3"
    return "hermes"  # what `without_tool_support` asks for


def parse_reply(text: str, family: Family, call_key: str = "") -> tuple[str, list[dict]]:
    """Splits a sampled reply into its text and its tool calls.

    Args:
        text: the decoded reply, tool markers included.
        family: see `family_of`.
        call_key: makes the calls' ids unique, for example attempt and call number: ids are a hash of it, the call's
            position and the text, so that the same sample always gets the same ids. Nine letters and digits, the
            only form that Mistral's templates accept.

    Returns:
        The content and the calls in OpenAI's form, `arguments` as JSON text. What is no well-formed call stays in the
        content; with no calls the content is `text` unchanged.
    """
    if family == "llama3":
        content, found = _parse_llama3(text)
    elif family == "mistral":
        content, found = _parse_mistral(text)
    else:
        content, found = _parse_hermes(text)
    calls = []
    for position, (name, arguments) in enumerate(found):
        digest = hashlib.blake2b(f"{call_key}\0{position}\0{text}".encode(), digest_size=15).digest()
        call_id = base64.b32encode(digest).decode("ascii")[:9].lower()
        calls.append({"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}})
    return (content.strip() if calls else text), calls


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


def _parse_hermes(text: str) -> tuple[str, list[tuple[str, str]]]:
    found: list[tuple[str, str]] = []

    def take(match: re.Match) -> str:
        value = _load(match[1].strip())
        calls = [_as_call(item) for item in (value if isinstance(value, list) else [value])]
        if not calls or None in calls:
            return match[0]
        found.extend(calls)
        return ""

    return _BLOCK.sub(take, text), found


def _parse_llama3(text: str) -> tuple[str, list[tuple[str, str]]]:
    rest = text.strip().removeprefix("<|python_tag|>").strip()
    found = []
    while rest:
        if not rest.startswith("{"):
            return text, []
        try:
            value, end = _DECODER.raw_decode(rest)
        except (ValueError, RecursionError):
            return text, []
        call = _as_call(value)
        if call is None or not {"parameters", "arguments"} & value.keys():
            return text, []
        found.append(call)
        rest = rest[end:].lstrip().removeprefix(";").lstrip()
    return ("" if found else text), found


def _parse_mistral(text: str) -> tuple[str, list[tuple[str, str]]]:
    content, marker, body = text.partition("[TOOL_CALLS]")
    value = _load(body.strip()) if marker else None
    calls = [_as_call(item) for item in value] if isinstance(value, list) else []
    return (text, []) if not calls or None in calls else (content, calls)


def _as_call(value: Any) -> tuple[str, str] | None:
    """The name and the JSON text of the arguments, or None when `value` is not a call."""
    if not isinstance(value, dict):
        return None
    name, arguments = value.get("name"), value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, str):  # some models write the arguments as JSON inside a string
        arguments = _load(arguments)
    if not isinstance(name, str) or not name or not isinstance(arguments, dict):
        return None
    written = json.dumps(arguments, ensure_ascii=False)
    try:
        (name + written).encode("utf-8")
    except UnicodeEncodeError:  # half of a surrogate pair, which no reply could carry
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
