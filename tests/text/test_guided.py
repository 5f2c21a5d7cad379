"""Grammars: whatever a model chooses of what the masks allow, a finished reply is what the grammar says.

The oracle is the jsonschema package (or Python's re), the chooser a random walk that knows nothing of JSON.
"""

import json
import re

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_jax.text import parse_reply
from lightning_jax.text.guided import Cursor, Grammar, Guide

POINT = {
    "type": "object",
    "properties": {"x": {"type": "integer"}, "y": {"$ref": "#/$defs/number"}},
    "required": ["x", "y"],
    "additionalProperties": False,
    "$defs": {"number": {"type": "integer", "minimum": -50, "maximum": 50}},
}
UNENFORCEABLE = {"type": "object", "properties": {"text": {"type": "string", "not": {"const": "no"}}}}


def tool(name: str, parameters: dict | None, strict: bool = True) -> dict:
    function = {"name": name, "strict": strict} | ({"parameters": parameters} if parameters else {})
    return {"type": "function", "function": function}


TOOLS = [tool("move", POINT), tool("say", UNENFORCEABLE, strict=False), tool("stop", None)]


@pytest.fixture(scope="session")
def guides(tokenizers) -> dict[str, Guide]:
    return {name: Guide(tokenizer) for name, tokenizer in tokenizers.items()}


def allowed(cursor: Cursor, vocab_size: int) -> np.ndarray:
    return np.flatnonzero(np.unpackbits(cursor.mask().view(np.uint8), bitorder="little")[:vocab_size])


def reply(tokenizer, grammar: Grammar, seed: int, *, length: int = 400, text: float = 0.0) -> str | None:
    """A random reply; None if it has not ended after `length` tokens.

    It takes one of the shortest tokens now and then, the end of a string or object where it can half of the time, and
    where it may end, goes on with probability `text`.
    """
    rng = np.random.default_rng(seed)
    closing = [i for i in range(tokenizer.vocab_size) if tokenizer.token_bytes(i).strip() in (b'"', b"}", b"]")]
    cursor, ids = grammar.start(), []
    while len(ids) < length:
        choices = allowed(cursor, tokenizer.vocab_size)
        ends = np.intersect1d(choices, tokenizer.eos_ids)
        closers = np.intersect1d(choices, closing)
        if len(ends) and (len(ends) == len(choices) or rng.random() >= text):
            choices = ends
        elif len(ends):
            choices = np.setdiff1d(choices, ends)
        elif len(closers) and rng.random() < 0.5:
            choices = closers
        token = int(rng.choice(choices))
        cursor.accept(token)
        if cursor.finished:
            assert token in tokenizer.eos_ids
            return tokenizer.decode(ids, skip_special=True)
        ids.append(token)
    return None


# SmolLM2's vocabulary has no token for the first byte of the planes above these, and none for some control characters.
CHARACTERS = st.characters(max_codepoint=0x2FFFF, exclude_categories=("Cc", "Cs"))
LEAVES = st.one_of(
    st.just({"type": "boolean"}),
    st.just({"type": "null"}),
    st.builds(
        lambda low, size: {"type": "integer", "minimum": low, "maximum": low + size},
        st.integers(-1000, 1000),
        st.integers(0, 500),
    ),
    st.builds(lambda longest: {"type": "string", "maxLength": longest}, st.integers(0, 8)),
    st.just({"type": "string", "pattern": "^[a-f0-9]{4}$"}),
    st.lists(
        st.one_of(st.text(CHARACTERS, max_size=6), st.integers(), st.none(), st.booleans()), min_size=1, max_size=4
    ).map(lambda values: {"enum": values}),
)


def containers(children):
    names = st.text(CHARACTERS, min_size=1, max_size=5)
    objects = st.dictionaries(names, children, max_size=4).flatmap(
        lambda properties: st.sets(st.sampled_from(sorted(properties)) if properties else st.nothing()).map(
            lambda required: {
                "type": "object",
                "properties": properties,
                "required": sorted(required),
                "additionalProperties": False,
            }
        )
    )
    arrays = st.builds(
        lambda items, low, more: {"type": "array", "items": items, "minItems": low, "maxItems": low + more},
        children,
        st.integers(0, 2),
        st.integers(0, 2),
    )
    return st.one_of(objects, arrays, st.lists(children, min_size=1, max_size=3).map(lambda some: {"anyOf": some}))


SCHEMAS = st.recursive(LEAVES, containers, max_leaves=6)


@given(schema=SCHEMAS, seed=st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_finished_replies_are_valid_under_any_schema(tokenizers, guides, schema, seed):
    name = ["tiny", "smollm2", "chatml", "llama2"][seed % 4]
    text = reply(tokenizers[name], guides[name].json_schema(schema), seed)
    if text is not None:
        jsonschema.validate(json.loads(text), schema, jsonschema.Draft202012Validator)


def test_most_replies_finish(tokenizers, guides):
    """Guards the test above: and white space, of which a model may have much to say, is bounded."""
    grammar = guides["smollm2"].json_schema(POINT)
    texts = [reply(tokenizers["smollm2"], grammar, seed, length=60) for seed in range(20)]
    finished = [text for text in texts if text is not None]
    assert len(finished) > 12 and len(set(finished)) > 6
    assert all(re.search(r"\s{35}", text) is None for text in finished)


def test_a_text_may_be_cut_into_tokens_as_the_model_likes(tokenizer):
    grammar = Guide(tokenizer).regex("[a-z, ]+[a-z]")
    for cut in (["yes, said the author"], ["y", "es", ", sa", "id", " the ", "a", "uthor"]):
        cursor = grammar.start()
        for piece in cut:
            for token in tokenizer.encode_after(-1, piece):
                assert token in allowed(cursor, tokenizer.vocab_size)
                cursor.accept(token)
        assert set(tokenizer.eos_ids) <= set(allowed(cursor, tokenizer.vocab_size).tolist())
    with pytest.raises(ValueError, match="does not allow"):
        grammar.start().accept(tokenizer.encode_after(-1, "Perhaps")[0])


def test_special_tokens_are_no_text(tokenizers, guides):
    """A string may spell `</tool_call>`, but the token that ends a call is kept for that."""
    tokenizer = tokenizers["tiny"]
    cursor = guides["tiny"].json_schema({"type": "string"}).start()
    cursor.accept(tokenizer.encode('"')[0])
    assert tokenizer.control_ids.isdisjoint(allowed(cursor, tokenizer.vocab_size))
    assert tokenizer.encode("<")[0] in allowed(cursor, tokenizer.vocab_size)


def test_regex_choice_and_ebnf(tokenizers, guides):
    tokenizer, guide = tokenizers["chatml"], guides["chatml"]
    for seed in range(10):
        assert re.fullmatch("[a-c]{3,5}x?", reply(tokenizer, guide.regex("[a-c]{3,5}x?"), seed))
        assert reply(tokenizer, guide.choice(["yes", "no", 'a "b"\n\x7f']), seed) in ("yes", "no", 'a "b"\n\x7f')
        assert re.fullmatch("a*b", reply(tokenizer, guide.ebnf('root ::= "b" | "a" root'), seed))
        assert re.fullmatch("a*b", reply(tokenizer, guide.ebnf('start: "b" | "a" start'), seed))
        assert isinstance(json.loads(reply(tokenizer, guide.json_object(), seed) or "{}"), dict)


FAMILIES = {"tiny": "hermes", "smollm2": "hermes", "chatml": "hermes", "llama3": "llama3", "mistral": "mistral"}


@pytest.mark.parametrize("name", FAMILIES)
def test_required_tool_calls(tokenizers, guides, name):
    """Every finished reply is read as calls of these tools, with arguments that are valid under their schemas."""
    tokenizer, family = tokenizers[name], FAMILIES[name]
    schemas = {entry["function"]["name"]: entry["function"].get("parameters", {}) for entry in TOOLS}
    counts, names = set(), set()
    for seed in range(30):
        grammar = guides[name].tool_call(TOOLS, family, required=True, parallel=seed % 2 == 0)
        text = reply(tokenizer, grammar, seed, text=0.5)
        if text is None:
            continue
        content, calls = parse_reply(text, family)
        assert calls and content == "", text
        if seed % 2:
            assert len(calls) == 1
        counts.add(len(calls))
        for call in calls:
            names.add(call["function"]["name"])
            schema = {**schemas[call["function"]["name"]]}
            jsonschema.validate(json.loads(call["function"]["arguments"]), schema if "$defs" in schema else {})
    assert names == set(schemas) and max(counts) > 1


@pytest.mark.parametrize("name", FAMILIES)
def test_the_named_tool_is_called(tokenizers, guides, name):
    grammar = guides[name].tool_call(TOOLS, FAMILIES[name], required=True, parallel=False, name="move")
    for seed in range(5):
        text = reply(tokenizers[name], grammar, seed)
        if text is not None:
            _, (call,) = parse_reply(text, FAMILIES[name])
            assert call["function"]["name"] == "move"
            jsonschema.validate(json.loads(call["function"]["arguments"]), POINT)


@pytest.mark.parametrize("name", FAMILIES)
def test_where_no_call_is_required_text_is_free_and_calls_are_valid(tokenizers, guides, name):
    tokenizer, family = tokenizers[name], FAMILIES[name]
    grammar = guides[name].tool_call(TOOLS[:1], family, required=False)
    call = {
        "hermes": '<tool_call>\n{"name": "move", "arguments": {"x": 1, "y": %s}}\n</tool_call>',
        "llama3": '{"name": "move", "parameters": {"x": 1, "y": %s}}',
        "mistral": '[TOOL_CALLS] [{"name": "move", "arguments": {"x": 1, "y": %s}}]',
    }[family]
    before = "" if family == "llama3" else "I move {it} now:\n"
    spelled = {tokenizer.token_bytes(token): token for token in range(tokenizer.vocab_size)}

    def takes(text: str) -> bool:
        """Whether this can be a whole reply, of the longest tokens that are allowed."""
        cursor, rest = grammar.start(), text.encode()
        while rest:
            choices = set(allowed(cursor, tokenizer.vocab_size).tolist())
            fitting = [spelled[rest[:n]] for n in range(20, 0, -1) if spelled.get(rest[:n]) in choices]
            if not fitting:
                return False
            cursor.accept(fitting[0])
            rest = rest[len(tokenizer.token_bytes(fitting[0])) :]
        return not set(tokenizer.eos_ids).isdisjoint(allowed(cursor, tokenizer.vocab_size).tolist())

    assert takes("") and takes("Well, 2 < 3 {so} it is.\n\n[1]") and takes(before + call % 50)
    assert not takes(before + call % 51), "y is at most 50"
    assert not takes(before + call % '"a"')
    assert not takes(before + call[:20])
    for seed in range(20):
        text = reply(tokenizer, grammar, seed, text=0.9)
        if text is not None:
            for made in parse_reply(text, family)[1]:
                jsonschema.validate(json.loads(made["function"]["arguments"]), POINT)


def takes_json(tokenizer, grammar: Grammar, text: str) -> bool:
    """Whether this can be a whole reply, one character after another."""
    cursor = grammar.start()
    for token in [token for character in text for token in tokenizer.encode_after(-1, character)]:
        if token not in allowed(cursor, tokenizer.vocab_size):
            return False
        cursor.accept(token)
    return not set(tokenizer.eos_ids).isdisjoint(allowed(cursor, tokenizer.vocab_size).tolist())


@pytest.mark.parametrize(
    "pattern", ['^[^"]*$', r"^[^\\]+$", '^[^a"]+$', r"^[^ -~]+$", r"^[^]\\]*$", '^[^-"]+$', r"^\\[^\"]$", r"^[\[^a]+$"]
)
def test_what_a_pattern_excludes_stays_out_escaped_too(tokenizers, guides, pattern):
    for wrap in (lambda s: s, lambda s: {"$defs": {"s": s}, "$ref": "#/$defs/s"}, lambda s: {"anyOf": [s]}):
        schema = wrap({"type": "string", "pattern": pattern})
        grammar = guides["tiny"].json_schema(schema)
        for text in ("", "a", "b", '"', "\\", 'b"', "b\\", "]", "-", "^", "[", '\\"', "\\b", "\n", "é"):
            is_valid = jsonschema.Draft202012Validator(schema).is_valid(text)
            assert takes_json(tokenizers["tiny"], grammar, json.dumps(text, ensure_ascii=False)) == is_valid, text


@pytest.mark.parametrize(
    "bounds",
    [
        {"exclusiveMinimum": 0, "maximum": 0.1},
        {"exclusiveMinimum": 0, "exclusiveMaximum": 0.5},
        {"exclusiveMinimum": 10.0, "exclusiveMaximum": 10.5},
        {"minimum": -0.5, "exclusiveMaximum": 0},
        {"exclusiveMinimum": -1.5, "exclusiveMaximum": -1},
    ],
)
def test_bounds_that_cannot_be_enforced(guides, bounds):
    guide = guides["tiny"]
    for number in (bounds, {"type": "number"} | bounds, {"type": ["null", "number"]} | bounds):
        for schema in ({"properties": {"enum": number}}, {"items": number}, {"$defs": {"n": number}}):
            with pytest.raises(ValueError, match="exclusiveM.*cannot be enforced"):
                guide.json_schema(schema)
    with pytest.raises(ValueError, match="exclusiveM.*cannot be enforced"):
        guide.tool_call([tool("wait", {"properties": {"s": bounds}})], "hermes", required=True)
    guide.tool_call([tool("wait", {"properties": {"s": bounds}}, strict=False)], "hermes", required=True)
    guide.json_schema({"enum": [bounds], "default": bounds})


def test_bounds_that_are_true_or_false(tokenizers, guides):
    """As JSON Schema's draft 4 and OpenAPI 3.0 write them."""
    bounds = {"type": "number", "minimum": 0, "maximum": 1, "exclusiveMinimum": True, "exclusiveMaximum": False}
    grammar = guides["tiny"].json_schema(bounds)
    taken = [number for number in ("0", "0.5", "1", "1.5") if takes_json(tokenizers["tiny"], grammar, number)]
    assert taken == ["0.5", "1"]


@pytest.mark.parametrize(
    "bounds",
    [
        {"exclusiveMinimum": 0},
        {"exclusiveMinimum": 0, "maximum": 1},
        {"exclusiveMinimum": 0.5, "maximum": 0.75},
        {"exclusiveMinimum": -1, "maximum": -0.5},
        {"exclusiveMaximum": 0, "minimum": -1},
        {"exclusiveMaximum": 1, "minimum": 0.5},
    ],
)
def test_bounds_of_numbers(tokenizers, guides, bounds):
    schema = {"type": "number"} | bounds
    grammar = guides["tiny"].json_schema(schema)
    for text in ("0", "-0", "0.0", "0.5", "0.6", "-0.5", "-0.6", "1", "1.0", "-1", "0.75", "2"):
        is_valid = jsonschema.Draft202012Validator(schema).is_valid(json.loads(text))
        assert takes_json(tokenizers["tiny"], grammar, text) == is_valid, text


def test_what_cannot_be_enforced_says_why(guides):
    guide = guides["tiny"]
    with pytest.raises(ValueError, match="JSON schema is not JSON"):
        guide.json_schema('{"type": ')
    with pytest.raises(ValueError, match="a JSON schema is an object, not int"):
        guide.json_schema(3)
    with pytest.raises(ValueError, match="JSON schema cannot be enforced.*strin"):
        guide.json_schema({"type": "strin"})
    with pytest.raises(ValueError, match="JSON schema cannot be enforced"):
        guide.json_schema({"type": 3})
    with pytest.raises(ValueError, match="JSON schema cannot be enforced.*not"):
        guide.json_schema(UNENFORCEABLE)
    with pytest.raises(ValueError, match="JSON schema cannot be enforced.*http://example.com"):
        guide.json_schema({"$ref": "http://example.com/schema"})
    with pytest.raises(ValueError, match="tool's schema cannot be enforced.*not"):
        guide.tool_call([tool("say", UNENFORCEABLE)], "hermes", required=True)
    with pytest.raises(ValueError, match="no tool named 'fly'"):
        guide.tool_call(TOOLS, "hermes", required=True, name="fly")
    with pytest.raises(ValueError, match="no tools"):
        guide.tool_call([], "hermes", required=True)
    with pytest.raises(ValueError, match="regular expression cannot be enforced"):
        guide.regex("(a")
    with pytest.raises(ValueError, match="choices"):
        guide.choice([])
    with pytest.raises(ValueError, match="grammar cannot be read"):
        guide.ebnf("root ::= missing")


def test_a_cursor_does_not_move_another(tokenizers, guides):
    tokenizer, grammar = tokenizers["tiny"], guides["tiny"].regex("ab*")
    first, second = grammar.start(), grammar.start()
    first.accept(tokenizer.encode("a")[0])
    assert tokenizer.decode(allowed(second, tokenizer.vocab_size)) == "a"
    assert "b" in tokenizer.decode(allowed(first, tokenizer.vocab_size))
    assert guides["tiny"].regex("ab*") is grammar, "compiled once"
