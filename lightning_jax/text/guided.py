"""Grammars: which tokens a reply may go on with, to become JSON of a schema, a tool call, or a text of another form.

A `Guide` belongs to one tokenizer and compiles `Grammar`s; a `Cursor` follows one reply through its grammar and gives a
mask of the vocabulary before each token. The llguidance library does the parsing, on bytes: a text may be cut into
tokens in any way, except where the grammar leaves no choice about it, which is cut as the tokenizer does it. Nothing
here knows how tokens are chosen.

JSON is written with little white space, see `_WHITE_SPACE`: a model that is unsure may otherwise write spaces until its
tokens are used up.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Sequence
from typing import Any

import llguidance
import numpy as np
from llguidance.gbnf_to_lark import any_to_lark

from lightning_jax.text.tokenizer import Tokenizer
from lightning_jax.text.tools import Family

# Between two parts of a JSON text: nothing, a space, or a new line and its indentation.
_WHITE_SPACE = r"( |\n[ \t]{0,32})?"
_KEPT_GRAMMARS = 64  # compiled, by each guide


class Grammar:
    """What a reply must look like. Never changes; any number of requests may share one."""

    def __init__(self, matcher: llguidance.LLMatcher, eos_ids: tuple[int, ...]):
        """`Guide` makes these; the matcher stands at the beginning and stays there."""
        self._matcher = matcher
        self._eos_ids = frozenset(eos_ids)

    def start(self) -> Cursor:
        """A cursor at the beginning of a reply."""
        return Cursor(self._matcher.deep_copy(), self._eos_ids)


class Cursor:
    """How far one reply has come in its grammar. For one thread at a time.

    Attributes:
        finished: the reply has ended with an end-of-sequence id; nothing may follow.
    """

    def __init__(self, matcher: llguidance.LLMatcher, eos_ids: frozenset[int]):
        self._matcher = matcher
        self._eos_ids = eos_ids
        self.finished = False

    def mask(self) -> np.ndarray:
        """[ceil(vocab_size / 32)] uint32; bit i % 32 of word i // 32 is set where token i may come next.

        An end-of-sequence id may come where the reply is complete, and only that where nothing can follow.

        Raises:
            ValueError: the grammar became too complex to follow, or wants a character that no token can spell.
        """
        mask = self._matcher.compute_bitmask()
        self._check()
        return np.frombuffer(mask, "<u4")

    def accept(self, token_id: int) -> None:
        """Moves past a token that the mask allowed.

        Raises:
            ValueError: the mask did not allow it.
        """
        if token_id in self._eos_ids:
            self.finished = True
        elif not self._matcher.consume_token(token_id):
            raise ValueError(f"the grammar does not allow token {token_id}: {_first_line(self._matcher.get_error())}")

    def _check(self) -> None:
        if self._matcher.is_error():
            raise ValueError(f"the grammar cannot be followed: {_first_line(self._matcher.get_error())}")


class Guide:
    """Compiles grammars for one tokenizer. Safe to use from several threads.

    Compiling takes a millisecond for a small schema and up to a second for a large one, the first grammar of all half a
    second for the vocabulary; an event loop should leave it to a thread. What was compiled lately is kept.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._compiled = functools.lru_cache(_KEPT_GRAMMARS)(self._compile)

    def json_schema(self, schema: dict | bool | str) -> Grammar:
        """JSON that is valid under a JSON schema (an object or its text), properties in the schema's order.

        Raises:
            ValueError: it is no schema, nothing is valid under it, or it uses a keyword that cannot be enforced.
        """
        return self._compiled(_lark(f"start: {_json(_load(schema))}"), "the JSON schema")

    def json_object(self) -> Grammar:
        """Any JSON object."""
        return self.json_schema({"type": "object"})

    def regex(self, pattern: str) -> Grammar:
        """A text that a regular expression matches as a whole (Rust's syntax, without look-around)."""
        return self._compiled(llguidance.LLMatcher.grammar_from_regex(pattern), "the regular expression")

    def choice(self, choices: Sequence[str]) -> Grammar:
        """One of several texts."""
        if not choices or not all(isinstance(choice, str) for choice in choices):
            raise ValueError("the choices must be at least one text")
        return self._compiled(_lark("start: " + " | ".join(map(_text, choices))), "the list of choices")

    def ebnf(self, grammar: str) -> Grammar:
        """A context-free grammar, as llama.cpp (GBNF) or llguidance (a dialect of Lark's) writes them."""
        try:
            lark = any_to_lark(grammar)
        except Exception as error:  # whatever its parser runs into
            raise ValueError(f"the grammar cannot be read: {_first_line(str(error))}") from None
        return self._compiled(lark, "the grammar")

    def tool_call(
        self,
        tools: Sequence[dict],
        family: Family,
        *,
        required: bool,
        parallel: bool = True,
        name: str | None = None,
        answer: dict | bool | str | None = None,
    ) -> Grammar:
        """Tool calls as the model's family writes them, with arguments that are valid under the tools' schemas.

        A tool that is not strict may have a schema with keywords that cannot be enforced; those are ignored.

        Args:
            tools: in OpenAI's form.
            family: how calls are written, see `tools.family_of`.
            required: the reply is a call from its first token on. Otherwise it is text, and calls after it.
            parallel: several calls may be made.
            name: of the only tool that may be called; None for any.
            answer: a JSON schema. Unless a call is required, the reply is either calls alone or JSON that is valid
                under it; None lets the text be anything.

        Raises:
            ValueError: there is no such tool, or the schema of a strict one cannot be enforced.
        """
        functions = [tool.get("function", tool) for tool in tools]
        functions = [function for function in functions if name in (None, function["name"])]
        if not functions:
            raise ValueError("there are no tools to call" if name is None else f"there is no tool named {name!r}")
        key = "parameters" if family == "llama3" else "arguments"
        rules = [f"call: {' | '.join(f'call_{i}' for i in range(len(functions)))}"]
        for i, function in enumerate(functions):
            head = f'{{"name": {json.dumps(function["name"], ensure_ascii=False)}, "{key}": '
            rules.append(f'call_{i}: {_text(head)} {self._arguments(function)} "}}"')
        if required or answer is None:
            rules += _CALLS[family](self._marker, required, parallel)
        else:
            only_calls = _CALLS[family](self._marker, True, parallel)
            rules += [rule.replace("start:", "made:", 1) if rule.startswith("start:") else rule for rule in only_calls]
            rules += ["start: answer | made", f"answer: {_json(_load(answer))}"]
        return self._compiled(_lark(*rules), "a tool's schema")

    def _marker(self, text: str) -> str:
        """What marks calls, as Lark writes it: a token where the vocabulary has one, else its letters."""
        ids = self._tokenizer.encode(text)
        return f"<[{ids[0]}]>" if len(ids) == 1 else _text(text)

    def _arguments(self, function: dict) -> str:
        """JSON under a tool's schema, as Lark writes it."""
        schema = {"type": "object", **(function.get("parameters") or {"properties": {}})}  # arguments are nothing else
        if function.get("strict"):
            return _json(schema)
        try:
            lenient = _json(schema, lenient=True)
            self._compiled(_lark(f"start: {lenient}"), "a tool's schema")
            return lenient
        except ValueError:
            return _json({"type": "object"})

    def _compile(self, grammar: str, what: str) -> Grammar:
        matcher = llguidance.LLMatcher(self._vocabulary, grammar, log_level=0)
        if matcher.is_error():
            raise ValueError(f"{what} cannot be enforced: {_first_line(matcher.get_error())}")
        return Grammar(matcher, self._tokenizer.eos_ids)

    @functools.cached_property
    def _vocabulary(self) -> llguidance.LLTokenizer:
        tokenizer = self._tokenizer
        if not tokenizer.eos_ids:
            raise ValueError("the tokenizer names no end-of-sequence token, so no reply could end as its grammar asks")
        return llguidance.LLTokenizer(
            _Vocabulary(tokenizer), n_vocab=tokenizer.vocab_size, eos_token=list(tokenizer.eos_ids)
        )


class _Vocabulary:
    """A tokenizer as llguidance wants it (`llguidance.TokenizerWrapper`)."""

    is_tokenizer_wrapper = True

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self.eos_token_id = tokenizer.eos_ids[0]
        self.bos_token_id = tokenizer.bos_id
        self.tokens = [tokenizer.token_bytes(index) for index in range(tokenizer.vocab_size)]
        self.special_token_ids = sorted(tokenizer.control_ids)

    def __call__(self, text: str) -> list[int]:
        """The ids that the model would most likely choose for a text that the grammar leaves no choice about."""
        ids = self._tokenizer.encode_after(-1, text)
        if self._tokenizer.control_ids.isdisjoint(ids):
            return ids
        return [index for character in text for index in self._tokenizer.encode_after(-1, character)]


# What `tools.parse_reply` reads, by family, as Lark rules that end in `call`.

_Marker = Callable[[str], str]


def _hermes(marker: _Marker, required: bool, parallel: bool) -> list[str]:
    first, last = marker("<tool_call>"), marker("</tool_call>")
    more = f'("\\n" {first} inner)*' if parallel else ""
    rules = [f"rest: inner {more}", f'inner: "\\n" call "\\n" {last}']
    return rules + ([f"start: {first} rest"] if required else _after_text("<tool_call>", first))


def _llama3(marker: _Marker, required: bool, parallel: bool) -> list[str]:
    more = "(/; ?/ call)*" if parallel else ""
    calls = f"calls: {marker('<|python_tag|>')}? call {more}"
    if required:
        return ["start: calls", calls]
    # A reply that begins like a call is read as one, so it must be one.
    return ["start: calls | TEXT?", calls, r"TEXT: /\s*([^\s{<]|<[^|])(.|\n)*/"]


def _mistral(marker: _Marker, required: bool, parallel: bool) -> list[str]:
    first = marker("[TOOL_CALLS]")
    more = '(", " call)*' if parallel else ""
    rules = [f'rest: / ?/ "[" call {more} "]"']
    return rules + ([f"start: {first} rest"] if required else _after_text("[TOOL_CALLS]", first))


def _after_text(text: str, marker: str) -> list[str]:
    """Rules for a reply of any text, in which the marker (its text, and as Lark writes it) is followed by `rest`."""
    free = rf"TEXT: /(.|\n)+/ & ~/(.|\n)*{re.escape(text)}(.|\n)*/"  # its letters would be read as the marker
    if marker == _text(text):  # no token tells where the text before it ends
        return ["start: TEXT? | before rest", free, rf"before[lazy]: /(.|\n)*/ {marker}"]
    return [f"start: TEXT? ({marker} rest)?", free]


_CALLS = {"hermes": _hermes, "llama3": _llama3, "mistral": _mistral}


def _lark(*rules: str) -> str:
    return "\n".join(["%llguidance {}", *rules, ""])


def _text(text: str) -> str:
    """A text as Lark writes it, which takes no control character as it is."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", r"\u007f")


def _json(schema: Any, *, lenient: bool = False) -> str:
    """JSON under a schema, as Lark writes it. Each has its own root, which `$ref`s refer to."""
    if not isinstance(schema, dict | bool):
        raise ValueError(f"a JSON schema is an object, not {type(schema).__name__}")
    if isinstance(schema, bool):
        schema = {} if schema else {"not": {}}
    schema = _corrected(schema, lenient)
    options = {"whitespace_pattern": _WHITE_SPACE, "lenient": lenient}
    return f"%json {json.dumps({**schema, 'x-guidance': options}, ensure_ascii=False)}"


# Keywords whose values are schemas by name, and those whose values are no schemas.
_NAMED = frozenset({"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"})
_VALUES = frozenset({"const", "enum", "default", "examples"})


def _corrected(schema: Any, lenient: bool) -> Any:
    """A schema, or a list of them, without what llguidance 1.9 gets wrong.

    Raises:
        ValueError: that cannot be done. Not raised if `lenient`.
    """
    if isinstance(schema, list):
        return [_corrected(item, lenient) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if not lenient:
        _check_bounds(schema)
    corrected = {}
    for key, value in schema.items():
        if key == "pattern" and isinstance(value, str):
            value = _without_nul(value)
        elif key in _NAMED and isinstance(value, dict):
            spell = _without_nul if key == "patternProperties" else str
            value = {spell(name): _corrected(child, lenient) for name, child in value.items()}
        elif key not in _VALUES:
            value = _corrected(value, lenient)
        corrected[key] = value
    return corrected


def _without_nul(pattern: str) -> str:
    """The pattern with NUL among what its negated classes exclude.

    llguidance lets a class that has all control characters match an escaped `"` and `\\`, though it excludes them.
    """

    def exclude(match: re.Match) -> str:
        if match["start"] is None:
            return match[0]
        literal = match["literal"]  # "]" and "-" stand for themselves only where a class begins
        return r"[^\x00" + ("\\" + literal if literal else "")

    return re.sub(r"\\.|(?P<start>\[\^)(?P<literal>[\]-]?)", exclude, pattern, flags=re.DOTALL)


def _check_bounds(schema: dict) -> None:
    """Raises ValueError where llguidance would let a number be the whole number that it must not be.

    That happens where the other bound is less than 1 away: 0 is then found to be above 0 and below 0.5.
    """
    kinds = schema.get("type", "number")
    if "number" not in (kinds if isinstance(kinds, list) else [kinds]):
        return
    for excluded, others, sign in (
        ("exclusiveMinimum", ("maximum", "exclusiveMaximum"), 1),
        ("exclusiveMaximum", ("minimum", "exclusiveMinimum"), -1),
    ):
        # Draft 4's bounds that are true or false are enforced.
        bounds = {key: sign * schema[key] for key in (excluded, *others) if type(schema.get(key)) in (int, float)}
        bound = bounds.pop(excluded, -1)
        if bound >= 0 and bound % 1 == 0 and any(other < bound + 1 for other in bounds.values()):
            raise ValueError(
                f"a JSON schema's {excluded} of {schema[excluded]} cannot be enforced beside {', '.join(bounds)} "
                "so near to it"
            )


def _load(schema: dict | bool | str) -> Any:
    if not isinstance(schema, str):
        return schema
    try:
        return json.loads(schema)
    except ValueError as error:
        raise ValueError(f"the JSON schema is not JSON: {error}") from None


def _first_line(message: str) -> str:
    """The part of an llguidance error that says something to the author of a schema."""
    return re.sub(r"^at \d+\(\d+\): ", "", message.strip().partition("\n")[0])
