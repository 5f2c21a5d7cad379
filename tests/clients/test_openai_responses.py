"""The openai package's responses and completions."""

import asyncio
import json

import openai
import pytest

from .conftest import Sum
from .tasks import CALL, OPENAI_TOOLS, RAMBLE, SAY
from .test_openai import client_of

TOOLS = [{"type": "function", "strict": False, **tool["function"]} for tool in OPENAI_TOOLS]


def seen(response) -> tuple:
    calls = [(item.name, json.loads(item.arguments)) for item in response.output if item.type == "function_call"]
    return response.output_text, calls


@pytest.mark.parametrize("version", ["", "/v1"])
def test_plain_and_streamed(rollout, version):
    options = {"model": "m", "instructions": "Be brief."}
    with client_of(rollout.url + version) as client:
        reply = client.responses.create(input=SAY, **options)
        with client.responses.stream(input=SAY, **options) as stream:
            text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
            streamed = stream.get_final_response()
        cut = client.responses.create(input=[{"role": "user", "content": RAMBLE}], max_output_tokens=5, **options)
        assert client.responses.retrieve(cut.id).output_text == cut.output_text
    assert (reply.status, streamed.status, text) == ("completed", "completed", streamed.output_text)
    assert (cut.status, cut.incomplete_details.reason, cut.usage.output_tokens) == (
        "incomplete",
        "max_output_tokens",
        5,
    )
    rollout.assert_saw(seen(reply), seen(streamed), seen(cut))


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("history", ["items", "previous_response_id"])
def test_a_conversation_with_tools_is_one_row(rollout, streamed, history):
    """Six calls, each response sent back as the SDK made it, or known to the server."""
    functions = dict(zip(("add", "look_up"), rollout.tools(6), strict=True))
    options = {"model": "m", "tools": TOOLS, "instructions": "Use tools."}
    items, previous, replies = [{"role": "user", "content": CALL}], openai.omit, []
    with client_of(rollout.url) as client:
        while True:
            if streamed:
                with client.responses.stream(input=items, previous_response_id=previous, **options) as stream:
                    response = stream.get_final_response()
            else:
                response = client.responses.create(input=items, previous_response_id=previous, **options)
            replies.append(seen(response))
            made = [item for item in response.output if item.type == "function_call"]
            if not made:
                break
            results = [
                {
                    "type": "function_call_output",
                    "call_id": item.call_id,
                    "output": functions[item.name](**json.loads(item.arguments)),
                }
                for item in made
            ]
            if history == "items":
                items = [*items, *response.output, *results]
            else:
                items, previous = results, response.id
    assert len(replies) == 6 and len(rollout.finish()) == 1
    rollout.assert_saw(*replies)


def test_forced_tools_and_structured_output(rollout):
    with client_of(rollout.url) as client:
        for choice in ("required", {"type": "function", "name": "add"}):
            reply = client.responses.create(model="m", input=SAY, tools=TOOLS, tool_choice=choice)
            assert "function_call" in {item.type for item in reply.output}
        parsed = client.responses.parse(model="m", input=SAY, text_format=Sum)
        with client.responses.stream(model="m", input=SAY, text_format=Sum) as stream:
            streamed = stream.get_final_response()
    assert isinstance(parsed.output_parsed, Sum) and isinstance(streamed.output_parsed, Sum)
    rollout.finish()
    assert all(call.constrained for call in rollout.calls)


async def test_64_at_once(rollout):
    texts = {}
    async with openai.AsyncOpenAI(base_url=rollout.url, api_key="any", max_retries=0) as client:

        async def one(i: int) -> None:
            text = f"{RAMBLE if i % 8 == 7 else SAY} {i}"
            if i % 2 == 0:
                texts[i] = (await client.responses.create(model="m", input=text)).output_text
                return
            texts[i] = ""
            async with client.responses.stream(model="m", input=text) as stream:
                async for event in stream:
                    if event.type == "response.output_text.delta":
                        texts[i] += event.delta
                        if i % 8 == 7 and len(texts[i]) > 10:
                            break

        await asyncio.gather(*(one(i) for i in range(64)))
    rollout.wait_for_calls(64)
    assert len(rollout.finish()) == 64
    for call in rollout.calls:
        seen = texts[int(call.messages[0]["content"].split()[-1])]
        assert (
            call.reply["content"].startswith(seen)
            if call.finish_reason == "cancelled"
            else call.reply["content"] == seen
        )
    assert sum(call.finish_reason == "cancelled" for call in rollout.calls) == 8


def test_errors(rollout):
    with client_of(rollout.url[:-4] + "none") as client, pytest.raises(openai.AuthenticationError):
        client.responses.create(model="m", input=SAY)
    with client_of(rollout.url) as client:
        with pytest.raises(openai.BadRequestError, match="prompt is too long") as caught:
            client.responses.create(model="m", input="x" * 4096)
        assert caught.value.code == "context_length_exceeded"
        with pytest.raises(openai.BadRequestError, match="previous_response_id"):
            client.responses.create(model="m", input=SAY, previous_response_id="resp_none")
        with pytest.raises(openai.NotFoundError):
            client.responses.retrieve("resp_none")
        assert client.responses.create(model="m", input=SAY).output_text


@pytest.mark.parametrize("streamed", [False, True])
def test_completions(rollout, streamed):
    """Plain prompts: a text, several, ids; what comes back is decoded from what was recorded."""
    tokenizer = rollout.running.policy.tokenizer
    prompt = f"<|user|>{SAY}<|end|><|assistant|>"
    texts = []
    with client_of(rollout.url) as client:
        for asked in (prompt, tokenizer.encode(prompt), [prompt, prompt]):
            options = {"model": "m", "prompt": asked, "n": 2, "max_tokens": 40, "logprobs": 2}
            reply = client.completions.create(**options, stream=streamed)
            found: dict[int, str] = {}
            for part in reply if streamed else [reply]:
                for choice in part.choices:
                    found[choice.index] = found.get(choice.index, "") + choice.text
            texts += [found[i] for i in sorted(found)]
    rollout.finish()
    assert len(texts) == 8 == len(rollout.calls)
    assert all(call.prompt_ids.tolist() == tokenizer.encode(prompt) for call in rollout.calls)
    calls = sorted(rollout.calls, key=lambda call: call.index)
    assert [tokenizer.decode(call.sampled_ids, skip_special=True) for call in calls] == texts
