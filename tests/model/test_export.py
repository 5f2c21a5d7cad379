"""Writing model folders: whole or not at all. That transformers reads them is in test_parity."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lightning_jax.model import export, weights

GOLDENS = pathlib.Path(__file__).parent / "goldens"


def names(folder):
    return sorted(file.name for file in folder.iterdir())


def assert_same(folder, expected):
    jax.tree.map(np.testing.assert_array_equal, weights.load_model(folder)[1], expected)


def test_shards(tmp_path):
    config, params = weights.load_model(GOLDENS / "qwen2")
    export.save_hf(tmp_path / "model", config, params, max_shard_bytes=20_000)
    index = json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text())
    shards = sorted((tmp_path / "model").glob("model-*-of-*.safetensors"))
    assert len(shards) > 1 and set(index["weight_map"].values()) == {shard.name for shard in shards}
    assert all(shard.stat().st_size < 20_000 + 4_000 for shard in shards)  # the header comes on top
    assert index["metadata"]["total_size"] == sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert_same(tmp_path / "model", params)


@pytest.mark.parametrize("dtype, name", [(jnp.bfloat16, "bfloat16"), (jnp.float16, "float16")])
def test_half_precision_is_rounded_once(tmp_path, dtype, name):
    config, params = weights.load_model(GOLDENS / "qwen3")
    export.save_hf(tmp_path / "model", config, params, dtype)
    assert json.loads((tmp_path / "model" / "config.json").read_text())["torch_dtype"] == name
    assert_same(tmp_path / "model", jax.tree.map(lambda leaf: leaf.astype(dtype).astype(jnp.float32), params))


def test_replacing_a_model_keeps_other_files_and_drops_old_weights(tmp_path):
    folder = tmp_path / "model"
    config, params = weights.load_model(GOLDENS / "llama2")
    export.save_hf(folder, config, params, max_shard_bytes=20_000)
    (folder / "README.md").write_text("a card")
    (folder / "tokenizer.json").write_text("{}")
    config, params = weights.load_model(GOLDENS / "qwen3")
    export.save_hf(folder, config, params, tokenizer_files_from=folder)
    assert names(folder) == sorted(
        ["README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json"]
    )
    assert names(tmp_path) == ["model"]
    assert weights.load_config(folder) == config
    assert_same(folder, params)


def test_a_failed_write_leaves_what_was_there(tmp_path):
    config, params = weights.load_model(GOLDENS / "llama2")
    export.save_hf(tmp_path / "model", config, params)
    broken = params | {"layers": {name: leaf for name, leaf in params["layers"].items() if name != "down_fd"}}
    with pytest.raises(KeyError):
        export.save_hf(tmp_path / "model", config, broken, max_shard_bytes=20_000)
    with pytest.raises(KeyError):
        export.save_hf(tmp_path / "new", config, broken, max_shard_bytes=20_000)
    assert names(tmp_path) == ["model"]
    assert_same(tmp_path / "model", params)


def test_tokenizer_files_are_copied(tmp_path):
    config, params = weights.load_model(GOLDENS / "llama2")
    source = tmp_path / "source"
    source.mkdir()
    for name in ("tokenizer.json", "chat_template.jinja", "model.safetensors"):
        (source / name).write_text(name)
    export.save_hf(tmp_path / "model", config, params, tokenizer_files_from=source)
    assert (tmp_path / "model" / "tokenizer.json").read_text() == "tokenizer.json"
    assert (tmp_path / "model" / "chat_template.jinja").exists()
    assert_same(tmp_path / "model", params)
