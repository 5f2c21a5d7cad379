"""Responses, as the openai package sees them."""

import json

import openai
import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from .conftest import TOOL_CALL, bigram_model

TOOLS = [{"type": "function", "name": "add", "description": "Adds.", "parameters": {"type": "object"}}]
IDS = {"return_token_ids": True}
AFTER = "OK,itwasfun!"  # several rounds of the sampler, so that it is streamed after the call before it


@pytest.fixture(scope="module")
def client(serving):
    with openai.OpenAI(base_url=serving.url, api_key="any", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def caller(serving_tools):
    with openai.OpenAI(base_url=f"{serving_tools.url}/v1", api_key="any", max_retries=0) as client:
        yield client


def create(client, **options) -> Response:
    options = {"model": "m", "input": "2+2?", "max_output_tokens": 12, "extra_body": IDS} | options
    reply = client.responses.create(**options)
    Response.model_validate(reply.model_dump(by_alias=True), strict=True)
    return reply


def test_a_reply_has_every_field_the_sdk_knows(client, serving):
    tokenizer = serving.policy.tokenizer
    reply = create(client, instructions="Be brief.", metadata={"a": "b"}, include=["message.output_text.logprobs"])
    assert reply.object == "response" and reply.model == "m" and reply.metadata == {"a": "b"} and reply.error is None
    assert (reply.status, reply.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert reply.prompt_token_ids == tokenizer.encode("<|system|>Be brief.<|end|><|user|>2+2?<|end|><|assistant|>")
    (item,) = reply.output
    assert (item.type, item.role, item.status) == ("message", "assistant", "incomplete")
    assert reply.output_text == item.content[0].text == tokenizer.decode(reply.token_ids, skip_special=True)
    assert len(item.content[0].logprobs) == 12
    usage = reply.usage
    assert usage.output_tokens == 12 and usage.input_tokens == len(reply.prompt_token_ids)
    assert usage.total_tokens == usage.input_tokens + 12


def test_a_function_call_and_its_output(caller, serving_tools):
    first = create(caller, tools=TOOLS, max_output_tokens=30)
    (call,) = first.output
    assert (call.type, call.name, call.status, first.status) == ("function_call", "add", "completed", "completed")
    assert json.loads(call.arguments) == {"a": 2, "b": [3, "x"]}
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "5"}
    by_items = create(caller, input=[{"role": "user", "content": "2+2?"}, call.model_dump(), result], tools=TOOLS)
    by_id = create(caller, input=[result], previous_response_id=first.id, tools=TOOLS)
    assert by_items.prompt_token_ids == by_id.prompt_token_ids
    text = serving_tools.policy.tokenizer.decode(by_id.prompt_token_ids)
    assert text.endswith("</tool_call><|end|><|tool|>5<|end|><|assistant|>")


def test_message_forms(client):
    parts = [
        {"role": "developer", "content": "Be brief."},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "2+2?"}]},
    ]
    plain = create(client, instructions="Be brief.")
    assert create(client, input=parts).prompt_token_ids == plain.prompt_token_ids
    thought = {"type": "reasoning", "id": "r1", "summary": []}
    assert create(client, input=[*parts, thought]).prompt_token_ids == plain.prompt_token_ids


def test_stored_responses(client):
    reply = create(client)
    assert client.responses.retrieve(reply.id).output_text == reply.output_text
    client.responses.delete(reply.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(reply.id)
    forgotten = create(client, store=False)
    with pytest.raises(openai.BadRequestError, match="previous_response_id"):
        create(client, previous_response_id=forgotten.id)


def test_a_previous_response_is_input_enough(client, serving):
    reply = create(client)
    by_items = create(client, input=[{"role": "user", "content": "2+2?"}, reply.output[0].model_dump()])
    for nothing in (openai.omit, []):
        again = create(client, input=nothing, previous_response_id=reply.id)
        assert again.prompt_token_ids == by_items.prompt_token_ids


def test_text_format(client):
    schema = {
        "type": "object",
        "properties": {"n": {"enum": [1, 22]}},
        "required": ["n"],
        "additionalProperties": False,
    }
    asked = {"format": {"type": "json_schema", "name": "it", "schema": schema, "strict": True}}
    reply = create(client, text=asked, max_output_tokens=150)
    assert json.loads(reply.output_text)["n"] in (1, 22) and reply.status == "completed"


def events_of(client, **options) -> list:
    options = {"model": "m", "input": "2+2?", "max_output_tokens": 20, "extra_body": IDS} | options
    events = list(client.responses.create(stream=True, **options))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    for event in events:
        TypeAdapter(ResponseStreamEvent).validate_python(event.model_dump(by_alias=True), strict=True)
    return events


def test_a_text_stream_has_the_documented_order(client):
    whole = create(client, temperature=0, max_output_tokens=20)
    events = events_of(client, temperature=0, top_logprobs=1)
    kinds = [event.type.removeprefix("response.") for event in events]
    deltas = [event for event in events if event.type == "response.output_text.delta"]
    assert kinds == ["created", "in_progress", "output_item.added", "content_part.added"] + ["output_text.delta"] * len(
        deltas
    ) + ["output_text.done", "content_part.done", "output_item.done", "incomplete"]
    assert len(deltas) > 2 and "".join(event.delta for event in deltas) == whole.output_text
    assert sum(len(event.logprobs) for event in deltas) <= 20
    assert [i for event in events for i in getattr(event, "token_ids", [])] == whole.token_ids
    final = events[-1].response
    assert final.output_text == whole.output_text and final.id == events[0].response.id
    assert final.usage.output_tokens == 20 and events[0].response.status == "in_progress"


def test_a_call_stream_has_the_documented_order(caller):
    kinds = [event.type.removeprefix("response.") for event in events_of(caller, tools=TOOLS)]
    assert kinds == [
        "created",
        "in_progress",
        "output_item.added",
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "output_item.done",
        "completed",
    ]
    with caller.responses.stream(model="m", input="2+2?", tools=TOOLS) as stream:
        final = stream.get_final_response()
    assert json.loads(final.output[0].arguments) == {"a": 2, "b": [3, "x"]}
    again = create(caller, input="And?", previous_response_id=final.id, tools=TOOLS)
    assert len(again.prompt_token_ids) > len(final.usage.model_dump())


@pytest.mark.parametrize(
    "options, text",
    [
        ({"input": []}, "input"),
        ({"input": openai.omit}, "input"),
        ({"input": [{"type": "computer_call_output", "call_id": "c", "output": {}}]}, "computer_call_output"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input_image"),
        ({"tools": [{"type": "web_search"}]}, "web_search"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"background": True}, "background"),
        ({"truncation": "auto"}, "truncation"),
        ({"previous_response_id": "resp_none"}, "previous_response_id"),
        ({"text": {"format": {"type": "grammar"}}}, "text.format"),
        ({"text": {"format": 5}}, "text.format"),
        ({"input": "x" * 300}, "context length is 256"),
    ],
)
def test_what_cannot_be_done_is_said(client, options, text):
    with pytest.raises(openai.BadRequestError, match=text):
        create(client, **options)


@pytest.mark.parametrize("by_id", [True, False])
def test_a_conversation_is_one_row(serving_tools, by_id):
    job, leases, ids = serving_tools.open()
    with openai.OpenAI(base_url=serving_tools.model_api(leases[0]), api_key="x", max_retries=0) as client:
        items, previous = [{"role": "user", "content": "2+2?"}], None
        for _ in range(3):
            reply = create(client, input=items, previous_response_id=previous, tools=TOOLS, max_output_tokens=20)
            (call,) = reply.output
            result = {"type": "function_call_output", "call_id": call.call_id, "output": "5"}
            items, previous = ([result], reply.id) if by_id else ([*items, call.model_dump(), result], None)
    (record,) = serving_tools.finish(job, leases, ids)
    assert [call.parent for call in record.calls] == [None, 0, 1]


@pytest.fixture(scope="module")
def talking(start, tmp_path_factory):
    """A model that says something before its call, and after it."""
    return start(bigram_model(tmp_path_factory, *"So", "<tool_call>", TOOL_CALL, "</tool_call>", *AFTER))


@pytest.mark.parametrize("stream", [True, False])
def test_a_call_between_two_texts_goes_back(talking, stream):
    job, leases, ids = talking.open()
    options = {"model": "m", "tools": TOOLS}
    with openai.OpenAI(base_url=talking.model_api(leases[0]), api_key="x", max_retries=0) as client:
        items, kinds = [{"role": "user", "content": "2+2?"}], []
        for _ in range(2):
            if stream:
                with client.responses.stream(input=items, **options) as events:
                    reply = events.get_final_response()
            else:
                reply = client.responses.create(input=items, **options)
            kinds.append([item.type for item in reply.output])
            (call,) = [item for item in reply.output if item.type == "function_call"]
            result = {"type": "function_call_output", "call_id": call.call_id, "output": "5"}
            items = [*items, *[item.model_dump(exclude_none=True) for item in reply.output], result]
    (record,) = talking.finish(job, leases, ids)
    assert kinds == [["message", "function_call", "message"][: 3 if stream else 2]] * 2
    assert [call.parent for call in record.calls] == [None, 0]
    assert [call.reply["content"] for call in record.calls] == ["So" + AFTER] * 2


@pytest.mark.parametrize("stream", [True, False])
def test_log_probs_of_a_text_are_none_of_its_calls(talking, stream):
    options = {"tools": TOOLS, "include": ["message.output_text.logprobs"], "top_logprobs": 1}
    with openai.OpenAI(base_url=talking.url, api_key="x", max_retries=0) as client:
        reply = events_of(client, **options)[-1].response if stream else create(client, max_output_tokens=20, **options)
    parts = [item.content[0] for item in reply.output if item.type == "message"]
    assert "".join(part.text for part in parts) == "So" + AFTER and len(parts) == 1 + stream
    for part in parts:
        assert "".join(entry.token for entry in part.logprobs) == part.text
        assert all(entry.top_logprobs[0].token == entry.token for entry in part.logprobs), "the model is sure"


def test_a_message_in_several_parts_is_the_reply(talking):
    """As LangChain sends a reply's two texts back: parts of one message, before the call."""
    job, leases, ids = talking.open()
    with openai.OpenAI(base_url=talking.model_api(leases[0]), api_key="x", max_retries=0) as client:
        *_, call = create(client, tools=TOOLS, max_output_tokens=24).output
        said = {"role": "assistant", "content": [{"type": "output_text", "text": text} for text in ("So", AFTER)]}
        result = {"type": "function_call_output", "call_id": call.call_id, "output": "5"}
        create(client, input=[{"role": "user", "content": "2+2?"}, said, call.model_dump(), result], tools=TOOLS)
    (record,) = talking.finish(job, leases, ids)
    assert [call.parent for call in record.calls] == [None, 0]


CALL = {"type": "function_call", "call_id": "c", "name": "add", "arguments": "{}"}


@pytest.mark.parametrize(
    "part, text",
    [
        ({"type": "input_image", "image_url": "x"}, "input_image"),
        ({"type": "output_text", "text": 5}, "must be a string"),
        ({"type": "output_text"}, "must be a string"),
        ("plain", "str"),
    ],
)
def test_an_assistants_message_behind_a_call_is_checked(client, part, text):
    with pytest.raises(openai.BadRequestError, match=text):
        create(client, input=[CALL, {"role": "assistant", "content": [part]}, {"role": "user", "content": "Why?"}])


def test_a_rollouts_responses_are_its_own(serving):
    job, leases, ids = serving.open(samples=2)
    first, second = (openai.OpenAI(base_url=serving.model_api(lease), api_key="x", max_retries=0) for lease in leases)
    with first, second:
        reply = create(first)
        assert create(first, input="Why?", previous_response_id=reply.id)
        with pytest.raises(openai.BadRequestError, match="previous_response_id"):
            create(second, input="Why?", previous_response_id=reply.id)
    serving.finish(job, leases, ids)


def test_a_stream_that_fails_says_so(serving):
    job, leases, ids = serving.open(mode="evaluate")
    with openai.OpenAI(base_url=serving.model_api(leases[0]), api_key="x", max_retries=0) as client:
        stream = client.responses.create(model="m", input="2+2?", max_output_tokens=200, stream=True)
        kinds = []
        with pytest.raises(openai.APIError, match="ended"):
            for event in stream:
                if not kinds:
                    serving.store.cancel_open(job)
                kinds.append(event.type)
    assert kinds[-1] == "response.failed"
