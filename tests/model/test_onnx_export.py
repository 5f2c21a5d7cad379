"""ONNX graphs in onnxruntime: the logits that transformers computed (goldens), at once and with the cache."""

import pathlib

import numpy as np
import pytest

from agent_lightning.exceptions import InvalidConfigError
from lightning_jax.model import onnx_export, weights

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

GOLDENS = sorted(path.parent for path in pathlib.Path(__file__).parent.glob("goldens/*/config.json"))
ATOL = 1e-3


class Session:
    """A model as other programs run it: they see names and shapes, nothing of ours."""

    def __init__(self, folder):
        self._session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
        self.inputs = {i.name: i for i in self._session.get_inputs()}
        self.outputs = [o.name for o in self._session.get_outputs()]

    def empty_cache(self, batch=1):
        """Past keys and values of no tokens; the sizes come from the graph."""
        return {
            name: np.zeros((batch, i.shape[1], 0, i.shape[3]), np.float32)
            for name, i in self.inputs.items()
            if name.startswith("past_key_values.")
        }

    def __call__(self, token_bt, cache, mask_bs=None, position_bt=None):
        """Logits and the next call's cache."""
        token_bt = np.asarray(token_bt, np.int64)
        past = next(iter(cache.values())).shape[2]
        if mask_bs is None:
            mask_bs = np.ones((len(token_bt), past + token_bt.shape[1]), np.int64)
        if position_bt is None:
            position_bt = np.broadcast_to(np.arange(past, past + token_bt.shape[1]), token_bt.shape)
        feed = {"input_ids": token_bt, "attention_mask": mask_bs, "position_ids": position_bt.astype(np.int64)}
        found = dict(zip(self.outputs, self._session.run(None, feed | cache), strict=True))
        logits = found.pop("logits")
        return logits, {name.replace("present", "past_key_values"): value for name, value in found.items()}


@pytest.fixture(scope="module")
def sessions(tmp_path_factory):
    """sessions(golden folder) -> its model in onnxruntime, and the golden."""
    made = {}

    def session(folder):
        if folder not in made:
            target = tmp_path_factory.mktemp("onnx") / folder.name
            onnx_export.save_onnx(target, *weights.load_arrays(folder))
            onnx.checker.check_model(target / "model.onnx", full_check=True)
            golden = np.load(folder / "logits.npz")
            made[folder] = Session(target), golden["token_t"], golden["logits_tv"]
        return made[folder]

    return session


families = pytest.mark.parametrize("folder", GOLDENS, ids=lambda folder: folder.name)


@families
def test_prefill(sessions, folder):
    session, token_t, logits_tv = sessions(folder)
    logits, _ = session(token_t[None], session.empty_cache())
    np.testing.assert_allclose(logits[0], logits_tv, rtol=0, atol=ATOL)


@families
def test_decoding_with_the_cache(sessions, folder):
    """A prompt, one token at a time, and at the end several at once."""
    session, token_t, logits_tv = sessions(folder)
    cache, found = session.empty_cache(), []
    for start, end in [(0, 20), *((i, i + 1) for i in range(20, 40)), (40, len(token_t))]:
        logits, cache = session(token_t[None, start:end], cache)
        found.append(logits[0])
        assert all(value.shape[2] == end for value in cache.values())
    np.testing.assert_allclose(np.concatenate(found), logits_tv, rtol=0, atol=ATOL)


@families
def test_a_batch_of_unequal_prompts_padded_on_the_left(sessions, folder):
    """As transformers' generate feeds it: padding is masked and not counted in the positions."""
    session, token_t, logits_tv = sessions(folder)
    lengths, width = (30, 17), 30
    token_bt, mask_bt = np.zeros((2, width), np.int64), np.zeros((2, width), np.int64)
    for row, length in enumerate(lengths):
        token_bt[row, width - length :] = token_t[:length]
        mask_bt[row, width - length :] = 1
    position_bt = np.maximum(mask_bt.cumsum(-1) - 1, 0)
    logits, cache = session(token_bt, session.empty_cache(2), mask_bt, position_bt)
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(logits[row, width - length :], logits_tv[:length], rtol=0, atol=ATOL)
    following = np.array([[token_t[length]] for length in lengths])
    mask_bs = np.concatenate([mask_bt, np.ones((2, 1), np.int64)], axis=1)
    logits, _ = session(following, cache, mask_bs, np.array(lengths)[:, None])
    expected = np.stack([logits_tv[length] for length in lengths])
    np.testing.assert_allclose(logits[:, 0], expected, rtol=0, atol=ATOL)


def test_names_are_optimums(sessions):
    """Names, order and dynamic axes by which ORTModelForCausalLM and transformers.js find their way."""
    folder = GOLDENS[0].with_name("llama3")
    session, *_ = sessions(folder)
    config = weights.load_config(folder)
    caches = [f"{layer}.{part}" for layer in range(config.num_layers) for part in ("key", "value")]
    first = ["input_ids", "attention_mask", "position_ids"]
    assert list(session.inputs) == first + [f"past_key_values.{name}" for name in caches]
    assert session.outputs == ["logits", *(f"present.{name}" for name in caches)]
    assert session.inputs["input_ids"].shape == ["batch_size", "sequence_length"]
    past = ["batch_size", config.num_kv_heads, "past_sequence_length", config.head_dim]
    assert session.inputs["past_key_values.0.key"].shape == past


def test_large_weights_go_beside_the_graph(sessions, tmp_path):
    folder = GOLDENS[0].with_name("qwen3")
    onnx_export.save_onnx(tmp_path / "model", *weights.load_arrays(folder), max_inline_bytes=1000)
    files = {file.name: file.stat().st_size for file in (tmp_path / "model").iterdir()}
    assert set(files) == {"config.json", "generation_config.json", "model.onnx", "model.onnx_data"}
    weights_bytes = (folder / "model.safetensors").stat().st_size
    assert files["model.onnx_data"] > 0.8 * weights_bytes
    onnx.checker.check_model(tmp_path / "model" / "model.onnx", full_check=True)
    session, token_t, _ = sessions(folder)
    beside = Session(tmp_path / "model")
    np.testing.assert_array_equal(
        beside(token_t[None], beside.empty_cache())[0], session(token_t[None], session.empty_cache())[0]
    )


def test_without_the_package_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "onnx", None)
    with pytest.raises(InvalidConfigError, match=r"lightning-jax\[onnx\]"):
        onnx_export.save_onnx(tmp_path / "model", *weights.load_arrays(GOLDENS[0]))
    assert not list(tmp_path.iterdir())
