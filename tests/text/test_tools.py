"""Reading tool calls out of replies, and writing tools for templates that know none."""

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_jax.text import canonical_messages, family_of, parse_reply
from lightning_jax.text.tools import PieceParser, ReplyParser

TOOL = {
    "type": "function",
    "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object", "properties": {}}},
}


def simple(calls):
    return [(call["function"]["name"], json.loads(call["function"]["arguments"])) for call in calls]


def test_families(tokenizers):
    families = {name: family_of(tokenizer) for name, tokenizer in tokenizers.items()}
    assert families == {
        "tiny": "hermes",
        "smollm2": "hermes",
        "chatml": "hermes",
        "llama2": "hermes",
        "llama3": "llama3",
        "mistral": "mistral",
    }


@pytest.mark.parametrize(
    "family, text, content, calls",
    [
        ("hermes", '<tool_call>{"name": "f", "arguments": {"x": 1}}</tool_call>', "", [("f", {"x": 1})]),
        ("hermes", 'Let me see.\n<tool_call>\n{"name": "f"}\n</tool_call>\n', "Let me see.", [("f", {})]),
        (
            "hermes",
            '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>\n<tool_call>{"name": "g", "arguments": '
            '{"s": "</b>"}}</tool_call>',
            "",
            [("f", {}), ("g", {"s": "</b>"})],
        ),
        (
            "hermes",
            '<tool_call>[{"name": "f", "arguments": {"x": "é"}}, {"name": "g", "arguments": {}}]</tool_call>',
            "",
            [("f", {"x": "é"}), ("g", {})],
        ),
        ("hermes", '<tool_call>{"name": "f", "arguments": "{\\"x\\": 1}"}</tool_call>', "", [("f", {"x": 1})]),
        (
            "hermes",
            '<tool_call>{"name": "f", "arguments": {"s": "a \\"</tool_call> <tool_call>{}</tool_call>"}}</tool_call>!',
            "!",
            [("f", {"s": 'a "</tool_call> <tool_call>{}</tool_call>'})],
        ),
        (
            "hermes",
            '<tool_call>{"name": "f}</tool_call><tool_call>{"name": "g"}</tool_call>',
            '<tool_call>{"name": "f}</tool_call>',
            [("g", {})],
        ),
        ("llama3", '{"name": "f", "parameters": {"x": 1}}', "", [("f", {"x": 1})]),
        ("llama3", '<|python_tag|>{"name": "f", "parameters": {}}\n', "", [("f", {})]),
        (
            "llama3",
            '{"name": "f", "parameters": {"x": 1}}; {"name": "g", "parameters": {"y": {"z": []}}}',
            "",
            [("f", {"x": 1}), ("g", {"y": {"z": []}})],
        ),
        ("mistral", '[TOOL_CALLS] [{"name": "f", "arguments": {"x": 1}}]', "", [("f", {"x": 1})]),
        ("mistral", 'Hm.[TOOL_CALLS][{"name": "f", "arguments": {}}, {"name": "g"}]', "Hm.", [("f", {}), ("g", {})]),
    ],
)
def test_calls(family, text, content, calls):
    found_content, found = parse_reply(text, family)
    assert (found_content, simple(found)) == (content, calls)
    assert (
        canonical_messages([{"role": "assistant", "content": content, "tool_calls": found}])[0]["tool_calls"] == found
    )


@pytest.mark.parametrize(
    "family, text",
    [
        ("hermes", " plain text, 1 < 2 \n"),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"x": 1}'),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"x": 1}}'),
        ("hermes", "<tool_call>{'name': 'f'}</tool_call>"),
        ("hermes", "<tool_call>[]</tool_call>"),
        ("hermes", "<tool_call>7</tool_call>"),
        ("hermes", '<tool_call>{"name": 3, "arguments": {}}</tool_call>'),
        ("hermes", '<tool_call>{"name": "f", "arguments": [1]}</tool_call>'),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"x": NaN}}</tool_call>'),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"x": 1e999}}</tool_call>'),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"x": "\\ud800"}}</tool_call>'),
        ("hermes", "<tool_call>" + "[" * 100_000 + "</tool_call>"),
        ("llama3", '{"name": "Ada", "age": 36}'),
        ("llama3", 'The call is {"name": "f", "parameters": {}}'),
        ("llama3", '{"name": "f", "parameters": {}} and then'),
        ("llama3", "<|python_tag|>print(1)"),
        ("llama3", '{"a":' * 100_000),
        ("mistral", "[TOOL_CALLS] f"),
        ("mistral", '[TOOL_CALLS] {"name": "f"}'),
        ("mistral", '[{"name": "f", "arguments": {}}]'),
    ],
)
def test_what_is_no_call_stays_text(family, text):
    assert parse_reply(text, family) == (text, [])


def test_a_malformed_call_beside_a_good_one_stays_in_the_content():
    text = 'A <tool_call>{"name": "f"}</tool_call> <tool_call>{oops}</tool_call>'
    content, calls = parse_reply(text, "hermes")
    assert content == "A  <tool_call>{oops}</tool_call>" and simple(calls) == [("f", {})]


@given(text=st.text(max_size=80) | st.text(st.sampled_from('<tool_cal>/{}[]":,name1 ;'), max_size=80))
@pytest.mark.parametrize("family", ["hermes", "llama3", "mistral"])
def test_no_text_breaks_the_parser(family, text):
    content, calls = parse_reply(text, family)
    assert calls or content == text


REPLIES = [
    'One. <tool_call>{"name": "f", "arguments": {"x": "</b>"}}</tool_call> \n<tool_call>{oops}</tool_call> two <tool_c',
    '<tool_call>{"name": "f", "arguments": {"s": "</tool_call> <tool_call>{}</tool_call>"}}</tool_call> one',
    '<tool_call>{"name": "f}</tool_call><tool_call>{"name": "g"}</tool_call> "two <tool_call>{"name": "h"}</tool_call>',
    '{"name": "f", "parameters": {"x": 1}}; {"name": "g", "parameters": {}} ',
    '<|python_tag|>{"name": "f", "parameters": {}}',
    'Hm. [TOOL_CALLS] [{"name": "f", "arguments": {}}, {"name": "g"}]',
]


@given(
    data=st.data(), text=st.sampled_from(REPLIES) | st.text(st.sampled_from('<tool_cal>/{}[]":,name1 ;'), max_size=60)
)
@pytest.mark.parametrize("family", ["hermes", "llama3", "mistral"])
def test_a_reply_in_pieces_is_the_reply_as_a_whole(family, data, text):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=12)))
    parser = ReplyParser(family, "key")
    taken = [parser.push(text[start:end]) for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    taken.append(parser.finish())
    whole = parse_reply(text, family, "key")
    assert ("".join(piece for piece, _ in taken), [call for _, calls in taken for call in calls]) == whole
    assert (parser.content, parser.calls) == whole
    ends = [0, *(end for span in parser.call_spans for end in span), len(text)]
    beside = "".join(text[start:end] for start, end in zip(ends[::2], ends[1::2], strict=True))
    assert beside == whole[0] if not whole[1] else beside.rstrip() == whole[0]


def test_the_end_of_a_call_in_its_strings_is_not_looked_for_for_ever():
    """32,768 characters on, whole and in pieces: a call beyond that is a text."""
    for length, is_call in ((30_000, True), (33_000, False)):
        text = '<tool_call>{"name": "f", "arguments": {"s": "</tool_call>' + length * "x" + '"}}</tool_call> one'
        parser = ReplyParser("hermes")
        for start in range(0, len(text), 1000):
            parser.push(text[start : start + 1000])
        parser.finish()
        whole = parse_reply(text, "hermes")
        assert (parser.content, len(parser.calls)) == (whole[0], len(whole[1])) and bool(whole[1]) == is_call


@pytest.mark.parametrize(
    "family, pieces, shown",
    [
        ("hermes", ["Let me", " see", ".\n<too", "l_call>{", "}"], ["Let me", " see", ".", "", ""]),
        (
            "hermes",
            ['<tool_call>{"name": "f"}</tool_call><tool_', 'call>{"name": "g"}</tool_call>'],
            [["f"], ["g"]],
        ),
        ("llama3", ["2", " + 2", " {"], ["2", " + 2", " {"]),
        ("llama3", ["<|pyth", "on!"], ["", "<|python!"]),
        ("mistral", ["Hm", ".[TOOL", "S", "[TOOL_CALLS] ["], ["Hm", ".", "[TOOLS", ""]),
    ],
)
def test_text_and_calls_come_as_soon_as_they_are_certain(family, pieces, shown):
    parser = ReplyParser(family)
    for piece, expected in zip(pieces, shown, strict=True):
        text, calls = parser.push(piece)
        assert ([name for name, _ in simple(calls)] or text) == expected


HELD = {  # replies as `guided` has calls written
    "hermes": [
        'Hm.\n<tool_call>\n{"name": "f", "arguments": {"a": {"b": [1, {}]}, "c": "}\\\\\\"{é"}}\n</tool_call>',
        '<tool_call>\n{"name": "f", "arguments": {"a": "</tool_call> <tool_call>"}}\n</tool_call>',
        '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>\n'
        '<tool_call>\n{"name": "g", "arguments": {"x":1}}\n</tool_call>',
        " 2 + 2 <tool\n",
    ],
    "llama3": [
        '<|python_tag|>{"name": "f", "parameters": {"s": "]}\\\\"}}',
        '{"name": "f", "parameters": {"a": []}}; {"name": "g", "parameters": {}}',
        " 2 + 2 {",
    ],
}


@given(data=st.data())
@pytest.mark.parametrize("family", HELD)
def test_calls_in_pieces_are_the_calls_as_a_whole(family, data):
    text = data.draw(st.sampled_from(HELD[family]))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=12)))
    parser = PieceParser(family, "key")
    taken = [parser.push(text[start:end]) for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    taken.append(parser.finish())
    calls = []
    for piece in [piece for _, pieces in taken for piece in pieces]:
        if piece.begun is not None:
            calls.append([*piece.begun, ""])
        calls[-1][-1] += piece.arguments
    content, whole = parse_reply(text, family, "key")
    assert "".join(shown for shown, _ in taken) == parser.content == content
    assert [(call_id, name) for call_id, name, _ in calls] == [(c["id"], c["function"]["name"]) for c in whole]
    assert [json.loads(call[-1]) for call in calls] == [json.loads(c["function"]["arguments"]) for c in whole]
    assert [call["function"]["arguments"] for call in parser.calls] == [call[-1] for call in calls]


def test_arguments_flow_before_a_call_is_over():
    parser = PieceParser("hermes")
    assert parser.push('So:\n<tool_call>\n{"name": "f", "argu') == ("So:", [])
    _, (begun, piece) = parser.push('ments": {"a": 1')
    assert (begun.begun[1], begun.arguments + piece.arguments, piece.complete) == ("f", '{"a": 1', False)
    _, (piece,) = parser.push("2}}\n</tool_")
    assert (piece.arguments, piece.complete) == ("2}", True)
    assert parser.push("call>") == parser.finish() == ("", [])


def test_call_ids():
    """The same sample always gets the same ids; calls differ; Mistral's templates accept nothing but nine of these."""
    text = '<tool_call>[{"name": "f"}, {"name": "f"}]</tool_call>'
    first, second = (call["id"] for call in parse_reply(text, "hermes", "attempt-1/0")[1])
    again = [call["id"] for call in parse_reply(text, "hermes", "attempt-1/0")[1]]
    other = [call["id"] for call in parse_reply(text, "hermes", "attempt-1/1")[1]]
    assert [first, second] == again and len({first, second, *other}) == 4
    assert all(re.fullmatch("[a-z0-9]{9}", call_id) for call_id in (first, second, *other))


def test_rendered_calls_are_read_back(tokenizer):
    """What a template writes for a call is what its family's parser reads (templates without tools included)."""
    call = {"id": "a1b2c3d4e", "type": "function", "function": {"name": "add", "arguments": '{"x": 1, "y": "é"}'}}
    user = {"role": "user", "content": "1 and é?"}
    messages = canonical_messages([user, {"role": "assistant", "content": None, "tool_calls": [call]}])
    before = tokenizer.render([user], [TOOL])
    after = tokenizer.render(messages, [TOOL], add_generation_prompt=False)
    reply = after.removeprefix(before) if after.startswith(before) else after.rpartition("[/INST]")[2]
    ids = tokenizer.encode(reply.strip())
    reply = tokenizer.decode(ids[: min([ids.index(end) for end in tokenizer.eos_ids if end in ids])], skip_special=True)
    content, calls = parse_reply(reply, family_of(tokenizer))
    assert (content, simple(calls)) == ("", [("add", {"x": 1, "y": "é"})])


def test_tools_reach_a_model_whose_template_has_none(tokenizers):
    messages = canonical_messages(
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "1 + 2, 3 + 4?"},
            {
                "role": "assistant",
                "content": "I add.",
                "tool_calls": [{"id": "a", "type": "function", "function": {"name": "add", "arguments": '{"x": 1}'}}],
            },
            {"role": "tool", "tool_call_id": "a", "content": "3"},
            {"role": "tool", "tool_call_id": "b", "content": "7"},
        ]
    )
    text = tokenizers["smollm2"].render(messages, [TOOL])
    system, user, reply, results, start = text.split("<|im_start|>")[1:]
    assert system.startswith("system\nBe brief.\n\n") and json.dumps(TOOL["function"]) in system
    assert reply == 'assistant\nI add.\n<tool_call>\n{"name": "add", "arguments": {"x": 1}}\n</tool_call><|im_end|>\n'
    assert results.count("<tool_response>") == 2 and results.startswith("user\n") and start == "assistant\n"
