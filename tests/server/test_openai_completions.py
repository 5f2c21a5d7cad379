"""Completions, as the openai package sees them."""

import json

import httpx
import openai
import pytest
from openai.types import Completion

from lightning_jax.model import weights

from .conftest import full_logprobs

IDS = {"return_token_ids": True}


@pytest.fixture(scope="module")
def client(serving):
    with openai.OpenAI(base_url=f"{serving.url}/v1", api_key="any", max_retries=0) as client:
        yield client


def create(client, prompt="One two", **options) -> Completion:
    body = IDS | options.pop("extra_body", {})
    reply = client.completions.create(
        **{"model": "m", "prompt": prompt, "max_tokens": 12, "extra_body": body} | options
    )
    Completion.model_validate(reply.model_dump(), strict=True)
    return reply


def test_a_reply_has_every_field_the_sdk_knows(client, serving):
    tokenizer = serving.policy.tokenizer
    reply = create(client, logprobs=2, seed=3)
    (choice,) = reply.choices
    assert reply.object == "text_completion" and reply.id.startswith("cmpl-") and choice.finish_reason == "length"
    assert choice.prompt_token_ids == tokenizer.encode_beginning("One two")
    assert choice.text == tokenizer.decode(choice.token_ids, skip_special=True)
    logprobs = choice.logprobs
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.text_offset) == 12
    for token, logprob, top in zip(logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True):
        assert top[token] == logprob and 2 <= len(top) <= 3 and logprob <= max(top.values()) + 1e-4
    assert reply.usage.completion_tokens == 12
    assert reply.usage.total_tokens == len(choice.prompt_token_ids) + 12
    assert create(client, max_tokens=None).usage.completion_tokens == 16, "the API's default"


def test_every_form_of_prompt(client, serving):
    ids = serving.policy.tokenizer.encode_beginning("One two")
    greedy = create(client, temperature=0)
    text = greedy.choices[0].text
    assert create(client, ids, temperature=0).choices[0].text == text
    several = create(client, ["One two", "Three"], temperature=0, n=2)
    assert [choice.index for choice in several.choices] == [0, 1, 2, 3]
    assert several.choices[0].text == several.choices[1].text == text != several.choices[2].text
    assert several.usage.completion_tokens == 48
    batch = create(client, [ids, ids[:2]], temperature=0)
    assert [choice.prompt_token_ids for choice in batch.choices] == [ids, ids[:2]]
    assert create(client, echo=True, temperature=0).choices[0].text == "One two" + text
    assert create(client, ids, echo=True, temperature=0).choices[0].text == "One two" + text


@pytest.mark.parametrize("max_tokens", [0, 6])
def test_an_echoed_prompt_has_log_probs(client, random_model, max_tokens):
    """The first token's are null; the others are those of a plain forward over prompt and reply."""
    options = {"echo": True, "logprobs": 3, "max_tokens": max_tokens, "n": 2, "seed": 1}
    # Not held against the package's type, which does not know of the documented null.
    reply = client.completions.create(model="m", prompt="One two", extra_body=IDS, **options)
    assert [choice.index for choice in reply.choices] == [0, 1] and reply.usage.completion_tokens == 2 * max_tokens
    config, params = weights.load_model(random_model)
    for choice in reply.choices:
        ids, logprobs = [*choice.prompt_token_ids, *choice.token_ids], choice.logprobs
        expected_tv = full_logprobs(config, params, ids)[:-1]
        expected_t = expected_tv[range(len(ids) - 1), ids[1:]].tolist()
        assert len(choice.token_ids) == max_tokens and choice.text.startswith("One two")
        assert logprobs.token_logprobs[0] is None and logprobs.top_logprobs[0] is None
        assert logprobs.token_logprobs[1:] == pytest.approx(expected_t, abs=1e-4)
        for top, expected_v in zip(logprobs.top_logprobs[1:], expected_tv, strict=True):
            assert max(top.values()) == pytest.approx(expected_v.max(), abs=1e-4) and 3 <= len(top) <= 4
        assert logprobs.text_offset[:7] == list(range(7)) and "".join(logprobs.tokens[:7]) == "One two"
    chunks = list(client.completions.create(model="m", prompt="One two", stream=True, **options))
    for i, choice in enumerate(reply.choices):
        mine = [c.logprobs for chunk in chunks for c in chunk.choices if c.index == i]
        offsets = [x for piece in mine for x in piece.text_offset]
        assert offsets[:8] == choice.logprobs.text_offset[:8] == list(range(8))[: 7 + max_tokens]
        streamed = [x for piece in mine for x in piece.token_logprobs]
        assert streamed[0] is None and streamed[1:] == pytest.approx(choice.logprobs.token_logprobs[1:], abs=1e-5)


def test_a_text_offset_is_where_the_token_stands(client, serving):
    """Behind a character of several tokens, and behind a special token that the text leaves out."""
    options = {"model": "m", "prompt": "é🙂 hi", "echo": True, "logprobs": 0, "max_tokens": 100, "seed": 1}
    # Not held against the package's type, which does not know of the documented null.
    choice = client.completions.create(**options).choices[0]
    tokens, offsets = choice.logprobs.tokens, choice.logprobs.text_offset
    assert offsets[:9] == [0, 0, 1, 1, 1, 1, 2, 3, 4]
    hidden = [i for i, token in enumerate(tokens) if token.startswith("<|")]
    assert hidden and any(token.startswith("bytes:") for token in tokens[9:])
    for i, (token, offset) in enumerate(zip(tokens, offsets, strict=True)):
        if i not in hidden and not token.startswith("bytes:"):
            assert choice.text[offset:].lstrip("\ufffd").startswith(token)
    chunks = list(client.completions.create(**options, stream=True))
    pieces = [chunk.choices[0].logprobs.text_offset for chunk in chunks]
    assert len(pieces) > 5 and [offset for piece in pieces for offset in piece] == offsets
    plain = client.completions.create(**options | {"echo": False}).choices[0]
    assert plain.logprobs.text_offset == [offset - 5 for offset in offsets[9:]]


def test_a_stop_string_around_a_token_that_the_text_leaves_out(client, serving):
    """What cuts the text ends the sample, too: nothing is sampled that the agent never sees."""
    tokenizer, found = serving.policy.tokenizer, None
    for seed in range(20):
        options = {"max_tokens": 100, "seed": seed}
        ids = create(client, **options).choices[0].token_ids
        texts = [tokenizer.decode([i], skip_special=True) for i in ids]
        for i in range(1, 99):
            stop, before = texts[i - 1] + texts[i + 1], "".join(texts[: i - 1])
            if not texts[i] and len(stop) == 2 and stop.isascii() and stop.isprintable() and stop not in before:
                found = options, ids, i, stop
    options, ids, i, stop = found
    cut = create(client, stop=stop, **options).choices[0]
    assert cut.finish_reason == "stop" and cut.token_ids == ids[: i + 2]
    assert cut.text == tokenizer.decode(ids[: i - 1], skip_special=True)


def test_a_stream_is_the_reply_in_pieces(client):
    options = {"prompt": ["One", "Two"], "n": 2, "seed": 5, "echo": True}
    whole = create(client, **options)
    chunks = list(
        client.completions.create(
            model="m", max_tokens=12, stream=True, stream_options={"include_usage": True}, extra_body=IDS, **options
        )
    )
    for chunk in chunks:
        if all(choice.finish_reason for choice in chunk.choices):  # the package's type says that it is never null
            Completion.model_validate(chunk.model_dump(), strict=True)
    for i, choice in enumerate(whole.choices):
        mine = [c for chunk in chunks for c in chunk.choices if c.index == i]
        assert "".join(c.text for c in mine) == choice.text
        assert [t for c in mine for t in c.token_ids] == choice.token_ids
        assert mine[0].prompt_token_ids == choice.prompt_token_ids
        assert [c.finish_reason for c in mine if c.finish_reason] == ["length"] and len(mine) > 2
    assert chunks[-1].usage.completion_tokens == 48 and chunks[-1].usage.prompt_tokens == whole.usage.prompt_tokens


def test_a_stream_of_the_prompts_alone_is_one_as_any(client):
    options = {"model": "m", "prompt": ["One", "Two"], "echo": True, "max_tokens": 0, "stream": True}
    *chunks, last = client.completions.create(**options, stream_options={"include_usage": True})
    assert [choice.text for chunk in chunks for choice in chunk.choices] == ["One", "Two"]
    assert last.choices == [] and last.usage.total_tokens == last.usage.prompt_tokens == 6
    assert [chunk.usage for chunk in client.completions.create(**options)] == [None, None]


def test_a_streams_lines_are_the_same_to_every_client(serving):
    """Some, as LiteLLM, end a line wherever Python's `splitlines` does."""
    text = "a\u2028b\u2029c\x85d\x0be\x1cf\r\n"
    body = {"model": "m", "prompt": text, "echo": True, "max_tokens": 1, "stream": True}
    with httpx.stream("POST", f"{serving.url}/completions", json=body) as reply:
        *events, end = [line.removeprefix("data: ") for line in reply.iter_lines() if line]
    told = "".join(json.loads(event)["choices"][0]["text"] for event in events)
    assert told.startswith(text) and end == "[DONE]"


@pytest.mark.parametrize(
    "options, text",
    [
        ({"suffix": "after"}, "suffix"),
        ({"best_of": 3}, "best_of"),
        ({"best_of": 10**30}, "best_of=1000000000"),
        ({"extra_body": {"repetition_penalty": 1e-38}}, "repetition_penalty"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": ""}, "this model's texts begin with none of their own"),
        ({"prompt": [""]}, "this model's texts begin with none of their own"),
        ({"prompt": [1, 10**7]}, "vocabulary"),
        ({"prompt": [1, 10**20]}, "vocabulary"),
        ({"prompt": "x" * 300}, "context length is 256"),
        ({"max_tokens": 0}, "echo"),
        ({"max_tokens": 0, "echo": True, "logprobs": 1, "prompt": [1] * 257}, "context length is 256"),
        ({"extra_body": {"stop_token_ids": [2**31], "min_tokens": 2}}, "stop id"),
        ({"extra_body": {"structured_outputs": {"regex": 5}}}, "regex"),
        ({"extra_body": {"structured_outputs": {"choice": "abc"}}}, "choice"),
        ({"extra_body": {"structured_outputs": {"choice": [5]}}}, "choice|str"),
        ({"extra_body": {"guided_json": "[" * 100_000}}, "recursion"),
        ({"prompt": ["a"] * 1000, "n": 2}, "1024"),
        ({"n": 61}, "n: .*sampler.max_queue=60"),
        ({"prompt": ["a"] * 31, "n": 2}, "n: .*sampler.max_queue=60"),
    ],
)
def test_what_cannot_be_done_is_said(client, options, text):
    with pytest.raises(openai.BadRequestError, match=text):
        create(client, **options)


def test_a_text_that_grows_keeps_its_ids(serving):
    """The prompt of a text agent's next call is the text so far and more: recorded ids, then the new text's."""
    job, leases, ids = serving.open()
    with openai.OpenAI(base_url=serving.model_api(leases[0]), api_key="x", max_retries=0) as client:
        text = "Question: 2+2?"
        for turn in range(3):
            text += create(client, text, max_tokens=20).choices[0].text + f"\nObservation {turn}\n"
        assert "\ufffd" in text
        choice = create(client, "Other", max_tokens=5).choices[0]
        create(client, [*choice.prompt_token_ids, *choice.token_ids, 65], max_tokens=5)
        create(client, "Otherwise", max_tokens=5)
    (record,) = serving.finish(job, leases, ids)
    assert [call.parent for call in record.calls] == [None, 0, 1, None, 3, None]
    tokenizer = serving.policy.tokenizer
    for turn in (1, 2):
        before = record.calls[turn - 1]
        whole = [*before.prompt_ids, *before.sampled_ids]
        new = tokenizer.encode(f"\nObservation {turn - 1}\n")
        assert record.calls[turn].prompt_ids.tolist() == whole + new


def test_a_stop_string_belongs_to_the_text_that_grows(serving):
    """A ReAct agent writes the stop string it never saw into its next prompt; the model did sample it."""
    job, leases, ids = serving.open()
    with openai.OpenAI(base_url=serving.model_api(leases[0]), api_key="x", max_retries=0) as client:
        free = create(client, "Go", max_tokens=24).choices[0].text
        stop = next(c for c in free[4:] if c.isascii() and c.isprintable())
        cut = create(client, "Go on", max_tokens=24, stop=[stop]).choices[0]
        if cut.finish_reason == "stop":
            create(client, "Go on" + cut.text + stop + " and on", max_tokens=3)
    (record,) = serving.finish(job, leases, ids)
    if cut.finish_reason == "stop":
        assert record.calls[2].parent == 1
