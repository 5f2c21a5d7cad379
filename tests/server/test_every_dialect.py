"""What every dialect must do alike, each in its own words."""

import json

import pytest

IMAGE = "data:image/png;base64,iVBORw0KGgo="
CALL = {"id": "c", "type": "function", "function": {"name": "look", "arguments": "{}"}}


def chat(content) -> tuple[str, dict]:
    return "/v1/chat/completions", {"model": "m", "max_tokens": 2, "messages": [{"role": "user", "content": content}]}


def responses(content) -> tuple[str, dict]:
    return "/v1/responses", {"model": "m", "max_output_tokens": 2, "input": [{"role": "user", "content": content}]}


def messages(content) -> tuple[str, dict]:
    return "/v1/messages", {"model": "m", "max_tokens": 2, "messages": [{"role": "user", "content": content}]}


def answered(path: str, body: dict, turns: list[dict]) -> tuple[str, dict]:
    """The request with what followed the question."""
    name = "input" if path.endswith("responses") else "messages"
    return path, body | {name: body[name] + turns}


ANTHROPIC_IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "iVBORw0KGgo="}}
ANTHROPIC_USE = {"role": "assistant", "content": [{"type": "tool_use", "id": "c", "name": "look", "input": {}}]}
REFUSED = {
    "chat image": chat([{"type": "image_url", "image_url": {"url": IMAGE}}]),
    "chat audio": chat(
        [{"type": "text", "text": "x"}, {"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}]
    ),
    "chat file": chat([{"type": "file", "file": {"file_id": "f"}}]),
    "chat tool image": answered(
        *chat("x"),
        [
            {"role": "assistant", "tool_calls": [CALL]},
            {"role": "tool", "tool_call_id": "c", "content": [{"type": "image_url", "image_url": {"url": IMAGE}}]},
        ],
    ),
    "chat spoken audio": (
        "/v1/chat/completions",
        chat("x")[1] | {"modalities": ["text", "audio"], "audio": {"voice": "a", "format": "wav"}},
    ),
    "responses image": responses([{"type": "input_image", "image_url": IMAGE, "detail": "auto"}]),
    "responses file": responses([{"type": "input_file", "file_id": "f"}]),
    "responses audio": responses([{"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}]),
    "responses tool image": answered(
        *responses("x"),
        [
            {"type": "function_call", "call_id": "c", "name": "look", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "c", "output": [{"type": "input_image", "image_url": IMAGE}]},
        ],
    ),
    "messages image": messages([ANTHROPIC_IMAGE]),
    "messages document": messages([{"type": "document", "source": {"type": "url", "url": "http://x/y.pdf"}}]),
    "messages tool image": answered(
        *messages("x"),
        [
            ANTHROPIC_USE,
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c", "content": [ANTHROPIC_IMAGE]}]},
        ],
    ),
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_text_is_refused(serving, case, stream):
    path, body = REFUSED[case]
    reply = serving.http.post(path, json=body | {"stream": stream})
    assert reply.status_code == 400
    said = reply.json()
    assert said["error"]["type"] == "invalid_request_error" and (said.get("type") == "error") == ("messages" in case)
    assert case.split()[-1] in said["error"]["message"]


@pytest.mark.parametrize("dialect", [chat, responses, messages])
def test_cached_tokens_are_counted_in_the_dialects_way(serving, dialect):
    path, body = dialect(f"{dialect.__name__} 0123456789 0123456789 0123456789 0123456789 0123456789 0123456789")

    def counts(usage: dict) -> tuple[int, int]:
        """(prompt tokens, those of them from the cache)"""
        if dialect is messages:
            cached = usage["cache_read_input_tokens"]
            return usage["input_tokens"] + usage.get("cache_creation_input_tokens", 0) + cached, cached
        name = "prompt_tokens" if dialect is chat else "input_tokens"
        return usage[name], usage[f"{name}_details"]["cached_tokens"]

    first, again = (counts(serving.http.post(path, json=body).json()["usage"]) for _ in range(2))
    assert first[1] < again[1] < again[0] == first[0]
    options = {"stream_options": {"include_usage": True}} if dialect is chat else {}
    streamed = serving.http.post(path, json=body | {"stream": True} | options)
    events = [json.loads(line[6:]) for line in streamed.text.splitlines() if line.startswith("data: {")]
    if dialect is chat:
        usages = [event["usage"] for event in events if event.get("usage")]
    elif dialect is responses:
        usages = [events[-1]["response"]["usage"]]
    else:
        usages = [event["usage"] for event in events if event["type"] == "message_delta"]
    assert [counts(usage) for usage in usages] == [again]


@pytest.mark.parametrize("dialect", [chat, responses, messages])
def test_what_the_server_cannot_handle_leaves_the_client_its_next_request(serving, monkeypatch, dialect):
    def fail(count):
        raise ZeroDivisionError("by accident")

    path, body = dialect("x")
    with monkeypatch.context() as patch:
        patch.setattr(serving.policy, "check_room", fail)
        failed = serving.http.post(path, json=body)
    assert failed.status_code == 500 and "by accident" in failed.text
    assert failed.headers["connection"] == "close"  # of a connection that is closed unsaid the next request is lost
    assert serving.http.post(path, json=body).status_code == 200


@pytest.mark.parametrize("dialect", [chat, responses, messages])
def test_more_of_the_likeliest_tokens_than_there_are_is_all_of_them(serving, dialect):
    """In an evaluation the agent decides, by numbers as large as JSON has them; what held is recorded."""
    job, leases, ids = serving.open(mode="evaluate")
    path, body = dialect("x")
    for top_k in (3, 2**31, 2**63):
        assert serving.http.post(serving.model_api(leases[0]) + path, json=body | {"top_k": top_k}).status_code == 200
    (record,) = serving.finish(job, leases, ids)
    vocab_size = serving.policy.config.vocab_size
    assert [call.top_k for call in record.calls] == [3, vocab_size, vocab_size]
