"""Several models in one server: who answers, what is recorded of it, and what each learns from it."""

import contextlib

import anthropic
import jax
import numpy as np
import openai
import pytest

from agent_lightning.client import Client
from agent_lightning.pool import Pool
from lightning_jax import rows, server
from lightning_jax.metrics import read_metrics
from lightning_jax.model import weights
from lightning_jax.policies import Policies
from lightning_jax.rl import checkpoint
from lightning_jax.server.control import JobRunner
from lightning_jax.store import Store
from tests.text.conftest import CHATML, LLAMA3, LLAMA3_PATTERN, byte_level_folder

from .conftest import settings

USER = [{"role": "user", "content": "Which 12 words, then?"}]
TEXTS = ["a question of words and numbers 0123456789, then an answer, what else? " * 3]
SMALL = {
    "algorithm.group_size": 4,
    "algorithm.learning_rate": 1e-2,
    "runtime.batch_size": 4,
    "runtime.gradient_accumulation": 1,
    "runtime.remat": "none",
    "runtime.checkpoint_interval": 1,
}


def save_model(folder, kind: str, specials: list[str], template: str, **sizes):
    """A small model with random weights and its own tokenizer, in the files that transformers writes."""
    import torch
    import transformers

    byte_level_folder(folder, TEXTS, specials, template, LLAMA3_PATTERN)
    vocab_size = len(transformers.AutoTokenizer.from_pretrained(folder))
    config = transformers.AutoConfig.for_model(
        kind,
        vocab_size=vocab_size,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        **sizes,
    )
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A Llama and a Qwen2.5, of different sizes and vocabularies."""
    parent = tmp_path_factory.mktemp("two")
    llama = ["<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"]
    qwen = ["<|endoftext|>", "<|im_end|>", "<|im_start|>"]
    return {
        "query": save_model(parent / "llama", "llama", llama, LLAMA3, hidden_size=32, intermediate_size=48),
        "answer": save_model(parent / "qwen", "qwen2", qwen, CHATML, hidden_size=48, intermediate_size=64),
    }


@pytest.fixture(scope="module")
def two(start, folders):
    return start(folders, **SMALL)


def transformers_prompt(folder, messages) -> list[int]:
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def ask(base_url: str, messages=USER, model="any", **options):
    with openai.OpenAI(base_url=base_url, api_key="x", max_retries=0) as client:
        options = {"max_tokens": 6, "extra_body": {"return_token_ids": True}} | options
        return client.chat.completions.create(model=model, messages=messages, **options)


# ---- who answers ----


@pytest.mark.parametrize("version", ["", "/v1", "/v1/v1"])
def test_a_role_is_a_number_or_a_name_in_every_dialect(two, folders, version):
    job, (lease,), ids = two.open()
    base_url = two.model_api(lease)
    assert lease["model_name"] == "query" and lease["model_names"] == ["query", "answer"]
    for role, name in {"": "query", "1": "query", "2": "answer", "query": "query", "answer": "answer"}.items():
        url = f"{base_url}/model/{role}" if role else base_url
        prompt = transformers_prompt(folders[name], USER)
        assert ask(url + version).prompt_token_ids == prompt
        base = url + version.removesuffix("/v1")  # to which this SDK adds one
        with anthropic.Anthropic(base_url=base, api_key="x", max_retries=0) as client:
            options = {"max_tokens": 6, "extra_body": {"return_token_ids": True}}
            assert client.messages.create(model="m", messages=USER, **options).prompt_token_ids == prompt
            assert client.messages.count_tokens(model="m", messages=USER).input_tokens == len(prompt)
    (record,) = two.finish(job, [lease], ids)
    asked = ["query", "query", "answer", "query", "answer"]
    assert [call.model for call in record.calls] == [name for name in asked for _ in range(2)]
    for call in record.calls:
        assert call.role == call.model
        assert call.prompt_ids.tolist() == transformers_prompt(folders[call.model], USER)
    assert transformers_prompt(folders["query"], USER) != transformers_prompt(folders["answer"], USER)


def test_a_role_that_there_is_not(two):
    _, (lease,), _ = two.open()
    for role in ("3", "0", "01", "judge"):
        with pytest.raises(openai.NotFoundError, match=f"no model '{role}': there are 1 to 2, or query, answer"):
            ask(f"{two.model_api(lease)}/model/{role}")
    with pytest.raises(openai.AuthenticationError):
        ask(f"{two.url}/rollout/nobody/model/2")


def test_at_the_root_the_models_name_decides(two, folders):
    with openai.OpenAI(base_url=f"{two.url}/v1", api_key="x") as client:
        assert [model.id for model in client.models.list()] == ["query", "answer"]
    _, (lease,), _ = two.open()
    with anthropic.Anthropic(base_url=f"{two.model_api(lease)}/model/2", api_key="x") as client:
        assert [model.id for model in client.models.list()] == ["answer"]
    for base_url in (f"{two.url}/v1", two.model_api(lease)):
        for model, name in {"answer": "answer", "query": "query", "gpt-9": "query"}.items():
            assert ask(base_url, model=model).prompt_token_ids == transformers_prompt(folders[name], USER)


def test_nobody_goes_on_from_another_models_reply(two):
    """The same conversation, sent to both in turn: each prompt begins with that model's own ids, or with none."""
    job, (lease,), ids = two.open()
    urls = [f"{two.model_api(lease)}/model/{role}" for role in (1, 2)]
    messages = list(USER)
    for turn in range(2):
        reply = ask(urls[0], messages).choices[0].message.content
        messages += [{"role": "assistant", "content": reply}, {"role": "user", "content": f"Turn {turn}."}]
        ask(urls[1], messages)
    (record,) = two.finish(job, [lease], ids)
    first, other, second, another = record.calls
    assert [call.model for call in record.calls] == ["query", "answer"] * 2
    assert (first.parent, other.parent, second.parent, another.parent) == (None, None, 0, None)
    assert second.prompt_ids[: len(first.prompt_ids) + 6].tolist() == [*first.prompt_ids, *first.sampled_ids]
    (row,) = rows.build([record], np.array([True]), "query")
    assert row.loss_mask.sum() == 12
    assert [row.loss_mask.sum() for row in rows.build([record], np.array([True]), "answer")] == [6, 6]


def test_one_model_in_two_roles(serving):
    """The same weights; a prompt's noise is its role's, whoever asks first."""
    replies = {}
    for order in (("1", "2"), ("2", "1")):
        job, (lease,), ids = serving.open(seed=11)
        url = serving.model_api(lease)
        bases = {"1": url, "2": f"{url}/model/2"}
        replies[order] = {role: ask(bases[role], max_tokens=12).choices[0].token_ids for role in order}
        (record,) = serving.finish(job, [lease], ids)
        assert [call.role for call in record.calls] == list(order)
        assert {call.model for call in record.calls} == {serving.policy.name}
        assert len(rows.build([record], np.array([True]))) == 2
    assert replies["1", "2"] == replies["2", "1"]
    assert replies["1", "2"]["1"] != replies["1", "2"]["2"]
    _, (lease,), _ = serving.open()
    with pytest.raises(openai.NotFoundError, match="'a b' is not a role"):
        ask(f"{serving.model_api(lease)}/model/a b")


# ---- what they learn ----


def lengths(resource, task):
    """Rewards long texts; in the first step the second model is not asked."""
    import httpx

    text = ""
    for api in [resource.model_api_1, resource.model_apis["answer"]][: resource.metadata["step"]]:
        body = {"messages": [{"role": "user", "content": task.question}], "max_tokens": 6}
        reply = httpx.post(f"{api}/v1/chat/completions", json=body, timeout=60).raise_for_status().json()
        text += reply["choices"][0]["message"]["content"]
    return float(len(text))


def said(url: str) -> dict[str, list]:
    """Each model's greedy reply at the root, with its log-probs."""
    replies = {name: ask(f"{url}/v1", model=name, temperature=0, logprobs=True) for name in ("query", "answer")}
    return {name: [(t.token, t.logprob) for t in r.choices[0].logprobs.content] for name, r in replies.items()}


def run_as_far_as(total_steps, config, then=lambda policies, url: None, job_id="job") -> tuple[dict, dict]:
    """Runs a job to there in a program's parts of its own; the result, and each model's version and state."""
    with contextlib.ExitStack() as stack:
        policies = stack.enter_context(contextlib.closing(Policies(config)))
        store = stack.enter_context(contextlib.closing(Store(f"{config.workdir}/store.sqlite3")))
        store.put_dataset("d", "train", [b'{"question": "1?"}\n{"question": "2?"}\n'])
        jobs = stack.enter_context(contextlib.closing(JobRunner(policies, store, config)))
        app = server.create_app(config=config, policies=policies, store=store, jobs=jobs)
        running = server.RunningServer(app, server.bind("127.0.0.1", 0))
        stack.callback(running.stop)
        jobs.submit({"kind": "train", "data_id": "d", "batch_size": 1, "total_steps": total_steps}, job_id)
        assert Pool(running.url, job_id, lengths, 2).run() == "succeeded", store.job(job_id)["traceback"]
        then(policies, running.url)
        states = {name: (policy.version, jax.tree.map(np.array, policy.state)) for name, policy in policies.items()}
        return store.job(job_id)["result"], states


def same(one, other) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True))


def curve(workdir) -> list[dict]:
    """What the metrics hold that is the same in every run."""
    groups = ("reward/", "policy/", "completion/", "train/tokens")
    return [
        {
            key: value
            for key, value in row.items()
            if key.removeprefix("query/").removeprefix("answer/").startswith(groups)
            and "sampler_learner" not in key
            and "per_s" not in key
        }
        for row in read_metrics(workdir)
    ]


def test_each_learns_from_its_own_calls_and_both_go_on_from_one_checkpoint(folders, tmp_path):
    config = settings(folders, tmp_path / "resumed", **SMALL)
    initial = {name: weights.load_model(path)[1] for name, path in folders.items()}
    at_first = {}
    _, states = run_as_far_as(1, config, then=lambda policies, url: at_first.update(said(url)))
    assert {name: version for name, (version, _) in states.items()} == {"query": 1, "answer": 1}
    (_, query), (_, answer) = states.values()
    assert not same(query.params, initial["query"]) and int(query.step) == 1
    assert same(answer.params, initial["answer"]) and int(answer.step) == 0, "nobody asked it"
    (first,) = read_metrics(config.workdir)
    assert {"query/policy/kl", "query/time/publish_s", "query/sampler/requests", "reward/mean"} <= first.keys()
    assert first["query/rollout/calls"] == first["rollout/calls"] == 4 and "answer/policy/kl" not in first
    assert first["answer/train/tokens"] == first["answer/rollout/calls"] == 0

    def look_back(policies, url):
        now = said(url)
        first = policies.find_checkpoint("step-1")
        assert policies.find_checkpoint(f"{first}/answer") == first
        with policies.sampling_from(first):
            assert said(url) == at_first and {policy.version for policy in policies.values()} == {1}
        assert said(url) == now and all(now[name] != at_first[name] for name in now)
        with contextlib.closing(Client(url)) as client:
            for name in folders:
                client.download_model(tmp_path / name, model=name)

    result, resumed = run_as_far_as(3, config, then=look_back)
    assert result["total_steps"] == 3
    assert [path.rpartition("/")[2] for path in result["checkpoints"]] == ["step-1", "step-2", "step-3"]
    for name, (version, state) in resumed.items():
        assert version == 3 and int(state.step) == (3 if name == "query" else 2)
        assert result["model_checkpoints"][name] == [f"{path}/{name}" for path in result["checkpoints"]]
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state.params)
        assert same(checkpoint.restore_params(result["checkpoints"][-1], abstract, item=name), state.params)
        assert same(weights.load_model(tmp_path / name)[1], state.params)
        assert transformers_prompt(tmp_path / name, USER) == transformers_prompt(folders[name], USER)

    straight_config = settings(folders, tmp_path / "straight", **SMALL)
    _, straight = run_as_far_as(3, straight_config)
    for name in folders:
        assert same(resumed[name][1], straight[name][1]), "to the last bit"
    assert curve(config.workdir) == curve(straight_config.workdir)


def test_a_result_lists_the_checkpoints_of_its_own_job(folders, tmp_path):
    config = settings(folders, tmp_path / "run", **SMALL)
    run_as_far_as(1, config)
    result, _ = run_as_far_as(1, config, job_id="next")
    (path,) = result["checkpoints"]
    assert path.endswith("/step-2")
    assert result["model_checkpoints"] == {name: [f"{path}/{name}"] for name in folders}
