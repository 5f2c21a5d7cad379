"""A real server over a real engine: a small model with random weights, and one made by hand that calls a tool."""

import contextlib
import dataclasses
import json
import shutil
import threading

import httpx
import jax
import ml_collections
import numpy as np
import pytest
import tokenizers

from agent_lightning import Client
from lightning_jax import config as config_lib
from lightning_jax import config_models, server
from lightning_jax.model import attention, export, llama
from lightning_jax.model.config import LlamaConfig
from lightning_jax.policies import Policies
from lightning_jax.policy import Policy
from lightning_jax.sampler.request import SamplingParams, noise_key
from lightning_jax.server.control import JobRunner
from lightning_jax.store import RolloutEntry, Store
from lightning_jax.text.tokenizer import load_tokenizer

TOOL_CALL = '{"name": "add", "arguments": {"a": 2, "b": [3, "x"]}}'
BUILTIN = config_lib.__file__.replace("config.py", "builtin/tiny")


@pytest.fixture(scope="session")
def random_model(tmp_path_factory):
    """Sizes of a toy, random weights, the tokenizer and chat template of builtin:tiny."""
    tokenizer = load_tokenizer("builtin:tiny")
    config = LlamaConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=64,
        intermediate_size=128,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        tie_embeddings=False,
        max_seq_len=512,
        eos_ids=(),  # as of base models that are trained to chat: only the tokenizer knows what ends a turn
    )
    params = llama.init_params(config, jax.random.key(0))
    # Width 0 is the same positive number in every position, and speaks against the end of the turn: no reply ends by
    # chance, so a reply is as long as was asked for.
    layers = params["layers"]
    layers["o_kghd"] = layers["o_kghd"].at[..., 0].set(0.0)
    layers["down_fd"] = layers["down_fd"].at[..., 0].set(0.0)
    params["embed_vd"] = params["embed_vd"].at[:, 0].set(0.1)
    params["unembed_dv"] = params["unembed_dv"].at[0].set(0.0).at[0, np.array(tokenizer.eos_ids)].set(-1000.0)
    folder = tmp_path_factory.mktemp("models") / "random"
    export.save_hf(folder, config, params, tokenizer_files_from=BUILTIN)
    return folder


@pytest.fixture(scope="session")
def tool_model(tmp_path_factory):
    """A bigram model made by hand: every reply of it is the tool call above, and the end of the turn."""
    return bigram_model(tmp_path_factory, "<tool_call>", TOOL_CALL, "</tool_call>")


def bigram_model(tmp_path_factory, *reply):
    """A model whose every reply is these tokens, and the end of the turn; one size, whatever they are."""
    folder = tmp_path_factory.mktemp("models") / "caller"
    tokenizer_files = tmp_path_factory.mktemp("tokenizer")
    shutil.copytree(BUILTIN, tokenizer_files, dirs_exist_ok=True)
    tokenizer = tokenizers.Tokenizer.from_file(str(tokenizer_files / "tokenizer.json"))
    tokenizer.add_tokens([TOOL_CALL])
    tokenizer.save(str(tokenizer_files / "tokenizer.json"))
    (end,) = load_tokenizer(tokenizer_files).eos_ids
    ids = [tokenizer.token_to_id(t) for t in ("<|assistant|>", *reply)]
    following = dict(zip(ids, [*ids[1:], end], strict=True))
    vocab = tokenizer.get_vocab_size()
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=vocab,
        intermediate_size=8,
        num_layers=1,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        max_seq_len=512,
        eos_ids=(end,),
    )
    zeros = jax.tree.map(lambda spec: np.zeros(spec.shape, np.float32), llama.abstract_params(config))
    unembed = np.zeros((vocab, vocab), np.float32)
    unembed[np.arange(vocab), [following.get(i, end) for i in range(vocab)]] = 3.0  # a norm of sqrt(vocab) comes in
    params = zeros | {
        "embed_vd": np.eye(vocab, dtype=np.float32),
        "final_norm_d": np.ones(vocab, np.float32),
        "unembed_dv": unembed,
    }
    export.save_hf(folder, config, params, tokenizer_files_from=tokenizer_files)
    return folder


def full_logprobs(config, params, ids):
    """[T, V] log-probs of each next token, from one plain forward over the whole sequence."""
    token_bt = np.array([ids], np.int32)
    position_bt = np.arange(len(ids), dtype=np.int32)[None]
    attend = attention.segment_attention(np.ones_like(token_bt), position_bt, None)
    x_btd, _ = llama.forward(params, config, token_bt, position_bt, attend)
    logits_tv = np.asarray(llama.unembed(params, config, x_btd[0]), np.float64)
    return (
        logits_tv
        - np.log(np.exp(logits_tv - logits_tv.max(-1, keepdims=True)).sum(-1, keepdims=True))
        - (logits_tv.max(-1, keepdims=True))
    )


@dataclasses.dataclass
class Running:
    """A server with its parts, and shortcuts for what a worker pool does."""

    url: str
    store: Store
    policies: Policies
    config: ml_collections.ConfigDict
    http: httpx.Client

    @property
    def policy(self) -> Policy:
        """The model, or the first of several."""
        return self.policies.first

    def open(self, *, mode="train", samples=1, step=1, seed=3, job=None, task=None):
        """Opens rollouts of one task and leases them; returns (job id, leases in order, rollout ids)."""
        job = job or self.store.create_job({"kind": "train", "data_id": "none"})
        greedy = mode == "evaluate"
        entries = [RolloutEntry("task-0", 0, 0, i, task or {"question": "?"}, greedy) for i in range(samples)]
        ids = self.store.open_rollouts(job, step=step, mode=mode, entries=entries, timeout_s=60, seed=seed)
        body = {"pool_id": "test", "results": [], "running": [], "want": samples, "wait_s": 0}
        leases = self.http.post(f"/api/jobs/{job}/exchange", json=body).raise_for_status().json()["leases"]
        return job, leases, ids

    def finish(self, job, leases, ids, reward=1.0):
        """Reports a reward for the leases and returns the rollouts' records."""
        results = [{"lease_id": lease["lease_id"], "reward": reward} for lease in leases]
        body = {"pool_id": "test", "results": results, "running": [], "want": 0, "wait_s": 0}
        self.http.post(f"/api/jobs/{job}/exchange", json=body).raise_for_status()
        self.store.wait(job, ids)
        return self.store.finished(ids)

    @contextlib.contextmanager
    def one_waiting(self):
        """While this is open, nothing is sampled, and a sample waits."""
        going_on = threading.Event()
        self.policies._device.run(going_on.wait)
        waiting = self.policy.sample([1], SamplingParams(max_tokens=1))
        try:
            yield
        finally:
            going_on.set()
            waiting.result()

    def model_api(self, lease) -> str:
        return f"{self.url}/rollout/{lease['token']}"


def settings(model, workdir, **overrides) -> ml_collections.ConfigDict:
    """A configuration of small sizes; `model` is a folder, or several models' by name."""
    config = config_lib.default_config()
    several = model if isinstance(model, dict) else {}
    for name in several:
        config_models.add(config, config, name)
    flat = {
        **({f"models.{name}.path": str(path) for name, path in several.items()} or {"model.path": str(model)}),
        "workdir": str(workdir),
        "runtime.max_seq_len": 256,
        "sampler.max_slots": 8,
        "sampler.kv_cache_tokens": 4096,
        "sampler.decode_steps": 4,
        "sampler.prefill_chunk": 64,
        "sampler.max_queue": 60,
        "sampler.max_tokens": 24,
        "server.port": 0,
    }
    config.update_from_flattened_dict(flat | overrides)
    return config


@pytest.fixture(scope="session")
def start(tmp_path_factory):
    """start(model folder, **settings) -> Running; all are stopped at the end."""
    started = []

    def start(model, jobs=False, **overrides) -> Running:
        workdir = tmp_path_factory.mktemp("work")
        config = settings(model, workdir, **overrides)
        policies = Policies(config)
        store = Store(workdir / "store.sqlite3")
        runner = JobRunner(policies, store, config) if jobs else None
        app = server.create_app(config=config, policies=policies, store=store, jobs=runner)
        running = server.RunningServer(app, server.bind("127.0.0.1", 0))
        started.append((running, runner, store, policies))
        return Running(running.url, store, policies, config, httpx.Client(base_url=running.url, timeout=60))

    yield start
    for running, runner, store, policies in started:
        running.stop()
        if runner is not None:
            runner.close()
        store.close()
        policies.close()


@pytest.fixture(scope="session")
def serving(start, random_model) -> Running:
    return start(random_model)


@pytest.fixture(scope="session")
def serving_tools(start, tool_model) -> Running:
    return start(tool_model)


def fills(resource, task):
    """Rewards replies with many letters, which random weights vary in."""
    import httpx

    body = {"messages": [{"role": "user", "content": task.question}], "max_tokens": 8}
    reply = httpx.post(f"{resource.model_api}/v1/chat/completions", json=body, timeout=60).raise_for_status().json()
    return sum(c.isascii() for c in reply["choices"][0]["message"]["content"]) / 8


@pytest.fixture(scope="session")
def trained(start, random_model, tmp_path_factory):
    """A server that has trained for two steps, with the job's `result` and checkpoints step-1 and step-2.

    `said` is a prompt and a reply that its policy sampled, as ids, with the log-probs of the reply.
    """
    settings = {
        "algorithm.group_size": 2,
        "algorithm.learning_rate": 1e-2,  # the second checkpoint is clearly another model
        "runtime.batch_size": 4,
        "runtime.gradient_accumulation": 1,
        "runtime.checkpoint_interval": 1,
        "runtime.remat": "none",
    }
    running = start(random_model, jobs=True, **settings)
    tasks = tmp_path_factory.mktemp("data") / "tasks.jsonl"
    tasks.write_text("".join(json.dumps({"question": f"{i}+1?"}) + "\n" for i in range(4)))
    with Client(running.url) as client:
        client.upload_data(tasks)
        running.result = client.train(fills, nworkers=2, batch_size=2)
    prompt = running.policy.tokenizer.encode("What is two and two?")
    sampling = SamplingParams(temperature=1.0, max_tokens=24, noise_key=noise_key("said"))
    completion = running.policy.sample(prompt, sampling).result()
    running.said = np.array([*prompt, *completion.token_ids]), np.asarray(completion.logprobs)
    return running
