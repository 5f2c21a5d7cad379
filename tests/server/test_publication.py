"""Weights that the learner publishes are those that the next request is sampled from."""

import jax
import numpy as np
import pytest

from agent_lightning.exceptions import InvalidConfigError
from lightning_jax.model import export, llama, weights
from lightning_jax.policies import Policies
from lightning_jax.rl.trajectory import TokenCall, build_rows

from .conftest import BUILTIN, full_logprobs, settings

BODY = {
    "messages": [{"role": "user", "content": "How many are two and two, and how many are three and three?"}],
    "max_tokens": 12,
    "logprobs": True,
    "return_token_ids": True,
}
SMALL = {
    "algorithm.group_size": 2,
    "algorithm.learning_rate": 1e-3,
    "runtime.batch_size": 4,
    "runtime.gradient_accumulation": 1,
    "runtime.remat": "none",
}


@pytest.fixture
def plain_model(random_model, tmp_path):
    """Random weights as they come: an update moves them as it would any model's."""
    config = weights.load_config(random_model)
    params = llama.init_params(config, jax.random.key(1))
    export.save_hf(tmp_path / "plain", config, params, tokenizer_files_from=BUILTIN)
    return tmp_path / "plain"


def ask(running, **options):
    """(prompt ids, sampled ids, log-probs) of a reply from the server's root."""
    reply = running.http.post("/v1/chat/completions", json=BODY | options).raise_for_status().json()
    (choice,) = reply["choices"]
    assert len(choice["token_ids"]) == len(choice["logprobs"]["content"]) == BODY["max_tokens"], "no end of turn"
    return reply["prompt_token_ids"], choice["token_ids"], [e["logprob"] for e in choice["logprobs"]["content"]]


def test_the_next_request_is_sampled_from_the_published_weights(start, plain_model):
    """The prompt is longer than two pages: those cached under the old weights must not serve it again."""
    running = start(plain_model, **SMALL)
    policy = running.policy
    running.policies.prepare_training()

    def agrees_with_the_learner():
        prompt, sampled, logprobs = ask(running, temperature=0)
        params = jax.tree.map(np.array, policy.state.params)
        logprob_tv = full_logprobs(policy.config, params, [*prompt, *sampled])[len(prompt) - 1 : -1]
        assert sampled == logprob_tv.argmax(-1).tolist()
        np.testing.assert_allclose(logprobs, logprob_tv.max(-1), atol=1e-4)
        return prompt, sampled, logprobs

    prompt, before, logprobs_before = agrees_with_the_learner()
    assert ask(running, temperature=0)[1:] == (before, logprobs_before), "nothing changes without an update"
    assert len(prompt) > 2 * running.config.sampler.page_size
    for update in (1, 2):
        calls = [ask(running, temperature=1, seed=seed) for seed in range(4)]
        rows = [row for i, call in enumerate(calls) for row in build_rows([TokenCall(0, None, *call)], i)]
        running.policies.update({policy.name: rows}, np.array([1.0, -1.0, 1.0, -1.0]), np.zeros(4, int))
        assert running.http.get("/health").json()["policy_version"] == policy.version == update
        _, _, logprobs = agrees_with_the_learner()
        assert np.abs(np.array(logprobs) - logprobs_before).max() > 0.05
        logprobs_before = logprobs


def test_after_an_update_that_fails_requests_are_answered_as_before(start, plain_model):
    running = start(plain_model, **SMALL)
    running.policies.prepare_training()
    call = ask(running, temperature=0)
    rows = build_rows([TokenCall(0, None, *call)], 0)
    with pytest.raises(IndexError):
        running.policies.update({running.policy.name: rows}, np.zeros(0), np.zeros(0, int))
    assert ask(running, temperature=0) == call and running.policy.version == 0


def test_a_learner_that_could_not_be_made_is_made_for_the_next_job(start, plain_model, monkeypatch):
    policies = start({"one": plain_model, "two": plain_model}, **SMALL).policies

    def no_room():
        raise MemoryError

    with monkeypatch.context() as patched:
        patched.setattr(policies["two"], "make_learner", no_room)
        with pytest.raises(MemoryError):
            policies.prepare_training()
    policies.prepare_training()
    assert [policy.state.step for policy in policies.values()] == [0, 0]


def test_a_checkpoint_that_does_not_fit_is_named(start, plain_model):
    running = start(plain_model, **SMALL)
    running.policies.prepare_training()
    running.policies.save_checkpoint({})
    config = settings(plain_model, running.config.workdir, **SMALL, **{"algorithm.name": "ppo"})
    with pytest.raises(InvalidConfigError, match="holds no critic"):
        Policies(config)
