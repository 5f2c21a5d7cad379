"""The openai package."""

import asyncio
import json

import openai
import pydantic
import pytest

from . import checks
from .conftest import Sum
from .tasks import CALL, OPENAI_TOOLS, RAMBLE, SAY, seen_openai, user


def client_of(url, **options) -> openai.OpenAI:
    return openai.OpenAI(base_url=url, **{"api_key": "any", "max_retries": 0} | options)


def chat(client, messages, **options):
    return client.chat.completions.create(model="m", messages=messages, **options)


@pytest.mark.parametrize("version", ["", "/v1", "/v1/"])
def test_plain(rollout, version):
    with client_of(rollout.url + version) as client:
        reply = chat(client, user(SAY), n=3, logprobs=True)
        again = chat(client, [{"role": "developer", "content": "Be brief."}, *user(SAY)], max_completion_tokens=2)
    assert [choice.finish_reason for choice in (*reply.choices, *again.choices)] == [*["stop"] * 3, "length"]
    rollout.assert_saw(*[seen_openai(choice.message) for choice in (*reply.choices, *again.choices)])
    for choice, call in zip(reply.choices, rollout.calls, strict=False):
        told = [entry.logprob for entry in choice.logprobs.content]
        assert told == pytest.approx(call.logprobs[: len(told)].tolist(), abs=1e-6)
        assert len(told) == len(call.logprobs) - 1, "all but the end of the turn"


def test_streams(rollout):
    options = {"model": "m", "tools": OPENAI_TOOLS, "n": 2, "stream_options": {"include_usage": True}}
    replies = []
    with client_of(rollout.url) as client:
        for messages in (user(SAY), user(CALL)):
            with client.chat.completions.stream(messages=messages, **options) as stream:
                completion = stream.get_final_completion()
            replies += [seen_openai(choice.message) for choice in completion.choices]
            reason = "tool_calls" if messages == user(CALL) else "stop"
            assert [choice.finish_reason for choice in completion.choices] == [reason] * 2
            assert completion.usage.completion_tokens > 2
    # Those of one request are recorded in the order in which they end.
    rollout.finish()
    rollout.calls.sort(key=lambda call: call.index)
    rollout.assert_saw(*replies)


@pytest.mark.parametrize("streamed", [False, True])
def test_a_conversation_with_tools_is_one_row(rollout, streamed):
    """Six calls, each reply sent back as the SDK made it."""
    functions = dict(zip(("add", "look_up"), rollout.tools(6), strict=True))
    messages, replies = user(CALL), []
    with client_of(rollout.url) as client:
        while True:
            if streamed:
                with client.chat.completions.stream(model="m", messages=messages, tools=OPENAI_TOOLS) as stream:
                    message = stream.get_final_completion().choices[0].message
            else:
                message = chat(client, messages, tools=OPENAI_TOOLS).choices[0].message
            replies.append(seen_openai(message))
            if not message.tool_calls:
                break
            messages.append(message)
            for call, (name, arguments) in zip(message.tool_calls, replies[-1][1], strict=True):
                messages.append({"role": "tool", "tool_call_id": call.id, "content": functions[name](**arguments)})
    assert len(replies) == 6 and len(rollout.finish()) == 1
    rollout.assert_saw(*replies)


def test_a_rewritten_history_is_more_rows(rollout):
    with client_of(rollout.url) as client:
        messages = user(SAY)
        for _ in range(3):
            reply = chat(client, messages).choices[0].message.content
            messages += [{"role": "assistant", "content": reply}, {"role": "user", "content": "And?"}]
        chat(client, [*messages[:1], {"role": "assistant", "content": "(a summary)"}, *messages[-1:]])
        chat(client, messages[2:])
    assert [len(row) for row in rollout.finish()] and len(rollout.finish()) == 3


def test_a_reply_may_come_back_in_other_clothes(rollout):
    """What agents and proxies make of an assistant's message: other key orders, parts, null for "", more fields."""
    with client_of(rollout.url) as client:
        message = chat(client, user(CALL), tools=OPENAI_TOOLS).choices[0].message
        calls = [
            {"type": "function", "id": call.id, "function": {"arguments": respelled(call), "name": call.function.name}}
            for call in message.tool_calls
        ]
        results = [{"role": "tool", "tool_call_id": call.id, "content": "5"} for call in message.tool_calls]
        for content in (
            message.content or None,
            message.content or "",
            [{"type": "text", "text": message.content or ""}],
        ):
            dressed = {"content": content, "tool_calls": calls, "role": "assistant", "refusal": None, "audio": None}
            chat(client, [*user(CALL), dressed, *results], tools=OPENAI_TOOLS)
        dressed = message.model_dump() | {"annotations": [], "function_call": None, "reasoning_content": None}
        chat(client, [*user(CALL), dressed, *results], tools=OPENAI_TOOLS)
    rollout.finish()
    assert [call.parent for call in rollout.calls] == [None, 0, 0, 0, 0]


def respelled(call) -> str:
    return json.dumps(json.loads(call.function.arguments), indent=2, sort_keys=True)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "add"}}])
def test_forced_tools(rollout, choice):
    """Even where the model would rather say something."""
    with client_of(rollout.url) as client:
        message = (
            chat(client, user(SAY), tools=OPENAI_TOOLS, tool_choice=choice, parallel_tool_calls=False)
            .choices[0]
            .message
        )
        text = chat(client, user(CALL), tools=OPENAI_TOOLS, tool_choice="none").choices[0].message
    (call,) = message.tool_calls
    assert call.function.name in ("add", "look_up") and (choice == "required" or call.function.name == "add")
    assert text.tool_calls is None and "<tool_call>" in text.content
    rollout.assert_saw(seen_openai(message), seen_openai(text))
    assert [call.constrained for call in rollout.calls] == [True, False]


def test_structured_output(rollout):
    with client_of(rollout.url) as client:
        reply = client.chat.completions.parse(model="m", messages=user(SAY), response_format=Sum)
        with client.chat.completions.stream(model="m", messages=user(SAY), response_format=Sum) as stream:
            streamed = stream.get_final_completion()
        tools = [openai.pydantic_function_tool(Sum)]
        called = client.chat.completions.parse(model="m", messages=user(SAY), tools=tools, tool_choice="required")
    assert isinstance(reply.choices[0].message.parsed, Sum) and isinstance(streamed.choices[0].message.parsed, Sum)
    assert isinstance(called.choices[0].message.tool_calls[0].function.parsed_arguments, Sum)
    rollout.finish()
    assert all(call.constrained for call in rollout.calls)


async def test_64_at_once(rollout):
    """Streams, plain ones, ones with several samples and ones that are given up, side by side."""
    texts = {}

    # 96 samples are more than the queue and the slots may hold at one moment: those refused come again.
    async with openai.AsyncOpenAI(base_url=rollout.url, api_key="any", max_retries=10) as client:

        async def one(i: int) -> None:
            messages = [{"role": "user", "content": f"(ramble) {i}" if i % 8 == 7 else f"(say) {i}"}]
            options = {"model": "m", "messages": messages, "n": 1 + i % 2}
            if i % 8 == 7:
                stream = await client.chat.completions.create(**options, stream=True)
                begun = {}
                async for chunk in stream:
                    for choice in chunk.choices:
                        begun[choice.index] = begun.get(choice.index, "") + (choice.delta.content or "")
                    if len("".join(begun.values())) > 20:
                        break
                await stream.close()
                texts[i] = begun
            elif i % 4 == 3:
                async with client.chat.completions.stream(**options) as stream:
                    completion = await stream.get_final_completion()
                texts[i] = {choice.index: choice.message.content for choice in completion.choices}
            else:
                completion = await client.chat.completions.create(**options)
                texts[i] = {choice.index: choice.message.content for choice in completion.choices}

        await asyncio.gather(*(one(i) for i in range(64)))
    rollout.wait_for_calls(64)
    assert len(rollout.finish()) == len(rollout.calls) > 64
    tokenizer = rollout.running.policy.tokenizer
    for i, seen in texts.items():
        calls = [call for call in rollout.calls if call.messages[0]["content"].endswith(f") {i}")]
        recorded = [
            tokenizer.decode(call.sampled_ids, skip_special=True) for call in sorted(calls, key=lambda c: c.index)
        ]
        if i % 8 == 7:
            assert all(any(text.startswith(part) for text in recorded) for part in seen.values())
            assert "cancelled" in {call.finish_reason for call in calls}
        else:
            assert recorded == [seen[n] for n in range(len(seen))] and len(seen) == 1 + i % 2


def test_a_reply_that_was_given_up_is_not_recorded_and_one_half_read_is(rollout):
    with client_of(rollout.url, timeout=0.1) as client, pytest.raises(openai.APITimeoutError):
        chat(client, user(RAMBLE), n=60)
    rollout.wait_for_calls(0)
    with client_of(rollout.url) as client:
        stream = chat(client, user(RAMBLE), stream=True)
        text = ""
        for chunk in stream:
            text += chunk.choices[0].delta.content or ""
            if len(text) > 10:
                break
        stream.close()
        rollout.wait_for_calls(1)
        chat(client, [*user(RAMBLE), {"role": "assistant", "content": text}, *user(SAY)])
    rollout.finish()
    assert [call.finish_reason for call in rollout.calls] == ["cancelled", "stop"]
    assert rollout.calls[0].reply["content"].startswith(text)


def test_errors_are_the_sdks_own(rollout):
    unknown = rollout.url[:-4] + "none"
    with client_of(unknown) as client, pytest.raises(openai.AuthenticationError):
        chat(client, user(SAY))
    with client_of(rollout.url) as client:
        with pytest.raises(openai.BadRequestError, match="maximum context length is 4096") as caught:
            chat(client, [{"role": "user", "content": "x" * 4096}])
        assert caught.value.code == "context_length_exceeded" and caught.value.type == "invalid_request_error"
        with rollout.running.one_waiting(), pytest.raises(openai.RateLimitError) as caught:
            chat(client, user(RAMBLE), n=64, stream=True)
        assert caught.value.response.headers["retry-after"] == "1"
        with pytest.raises(openai.BadRequestError, match="image_url"):
            parts = [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}]
            chat(client, [{"role": "user", "content": parts}])
        with pytest.raises(openai.BadRequestError, match="temperature"):
            chat(client, user(SAY), temperature=-1)
        with pytest.raises(openai.NotFoundError):
            client.embeddings.create(model="m", input="x")
        assert chat(client, user(SAY)).choices
    rollout.finish()
    assert len(rollout.calls) == 1


def test_a_full_server_is_asked_again(rollout):
    """With the SDK's own retries, more requests than fit are all answered in the end."""

    async def ask():
        async with openai.AsyncOpenAI(base_url=rollout.url, api_key="any", max_retries=20) as client:
            asked = [
                client.chat.completions.create(model="m", messages=user(SAY), n=60, max_tokens=4) for _ in range(4)
            ]
            return await asyncio.gather(*asked)

    assert len(asyncio.run(ask())) == 4
    rollout.finish()
    assert len(rollout.calls) == 240
    assert 429 in {exchange.status for exchange in rollout.tap.exchanges[rollout.token]}


def test_models_are_listed(rollout):
    with client_of(f"{rollout.url}/v1") as client:
        assert [model.id for model in client.models.list()] == ["obedient"]
        chat(client, user(SAY))


def test_types_are_checked(rollout):
    """That a response which is not what the SDK's types say would be noticed."""
    with client_of(rollout.url) as client:
        chat(client, user(SAY))
        chat(client, user(SAY), stream=True).close()
    rollout.wait_for_calls(1)
    whole, *_ = rollout.tap.exchanges[rollout.token]
    damaged = whole.response.replace(b'"index":0', b'"index":"0"')
    assert damaged != whole.response
    with pytest.raises(pydantic.ValidationError):
        checks.assert_strict(checks.Exchange(whole.path, b"", 200, whole.media_type, damaged, True))
