"""A server that trains adapters: what is sampled, evaluated, fetched and restored is the model with them."""

import json

import jax
import numpy as np
import pytest
import safetensors.numpy

from agent_lightning import Client
from agent_lightning.exceptions import InvalidConfigError
from lightning_jax.model import lora, weights
from lightning_jax.policies import Policies
from lightning_jax.rl import checkpoint, trajectory
from lightning_jax.sampler.request import SamplingParams, noise_key

from .conftest import fills, full_logprobs, settings
from .test_downloads import assert_is_the_policy, transformers_logits

RANK, ALPHA = 4, 16.0
SETTINGS = {
    "model.lora_rank": RANK,
    "model.lora_alpha": ALPHA,
    "algorithm.group_size": 2,
    "algorithm.learning_rate": 2e-3,
    "runtime.batch_size": 4,
    "runtime.gradient_accumulation": 1,
    "runtime.checkpoint_interval": 1,
    "runtime.remat": "none",
}


def said(policy):
    """A prompt and a reply as ids, and the log-probs of the reply."""
    prompt = policy.tokenizer.encode("What is two and two?")
    sampling = SamplingParams(temperature=1.0, max_tokens=24, noise_key=noise_key("said"))
    completion = policy.sample(prompt, sampling).result()
    return np.array([*prompt, *completion.token_ids]), np.asarray(completion.logprobs)


@pytest.fixture(scope="module")
def adapted(start, random_model, tmp_path_factory):
    """A server that has trained adapters for two steps; see `conftest.trained`."""
    running = start(random_model, jobs=True, **SETTINGS)
    tasks = tmp_path_factory.mktemp("data") / "tasks.jsonl"
    tasks.write_text("".join(json.dumps({"question": f"{i}+1?"}) + "\n" for i in range(4)))
    running.before = said(running.policy)
    with Client(running.url) as client:
        client.upload_data(tasks)
        client.train(fills, nworkers=2, batch_size=2)
    running.said = said(running.policy)
    return running


def test_the_sampler_has_the_adapters_of_the_learner(adapted):
    assert not np.array_equal(adapted.before[0], adapted.said[0]), "two large steps changed nothing"
    assert len(adapted.said[1]) > 8 and np.median(adapted.said[1]) < -0.1, "there is nothing to compare"
    rows = (json.loads(line) for line in open(f"{adapted.config.workdir}/metrics.jsonl"))
    differences = [row["policy/sampler_learner_logprob_diff_max"] for row in rows if row["step"]]
    assert len(differences) == 2 and max(differences) < 1e-4
    # By the forward pass with the adapters beside the model, which is another program than the sampler's.
    ids, logprobs = adapted.said
    logprobs_tv = full_logprobs(adapted.policy.config, adapted.policy._learner.params, ids)
    first = len(ids) - len(logprobs)
    np.testing.assert_allclose(logprobs_tv[np.arange(first - 1, len(ids) - 1), ids[first:]], logprobs, atol=1e-4)


def test_a_checkpoint_holds_adapters_alone_and_where_they_belong(adapted, random_model):
    path = adapted.policies.find_checkpoint("latest")
    names = {key[-1].key for key, _ in jax.tree.leaves_with_path(adapted.policy.read_trained(path, np.float32))}
    assert len(names) == 14 and all("_a_" in name or "_b_" in name for name in names)
    (origin,) = checkpoint.read_extra(path)["origins"].values()
    assert origin.pop("fingerprint") == weights.fingerprint(random_model)
    assert origin == {"path": str(random_model)} | {k: adapted.config.model[k] for k in origin if k != "path"}


def test_evaluations_of_a_checkpoint_sample_from_it(adapted):
    with adapted.policies.sampling_from(adapted.policies.find_checkpoint("step-1")):
        first = said(adapted.policy)
    last = said(adapted.policy)
    np.testing.assert_array_equal(last[1], adapted.said[1])
    assert not np.array_equal(first[1], last[1])


def test_huggingface_is_the_model_with_them_merged(adapted, tmp_path):
    with Client(adapted.url) as client:
        folder = client.download_model(tmp_path / "model")
        initial = client.download_model(tmp_path / "initial", checkpoint="initial", format="safetensors")
    assert_is_the_policy(adapted, transformers_logits(folder, adapted.said[0]), 1e-4)
    base = safetensors.numpy.load_file(initial / "model.safetensors")
    model = safetensors.numpy.load_file(folder / "model.safetensors")
    changed = {name for name in base if not np.array_equal(base[name], model[name])}
    assert changed == {name for name in base if "_proj" in name}


def test_peft_is_the_adapters_beside_the_model(adapted, random_model, tmp_path):
    """W + alpha / r B A, by PEFT's names, put into transformers' model; and by PEFT, where it is installed."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    (tmp_path / "adapters").mkdir()
    (tmp_path / "adapters" / "model.safetensors").write_text("of another model")
    with Client(adapted.url) as client:
        folder = client.download_model(tmp_path / "adapters", format="peft")
        with pytest.raises(InvalidConfigError, match="has no adapters to export as peft"):
            client.download_model(tmp_path / "none", checkpoint="initial", format="peft")
    assert {path.name for path in folder.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(random_model)
    assert set(config["target_modules"]) == set(lora.TARGETS)
    tensors = safetensors.numpy.load_file(folder / "adapter_model.safetensors")
    assert len(tensors) == 2 * 7 * 2

    model = transformers.AutoModelForCausalLM.from_pretrained(random_model, local_files_only=True).eval()
    ids = torch.tensor(adapted.said[0])[None]
    with torch.no_grad():
        for name, module in model.named_modules():
            if name.rpartition(".")[2] in config["target_modules"]:
                a, b = (torch.tensor(tensors[f"base_model.model.{name}.lora_{x}.weight"]) for x in "AB")
                assert a.shape[0] == b.shape[1] == config["r"] == RANK
                module.weight += config["lora_alpha"] / config["r"] * b @ a
        assert_is_the_policy(adapted, model(ids).logits[0].numpy(), 1e-4)

        peft = pytest.importorskip("peft")
        model = transformers.AutoModelForCausalLM.from_pretrained(random_model, local_files_only=True)
        model = peft.PeftModel.from_pretrained(model, folder).eval()
        assert_is_the_policy(adapted, model(ids).logits[0].numpy(), 1e-4)


def rows_of(policy):
    rng = np.random.default_rng(0)
    calls = [rng.integers(policy.config.vocab_size, size=(2, 6)).tolist() for _ in range(4)]
    calls = [trajectory.TokenCall(0, None, p, s, -np.ones(6, np.float32), temperature=1.0) for p, s in calls]
    return [row for n, call in enumerate(calls) for row in trajectory.build_rows([call], n)]


def test_a_restored_run_goes_on_to_the_bit(adapted, random_model, tmp_path):
    """Its own work directory, copied, as another process finds it."""
    rows = {adapted.policy.name: rows_of(adapted.policy)}
    returns = np.array([0, 1, 3, 2], np.float32), np.zeros(4, np.int32)
    workdir = tmp_path / "run"
    copied = workdir / "checkpoints" / "step-2"
    copied.parent.mkdir(parents=True)
    checkpoint.save(
        copied.parent, 2, adapted.policy.state, checkpoint.read_extra(adapted.policies.find_checkpoint("step-2"))
    )
    restored = Policies(settings(random_model, workdir, **SETTINGS))
    try:
        assert restored.step == 2 and restored.first.version == 2
        for ours, theirs in zip(said(restored.first), adapted.said, strict=True):
            np.testing.assert_array_equal(ours, theirs)
        first, second = (policies.update(rows, *returns) for policies in (restored, adapted.policies))
        same = [{k: v for k, v in m[adapted.policy.name].items() if not k.startswith("time/")} for m in (first, second)]
        assert same[0] == same[1]
        jax.tree.map(np.testing.assert_array_equal, restored.first.state, adapted.policy.state)
    finally:
        restored.close()

    for changes, words in [
        ({"model.lora_rank": 0}, "model.lora_rank=4 there, 0 here"),
        ({"model.lora_alpha": 8.0}, "model.lora_alpha=16.0 there, 8.0 here"),
        ({"model.lora_targets": "q_proj"}, "model.lora_targets='all-linear' there, 'q_proj' here"),
    ]:
        with pytest.raises(InvalidConfigError, match=f"{words}\n.*settings that it was made with"):
            Policies(settings(random_model, workdir, **(SETTINGS | changes)))


def test_two_models_learn_each_in_its_own_way(start, random_model, tool_model, tmp_path):
    own = {
        "models.query.lora_rank": 2,
        "models.query.lora_targets": "q_proj, v_proj",
        "models.answer.frozen": "embed_tokens|lm_head",
        "algorithm.learning_rate": 1e-2,
        "runtime.remat": "none",
    }
    two = start({"query": random_model, "answer": tool_model}, **own)
    two.policies.prepare_training()
    query, answer = two.policies.values()
    before = {name: jax.tree.map(np.array, policy._learner.params) for name, policy in two.policies.items()}
    returns = np.array([0, 1, 3, 2], np.float32), np.zeros(4, np.int32)
    two.policies.update({name: rows_of(policy) for name, policy in two.policies.items()}, *returns)
    path = two.policies.save_checkpoint({"job_id": "", "step": 1})
    assert set(query.state.params["layers"]) == {"q_a_dr", "q_b_rkgh", "v_a_dr", "v_b_rkh"}
    assert set(answer.state.params) == {"layers", "final_norm_d"}
    weights = {name: p.read_weights(path, np.float32, name) for name, p in two.policies.items()}
    for name, fixed in (("query", {"embed_vd", "unembed_dv", "final_norm_d"}), ("answer", {"embed_vd", "unembed_dv"})):
        for leaf in ("embed_vd", "unembed_dv", "final_norm_d"):
            assert np.array_equal(weights[name][leaf], before[name][leaf]) == (leaf in fixed), (name, leaf)
    live = answer._learner.params
    jax.tree.map(np.testing.assert_array_equal, weights["answer"], jax.device_get(live))
    (sampled,) = two.policies.first._engine._executor._params["layers"][1]["v_khd"]
    sampled = np.moveaxis(sampled, -1, 0)
    np.testing.assert_allclose(weights["query"]["layers"]["v_dkh"][1], sampled, rtol=0, atol=1e-7)
    assert not np.array_equal(sampled, before["query"]["layers"]["v_dkh"][1])
