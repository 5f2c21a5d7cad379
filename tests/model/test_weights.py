"""Reading models: GGUF as llama.cpp's converter writes it, sharded folders, and files that are wrong."""

import json
import pathlib
import shutil

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from agent_lightning.exceptions import InvalidConfigError
from lightning_jax.model import llama, weights
from lightning_jax.model.config import LlamaConfig, RopeScaling

GOLDENS = pathlib.Path(__file__).parent / "goldens"
GGUF_NAMES = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, 2)  # a superset of what llama and qwen2 have


def write_gguf(folder: pathlib.Path, file: pathlib.Path, *, without=(), tensors=None, split=0, **metadata) -> None:
    """A golden as `convert_hf_to_gguf.py` of llama.cpp writes it (its `permute` and `rope_freqs`, in float32).

    Args:
        without: metadata keys and tensors to leave out.
        tensors: GGUF name -> array, of tensors to add or to replace.
        split: tensors in each of several files; 0 for one file.
        metadata: texts, numbers and lists to add, without the family's name in the key and with "__" for ".".
    """
    hf = json.loads((folder / "config.json").read_text())
    family, heads, kv_heads = hf["model_type"], hf["num_attention_heads"], hf["num_key_value_heads"]
    head_dim = hf.get("head_dim") or hf["hidden_size"] // heads
    rope = hf["rope_parameters"]
    writer = gguf.GGUFWriter(file, family, split_max_tensors=split)
    writer.add_block_count(hf["num_hidden_layers"])
    writer.add_context_length(hf["max_position_embeddings"])
    writer.add_embedding_length(hf["hidden_size"])
    writer.add_feed_forward_length(hf["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_layer_norm_rms_eps(hf["rms_norm_eps"])
    writer.add_bos_token_id(hf["bos_token_id"])
    writer.add_eos_token_id(2)
    writer.add_eot_token_id(5)
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "llama3":
        writer.add_tensor("rope_freqs.weight", rope_divisors(head_dim, rope))
    for key, value in metadata.items():
        add = {list: writer.add_array, float: writer.add_float32, str: writer.add_string}[type(value)]
        add(f"{family}.{key}".replace("__", "."), value)
    for name, value in safetensors.numpy.load_file(folder / "model.safetensors").items():
        if family == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            n = heads if "q_proj" in name else kv_heads
            value = value.reshape(n, 2, value.shape[0] // n // 2, *value.shape[1:]).swapaxes(1, 2).reshape(value.shape)
        gguf_name = GGUF_NAMES.get_name(name, try_suffixes=(".weight", ".bias"))
        if gguf_name not in (tensors or {}):
            writer.add_tensor(gguf_name, np.ascontiguousarray(value))
    for name, value in (tensors or {}).items():
        writer.add_tensor(name, value)
    for name in without:
        for table in (*writer.kv_data, *writer.tensors):
            table.pop(name, None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def rope_divisors(head_dim: int, rope: dict) -> np.ndarray:
    """What llama.cpp's converter stores for Llama 3.1's rope scaling."""
    divisors = []
    for frequency in rope["rope_theta"] ** -(np.arange(0, head_dim, 2) / head_dim):
        turns = rope["original_max_position_embeddings"] * frequency / (2 * np.pi)
        if turns > rope["high_freq_factor"]:
            divisors.append(1)
        elif turns < rope["low_freq_factor"]:
            divisors.append(rope["factor"])
        else:
            smooth = (turns - rope["low_freq_factor"]) / (rope["high_freq_factor"] - rope["low_freq_factor"])
            divisors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return np.array(divisors, np.float32)


@pytest.mark.parametrize("name", ["llama2", "llama3_scaled", "llama_linear", "smollm2", "qwen2", "qwen3"])
def test_gguf_is_the_same_model(name, tmp_path):
    write_gguf(GOLDENS / name, tmp_path / "model.gguf")
    config, params = weights.load_model(tmp_path / "model.gguf")
    expected_config, expected = weights.load_model(GOLDENS / name)
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    assert config.eos_ids == (2, 5)
    position_bt = jnp.arange(128)[None]
    for angles, wanted in zip(
        llama.rope_angles(config, position_bt), llama.rope_angles(expected_config, position_bt), strict=True
    ):
        np.testing.assert_allclose(angles, wanted, rtol=0, atol=2e-5)
    same = ("num_heads", "num_kv_heads", "head_dim", "rms_norm_eps", "tie_embeddings", "max_seq_len", "model_type")
    assert {key: getattr(config, key) for key in same} == {key: getattr(expected_config, key) for key in same}


def test_llama32_rope_scaling_is_recovered_from_gguf(tmp_path):
    """The published numbers of Llama 3.2, from the divisors that its GGUF files store."""
    rope = {"rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope |= {"rope_type": "llama3", "original_max_position_embeddings": 8192}
    folder = shutil.copytree(GOLDENS / "llama3_scaled", tmp_path / "model")
    hf = json.loads((folder / "config.json").read_text())
    hf |= {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 64, "rope_parameters": rope}
    (folder / "config.json").write_text(json.dumps(hf))
    write_gguf(folder, tmp_path / "model.gguf")
    assert weights.load_config(tmp_path / "model.gguf").rope_scaling == RopeScaling(32.0, 1.0, 4.0, 8192)


def test_a_sharded_folder_is_the_same_model(tmp_path):
    """Shards as the Hub has them, made by hand here; export's own are in test_export."""
    folder = shutil.copytree(GOLDENS / "qwen3", tmp_path / "model")
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for number, names in enumerate((sorted(tensors)[::2], sorted(tensors)[1::2]), start=1):
        file = f"model-0000{number}-of-00002.safetensors"
        safetensors.numpy.save_file({name: tensors[name] for name in names}, folder / file)
        weight_map |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    jax.tree.map(np.testing.assert_array_equal, weights.load_model(folder)[1], weights.load_model(GOLDENS / "qwen3")[1])
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(InvalidConfigError, match="shards are missing: model-00002-of-00002.safetensors"):
        weights.load_model(folder)


def test_end_of_turn_ids_of_both_config_files(tmp_path):
    """Chat models end turns with ids that only generation_config.json lists."""
    folder = shutil.copytree(GOLDENS / "llama2", tmp_path / "model")
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 2, 9]}')
    assert weights.load_config(folder).eos_ids == (7, 2, 9)
    (folder / "generation_config.json").write_text('{"eos_token_id": 7}')
    assert weights.load_config(folder).eos_ids == (7, 2)


def test_an_empty_list_of_first_ids():
    hf = json.loads((GOLDENS / "llama2" / "config.json").read_text())
    assert LlamaConfig.from_hf(hf | {"bos_token_id": []}).bos_id is None


def test_asked_dtype():
    _, params = weights.load_model(GOLDENS / "llama2", jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}


def test_an_output_matrix_of_its_own_is_not_tied_whatever_the_config_says(tmp_path):
    folder = shutil.copytree(GOLDENS / "llama2", tmp_path / "model")
    _, params = weights.load_model(folder)
    change_config(folder, tie_word_embeddings=True)
    config, again = weights.load_model(folder)
    assert not config.tie_embeddings and not weights.load_config(folder).tie_embeddings
    np.testing.assert_array_equal(again["unembed_dv"], params["unembed_dv"])
    change_tensors(folder, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"]}))
    config, again = weights.load_model(folder)
    assert config.tie_embeddings and "unembed_dv" not in again


def test_windows_that_a_family_ignores():
    """transformers' Mistral always has its window, and its Llama none, whatever `use_sliding_window` says."""
    llama = json.loads((GOLDENS / "llama2" / "config.json").read_text())
    window = {"sliding_window": 7, "max_window_layers": 0}
    assert LlamaConfig.from_hf(llama | window | {"use_sliding_window": True}).sliding_window is None
    mistral = llama | window | {"model_type": "mistral", "use_sliding_window": False}
    assert LlamaConfig.from_hf(mistral).sliding_window == 7
    layers = mistral["num_hidden_layers"]
    assert LlamaConfig.from_hf(mistral | {"layer_types": ["full_attention"] * layers}).sliding_window is None


def test_rope_scaling_beside_rope_parameters_counts():
    """transformers 5 writes `rope_parameters`; Qwen's model cards tell to add a `rope_scaling`."""
    hf = json.loads((GOLDENS / "qwen3" / "config.json").read_text())
    assert hf["rope_parameters"] == {"rope_theta": 1000000.0, "rope_type": "default"}
    config = LlamaConfig.from_hf(hf | {"rope_scaling": {"type": "linear", "factor": 4.0}})
    assert (config.rope_theta, config.rope_scaling) == (1000000.0, RopeScaling(4.0))
    with pytest.raises(InvalidConfigError, match="rope scaling 'yarn' is not supported"):
        LlamaConfig.from_hf(hf | {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}})


@pytest.mark.parametrize("inside, beside, expected", [(64, None, 64), (64, 32, 32), (None, 32, 32), (None, None, 512)])
def test_where_the_length_before_scaling_is_found(inside, beside, expected):
    """transformers 5 (`RotaryEmbeddingConfigMixin.standardize_rope_params`): beside the scaling goes before inside."""
    hf = json.loads((GOLDENS / "llama2" / "config.json").read_text()) | {"max_position_embeddings": 512}
    hf.pop("rope_parameters", None)
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    hf |= {"rope_scaling": scaling | ({} if inside is None else {"original_max_position_embeddings": inside})}
    hf |= {} if beside is None else {"original_max_position_embeddings": beside}
    assert LlamaConfig.from_hf(hf).rope_scaling.original_max_position_embeddings == expected


# --- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path, hint",
    [("no/such/model", "local folder"), ("no/such.gguf", "local folder"), ("builtin:huge", "builtin:tiny")],
)
def test_nothing_there(path, hint):
    with pytest.raises(InvalidConfigError, match=f"(?s){path}.*does not exist.*{hint}"):
        weights.load_model(path)


def change_config(folder, **changes):
    hf = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(hf | changes))


def change_tensors(folder, change):
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    change(tensors)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")


NORM = "model.layers.1.input_layernorm.weight"
BROKEN = {
    "holds no config.json": lambda f: (f / "config.json").unlink(),
    "cannot be read": lambda f: (f / "config.json").write_text("{"),
    "holds no model.safetensors": lambda f: (f / "model.safetensors").unlink(),
    "model_type 'gpt2' is not supported": lambda f: change_config(f, model_type="gpt2"),
    "config.json lacks hidden_size": lambda f: change_config(f, hidden_size=None),
    "hidden_act='gelu'": lambda f: change_config(f, hidden_act="gelu"),
    "attention_bias=True": lambda f: change_config(f, attention_bias=True),
    "rope scaling 'yarn'": lambda f: change_config(f, rope_parameters={"rope_type": "yarn", "factor": 2}),
    f"lacks {NORM}": lambda f: change_tensors(f, lambda tensors: tensors.pop(NORM)),
    "cannot be read: KeyError: 'factor'": lambda f: change_config(f, rope_parameters={"rope_type": "linear"}),
    "config.json's num_attention_heads is 0;": lambda f: change_config(f, num_attention_heads=0, head_dim=None),
    "config.json's num_attention_heads is '4';": lambda f: change_config(f, num_attention_heads="4"),
    "config.json's num_hidden_layers is 0;": lambda f: change_config(f, num_hidden_layers=0),
    "config.json's hidden_size is 24.5;": lambda f: change_config(f, hidden_size=24.5),
    r"config.json's num_key_value_heads is \[2, 1\];": lambda f: change_config(f, num_key_value_heads=[2, 1]),
    "config.json's rms_norm_eps is None;": lambda f: change_config(f, rms_norm_eps=None),
    "config.json's sliding_window is 0;": lambda f: change_config(f, model_type="mistral", sliding_window=0),
    "4 attention heads cannot share 8 key/value heads": lambda f: change_config(f, num_key_value_heads=8),
    "config.json lacks max_position_embeddings": lambda f: change_config(f, max_position_embeddings=None),
    "cannot be read: AttributeError": lambda f: (f / "config.json").write_text("[]"),
    "does not explain: model.layers.0.moe": lambda f: change_tensors(
        f, lambda tensors: tensors.update({"model.layers.0.moe": np.ones(3, np.float32)})
    ),
    f"{NORM} is .7,.": lambda f: change_tensors(f, lambda tensors: tensors.update({NORM: np.ones(7, np.float32)})),
    "cannot be read: .*Is a directory": lambda f: ((f / "config.json").unlink(), (f / "config.json").mkdir()),
    "(?s)cannot be read.*[Hh]eader": lambda f: (f / "model.safetensors").write_bytes(b"not safetensors at all"),
}


@pytest.mark.parametrize("message", BROKEN)
def test_broken_folder(message, tmp_path):
    folder = shutil.copytree(GOLDENS / "llama2", tmp_path / "model")
    BROKEN[message](folder)
    with pytest.raises(InvalidConfigError, match=message) as error:
        weights.load_model(folder)
    assert str(folder) in str(error.value)


def test_a_window_in_some_layers_only():
    hf = json.loads((GOLDENS / "qwen2_sliding" / "config.json").read_text())
    assert LlamaConfig.from_hf(hf).sliding_window == 8
    assert LlamaConfig.from_hf(hf | {"use_sliding_window": False}).sliding_window is None
    with pytest.raises(InvalidConfigError, match="some layers only"):
        LlamaConfig.from_hf(hf | {"layer_types": ["full_attention", "sliding_attention"]})
    with pytest.raises(InvalidConfigError, match="some layers only"):
        LlamaConfig.from_hf(hf | {"model_type": "mistral", "layer_types": ["full_attention", "sliding_attention"]})


@pytest.mark.parametrize("key", ["rope__scaling__factor", "rope__scale_linear"])
def test_gguf_with_a_rope_factor_and_no_kind_of_scaling(key, tmp_path):
    """llama.cpp takes it as linear, and still reads the older name (`llama_model::load_hparams`)."""
    write_gguf(GOLDENS / "llama2", tmp_path / "model.gguf", **{key: 4.0})
    assert weights.load_config(tmp_path / "model.gguf").rope_scaling == RopeScaling(4.0)


def test_gguf_with_a_tensor_of_a_type_that_cannot_be_read(tmp_path):
    tensors = {"output_norm.weight": np.ones(48, np.int32)}
    write_gguf(GOLDENS / "llama2", tmp_path / "model.gguf", tensors=tensors)
    with pytest.raises(InvalidConfigError, match="model.gguf': output_norm.weight is of type I32, which is not"):
        weights.load_model(tmp_path / "model.gguf")


def test_broken_gguf(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF but not really")
    with pytest.raises(InvalidConfigError, match="cannot be read"):
        weights.load_model(tmp_path / "model.gguf")
    write_gguf(GOLDENS / "llama2", tmp_path / "yarn.gguf", rope__scaling__type="yarn")
    with pytest.raises(InvalidConfigError, match="'yarn' is not supported"):
        weights.load_model(tmp_path / "yarn.gguf")


@pytest.mark.parametrize(
    "key",
    [
        "embedding_length",
        "block_count",
        "feed_forward_length",
        "context_length",
        "attention.head_count",
        "attention.layer_norm_rms_epsilon",
        "rope.scaling.factor",
    ],
)
def test_gguf_without_a_size(key, tmp_path):
    write_gguf(GOLDENS / "llama_linear", tmp_path / "model.gguf", without=[f"llama.{key}"])
    with pytest.raises(InvalidConfigError, match=f"model.gguf'.*metadata lacks llama.{key}\n"):
        weights.load_model(tmp_path / "model.gguf")


def test_gguf_with_a_size_that_is_no_number(tmp_path):
    """Models whose layers differ in size list one for each."""
    write_gguf(GOLDENS / "llama2", tmp_path / "model.gguf", attention__head_count_kv=[2, 1])
    with pytest.raises(InvalidConfigError, match=r"llama.attention.head_count_kv is \[2, 1\]; only one number"):
        weights.load_model(tmp_path / "model.gguf")


@pytest.mark.parametrize(
    "tensor, message",
    [
        ("token_embd.weight", "lacks the tensor token_embd.weight"),
        ("output_norm.weight", "lacks model.norm.weight"),
        ("blk.1.ffn_up.weight", "lacks model.layers.1.mlp.up_proj.weight"),
    ],
)
def test_gguf_without_a_tensor(tensor, message, tmp_path):
    write_gguf(GOLDENS / "llama2", tmp_path / "model.gguf", without=[tensor])
    with pytest.raises(InvalidConfigError, match=message):
        weights.load_model(tmp_path / "model.gguf")


@pytest.mark.parametrize("tensor", ["blk.0.moe", "v.patch_embd.weight", "ffn_up.weight", "blk.0.ffn_gate_exps.weight"])
def test_gguf_with_a_tensor_too_many(tensor, tmp_path):
    write_gguf(GOLDENS / "llama2", tmp_path / "model.gguf", tensors={tensor: np.ones(3, np.float32)})
    with pytest.raises(InvalidConfigError, match=f"does not explain: {tensor}\n"):
        weights.load_model(tmp_path / "model.gguf")


def test_split_gguf(tmp_path):
    write_gguf(GOLDENS / "llama2", tmp_path / "model.gguf", split=12)
    first, second = sorted(tmp_path.iterdir())
    for file in (first, second):
        with pytest.raises(InvalidConfigError, match="(?s)one of 2 GGUF files.*llama-gguf-split --merge"):
            weights.load_model(file)


def test_gguf_cut_short(tmp_path):
    write_gguf(GOLDENS / "llama2", tmp_path / "whole.gguf")
    whole = (tmp_path / "whole.gguf").read_bytes()
    for size in (1, 7, 20, 30, 100, 400, 900, 1500, len(whole) // 2, len(whole) - 1):
        (tmp_path / "cut.gguf").write_bytes(whole[:size])
        with pytest.raises(InvalidConfigError, match="cut.gguf"):
            weights.load_model(tmp_path / "cut.gguf")
