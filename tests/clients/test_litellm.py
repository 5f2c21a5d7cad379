"""LiteLLM, speaking each dialect."""

import asyncio
import json

import litellm
import pytest

from .conftest import Sum
from .tasks import CALL, OPENAI_TOOLS, RAMBLE, SAY, THINK, seen_openai, user

both = pytest.mark.parametrize("dialect", ["openai", "hosted_vllm", "anthropic"])


def options(rollout, dialect, version="") -> dict:
    return {"model": f"{dialect}/m", "api_base": rollout.url + version, "api_key": "any", "max_retries": 0}


@both
@pytest.mark.parametrize("version", ["", "/v1"])
def test_plain_and_streamed(rollout, dialect, version):
    asked = options(rollout, dialect, version) | {"messages": user(SAY)}
    reply = litellm.completion(**asked)
    chunks = list(litellm.completion(**asked, stream=True))
    streamed = litellm.stream_chunk_builder(chunks, messages=user(SAY))
    assert reply.usage.completion_tokens > 0 and reply.choices[0].finish_reason == "stop"
    rollout.assert_saw(seen_openai(reply.choices[0].message), seen_openai(streamed.choices[0].message))


@both
@pytest.mark.parametrize("streamed", [False, True])
def test_a_conversation_with_tools_is_one_row(rollout, dialect, streamed):
    functions = dict(zip(("add", "look_up"), rollout.tools(6), strict=True))
    messages, replies = user(CALL), []
    while True:
        reply = litellm.completion(
            **options(rollout, dialect), messages=messages, tools=OPENAI_TOOLS, stream=streamed, max_tokens=200
        )
        if streamed:
            reply = litellm.stream_chunk_builder(list(reply), messages=messages)
        message = reply.choices[0].message
        replies.append(seen_openai(message))
        if not message.tool_calls:
            break
        messages.append(message.model_dump())
        for call, (name, arguments) in zip(message.tool_calls, replies[-1][1], strict=True):
            messages.append({"role": "tool", "tool_call_id": call.id, "content": functions[name](**arguments)})
    assert len(replies) == 6 and len(rollout.finish()) == 1
    rollout.assert_saw(*replies)


@pytest.mark.parametrize("dialect", ["openai", "hosted_vllm"])
def test_a_thought_that_comes_back_beside_the_text_is_the_replys(rollout, dialect):
    messages = user(SAY)
    for _ in range(3):
        reply = litellm.completion(**options(rollout, dialect), messages=messages, extra_body=THINK)
        message = reply.choices[0].message
        assert message.reasoning_content.startswith("\nso ") and "think" not in message.content
        messages += [message.model_dump(), *user(SAY)]
    rollout.finish()
    assert [call.parent for call in rollout.calls] == [None, 0, 1]


@both
def test_structured_output(rollout, dialect):
    reply = litellm.completion(**options(rollout, dialect), messages=user(SAY), response_format=Sum)
    Sum.model_validate(json.loads(reply.choices[0].message.content))


@both
async def test_64_at_once(rollout, dialect):
    prompts = [f"{SAY} {i}" for i in range(64)]
    asked = [litellm.acompletion(**options(rollout, dialect), messages=user(prompt)) for prompt in prompts]
    replies = await asyncio.gather(*asked)
    rollout.finish()
    recorded = {call.messages[-1]["content"]: call.reply["content"] for call in rollout.calls}
    assert recorded == {
        prompt: reply.choices[0].message.content for prompt, reply in zip(prompts, replies, strict=True)
    }


@both
def test_errors(rollout, dialect):
    asked = options(rollout, dialect)
    with pytest.raises(litellm.AuthenticationError):
        litellm.completion(**asked | {"api_base": rollout.url[:-4] + "none"}, messages=user(SAY))
    with pytest.raises(litellm.ContextWindowExceededError):
        litellm.completion(**asked, messages=user("x" * 4096))
    if dialect != "anthropic":  # which has no `n`
        with rollout.running.one_waiting(), pytest.raises(litellm.RateLimitError):
            litellm.completion(**asked, messages=user(RAMBLE), n=64)
    assert litellm.completion(**asked, messages=user(SAY)).choices


@pytest.mark.parametrize("dialect", ["openai", "anthropic"])
def test_responses(rollout, dialect):
    """LiteLLM's responses interface, which it translates for the dialects that are not OpenAI's."""
    reply = litellm.responses(
        **options(rollout, dialect),
        input=CALL,
        tools=[{"type": "function", **tool["function"]} for tool in OPENAI_TOOLS],
    )
    assert [item.type for item in reply.output][-1] == "function_call"
