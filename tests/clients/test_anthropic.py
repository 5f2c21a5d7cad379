"""The anthropic package."""

import asyncio

import anthropic
import pytest

from .conftest import Sum
from .tasks import ANTHROPIC_TOOLS, CALL, RAMBLE, SAY, seen_anthropic, user


def client_of(url, **options) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=url, **{"api_key": "any", "max_retries": 0} | options)


def create(client, messages, **options):
    return client.messages.create(**{"model": "m", "max_tokens": 200, "messages": messages} | options)


@pytest.mark.parametrize("base", ["", "/v1"])
@pytest.mark.parametrize("key", ["api_key", "auth_token"])
def test_plain(rollout, base, key):
    with anthropic.Anthropic(base_url=rollout.url + base, max_retries=0, **{key: "any"}) as client:
        reply = create(client, user(SAY), system="Be brief.")
        parts = [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}]
        cut = create(client, user(RAMBLE), system=parts, max_tokens=5)
        counted = client.messages.count_tokens(model="m", messages=user(RAMBLE), system="Be brief.")
    assert (reply.stop_reason, cut.stop_reason) == ("end_turn", "max_tokens")
    usage = cut.usage
    assert counted.input_tokens == usage.input_tokens + usage.cache_read_input_tokens and usage.output_tokens == 5
    rollout.assert_saw(seen_anthropic(reply), seen_anthropic(cut))


def test_streams(rollout):
    replies = []
    with client_of(rollout.url) as client:
        for text in (SAY, CALL):
            asked = {"model": "m", "max_tokens": 200, "messages": user(text), "tools": ANTHROPIC_TOOLS}
            with client.messages.stream(**asked) as stream:
                pieces = [event.delta.text for event in stream if event.type == "content_block_delta" and text == SAY]
                message = stream.get_final_message()
            replies.append(seen_anthropic(message))
            assert text == CALL or "".join(pieces) == replies[-1][0]
            assert message.stop_reason == ("tool_use" if text == CALL else "end_turn")
    rollout.assert_saw(*replies)


def test_stop_sequences(rollout):
    with client_of(rollout.url) as client:
        reply = create(client, user(RAMBLE), stop_sequences=["c", "zz"])
    assert (reply.stop_reason, reply.stop_sequence) == ("stop_sequence", "c")
    rollout.assert_saw(seen_anthropic(reply))


@pytest.mark.parametrize("streamed", [False, True])
def test_a_conversation_with_tools_is_one_row(rollout, streamed):
    """Six calls, each reply sent back as the SDK made it."""
    functions = dict(zip(("add", "look_up"), rollout.tools(6), strict=True))
    messages, replies = user(CALL), []
    with client_of(rollout.url) as client:
        while True:
            options = {"tools": ANTHROPIC_TOOLS, "system": "Use tools."}
            if streamed:
                with client.messages.stream(model="m", max_tokens=200, messages=messages, **options) as stream:
                    message = stream.get_final_message()
            else:
                message = create(client, messages, **options)
            replies.append(seen_anthropic(message))
            if message.stop_reason != "tool_use":
                break
            results = [
                {"type": "tool_result", "tool_use_id": block.id, "content": functions[block.name](**block.input)}
                for block in message.content
                if block.type == "tool_use"
            ]
            messages += [{"role": "assistant", "content": message.content}, {"role": "user", "content": results}]
    assert len(replies) == 6 and len(rollout.finish()) == 1
    rollout.assert_saw(*replies)


def test_the_tool_runner_makes_one_row(rollout):
    """The SDK's own loop, in which a tool fails now and then."""
    functions = dict(zip(("add", "look_up"), rollout.tools(6), strict=True))

    @anthropic.beta_tool
    def add(a: int, b: int) -> str:
        """Adds two numbers.

        Args:
            a: one number.
            b: the other.
        """
        if rollout.num_calls == 2:
            raise ValueError("(call) the adder is out of order")
        return functions["add"](a, b)

    with client_of(rollout.url) as client:
        runner = client.beta.messages.tool_runner(
            model="m", max_tokens=200, messages=user(CALL), tools=[add, anthropic.beta_tool(functions["look_up"])]
        )
        replies = [seen_anthropic(message) for message in runner]
    assert len(replies) == 6 and len(rollout.finish()) == 1
    rollout.assert_saw(*replies)


def test_a_rewritten_history_is_more_rows(rollout):
    with client_of(rollout.url) as client:
        messages = user(SAY)
        for _ in range(3):
            reply = create(client, messages)
            messages += [{"role": "assistant", "content": reply.content}, *user("And?")]
        create(client, messages[2:])
    assert len(rollout.finish()) == 2


def test_a_prefill_is_written_on(rollout):
    with client_of(rollout.url) as client:
        cut = create(client, user(RAMBLE), max_tokens=9)
        begun = [*user(RAMBLE), {"role": "assistant", "content": cut.content}]
        create(client, begun, max_tokens=9)
        create(client, [*user(SAY), {"role": "assistant", "content": "I say"}])
    rollout.finish()
    assert [call.parent for call in rollout.calls] == [None, 0, None]


@pytest.mark.parametrize(
    "choice", [{"type": "any", "disable_parallel_tool_use": True}, {"type": "tool", "name": "add"}]
)
def test_forced_tools(rollout, choice):
    with client_of(rollout.url) as client:
        message = create(client, user(SAY), tools=ANTHROPIC_TOOLS, tool_choice=choice)
        text = create(client, user(CALL), tools=ANTHROPIC_TOOLS, tool_choice={"type": "none"})
    block = message.content[-1]
    assert block.type == "tool_use" and (choice["type"] == "any" or block.name == "add")
    assert [block.type for block in text.content] == ["text"] and "<tool_call>" in text.content[0].text
    rollout.assert_saw(seen_anthropic(message), seen_anthropic(text))
    assert [call.constrained for call in rollout.calls] == [True, False]


def test_structured_output(rollout):
    with client_of(rollout.url) as client:
        options = {"model": "m", "max_tokens": 200, "messages": user(SAY), "output_format": Sum}
        reply = client.messages.parse(**options)
        with client.messages.stream(**options) as stream:
            streamed = stream.get_final_message()
    assert isinstance(reply.parsed_output, Sum) and isinstance(streamed.parsed_output, Sum)
    rollout.finish()
    assert all(call.constrained for call in rollout.calls)


def test_a_system_message_behind_a_users(rollout):
    system = {"role": "system", "content": [{"type": "text", "text": "Be brief.", "cache_control": None}]}
    messages = [*user(SAY), {"role": "assistant", "content": "So."}, *user(SAY), system]
    with client_of(rollout.url) as client:
        reply = create(client, messages, system="Be kind.")
        counted = client.messages.count_tokens(model="m", messages=messages, system="Be kind.")
    assert counted.input_tokens == reply.usage.input_tokens + reply.usage.cache_read_input_tokens
    rollout.assert_saw(seen_anthropic(reply))
    assert [message["role"] for message in rollout.calls[0].messages] == "system user assistant user system".split()


def test_thoughts_and_other_blocks_of_the_past_are_accepted(rollout):
    """An agent that moved here from another model brings its history along."""
    thinking = {"type": "thinking", "thinking": "Hm.", "signature": "x"}
    call = {"type": "tool_use", "id": "toolu_1", "name": "add", "input": {"a": 1, "b": 2}}
    result = {"type": "tool_result", "tool_use_id": "toolu_1", "content": [{"type": "text", "text": "3"}]}
    messages = [
        *user(SAY),
        {"role": "assistant", "content": [thinking, {"type": "text", "text": "So:"}, call]},
        {"role": "user", "content": [result | {"is_error": True}, {"type": "text", "text": "Go on."}]},
    ]
    with client_of(rollout.url) as client:
        create(client, messages, tools=ANTHROPIC_TOOLS, thinking={"type": "enabled", "budget_tokens": 1024})


async def test_64_at_once(rollout):
    texts = {}
    async with anthropic.AsyncAnthropic(base_url=rollout.url, api_key="any", max_retries=0) as client:

        async def one(i: int) -> None:
            if i % 8 == 7:
                options = {"model": "m", "max_tokens": 1000, "messages": user(f"(ramble) {i}")}
                texts[i] = ""
                async with client.messages.stream(**options) as stream:
                    async for text in stream.text_stream:
                        texts[i] += text
                        if len(texts[i]) > 10:
                            break
            elif i % 2:
                async with client.messages.stream(model="m", max_tokens=200, messages=user(f"(say) {i}")) as stream:
                    texts[i] = await stream.get_final_text()
            else:
                reply = await client.messages.create(model="m", max_tokens=200, messages=user(f"(say) {i}"))
                texts[i] = reply.content[0].text

        await asyncio.gather(*(one(i) for i in range(64)))
    rollout.wait_for_calls(64)
    assert len(rollout.finish()) == 64
    for call in rollout.calls:
        seen = texts[int(call.messages[0]["content"].split()[1])]
        text = rollout.running.policy.tokenizer.decode(call.sampled_ids, skip_special=True)
        assert text.startswith(seen) if call.finish_reason == "cancelled" else text == seen
    assert sum(call.finish_reason == "cancelled" for call in rollout.calls) == 8


def test_errors_are_the_sdks_own(rollout):
    with client_of(rollout.url[:-4] + "none") as client, pytest.raises(anthropic.AuthenticationError):
        create(client, user(SAY))
    with client_of(rollout.url) as client:
        with pytest.raises(anthropic.BadRequestError, match="prompt is too long") as caught:
            create(client, user("x" * 4096))
        assert caught.value.body["error"]["type"] == "invalid_request_error"
        with pytest.raises(anthropic.BadRequestError, match="image"):
            source = {"type": "base64", "media_type": "image/png", "data": "AAAA"}
            create(client, user([{"type": "image", "source": source}]))
        with pytest.raises(anthropic.BadRequestError, match="max_tokens"):
            create(client, user(SAY), max_tokens=0)
        assert create(client, user(SAY)).content

        async def flood():
            async with anthropic.AsyncAnthropic(base_url=rollout.url, api_key="any", max_retries=0) as many:
                asked = [many.messages.create(model="m", max_tokens=100, messages=user(RAMBLE)) for _ in range(250)]
                return await asyncio.gather(*asked, return_exceptions=True)

        refused = [error for error in asyncio.run(flood()) if isinstance(error, Exception)]
    assert refused and {type(error) for error in refused} == {anthropic.RateLimitError}
    assert refused[0].response.headers["retry-after"] == "1"
