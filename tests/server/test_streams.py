"""Streams, as the openai and anthropic packages see them: the same samples as without, piece by piece."""

import itertools
import json
import time

import anthropic
import httpx
import openai
import pytest
from anthropic.types import Message, RawMessageStreamEvent
from openai.types.chat import ChatCompletionChunk
from pydantic import TypeAdapter

USER = [{"role": "user", "content": "2+2?"}]
TOOLS = [{"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object"}}}]
ANTHROPIC_TOOLS = [{"name": "add", "description": "Adds.", "input_schema": {"type": "object"}}]
IDS = {"return_token_ids": True}


def openai_client(url) -> openai.OpenAI:
    return openai.OpenAI(base_url=url, api_key="any", max_retries=0)


def anthropic_client(url) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=url, api_key="any", max_retries=0)


def chunks_of(client, **options) -> list[ChatCompletionChunk]:
    options = {"model": "m", "messages": USER, "max_tokens": 30, "extra_body": IDS, "stream": True} | options
    chunks = list(client.chat.completions.create(**options))
    for chunk in chunks:
        ChatCompletionChunk.model_validate(chunk.model_dump(), strict=True)
    assert len({chunk.id for chunk in chunks}) == 1
    return chunks


def assembled(chunks, index=0) -> dict:
    """What an agent makes of one choice's chunks."""
    choices = [choice for chunk in chunks for choice in chunk.choices if choice.index == index]
    calls = {}
    for delta in [call for choice in choices for call in choice.delta.tool_calls or ()]:
        known = calls.setdefault(delta.index, {"id": delta.id, "name": delta.function.name, "arguments": ""})
        known["arguments"] += delta.function.arguments
    return {
        "role": "".join(choice.delta.role or "" for choice in choices),
        "content": "".join(choice.delta.content or "" for choice in choices),
        "token_ids": [i for choice in choices for i in getattr(choice, "token_ids", [])],
        "logprobs": [e.logprob for choice in choices if choice.logprobs for e in choice.logprobs.content],
        "finish_reason": [choice.finish_reason for choice in choices if choice.finish_reason],
        "calls": list(calls.values()),
    }


def test_a_chat_stream_is_the_reply_in_pieces(serving):
    with openai_client(serving.url) as client:
        options = {"model": "m", "messages": USER, "max_tokens": 30, "seed": 7, "n": 3, "extra_body": IDS}
        whole = client.chat.completions.create(**options, logprobs=True)
        chunks = chunks_of(client, seed=7, n=3, logprobs=True, stream_options={"include_usage": True})
    assert chunks[0].prompt_token_ids == whole.prompt_token_ids and not hasattr(chunks[1], "prompt_token_ids")
    for i, choice in enumerate(whole.choices):
        got = assembled(chunks, i)
        assert got["role"] == "assistant" and got["content"] == choice.message.content
        assert got["token_ids"] == choice.token_ids and got["finish_reason"] == [choice.finish_reason] == ["length"]
        assert got["logprobs"] == pytest.approx([entry.logprob for entry in choice.logprobs.content], abs=1e-5)
    *others, last = chunks
    assert last.choices == [] and last.usage.completion_tokens == 90
    assert last.usage.prompt_tokens == whole.usage.prompt_tokens and all(chunk.usage is None for chunk in others)
    order = [choice.index for chunk in others for choice in chunk.choices if choice.delta.content]
    assert order != sorted(order) and len(order) > 6, "the samples come side by side, each in several pieces"


def test_cached_tokens_are_the_first_samples(serving):
    """Of a new prompt's samples the first computes it; the others find it in the cache, and may end before."""
    content = [{"role": "user", "content": "a prompt that nothing else here has, of several pages: 0123456789"}]
    options = {"messages": content, "n": 3, "max_tokens": 2, "stream_options": {"include_usage": True}}
    with openai_client(serving.url) as client:
        first, again = (chunks_of(client, **options)[-1].usage.prompt_tokens_details for _ in range(2))
    assert first.cached_tokens < 40 < again.cached_tokens


def test_a_stop_string_never_leaks(serving):
    with openai_client(serving.url) as client:
        text = assembled(chunks_of(client, seed=2, max_tokens=60))["content"]
        for length in (1, 2, 5):
            for start in range(10, 50, 7):
                stop = text[start : start + length]
                if "\ufffd" in stop or text[:start].endswith("\ufffd"):
                    continue
                got = assembled(chunks_of(client, seed=2, max_tokens=60, stop=["\x00\x00", stop]))
                assert got["content"] == text[: text.index(stop)] and got["finish_reason"] == ["stop"]


def test_streamed_tool_calls(serving_tools):
    with openai_client(serving_tools.url) as client:
        got = assembled(chunks_of(client, tools=TOOLS, temperature=0))
    (call,) = got["calls"]
    assert call["name"] == "add" and json.loads(call["arguments"]) == {"a": 2, "b": [3, "x"]} and call["id"]
    assert got["content"] == "" and got["finish_reason"] == ["tool_calls"] and len(got["token_ids"]) == 4


def test_the_openai_packages_own_accumulation(serving_tools):
    with openai_client(serving_tools.url) as client:
        with client.chat.completions.stream(model="m", messages=USER, tools=TOOLS) as stream:
            kinds = [event.type for event in stream]
            final = stream.get_final_completion()
    assert final.choices[0].message.tool_calls[0].function.name == "add"
    assert "tool_calls.function.arguments.delta" in kinds and "tool_calls.function.arguments.done" in kinds


def events_of(client, **options) -> list:
    body = IDS | options.pop("extra_body", {})
    options = {"model": "m", "messages": USER, "max_tokens": 30, "stream": True} | options
    events = list(client.messages.create(**options, extra_body=body))
    for event in events:
        TypeAdapter(RawMessageStreamEvent).validate_python(event.model_dump(), strict=True)
    return events


def test_a_messages_stream_has_the_documented_order(serving):
    with anthropic_client(serving.url) as client:
        options = {"model": "m", "messages": USER, "max_tokens": 30}
        whole = client.messages.create(**options, extra_body=IDS | {"temperature": 0})
        events = events_of(client, extra_body={"temperature": 0})
    kinds = [event.type for event in events]
    deltas = [event for event in events if event.type == "content_block_delta"]
    assert kinds == ["message_start", "content_block_start", *["content_block_delta"] * len(deltas)] + [
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    assert len(deltas) > 2 and "".join(event.delta.text for event in deltas) == whole.content[0].text
    assert [i for event in events for i in getattr(event, "token_ids", [])] == whole.token_ids
    start, end = events[0].message, events[-2]
    assert start.prompt_token_ids == whole.prompt_token_ids and start.content == [] and start.stop_reason is None
    assert end.delta.stop_reason == "max_tokens" and end.usage.output_tokens == 30
    assert end.usage.input_tokens + end.usage.cache_read_input_tokens == len(whole.prompt_token_ids)


def test_streamed_tool_use_and_the_anthropic_packages_own_accumulation(serving_tools):
    with anthropic_client(serving_tools.url) as client:
        events = events_of(client, tools=ANTHROPIC_TOOLS)
        kinds = [event.type for event in events]
        assert kinds == [
            "message_start",
            "content_block_start",
            "content_block_delta",
            "content_block_stop",
            "message_delta",
            "message_stop",
        ]
        assert events[2].delta.type == "input_json_delta" and events[1].content_block.input == {}
        with client.messages.stream(model="m", max_tokens=30, messages=USER, tools=ANTHROPIC_TOOLS) as stream:
            final = stream.get_final_message()
    Message.model_validate(final.model_dump(), strict=True)
    (block,) = final.content
    assert (block.name, block.input, final.stop_reason) == ("add", {"a": 2, "b": [3, "x"]}, "tool_use")


def test_a_ping_follows_message_start(serving):
    body = {"messages": USER, "max_tokens": 3, "stream": True}
    reply = serving.http.post("/v1/messages", json=body)
    assert reply.headers["content-type"].startswith("text/event-stream")
    names = [line for line in reply.text.splitlines() if line.startswith("event: ")]
    assert names[:2] == ["event: message_start", "event: ping"] and names[-1] == "event: message_stop"


def test_errors_before_the_first_token_have_their_status(serving):
    with openai_client(serving.url) as client, pytest.raises(openai.BadRequestError, match="context length is 256"):
        client.chat.completions.create(model="m", messages=[{"role": "user", "content": "x" * 300}], stream=True)
    with (
        anthropic_client(serving.url) as client,
        pytest.raises(anthropic.BadRequestError, match="context length is 256"),
    ):
        messages = [{"role": "user", "content": "x" * 300}]
        client.messages.create(model="m", max_tokens=3, messages=messages, stream=True)
    with openai_client(serving.url) as client:
        with serving.one_waiting(), pytest.raises(openai.RateLimitError):
            client.chat.completions.create(model="m", messages=USER, n=60, stream=True)
        with pytest.raises(openai.BadRequestError, match="n: .*sampler.max_queue=60"):
            client.chat.completions.create(model="m", messages=USER, n=61, stream=True)


@pytest.mark.parametrize("dialect", ["openai", "anthropic"])
def test_an_attempt_that_ends_ends_its_streams_with_an_error(serving, dialect):
    job, leases, ids = serving.open(mode="evaluate")  # in training replies are short, and soon over
    url = serving.model_api(leases[0])
    if dialect == "openai":
        client, kind = openai_client(url), openai.APIError
        stream = client.chat.completions.create(model="m", messages=USER, max_tokens=24, n=50, stream=True)
    else:
        client, kind = anthropic_client(url), anthropic.APIStatusError
        stream = client.messages.create(model="m", messages=USER, max_tokens=200, stream=True)
    with client, pytest.raises(kind, match="ended"):
        next(iter(stream))
        serving.store.cancel_open(job)
        list(stream)


def test_streams_are_recorded_like_other_calls(serving):
    job, leases, ids = serving.open()
    with openai_client(serving.model_api(leases[0])) as client:
        chunks = chunks_of(client, n=2, max_tokens=20)
    with anthropic_client(serving.model_api(leases[0])) as client:
        events = events_of(client, max_tokens=20)
    (record,) = serving.finish(job, leases, ids)
    tokenizer = serving.policy.tokenizer
    seen = [assembled(chunks, i) for i in range(2)]
    text = "".join(event.delta.text for event in events if event.type == "content_block_delta")
    seen.append({"content": text, "token_ids": [i for event in events for i in getattr(event, "token_ids", [])]})
    assert len(record.calls) == 3
    for call, got in zip(record.calls, seen, strict=True):
        assert call.sampled_ids.tolist() == got["token_ids"] and call.reply["content"] == got["content"]
        assert tokenizer.decode(call.sampled_ids, skip_special=True) == got["content"]
        assert call.finish_reason == "length" and len(call.logprobs) == 20


def test_a_streamed_conversation_is_one_row(serving_tools):
    """The reply as the agent put it together goes back, with a tool's result, and its ids are gone on from."""
    job, leases, ids = serving_tools.open()
    with openai_client(serving_tools.model_api(leases[0])) as client:
        with client.chat.completions.stream(model="m", messages=USER, tools=TOOLS) as stream:
            message = stream.get_final_completion().choices[0].message
        result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "5"}
        chunks_of(client, messages=[*USER, message.model_dump(), result], tools=TOOLS)
    (record,) = serving_tools.finish(job, leases, ids)
    one, two = record.calls
    assert (one.parent, two.parent) == (None, 0)
    assert two.prompt_ids.tolist()[: len(one.prompt_ids) + 4] == [*one.prompt_ids, *one.sampled_ids]


@pytest.mark.parametrize("dialect", ["openai", "anthropic"])
def test_a_cancelled_stream_frees_its_slot_and_keeps_what_was_seen(serving, dialect):
    """The agent that goes on from the half it read finds the ids of that half."""
    job, leases, ids = serving.open(mode="evaluate")
    url = serving.model_api(leases[0])
    before = serving.policy.sampler_metrics()
    client = openai_client(url) if dialect == "openai" else anthropic_client(url)
    with client:
        if dialect == "openai":
            stream = client.chat.completions.create(model="m", messages=USER, max_tokens=200, stream=True)
        else:
            stream = client.messages.create(model="m", messages=USER, max_tokens=200, stream=True)
        for _ in itertools.islice(stream, 4):
            pass
        stream.close()
        attempt = serving.store.attempt_by_token(leases[0]["token"])
        wait_for(lambda: not attempt.on_end and attempt.calls)
        wait_for(lambda: serving.policy.sampler_metrics()["sampler/running"] == 0)
        (call,) = attempt.calls
        text = call.reply["content"]
        assert text and serving.policy.tokenizer.decode(call.sampled_ids, skip_special=True).startswith(text)
        assert call.finish_reason == "cancelled" and len(call.sampled_ids) == len(call.logprobs) < 200
        turns = [*USER, {"role": "assistant", "content": text}, {"role": "user", "content": "Go on."}]
        if dialect == "openai":
            client.chat.completions.create(model="m", messages=turns, max_tokens=4)
        else:
            client.messages.create(model="m", messages=turns, max_tokens=4)
            client.messages.create(model="m", messages=turns[:2], max_tokens=4)  # the reply itself is written on
    after = serving.policy.sampler_metrics()
    assert after["sampler/generated_tokens"] - before["sampler/generated_tokens"] < 200
    (record,) = serving.finish(job, leases, ids)
    assert [call.parent for call in record.calls] == [None, 0, 0][: len(record.calls)]
    for call in record.calls[1:]:
        whole = [*record.calls[0].prompt_ids, *record.calls[0].sampled_ids]
        assert call.prompt_ids.tolist()[: len(whole)] == whole
    if dialect == "anthropic":
        assert record.calls[2].prompt_ids.tolist() == whole and record.calls[2].reply["content"].startswith(text)


def test_a_stream_that_is_open_when_the_result_comes_keeps_what_was_sent(serving):
    """The agent returns without closing it; the samples that have ended by then are as they are."""
    job, leases, ids = serving.open(mode="evaluate")
    options = {"max_tokens": 100, "n": 50, "temperature": 1.0, "extra_body": IDS}
    with openai_client(serving.model_api(leases[0])) as client:
        stream = client.chat.completions.create(model="m", messages=USER, stream=True, **options)
        chunks = list(itertools.islice(stream, 80))
        (record,) = serving.finish(job, leases, ids)
        with pytest.raises(openai.APIError, match="ended"):
            for chunk in stream:
                chunks.append(chunk)
    sent = {i: got for i in range(50) if (got := assembled(chunks, i))["content"]}
    assert {call.index for call in record.calls} == sent.keys() and 0 < len(sent) < 50
    assert "cancelled" in {call.finish_reason for call in record.calls}
    for call in record.calls:
        got = sent[call.index]
        assert call.sampled_ids.tolist() == got["token_ids"] and call.reply["content"] == got["content"]
        assert len(call.logprobs) == len(call.sampled_ids)
        assert got["finish_reason"] == [call.finish_reason] or call.finish_reason == "cancelled"


def test_a_stream_that_nobody_read_frees_its_slots(serving):
    """However late its end is seen, no sample begins after it; one that had ended by then is as it is."""
    job, leases, ids = serving.open()
    body = {"messages": USER, "max_tokens": 400, "n": 60, "stream": True}
    url = f"{serving.model_api(leases[0])}/chat/completions"
    before = serving.policy.sampler_metrics()["sampler/generated_tokens"]
    with httpx.Client() as http, http.stream("POST", url, json=body) as reply:
        assert reply.status_code == 200
    attempt = serving.store.attempt_by_token(leases[0]["token"])
    wait_for(lambda: not attempt.on_end)
    wait_for(lambda: serving.policy.sampler_metrics()["sampler/running"] == 0)
    assert serving.policy.sampler_metrics()["sampler/generated_tokens"] - before < 60 * 400 / 2
    (record,) = serving.finish(job, leases, ids)
    assert all((call.finish_reason == "cancelled") == (len(call.sampled_ids) < 400) for call in record.calls)
    assert len(record.calls) < 60


def wait_for(condition) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)
