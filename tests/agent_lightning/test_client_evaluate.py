"""`Client.evaluate`: which weights it asks, that these stay as they are, and pass@k."""

import json
import math
import random
import urllib.request

import jax
import numpy as np
import pytest

from agent_lightning import Client, InvalidConfigError
from agent_lightning.results import pass_at_k
from agent_lightning.transport import Transport


def answer(resource, task) -> tuple[str, float]:
    """The model's reply and its log-probability; no temperature is asked for."""
    body = {"messages": [{"role": "user", "content": task.question}], "max_tokens": 4, "logprobs": True}
    request = urllib.request.Request(f"{resource.model_api}/v1/chat/completions", json.dumps(body).encode())
    request.add_header("Content-Type", "application/json")
    with urllib.request.urlopen(request) as response:
        choice = json.load(response)["choices"][0]
    return choice["message"]["content"], sum(token["logprob"] for token in choice["logprobs"]["content"])


def logprob(resource, task):
    return answer(resource, task)[1]


def learns_something(resource, task):
    answer(resource, task)
    return random.random()


def test_evaluate(client, training, tmp_path):
    result = client.evaluate(lambda resource, task: logprob(resource, task) * 0 + len(task.question), nworkers=1)
    assert (result.mean, result.standard_error, result.failures) == (5.0, 0.0, 0)
    assert list(result.rewards.values()) == [5.0]
    (tmp_path / "other.jsonl").write_text('{"question": "1"}\n{"question": "22"}\n{"question": "333"}\n')

    def agent(resource, task):
        assert resource.metadata["mode"] == "evaluate"
        if task.question == "22":
            raise ValueError("not this one")
        return len(task.question)

    result = client.evaluate(agent, str(tmp_path / "other.jsonl"), nworkers=2)
    assert (result.mean, result.failures) == (2.0, 1)
    assert result.standard_error == pytest.approx(1.0)  # of 1 and 3: sqrt(2) / sqrt(2)
    assert list(result.rewards.values()) == [1.0, None, 3.0]


def test_events_are_waited_for_within_the_timeout(client, training, monkeypatch):
    asked, request = [], Transport.request

    def watched(self, method, path, **more):
        if path.endswith("/events"):
            asked.append(more["params"]["wait_s"])
        return request(self, method, path, **more)

    monkeypatch.setattr(Transport, "request", watched)
    Client(training[0], timeout=3).evaluate(lambda resource, task: 1.0, data_id="sums", nworkers=1)
    assert 0 < max(asked) <= 1.5


def test_checkpoints_are_evaluated_and_the_weights_in_training_stay(client, policies):
    """The reward is the greedy reply's log-prob, by which weights are told apart."""
    first = client.train(learns_something, nworkers=2, batch_size=4)
    (old,) = first.checkpoints
    of_old = client.evaluate(logprob, nworkers=1)
    assert of_old.checkpoint is None and of_old.step == policies.step
    second = client.train(learns_something, nworkers=2, batch_size=2)
    (new,) = second.checkpoints
    assert second.best_checkpoint in (old, new), "it began with the old one"
    of_new = client.evaluate(logprob, nworkers=1)
    assert abs(of_new.mean - of_old.mean) > 1e-3, "or nothing is shown by what follows"

    params = jax.tree.map(np.array, policies.first.state.params)
    step = policies.step
    for name in (f"step-{of_old.step}", old, f"checkpoints/step-{of_old.step}"):
        found = client.evaluate(logprob, checkpoint=name, nworkers=1)
        assert found.mean == pytest.approx(of_old.mean, abs=1e-5)
        assert (found.checkpoint, found.step) == (old, of_old.step)
    for name, path in (("latest", new), ("best", second.best_checkpoint)):
        assert client.evaluate(logprob, checkpoint=name, nworkers=1).checkpoint == path

    def version(resource, task):
        return resource.metadata["policy_version"]

    assert client.evaluate(version, checkpoint=old, nworkers=1).mean == of_old.step
    assert client.evaluate(logprob, nworkers=1).mean == pytest.approx(of_new.mean, abs=1e-5)
    assert policies.step == step == policies.first.version
    jax.tree.map(np.testing.assert_array_equal, policies.first.state.params, params)


def test_after_a_failed_evaluation_the_weights_in_training_are_asked_again(client, policies):
    def fails(resource, task):
        raise ValueError("no")

    with pytest.raises(Exception, match="rollouts of step"):
        client.evaluate(fails, checkpoint="latest", nworkers=1)
    assert policies.first.version == policies.step


def test_a_checkpoint_that_is_not_there_is_refused_before_anything_starts(client, training):
    jobs = len(training[1].jobs())
    with pytest.raises(
        InvalidConfigError, match=r"no checkpoint 'step-999' in .*\n  hint: there are step-\d+, .*latest"
    ):
        client.evaluate(logprob, checkpoint="step-999")
    assert len(training[1].jobs()) == jobs


def test_samples_of_a_task_differ_and_give_pass_at_k(client, tmp_path):
    (tmp_path / "several.jsonl").write_text("".join(json.dumps({"question": f"{i}+{i}=?"}) + "\n" for i in range(3)))
    test_file = str(tmp_path / "several.jsonl")

    def letters(resource, task):
        assert resource.metadata["num_samples"] == 6
        return float(sum(map(ord, answer(resource, task)[0])))

    sampled = client.evaluate(letters, test_file, nworkers=2, num_samples=6, success_threshold=100.0)
    samples = list(sampled.samples.values())
    assert [len(rewards) for rewards in samples] == [6, 6, 6]
    assert max(len(set(rewards)) for rewards in samples) > 1, "at temperature 1 the replies differ"
    assert sampled.pass_at_k == pass_at_k(samples, 100.0) and list(sampled.pass_at_k) == [1, 2, 3, 4, 5, 6]
    means = [sum(rewards) / 6 for rewards in samples]
    assert list(sampled.rewards.values()) == pytest.approx(means)
    assert sampled.mean == pytest.approx(sum(means) / 3)
    spread = math.sqrt(sum((mean - sampled.mean) ** 2 for mean in means) / 2)
    assert sampled.standard_error == pytest.approx(spread / math.sqrt(3)), "over tasks: samples of one are no news"

    def once(resource, task):
        assert resource.metadata["num_samples"] == "the agent's own"
        return float(sum(map(ord, answer(resource, task)[0])))

    own = {"num_samples": "the agent's own"}
    first, second = (client.evaluate(once, test_file, nworkers=1, metadata=own) for _ in range(2))
    assert first.rewards == second.rewards and first.pass_at_k == {}, "greedy where the agent does not decide"
