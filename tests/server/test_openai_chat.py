"""Chat completions, as the openai package sees them."""

import asyncio
import json

import openai
import pytest
from openai.types.chat import ChatCompletion

USER = [{"role": "user", "content": "2+2?"}]
TOOLS = [{"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object"}}}]


@pytest.fixture(scope="module")
def client(serving):
    return openai.OpenAI(base_url=f"{serving.url}/v1", api_key="any", max_retries=0)


def create(client, **options) -> ChatCompletion:
    options = {
        "model": "whatever",
        "messages": USER,
        "max_tokens": 12,
        "extra_body": {"return_token_ids": True},
    } | options
    reply = client.chat.completions.create(**options)
    ChatCompletion.model_validate(reply.model_dump(), strict=True)
    return reply


def test_a_reply_has_every_field_the_sdk_knows(client, serving):
    reply = create(client, logprobs=True, seed=1)
    (choice,) = reply.choices
    tokenizer = serving.policy.tokenizer
    assert reply.object == "chat.completion" and reply.model == "whatever" and reply.id.startswith("chatcmpl-")
    assert choice.finish_reason == "length" and choice.index == 0 and choice.message.role == "assistant"
    assert reply.prompt_token_ids == tokenizer.encode("<|user|>2+2?<|end|><|assistant|>")
    assert len(choice.token_ids) == 12 == reply.usage.completion_tokens
    assert reply.usage.prompt_tokens == len(reply.prompt_token_ids)
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + 12
    assert reply.usage.prompt_tokens_details.cached_tokens >= 0
    assert choice.message.content == tokenizer.decode(choice.token_ids, skip_special=True)
    assert [bytes(entry.bytes) for entry in choice.logprobs.content] == [
        tokenizer.token_bytes(i) for i in choice.token_ids
    ]
    assert all(entry.logprob <= 0 for entry in choice.logprobs.content)
    assert create(client).choices[0].logprobs is None


def test_seed_temperature_and_n(client):
    same = [create(client, seed=5, n=3) for _ in range(2)]
    ids = [[choice.token_ids for choice in reply.choices] for reply in same]
    assert ids[0] == ids[1]
    assert len({tuple(i) for i in ids[0]}) == 3, "samples of one request differ"
    assert same[0].usage.completion_tokens == 36
    unseeded = [create(client).choices[0].token_ids for _ in range(2)]
    assert unseeded[0] != unseeded[1], "the root samples at temperature 1 unless asked otherwise"
    greedy = create(client, temperature=0, n=2)
    assert greedy.choices[0].token_ids == greedy.choices[1].token_ids
    for top_p in (0, 1e-6):
        assert create(client, top_p=top_p).choices[0].token_ids == greedy.choices[0].token_ids
    assert create(client, extra_body={"top_k": 1, "return_token_ids": True}).choices[0].token_ids == (
        greedy.choices[0].token_ids
    )


def test_max_tokens_is_clamped_and_max_completion_tokens_wins(client, serving):
    assert create(client, max_tokens=7).usage.completion_tokens == 7
    assert create(client, max_tokens=7, max_completion_tokens=3).usage.completion_tokens == 3
    long = create(client, max_tokens=100_000)
    assert long.usage.total_tokens == serving.policy.max_seq_len
    assert long.choices[0].finish_reason == "length"
    default = create(client, max_tokens=None)
    assert default.usage.completion_tokens == serving.config.sampler.max_tokens


def test_stop_strings(client):
    free = create(client, seed=2, max_tokens=60).choices[0]
    text = free.message.content
    stop = next(
        text[i : i + 2] for i in range(20, 50) if text[i : i + 2].isprintable() and "\ufffd" not in text[i : i + 2]
    )
    cut = create(client, seed=2, max_tokens=60, stop=["never there \x00", stop])
    assert cut.choices[0].message.content == text[: text.index(stop)]
    assert cut.choices[0].finish_reason == "stop"
    kept = cut.choices[0].token_ids
    assert free.token_ids[: len(kept)] == kept and len(kept) < 60
    assert create(client, seed=2, max_tokens=60, stop=stop).choices[0].message.content == cut.choices[0].message.content


def test_message_forms(client, serving):
    parts = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
    ]
    plain = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "a\nb"}]
    assert create(client, messages=parts).prompt_token_ids == create(client, messages=plain).prompt_token_ids


@pytest.mark.parametrize(
    "options, text",
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "image_url"),
        ({"messages": [{"role": "king", "content": "x"}]}, "king"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"n": 0}, "n: "),
        ({"max_tokens": 0}, "max_tokens"),
        ({"stop": [""]}, "stop"),
        ({"logit_bias": {"five": 1}}, "logit_bias"),
        ({"presence_penalty": 2.5}, "presence_penalty"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": "maybe"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "custom"}}, "tool_choice"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"top_logprobs": 21, "logprobs": True}, "top_logprobs"),
        ({"extra_body": {"min_p": 0.1}}, "min_p"),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}]}, "input_audio"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
    ],
)
def test_what_cannot_be_done_is_said(client, options, text):
    with pytest.raises(openai.BadRequestError, match=text) as caught:
        create(client, **options)
    assert caught.value.type == "invalid_request_error" and caught.value.param.split(".")[0].split("[")[0] in {
        *options,
        "min_p",
    }


def test_what_changes_nothing_is_accepted(client):
    create(
        client,
        stream=False,
        presence_penalty=0.0,
        frequency_penalty=0,
        logit_bias={},
        response_format={"type": "text"},
        user="somebody",
        metadata={"a": "b"},
        store=False,
        tools=TOOLS,
        tool_choice="auto",
        parallel_tool_calls=True,
    )


def test_a_body_that_is_no_json(serving):
    reply = serving.http.post("/v1/chat/completions", content=b"{nope")
    assert reply.status_code == 400 and reply.json()["error"]["type"] == "invalid_request_error"
    reply = serving.http.post("/v1/chat/completions", content=b"[1]")
    assert reply.status_code == 400 and "error" in reply.json()


def test_a_prompt_that_does_not_fit(client, serving):
    with pytest.raises(openai.BadRequestError, match="context length is 256") as caught:
        create(client, messages=[{"role": "user", "content": "x" * 300}])
    assert caught.value.code == "context_length_exceeded"
    room_for_one = 256 - 1 - len(serving.policy.tokenizer.encode("<|user|><|end|><|assistant|>"))
    assert create(client, messages=[{"role": "user", "content": "x" * room_for_one}]).usage.completion_tokens == 1


async def test_a_full_queue_is_a_429_with_retry_after(serving):
    async with openai.AsyncOpenAI(base_url=serving.url, api_key="any", max_retries=0) as client:
        calls = [client.chat.completions.create(model="m", messages=USER, max_tokens=50, seed=i) for i in range(160)]
        replies = await asyncio.gather(*calls, return_exceptions=True)
    refused = [reply for reply in replies if isinstance(reply, openai.RateLimitError)]
    served = [reply for reply in replies if isinstance(reply, ChatCompletion)]
    assert refused and served and len(refused) + len(served) == 160
    assert all(int(error.response.headers["retry-after"]) >= 1 for error in refused)
    assert all(reply.usage.completion_tokens == 50 for reply in served)


def test_a_refused_request_leaves_the_queue_as_it_was(client, serving):
    """Its samples wait all or none: those before the one too many once kept others out until the next round."""
    with serving.one_waiting():
        with pytest.raises(openai.RateLimitError, match="60 more came together, and no more than 60"):
            create(client, n=60)
        assert serving.policy._engine.stats()["queue_length"] == 1
    assert len(create(client, n=60).choices) == 60


def test_every_prefix(serving):
    for prefix in ("", "/v1", "/v1/v1"):
        with openai.OpenAI(base_url=serving.url + prefix, api_key="any", max_retries=0) as client:
            assert create(client).choices
            assert [model.id for model in client.models.list()] == [serving.policy.name]


def test_tool_calls(serving_tools):
    client = openai.OpenAI(base_url=f"{serving_tools.url}/v1", api_key="any", max_retries=0)
    reply = create(client, tools=TOOLS, temperature=0)
    (choice,) = reply.choices
    assert choice.finish_reason == "tool_calls" and choice.message.content is None
    (call,) = choice.message.tool_calls
    assert call.type == "function" and call.function.name == "add" and call.id
    assert json.loads(call.function.arguments) == {"a": 2, "b": [3, "x"]}
    assert create(client, tools=TOOLS, tool_choice="none", temperature=0).choices[0].finish_reason == "stop"
    text = create(client, temperature=0).choices[0].message.content
    assert text.startswith('<tool_call>{"name": "add"'), "nobody offered tools, so this is text"
