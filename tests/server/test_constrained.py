"""What agents ask of a reply's form and distribution: structured output, forced tools, biases, penalties."""

import json

import anthropic
import numpy as np
import openai
import pytest

from lightning_jax import rows

USER = [{"role": "user", "content": "2+2?"}]
SCHEMA = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}, "n": {"enum": [1, 22, 333]}},
    "required": ["ok", "n"],
    "additionalProperties": False,
}
SMALL = {"type": "object", "properties": {"n": {"enum": [1, 22]}}, "required": ["n"], "additionalProperties": False}
TOOLS = [{"type": "function", "function": {"name": name, "parameters": SMALL}} for name in ("first", "second")]


@pytest.fixture(scope="module")
def serving(start, random_model):
    return start(random_model, **{"runtime.max_seq_len": 512})  # tools take room, a character a token


@pytest.fixture(scope="module")
def client(serving):
    with openai.OpenAI(base_url=serving.url, api_key="any", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def claude(serving):
    with anthropic.Anthropic(base_url=serving.url, api_key="any", max_retries=0) as client:
        yield client


def create(client, **options):
    return client.chat.completions.create(**{"model": "m", "messages": USER, "max_tokens": 250, "seed": 1} | options)


def is_valid(value) -> bool:
    return list(value) == ["ok", "n"] and isinstance(value["ok"], bool) and value["n"] in (1, 22, 333)


@pytest.mark.parametrize("strict", [True, False])
def test_json_schema(client, strict):
    asked = {"type": "json_schema", "json_schema": {"name": "it", "schema": SCHEMA, "strict": strict}}
    (choice,) = create(client, response_format=asked).choices
    assert is_valid(json.loads(choice.message.content)) and choice.finish_reason == "stop"


def test_json_of_other_names(client, claude):
    assert is_valid(json.loads(create(client, extra_body={"guided_json": SCHEMA}).choices[0].message.content))
    structured = {"structured_outputs": {"choice": ["left", "right"]}}
    assert create(client, extra_body=structured).choices[0].message.content in ("left", "right")
    reply = claude.messages.create(
        model="m",
        max_tokens=250,
        messages=USER,
        output_config={"format": {"type": "json_schema", "schema": SCHEMA}},
    )
    assert is_valid(json.loads(reply.content[0].text)) and reply.stop_reason == "end_turn"


def test_json_object_begins_as_one(client):
    asked = {"type": "json_object"}
    text = create(client, response_format=asked, max_tokens=10).choices[0].message.content
    assert text.startswith("{")


def test_a_schema_that_cannot_be_enforced(client):
    schema = {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}
    asked = {"type": "json_schema", "json_schema": {"name": "it", "schema": schema, "strict": True}}
    with pytest.raises(openai.BadRequestError, match="uniqueItems"):
        create(client, response_format=asked)
    asked["json_schema"]["strict"] = False
    assert create(client, response_format=asked, max_tokens=5).choices[0].message.content.startswith("{")


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "second"}}], ids=["required", "named"]
)
def test_forced_tools(client, choice):
    (reply,) = create(client, tools=TOOLS, tool_choice=choice, parallel_tool_calls=False).choices
    (call,) = reply.message.tool_calls
    assert call.function.name in (["first", "second"] if choice == "required" else ["second"])
    assert json.loads(call.function.arguments)["n"] in (1, 22)
    assert reply.message.content is None and reply.finish_reason == "tool_calls"


def test_tools_beside_a_form_are_calls_or_an_answer_of_it(client):
    """What agents with tools and an output type ask for: the model decides, and either way the reply is in form."""
    asked = {"type": "json_schema", "json_schema": {"name": "it", "schema": SCHEMA, "strict": True}}
    for seed in range(4):
        reply = create(client, tools=TOOLS[:1], response_format=asked, parallel_tool_calls=False, seed=seed)
        (choice,) = reply.choices
        calls = choice.message.tool_calls
        if calls:
            assert json.loads(calls[0].function.arguments)["n"] in (1, 22)
        else:
            assert is_valid(json.loads(choice.message.content))


def test_forced_tools_of_anthropic(claude):
    tools = [{"name": name, "input_schema": SMALL} for name in ("first", "second")]
    choice = {"type": "tool", "name": "second", "disable_parallel_tool_use": True}
    reply = claude.messages.create(model="m", max_tokens=250, messages=USER, tools=tools, tool_choice=choice)
    (block,) = reply.content
    assert block.name == "second" and block.input["n"] in (1, 22) and reply.stop_reason == "tool_use"
    choice = {"type": "any", "disable_parallel_tool_use": True}
    reply = claude.messages.create(model="m", max_tokens=250, messages=USER, tools=tools, tool_choice=choice)
    assert len(reply.content) == 1 and reply.content[0].input["n"] in (1, 22)
    with pytest.raises(anthropic.BadRequestError, match="third"):
        choice = {"type": "tool", "name": "third"}
        claude.messages.create(model="m", max_tokens=250, messages=USER, tools=tools, tool_choice=choice)


def test_logit_bias_penalties_and_min_tokens(client, serving):
    tokenizer = serving.policy.tokenizer
    a, b = (tokenizer.encode(letter)[0] for letter in "ab")
    text = create(client, logit_bias={str(a): 100}, max_tokens=10).choices[0].message.content
    assert text == "a" * 10
    bias = {str(a): 30, str(b): 29}
    text = create(client, logit_bias=bias, temperature=0, frequency_penalty=2, max_tokens=20).choices[0].message.content
    assert set(text) == {"a", "b"}
    body = {"min_tokens": 5, "stop_token_ids": [a], "return_token_ids": True}
    (choice,) = create(client, logit_bias={str(a): 100}, max_tokens=10, extra_body=body).choices
    assert len(choice.token_ids) == 6 and choice.token_ids.index(a) == 5 and choice.finish_reason == "stop"
    with pytest.raises(openai.BadRequestError, match="vocabulary|token"):
        create(client, logit_bias={"123456789": 1})


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "stop, text",
    [("a", "aaaaa"), ("aa", "aaaa"), (["a", "aaaaaaaa"], "aaaaa"), (["aaaaaaaa", "b"], ""), ("b", "a" * 10)],
)
def test_min_tokens_holds_back_stop_strings(client, serving, stop, text, stream):
    """As in vLLM: one stops the reply that is complete behind them, wherever it begins."""
    (a,) = serving.policy.tokenizer.encode("a")
    options = {"logit_bias": {str(a): 100}, "max_tokens": 10, "stop": stop, "extra_body": {"min_tokens": 5}}
    if stream:
        chunks = list(client.chat.completions.create(model="m", messages=USER, stream=True, **options))
        got = "".join(chunk.choices[0].delta.content or "" for chunk in chunks), chunks[-1].choices[0].finish_reason
    else:
        (choice,) = create(client, **options).choices
        got = choice.message.content, choice.finish_reason
    assert got == (text, "length" if stop == "b" else "stop")


def test_stop_token_ids(client, serving):
    (a,) = serving.policy.tokenizer.encode("a")
    body = {"stop_token_ids": [a], "return_token_ids": True}
    (choice,) = create(client, logit_bias={str(a): 100}, extra_body=body).choices
    assert choice.token_ids == [a] and choice.message.content == "" and choice.finish_reason == "stop"


def test_top_logprobs(client):
    options = {"logprobs": True, "top_logprobs": 3, "seed": 4, "max_tokens": 20}
    whole = create(client, **options).choices[0].logprobs.content
    assert len(whole) == 20 and all(len(entry.top_logprobs) == 3 for entry in whole)
    for entry in whole:
        ranked = [likely.logprob for likely in entry.top_logprobs]
        assert ranked == sorted(ranked, reverse=True) and ranked[0] >= entry.logprob - 1e-4
    chunks = create(client, stream=True, **options)
    pieces = [choice.logprobs.content for chunk in chunks for choice in chunk.choices if choice.logprobs]
    streamed = [entry for piece in pieces for entry in piece]
    assert [entry.bytes for entry in streamed] == [entry.bytes for entry in whole]
    np.testing.assert_allclose(
        [[likely.logprob for likely in entry.top_logprobs] for entry in streamed],
        [[likely.logprob for likely in entry.top_logprobs] for entry in whole],
        atol=1e-4,
    )


def test_in_training_the_distribution_is_the_servers_and_the_form_the_agents(serving):
    job, leases, ids = serving.open()
    (a,) = serving.policy.tokenizer.encode("a")
    with openai.OpenAI(base_url=serving.model_api(leases[0]), api_key="x", max_retries=0) as agent:
        text = create(agent, logit_bias={str(a): 100}, max_tokens=10).choices[0].message.content
        assert text != "a" * 10
        asked = {"type": "json_schema", "json_schema": {"name": "it", "schema": {"enum": ["x", "y"]}, "strict": True}}
        assert json.loads(create(agent, response_format=asked, max_tokens=10).choices[0].message.content) in ("x", "y")
    (record,) = serving.finish(job, leases, ids)
    assert [call.constrained for call in record.calls] == [False, True]
    marked = [row.on_policy[row.loss_mask].tolist() for row in rows.build([record], np.array([True]), None)]
    assert sorted(map(all, marked)) == [False, True] and sorted(map(any, marked)) == [False, True]


NAMED = {"type": "function", "function": {"name": "second"}}


def streamed_calls(client, **options) -> tuple[list[list[str]], str]:
    """Each call's name and the pieces of its arguments; the finish reason."""
    calls, reason = [], None
    for chunk in create(client, stream=True, **options):
        for delta in chunk.choices[0].delta.tool_calls or ():
            if delta.id is not None:
                calls.append([delta.function.name])
            calls[delta.index].append(delta.function.arguments)
        reason = chunk.choices[0].finish_reason or reason
    return calls, reason


@pytest.mark.parametrize("asked", ["required", "named", "strict"])
def test_arguments_of_a_call_that_a_grammar_holds_come_in_pieces(client, serving, asked):
    options = {"tools": TOOLS, "parallel_tool_calls": False, "tool_choice": NAMED if asked == "named" else "required"}
    if asked == "strict":  # text and then calls, the model decides: it likes to call
        (marker,) = serving.policy.tokenizer.encode("<tool_call>")
        strict = [{"type": "function", "function": tool["function"] | {"strict": True}} for tool in TOOLS]
        options |= {"tools": strict, "tool_choice": "auto", "logit_bias": {str(marker): 100}}
    ((name, *pieces),), reason = streamed_calls(client, **options)
    (whole,) = create(client, **options).choices[0].message.tool_calls
    assert name == whole.function.name and reason == "tool_calls"
    assert len([piece for piece in pieces if piece]) > 1
    assert json.loads("".join(pieces)) == json.loads(whole.function.arguments) and json.loads("".join(pieces))["n"]


def test_a_held_call_that_is_cut_short(client):
    """A stream has begun to tell of it; a reply as a whole gives it as text."""
    options = {"tools": TOOLS, "tool_choice": NAMED, "max_tokens": 38}
    ((name, *pieces),), reason = streamed_calls(client, **options)
    assert (name, reason) == ("second", "length") and "".join(pieces).startswith("{") and "}" not in "".join(pieces)
    (choice,) = create(client, **options).choices
    assert choice.message.tool_calls is None and choice.message.content.startswith("<tool_call>")


def test_pieces_in_the_other_dialects(serving):
    """Their packages put the pieces together; and the call as they send it back goes on from its ids."""
    job, leases, ids = serving.open(mode="evaluate")
    url = serving.model_api(leases[0])
    tools = [{"name": name, "input_schema": SMALL} for name in ("first", "second")]
    choice = {"type": "tool", "name": "second", "disable_parallel_tool_use": True}
    with anthropic.Anthropic(base_url=url, api_key="x", max_retries=0) as agent:
        options = {"model": "m", "max_tokens": 250, "tools": tools, "tool_choice": choice}
        with agent.messages.stream(messages=USER, **options) as stream:
            pieces = [event.partial_json for event in stream if event.type == "input_json"]
            message = stream.get_final_message()
        (block,) = message.content
        result = {"type": "tool_result", "tool_use_id": block.id, "content": "5"}
        turns = [{"role": "assistant", "content": message.content}, {"role": "user", "content": [result]}]
        agent.messages.create(messages=[*USER, *turns], **options)
    assert len(pieces) > 1 and json.loads("".join(pieces)) == block.input and block.input["n"] in (1, 22)
    with openai.OpenAI(base_url=url, api_key="x", max_retries=0) as agent:
        tools = [tool["function"] | {"type": "function", "strict": False} for tool in TOOLS]
        choice = {"type": "function", "name": "second"}
        options = {"tools": tools, "tool_choice": choice, "parallel_tool_calls": False, "max_output_tokens": 250}
        with agent.responses.stream(model="m", input="2+2?", **options) as stream:
            pieces = [event.delta for event in stream if event.type == "response.function_call_arguments.delta"]
            (item,) = stream.get_final_response().output[:1]
    assert len(pieces) > 1 and json.loads("".join(pieces)) == json.loads(item.arguments) and item.status == "completed"
    (record,) = serving.finish(job, leases, ids)
    assert [call.parent for call in record.calls] == [None, 0, None]
