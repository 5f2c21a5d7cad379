"""Model calls under a rollout's URL: attributed, recorded to the token, sampled as the mode demands."""

import asyncio
import logging
import threading
import time

import anthropic
import httpx
import numpy as np
import openai
import pytest

from lightning_jax.model import weights

from .conftest import full_logprobs

USER = [{"role": "user", "content": "2+2?"}]
TOOLS = [{"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object"}}}]
IDS = {"return_token_ids": True}


def chat(running, lease, messages=USER, **options):
    with openai.OpenAI(base_url=running.model_api(lease), api_key="x", max_retries=0) as client:
        body = options.pop("extra_body", {}) | IDS
        options = {"model": "m", "max_tokens": 8} | options
        return client.chat.completions.create(messages=messages, extra_body=body, **options)


def test_a_call_is_recorded_as_it_was_sampled(serving, random_model):
    job, leases, ids = serving.open()
    reply = chat(serving, leases[0], n=2, stop="\x00\x00")
    (record,) = serving.finish(job, leases, ids)
    assert record.reward == 1.0 and len(record.calls) == 2
    for choice, call in zip(reply.choices, record.calls, strict=True):
        assert choice.token_ids == call.sampled_ids.tolist() and reply.prompt_token_ids == call.prompt_ids.tolist()
        assert (call.temperature, call.top_p, call.top_k, call.parent) == (1.0, 1.0, 0, None)
        assert call.finish_reason == "length" and call.policy_version == serving.policy.version
        assert call.messages == USER and call.reply["content"] == choice.message.content
        whole = [*call.prompt_ids, *call.sampled_ids]
        logprob_tv = full_logprobs(*weights.load_model(random_model), whole)
        start = len(call.prompt_ids) - 1
        expected = logprob_tv[np.arange(start, start + 8), call.sampled_ids]
        np.testing.assert_allclose(call.logprobs, expected, atol=1e-4)


@pytest.mark.parametrize("dialect", ["openai", "anthropic"])
def test_a_conversation_grows_on_the_recorded_ids(serving_tools, dialect):
    """Two turns with a tool between them: the second prompt begins with the first call's prompt and sample."""
    job, leases, ids = serving_tools.open()
    base_url = serving_tools.model_api(leases[0])
    if dialect == "openai":
        client = openai.OpenAI(base_url=base_url, api_key="x", max_retries=0)
        first = client.chat.completions.create(model="m", messages=USER, tools=TOOLS)
        message = first.choices[0].message
        result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "5"}
        client.chat.completions.create(model="m", messages=[*USER, message.model_dump(), result], tools=TOOLS)
    else:
        client = anthropic.Anthropic(base_url=base_url, api_key="x", max_retries=0)
        tools = [{"name": "add", "description": "Adds.", "input_schema": {"type": "object"}}]
        first = client.messages.create(model="m", max_tokens=20, messages=USER, tools=tools)
        result = {"type": "tool_result", "tool_use_id": first.content[0].id, "content": "5"}
        turns = [*USER, {"role": "assistant", "content": first.content}, {"role": "user", "content": [result]}]
        client.messages.create(model="m", max_tokens=20, messages=turns, tools=tools)
    (record,) = serving_tools.finish(job, leases, ids)
    one, two = record.calls
    whole = [*one.prompt_ids, *one.sampled_ids]
    assert (one.parent, two.parent) == (None, 0)
    assert two.prompt_ids.tolist() == whole + serving_tools.policy.tokenizer.encode("<|tool|>5<|end|><|assistant|>")


def test_sampled_bytes_that_are_no_text_are_not_encoded_again(serving):
    """A random model's bytes decode to replacement characters, which do not encode back to them."""
    job, leases, ids = serving.open()
    messages = list(USER)
    for turn in range(3):
        reply = chat(serving, leases[0], messages, max_tokens=20)
        content = reply.choices[0].message.content
        assert "\ufffd" in content
        messages += [{"role": "assistant", "content": content}, {"role": "user", "content": f"turn {turn}"}]
    rewritten = [{"role": "user", "content": "something else"}, *messages[1:]]
    chat(serving, leases[0], rewritten)
    (record,) = serving.finish(job, leases, ids)
    assert [call.parent for call in record.calls] == [None, 0, 1, None]
    for parent, call in zip(record.calls[:2], record.calls[1:3], strict=True):
        whole = [*parent.prompt_ids, *parent.sampled_ids]
        assert call.prompt_ids.tolist()[: len(whole)] == whole
        assert serving.policy.tokenizer.encode(serving.policy.tokenizer.decode(whole)) != whole


def test_training_overrides_the_agents_sampling_and_says_so_once(serving, caplog):
    job, leases, ids = serving.open(samples=2)
    with caplog.at_level(logging.WARNING):
        for lease in leases:
            chat(serving, lease, temperature=0, top_p=0.5, seed=1, max_tokens=1000)
            chat(serving, lease, temperature=0)
    said = [record.message for record in caplog.records if "honor_agent_sampling" in record.message]
    assert len(said) == 1 and "temperature=0" in said[0] and "top_p=0.5" in said[0]
    records = serving.finish(job, leases, ids)
    calls = [call for record in records for call in record.calls]
    assert {(call.temperature, call.top_p, call.top_k) for call in calls} == {(1.0, 1.0, 0)}
    assert calls[0].sampled_ids.tolist() != calls[2].sampled_ids.tolist(), "samples of a group differ"
    assert len(calls[0].sampled_ids) == serving.config.sampler.max_tokens, "a larger max_tokens is cut to the server's"
    assert len(calls[1].sampled_ids) == 8, "a smaller one holds"


def test_honor_agent_sampling(start, random_model):
    running = start(random_model, **{"sampler.honor_agent_sampling": True, "sampler.temperature": 0.9})
    job, leases, ids = running.open()
    chat(running, leases[0], temperature=0.5, top_p=0.9)
    chat(running, leases[0])
    (record,) = running.finish(job, leases, ids)
    assert [(call.temperature, call.top_p) for call in record.calls] == [(0.5, 0.9), (0.9, 1.0)]


def test_evaluation_is_greedy_unless_the_agent_asks(serving):
    job, leases, ids = serving.open(mode="evaluate", samples=2)
    for lease in leases:
        chat(serving, lease)
        chat(serving, lease, temperature=1.5)
    first, second = serving.finish(job, leases, ids)
    assert [call.temperature for call in first.calls] == [0.0, 1.5]
    assert first.calls[0].sampled_ids.tolist() == second.calls[0].sampled_ids.tolist()
    assert first.calls[1].sampled_ids.tolist() != second.calls[1].sampled_ids.tolist()


def test_in_evaluation_the_agents_seed_names_the_sample(serving):
    job, leases, ids = serving.open(mode="evaluate", samples=2)
    mine = [chat(serving, leases[0], temperature=1, seed=5, n=2).choices for _ in range(2)]
    free = [chat(serving, leases[0], temperature=1).choices[0].token_ids for _ in range(2)]
    serving.finish(job, leases, ids)
    assert [choice.token_ids for choice in mine[0]] == [choice.token_ids for choice in mine[1]]
    assert mine[0][0].token_ids != mine[0][1].token_ids and free[0] != free[1]


def sampled(running, order, **options):
    """What rollouts sample when their calls are sent together in this order, by (sample, call)."""
    job, leases, ids = running.open(samples=3, **options)
    prompts = ["2+2?", "3+3?", "3+3?"]  # two calls are alike

    async def send():
        async with httpx.AsyncClient(timeout=60) as http:

            async def one(sample, call):
                body = {"messages": [{"role": "user", "content": prompts[call]}], "max_tokens": 8} | IDS
                reply = await http.post(f"{running.model_api(leases[sample])}/chat/completions", json=body)
                return reply.raise_for_status().json()["choices"][0]["token_ids"]

            keys = [(sample, call) for sample in range(3) for call in range(3)]
            keys = [keys[i] for i in order]
            return dict(zip(keys, await asyncio.gather(*(one(*key) for key in keys)), strict=True))

    result = asyncio.run(send())
    serving_records = running.finish(job, leases, ids)
    assert all(len(record.calls) == 3 for record in serving_records)
    return {
        (sample, tuple(sorted(tuple(result[sample, call]) for call in calls)))
        for sample in range(3)
        for calls in ((0,), (1, 2))
    }


def test_noise_depends_on_what_a_call_is_not_on_when_it_comes(serving):
    one = sampled(serving, list(range(9)))
    assert sampled(serving, [8, 3, 1, 6, 0, 7, 2, 5, 4]) == one
    assert len(one) == 6 and all(len(set(ids)) == len(ids) for _, ids in one), "two like calls differ from each other"
    assert not sampled(serving, list(range(9)), seed=4) & one
    assert not sampled(serving, list(range(9)), step=2) & one


def test_a_retry_samples_the_same(serving):
    """A killed attempt's successor repeats its calls, token for token."""
    job, leases, ids = serving.open()
    first = chat(serving, leases[0]).choices[0].token_ids
    result = {"lease_id": leases[0]["lease_id"], "cause": "crash"}
    body = {"pool_id": "test", "results": [result], "running": [], "want": 1, "wait_s": 0}
    again = serving.http.post(f"/api/jobs/{job}/exchange", json=body).json()["leases"]
    assert again[0]["attempt"] == 2 and again[0]["metadata"]["attempt"] == 2
    assert chat(serving, again[0]).choices[0].token_ids == first
    (record,) = serving.finish(job, again, ids)
    assert len(record.calls) == 1 and record.attempt == 2


def test_a_refused_call_that_is_sent_again_is_the_same_call(serving):
    """A full queue changes when something is sampled, not what."""
    job, leases, ids = serving.open(samples=2)
    with serving.one_waiting(), pytest.raises(openai.RateLimitError):
        chat(serving, leases[0], n=60)
    replies = [chat(serving, leases[0], n=2).choices[1].token_ids for _ in range(2)]
    serving.finish(job, leases, ids)
    job, leases, ids = serving.open(samples=2)
    assert [chat(serving, leases[0], n=2).choices[1].token_ids for _ in range(2)] == replies
    serving.finish(job, leases, ids)


def test_an_ended_attempts_url_is_refused(serving):
    job, leases, ids = serving.open()
    serving.finish(job, leases, ids)
    with pytest.raises(openai.AuthenticationError, match="ended"):
        chat(serving, leases[0])
    with anthropic.Anthropic(base_url=serving.model_api(leases[0]), api_key="x", max_retries=0) as client:
        with pytest.raises(anthropic.AuthenticationError, match="ended"):
            client.messages.create(model="m", max_tokens=5, messages=USER)


def test_a_call_in_flight_ends_with_its_attempt(serving):
    job, leases, ids = serving.open()
    errors = []

    def call():
        try:
            chat(serving, leases[0], max_tokens=24, n=60)
        except openai.AuthenticationError as error:
            errors.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    attempt = serving.store.attempt_by_token(leases[0]["token"])
    while len(attempt.on_end) < 60:
        time.sleep(0.001)
    serving.store.cancel_open(job)
    thread.join(30)
    assert len(errors) == 1
    assert serving.store._database.read("SELECT count(*) FROM calls WHERE attempt_id = ?", (attempt.attempt_id,)) == [
        (0,)
    ]


def test_a_client_that_hangs_up_frees_its_slot_and_leaves_no_call(serving):
    job, leases, ids = serving.open()
    before = serving.policy.sampler_metrics()
    body = {"messages": USER, "max_tokens": 24, "n": 60}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{serving.model_api(leases[0])}/chat/completions", json=body, timeout=httpx.Timeout(10, read=0.02))
    attempt = serving.store.attempt_by_token(leases[0]["token"])
    deadline = time.monotonic() + 20
    while attempt.on_end:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    chat(serving, leases[0])
    (record,) = serving.finish(job, leases, ids)
    assert len(record.calls) == 1
    after = serving.policy.sampler_metrics()
    assert after["sampler/generated_tokens"] - before["sampler/generated_tokens"] < 24 * 60


def test_a_lease_is_json_whatever_the_task_holds(serving):
    """JSON knows no infinity; beside a number of more than 64 bits, too."""
    job, leases, ids = serving.open(task={"big": 2**70, "worst": float("-inf"), "all": [float("nan"), 1.5]})
    assert leases[0]["task"] == {"big": 2**70, "worst": None, "all": [None, 1.5]}
    serving.finish(job, leases, ids)


def test_lease_says_what_the_worker_needs(serving):
    job, leases, ids = serving.open(task={"question": "q", "big": 2**70})
    (lease,) = leases
    assert lease["task"] == {"question": "q", "big": 2**70}
    assert lease["model_name"] == serving.policy.name
    assert lease["metadata"] == {
        "mode": "train",
        "rollout_id": ids[0],
        "attempt": 1,
        "step": 1,
        "policy_version": serving.policy.version,
    }
    assert len(lease["token"]) >= 32
    serving.finish(job, leases, ids)
