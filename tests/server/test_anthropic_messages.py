"""Messages, as the anthropic package sees them."""

import itertools

import anthropic
import pytest
from anthropic.types import Message

USER = [{"role": "user", "content": "2+2?"}]
TOOLS = [{"name": "add", "description": "Adds.", "input_schema": {"type": "object"}}]

GREEDY = {"temperature": 0}  # current SDKs have no argument for it


@pytest.fixture(scope="module")
def client(serving):
    return anthropic.Anthropic(base_url=serving.url, api_key="any", max_retries=0)


def create(client, **options) -> Message:
    options = {"model": "whatever", "messages": USER, "max_tokens": 12} | options
    options["extra_body"] = {"return_token_ids": True} | options.get("extra_body", {})
    reply = client.messages.create(**options)
    Message.model_validate(reply.model_dump(), strict=True)
    return reply


def test_a_reply_has_every_field_the_sdk_knows(client, serving):
    reply = create(client)
    (block,) = reply.content
    tokenizer = serving.policy.tokenizer
    assert (reply.type, reply.role, reply.model) == ("message", "assistant", "whatever") and reply.id.startswith("msg_")
    assert reply.stop_reason == "max_tokens" and reply.stop_sequence is None
    assert block.type == "text" and block.text == tokenizer.decode(reply.token_ids, skip_special=True)
    assert reply.prompt_token_ids == tokenizer.encode("<|user|>2+2?<|end|><|assistant|>")
    usage = reply.usage
    assert usage.output_tokens == 12
    assert usage.input_tokens + usage.cache_read_input_tokens == len(reply.prompt_token_ids)


def test_content_blocks_are_the_same_chat(client, serving):
    tokenizer = serving.policy.tokenizer
    history = [
        {"role": "user", "content": [{"type": "text", "text": "What is "}, {"type": "text", "text": "2+3?"}]},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "hm", "signature": "s"},
                {"type": "text", "text": "Let me see."},
                {"type": "tool_use", "id": "t1", "name": "add", "input": {"a": 2, "b": 3}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "5"}]},
                {"type": "tool_result", "tool_use_id": "t2", "content": "no such", "is_error": True},
                {"type": "text", "text": "So?"},
            ],
        },
    ]
    reply = create(client, messages=history, system=[{"type": "text", "text": "Be brief."}])
    text = tokenizer.decode(reply.prompt_token_ids)
    assert text == (
        "<|system|>Be brief.<|end|><|user|>What is 2+3?<|end|>"
        '<|assistant|>Let me see.<tool_call>{"name": "add", "arguments": {"a": 2, "b": 3}}</tool_call><|end|>'
        "<|tool|>5<|end|><|tool|>Error: no such<|end|><|user|>So?<|end|><|assistant|>"
    )


def test_system_messages_stand_where_they_are_sent(client, serving):
    history = [
        *USER,
        {"role": "system", "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "kind."}]},
        {"role": "assistant", "content": "4"},
        {"role": "system", "content": []},
        {"role": "user", "content": "3+3?"},
        {"role": "system", "content": "Count."},
        {"role": "system", "content": ""},
    ]
    reply = create(client, messages=history, system="Be brief.")
    assert serving.policy.tokenizer.decode(reply.prompt_token_ids) == (
        "<|system|>Be brief.<|end|><|user|>2+2?<|end|><|system|>Be kind.<|end|>"
        "<|assistant|>4<|end|><|user|>3+3?<|end|><|system|>Count.<|end|><|assistant|>"
    )
    counted = client.messages.count_tokens(model="m", messages=history, system="Be brief.")
    assert counted.input_tokens == len(reply.prompt_token_ids)


def test_litellms_words_for_an_empty_text_are_none(serving_tools):
    """As LiteLLM 1.106 sends a call without text back: the conversation goes on from the call's own ids."""
    job, leases, ids = serving_tools.open()
    with anthropic.Anthropic(base_url=serving_tools.model_api(leases[0]), api_key="x", max_retries=0) as agent:
        (call,) = create(agent, tools=TOOLS).content
        empty = {"type": "text", "text": "[System: Empty message content sanitised to satisfy protocol]"}
        result = {"type": "tool_result", "tool_use_id": call.id, "content": "5"}
        turns = [{"role": "assistant", "content": [empty, call]}, {"role": "user", "content": [result]}]
        create(agent, messages=[*USER, *turns], tools=TOOLS)
    (record,) = serving_tools.finish(job, leases, ids)
    assert [call.parent for call in record.calls] == [None, 0]


def test_stop_sequences(client):
    free = create(client, max_tokens=60, extra_body=GREEDY)
    text = free.content[0].text
    stop = next(
        text[i : i + 2] for i in range(10, 50) if text[i : i + 2].isprintable() and "\ufffd" not in text[i : i + 2]
    )
    cut = create(client, max_tokens=60, extra_body=GREEDY, stop_sequences=["\x00never", stop])
    assert (cut.stop_reason, cut.stop_sequence) == ("stop_sequence", stop)
    assert "".join(block.text for block in cut.content) == text[: text.index(stop)]


@pytest.mark.parametrize("stream", [True, False])
def test_a_stop_sequence_that_is_a_special_token(serving, stream):
    """The text never shows it, and it ends the reply all the same."""
    special = ["<|pad|>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>"]
    options = {"messages": USER, "max_tokens": 200, "stop_sequences": special, "model": "m"}
    options["extra_body"] = {"temperature": 1.5, "return_token_ids": True}
    job, leases, ids = serving.open(mode="evaluate")
    with anthropic.Anthropic(base_url=serving.model_api(leases[0]), api_key="x", max_retries=0) as agent:
        if stream:
            with agent.messages.stream(**options) as events:
                reply = events.get_final_message()
        else:
            reply = agent.messages.create(**options)
    (record,) = serving.finish(job, leases, ids)
    (call,) = record.calls
    *before, last = call.sampled_ids.tolist()
    tokenizer = serving.policy.tokenizer
    assert tokenizer.decode([last]) in special and not {*tokenizer.encode("".join(special))} & {*before}
    assert (reply.stop_reason, reply.stop_sequence) == ("stop_sequence", tokenizer.decode([last]))
    assert "".join(block.text for block in reply.content) == tokenizer.decode(before)


def test_tool_use(serving_tools):
    client = anthropic.Anthropic(base_url=serving_tools.url, api_key="any", max_retries=0)
    reply = create(client, tools=TOOLS)
    (block,) = reply.content
    assert reply.stop_reason == "tool_use"
    assert (block.type, block.name, block.input) == ("tool_use", "add", {"a": 2, "b": [3, "x"]})
    plain = create(client, tools=TOOLS, tool_choice={"type": "none"})
    assert plain.stop_reason == "end_turn" and plain.content[0].text.startswith("<tool_call>")


@pytest.mark.parametrize(
    "options, text",
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "role"),
        ({"messages": [{"role": "system", "content": ""}]}, "at least one message"),
        ({"messages": [*USER, {"role": "system", "content": "x", "clear_at": "next_user_message"}]}, "clear_at"),
        ({"messages": [{"role": "system", "content": [{"type": "image", "source": {}}]}]}, "image"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "image"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "text: must be a str"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "some"}}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": ["any"]}}, "tool_choice"),
        (
            {"messages": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t1", "content": 5}]}]},
            "content: must be a text",
        ),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "web_search"),
        ({"extra_body": {"temperature": -1}}, "temperature"),
        ({"extra_body": {"stop_sequences": [""]}}, "stop_sequences"),
        ({"messages": [{"role": "user", "content": "x" * 300}]}, "context length is 256"),
    ],
)
def test_what_cannot_be_done_is_said(client, options, text):
    with pytest.raises(anthropic.BadRequestError, match=text) as caught:
        create(client, **options)
    body = caught.value.body
    assert body["type"] == "error" and body["error"]["type"] == "invalid_request_error" and body["request_id"]


def test_every_prefix(serving):
    for prefix in ("", "/v1"):  # this SDK appends one more
        with anthropic.Anthropic(base_url=serving.url + prefix, api_key="any", max_retries=0) as client:
            assert create(client).content
            assert [model.id for model in client.models.list()] == [serving.policy.name]
    body = {"messages": USER, "max_tokens": 1}
    assert serving.http.post("/messages", json=body).status_code == 200


def test_count_tokens(client, serving):
    tools = {"tools": TOOLS, "system": "Be brief."}
    counted = client.messages.count_tokens(model="m", messages=USER, **tools)
    assert counted.input_tokens == len(create(client, **tools).prompt_token_ids)
    job, leases, ids = serving.open()
    with anthropic.Anthropic(base_url=serving.model_api(leases[0]), api_key="x", max_retries=0) as agent:
        reply = create(agent)
        turns = [*USER, {"role": "assistant", "content": reply.content}, {"role": "user", "content": "Why?"}]
        counted = agent.messages.count_tokens(model="m", messages=turns)
        assert counted.input_tokens == len(create(agent, messages=turns).prompt_token_ids)
    serving.finish(job, leases, ids)


def test_prefill(client, serving):
    """A last message of the assistant is the beginning of the reply, which is what follows it."""
    tokenizer = serving.policy.tokenizer
    begun = [*USER, {"role": "assistant", "content": "The sum is"}]
    reply = create(client, messages=begun)
    assert tokenizer.decode(reply.prompt_token_ids) == "<|user|>2+2?<|end|><|assistant|>The sum is"
    job, leases, ids = serving.open()
    with anthropic.Anthropic(base_url=serving.model_api(leases[0]), api_key="x", max_retries=0) as agent:
        text = "The sum is" + create(agent, messages=begun).content[0].text
        create(agent, messages=[*USER, {"role": "assistant", "content": text}, {"role": "user", "content": "Why?"}])
    (record,) = serving.finish(job, leases, ids)
    assert [call.parent for call in record.calls] == [None, 0] and record.calls[0].reply["content"] == text


def test_a_prefilled_reply_goes_on_and_on(serving):
    """Each call extends the one before to the token, wherever `max_tokens` cut it."""
    job, leases, ids = serving.open()
    with anthropic.Anthropic(base_url=serving.model_api(leases[0]), api_key="x", max_retries=0) as agent:
        text = "One, two"
        for _ in range(4):
            text += (
                create(agent, messages=[*USER, {"role": "assistant", "content": text}], max_tokens=5).content[0].text
            )
    (record,) = serving.finish(job, leases, ids)
    assert [call.parent for call in record.calls] == [None, 0, 1, 2]
    for earlier, call in itertools.pairwise(record.calls):
        assert call.prompt_ids.tolist() == [*earlier.prompt_ids, *earlier.sampled_ids]


def test_an_empty_system_message_behind_a_reply_makes_it_no_prefill(client, serving):
    messages = [*USER, {"role": "assistant", "content": "Four."}]
    reply = create(client, messages=[*messages, {"role": "system", "content": ""}])
    assert serving.policy.tokenizer.decode(reply.prompt_token_ids).endswith("Four.<|end|><|assistant|>")


def test_what_changes_nothing_is_accepted(client):
    create(
        client,
        thinking={"type": "enabled", "budget_tokens": 1024},
        metadata={"user_id": "u"},
        service_tier="auto",
        tools=TOOLS,
        tool_choice={"type": "auto"},
        extra_body={"stop_sequences": []},
    )
