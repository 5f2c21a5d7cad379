"""Logits against transformers, in float32, to 1e-4: goldens everywhere, live models where torch is installed."""

import functools
import pathlib
import runpy

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lightning_jax import compiler
from lightning_jax.model import export, llama, weights
from lightning_jax.model.attention import segment_attention
from lightning_jax.rl import update

HERE = pathlib.Path(__file__).parent
GOLDENS = sorted(path.parent for path in HERE.glob("goldens/*/config.json"))
FAMILIES = pytest.mark.parametrize("folder", GOLDENS, ids=lambda folder: folder.name)


def logits_tv(config: llama.LlamaConfig, params: llama.Params, token_t: np.ndarray) -> np.ndarray:
    """One sequence through the learner's forward pass, compiled as the learner's."""

    @functools.partial(compiler.PlatformJit, cpu_options=update.CPU_OPTIONS)
    def logits(params: llama.Params, token_bt: jax.Array) -> jax.Array:
        position_bt = jnp.arange(len(token_t))[None]
        attend = segment_attention(jnp.ones_like(token_bt), position_bt, config.sliding_window)
        x_btd, _ = llama.forward(params, config, token_bt, position_bt, attend)
        return llama.unembed(params, config, x_btd)

    return np.asarray(logits(params, jnp.asarray(token_t)[None])[0])


def test_every_family_has_a_golden():
    assert {folder.name for folder in GOLDENS} == {
        "llama2",
        "llama3",
        "llama3_scaled",
        "llama_linear",
        "mistral",
        "qwen2",
        "qwen2_sliding",
        "qwen3",
        "smollm2",
    }


@FAMILIES
def test_golden(folder):
    golden = np.load(folder / "logits.npz")
    assert np.ptp(golden["logits_tv"]) > 1  # nothing that a tolerance of 1e-4 would hide
    config, params = weights.load_model(folder)
    np.testing.assert_allclose(logits_tv(config, params, golden["token_t"]), golden["logits_tv"], rtol=0, atol=1e-4)


@FAMILIES
def test_live_transformers_both_ways(folder, tmp_path):
    """A random model that transformers saves, loaded here; then saved here, and loaded by transformers."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    randomize = runpy.run_path(str(HERE / "make_goldens.py"))["randomize"]

    def theirs(model: "torch.nn.Module") -> np.ndarray:
        with torch.no_grad():
            return model.eval()(torch.tensor(token_t)[None]).logits[0].numpy()

    theirs_config = transformers.AutoConfig.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_config(theirs_config, attn_implementation="eager").float()
    randomize(model, seed=100)
    model.save_pretrained(tmp_path / "theirs")
    token_t = np.random.default_rng(7).integers(0, theirs_config.vocab_size, 60)
    config, params = weights.load_model(tmp_path / "theirs")
    np.testing.assert_allclose(logits_tv(config, params, token_t), theirs(model), rtol=0, atol=1e-4)

    export.save_hf(tmp_path / "ours", config, params)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", attn_implementation="eager")
    assert type(again) is type(model)
    np.testing.assert_array_equal(theirs(again), theirs(model))
    assert again.generation_config.eos_token_id == list(config.eos_ids)
    assert weights.load_config(tmp_path / "ours") == config


def test_smollm2_golden(smollm2_gguf):
    golden = np.load(HERE / "goldens" / "smollm2_135m_q4_1.npz")
    config, params = weights.load_model(smollm2_gguf)
    logits = logits_tv(config, params, golden["token_t"])
    np.testing.assert_allclose(logits[:, ::97], golden["logits_tv"], rtol=0, atol=1e-4)
    logsumexp_t = np.logaddexp.reduce(logits.astype(np.float64), axis=-1)
    np.testing.assert_allclose(logsumexp_t, golden["logsumexp_t"], rtol=0, atol=1e-4)
    np.testing.assert_array_equal(logits.argmax(-1), golden["argmax_t"])


def test_smollm2_live(smollm2_gguf, tmp_path):
    """The GGUF file read by both, then our export of it read by transformers, which computes in float64.

    Of five million logits some differ by nearly as much as the tolerance between any two orders of 30 layers' sums.
    """
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    read_gguf = runpy.run_path(str(HERE / "make_goldens.py"))["transformers_gguf"]
    token_t = np.random.default_rng(3).integers(0, 49152, 96)
    config, params = weights.load_model(smollm2_gguf)
    with torch.no_grad():
        theirs = read_gguf(smollm2_gguf).double()(torch.tensor(token_t)[None]).logits[0].numpy()
        np.testing.assert_allclose(logits_tv(config, params, token_t), theirs, rtol=0, atol=1e-4)
        export.save_hf(tmp_path / "smollm2", config, params)
        exported = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "smollm2")
        again = exported.double()(torch.tensor(token_t)[None]).logits[0].numpy()
    np.testing.assert_allclose(again, theirs, rtol=0, atol=1e-9)
