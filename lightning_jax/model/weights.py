"""Reads models: Hugging Face folders of safetensors, GGUF files, and the model that ships in this package.

Either kind of file becomes a table of Hugging Face tensor names, each with a function that reads it; `_assemble` then
stacks the layers, one parameter at a time, so that the host never holds the model twice.
"""

import dataclasses
import functools
import hashlib
import json
import pathlib
import re
from collections.abc import Callable
from typing import Any

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import safetensors

from agent_lightning.exceptions import InvalidConfigError
from lightning_jax import mesh
from lightning_jax.model.config import LlamaConfig, RopeScaling, check_numbers
from lightning_jax.model.llama import Params, abstract_params

BUILTIN = "builtin:"
_PARTS, _PART_BYTES = 64, 2**16  # of a file, in a model's fingerprint
Tensors = dict[str, Callable[[], np.ndarray]]  # Hugging Face name -> reads the tensor
DType = Any  # a dtype, or a function from a parameter's name to its dtype

TOP_NAMES = {
    "embed_vd": "model.embed_tokens.weight",
    "final_norm_d": "model.norm.weight",
    "unembed_dv": "lm_head.weight",
}
LAYER_NAMES = {
    "attn_norm_d": "input_layernorm.weight",
    "q_dkgh": "self_attn.q_proj.weight",
    "k_dkh": "self_attn.k_proj.weight",
    "v_dkh": "self_attn.v_proj.weight",
    "o_kghd": "self_attn.o_proj.weight",
    "q_bias_kgh": "self_attn.q_proj.bias",
    "k_bias_kh": "self_attn.k_proj.bias",
    "v_bias_kh": "self_attn.v_proj.bias",
    "q_norm_h": "self_attn.q_norm.weight",
    "k_norm_h": "self_attn.k_norm.weight",
    "mlp_norm_d": "post_attention_layernorm.weight",
    "gate_df": "mlp.gate_proj.weight",
    "up_df": "mlp.up_proj.weight",
    "down_fd": "mlp.down_proj.weight",
}
_GGUF_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_GGUF_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def model_folder(path: str | pathlib.Path) -> pathlib.Path:
    """The folder or `.gguf` file that a model path names; `builtin:tiny` is inside this package.

    Raises:
        InvalidConfigError: there is nothing there.
    """
    if str(path).startswith(BUILTIN):
        builtin = pathlib.Path(__file__).parent.parent / "builtin"
        found = builtin / str(path).removeprefix(BUILTIN)
        known = ", ".join(BUILTIN + folder.name for folder in sorted(builtin.iterdir()) if folder.is_dir())
        hint = f"models in this package: {known}"
    else:
        found = pathlib.Path(path).expanduser()
        hint = "give a local folder with config.json and *.safetensors, a .gguf file, or builtin:tiny"
        if re.fullmatch(r"[\w-]+/[\w.-]+", str(path)) and not str(path).endswith(".gguf"):
            hint += f"; the model of that name on the hub is fetched by `hf download {path} --local-dir {path}`"
    if not found.exists():
        raise InvalidConfigError(f"model path {str(path)!r} does not exist", hint=hint)
    return found


def load_config(path: str | pathlib.Path) -> LlamaConfig:
    """The config alone, without reading weights, but for the two matrices that a tied model may store both of.

    Raises as `load_model`.
    """
    return _open(path)[0]


def load_model(
    path: str | pathlib.Path, dtype: DType = jnp.float32, shardings: Any = None
) -> tuple[LlamaConfig, Params]:
    """Reads a model.

    Args:
        path: see `model_folder`.
        dtype: of the returned parameters; or a function of their names, those of the leaves, that gives each its own.
        shardings: a tree as `mesh.shardings` makes, for where each parameter goes; None for the default device.

    Returns:
        The config, and the parameters in the master form of `llama.abstract_params`.

    Raises:
        InvalidConfigError: nothing there, an unsupported family, or tensors that are missing, left over or misshapen.
    """
    config, tensors = _open(path)
    put = jax.device_put if shardings is None else mesh.put
    return config, _assemble(config, tensors, dtype, shardings, str(path), put)


def load_arrays(path: str | pathlib.Path, dtype: DType = np.float32) -> tuple[LlamaConfig, Params]:
    """The same with NumPy arrays: no device is touched."""
    config, tensors = _open(path)
    return config, _assemble(config, tensors, dtype, None, str(path), lambda value, sharding: value)


def fingerprint(path: str | pathlib.Path) -> str:
    """Tells a model's weights from others', by a digest of parts of their files from the first byte to the last.

    Raises:
        InvalidConfigError: there is nothing there, or it cannot be read.
    """
    found = model_folder(path)
    digest = hashlib.blake2b(digest_size=16)
    try:
        for file in [found] if found.is_file() else sorted(found.glob("*.safetensors")):
            size = file.stat().st_size
            digest.update(size.to_bytes(8))
            with open(file, "rb") as content:
                for start in np.linspace(0, max(0, size - _PART_BYTES), _PARTS, dtype=np.int64).tolist():
                    content.seek(start)
                    digest.update(content.read(_PART_BYTES))
    except OSError as error:
        raise InvalidConfigError(f"model {str(path)!r} cannot be read: {error}") from error
    return digest.hexdigest()


def _open(path: str | pathlib.Path) -> tuple[LlamaConfig, Tensors]:
    found = model_folder(path)
    try:
        return _open_gguf(found) if found.is_file() else _open_folder(found)
    except InvalidConfigError as error:
        raise InvalidConfigError(f"model {str(path)!r}: {error}") from error
    except (OSError, ValueError, safetensors.SafetensorError) as error:  # not the format that its name says
        raise InvalidConfigError(f"model {str(path)!r} cannot be read: {error}") from error
    except (KeyError, TypeError, AttributeError, ZeroDivisionError) as error:  # a config that makes no sense
        raise InvalidConfigError(f"model {str(path)!r} cannot be read: {type(error).__name__}: {error}") from error


def _assemble(config: LlamaConfig, tensors: Tensors, dtype: DType, shardings: Any, path: str, put: Callable) -> Params:
    """Reads, reshapes and stacks what the config's abstract tree asks for; `put(array, sharding)` places each."""
    specs = abstract_params(config)
    wanted = {TOP_NAMES[name] for name in specs if name != "layers"}
    wanted |= {_layer_name(name, layer) for name in specs["layers"] for layer in range(config.num_layers)}
    # A tied model may still store its output matrix, and old files store the rotary frequencies.
    extra = {name for name in tensors.keys() - wanted if name != "lm_head.weight" and "rotary_emb" not in name}
    for words, names in (("lacks", wanted - tensors.keys()), ("has tensors its config does not explain:", extra)):
        if names:
            shown = ", ".join(sorted(names)[:5])
            raise InvalidConfigError(
                f"model {path!r} {words} {shown}" + (f" and {len(names) - 5} more" if len(names) > 5 else ""),
                hint="the weights do not belong to this config, or a shard is missing: fetch the model again",
            )

    def read(hf_name: str, name: str, shape: tuple[int, ...]) -> np.ndarray:
        tensor = tensors[hf_name]()
        if name != "embed_vd":  # Hugging Face stores [out, in]
            tensor = tensor.T
        if tensor.size != np.prod(shape):
            raise InvalidConfigError(f"model {path!r}: {hf_name} is {tensor.T.shape}, its config asks for {shape}")
        return tensor.reshape(shape)

    def leaf(tree_path: tuple[Any, ...], spec: Any, sharding: Any = None) -> Any:
        name = tree_path[-1].key
        own_dtype = dtype(name) if callable(dtype) and not isinstance(dtype, type) else dtype
        if len(tree_path) == 1:
            value = read(TOP_NAMES[name], name, spec.shape).astype(own_dtype)
        else:
            value = np.empty(spec.shape, own_dtype)
            for layer in range(config.num_layers):
                value[layer] = read(_layer_name(name, layer), name, spec.shape[1:])
        return put(value, sharding)

    trees = (specs,) if shardings is None else (specs, shardings)
    return jax.tree_util.tree_map_with_path(leaf, *trees)


def _layer_name(name: str, layer: int) -> str:
    return f"model.layers.{layer}.{LAYER_NAMES[name]}"


def _open_folder(folder: pathlib.Path) -> tuple[LlamaConfig, Tensors]:
    """A Hugging Face folder: config.json, and either one safetensors file or shards with an index."""
    if not (folder / "config.json").exists():
        raise InvalidConfigError("the folder holds no config.json", hint="it is not a Hugging Face model folder")
    hf = json.loads((folder / "config.json").read_text())
    if (generation := folder / "generation_config.json").exists():
        # Chat models list all their end-of-turn ids only here.
        ids = json.loads(generation.read_text())
        eos = [ids.get("eos_token_id"), hf.get("eos_token_id")]
        flat = [e for value in eos if value is not None for e in (value if isinstance(value, list) else [value])]
        hf = hf | {"eos_token_id": list(dict.fromkeys(flat)) or None}
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").exists():
        files = [folder / "model.safetensors"]
    elif index.exists():
        files = [folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    else:
        raise InvalidConfigError(
            "the folder holds no model.safetensors", hint="other weight formats are not read; save it as safetensors"
        )
    if missing := [file.name for file in files if not file.exists()]:
        raise InvalidConfigError(f"shards are missing: {', '.join(missing)}", hint="fetch the model again")
    tensors: Tensors = {}
    for file in files:
        handle = safetensors.safe_open(file, framework="numpy")
        names = handle.keys()
        tensors |= {name: functools.partial(handle.get_tensor, name) for name in names}
    config = LlamaConfig.from_hf(hf)
    embed, unembed = (tensors.get(TOP_NAMES[name]) for name in ("embed_vd", "unembed_dv"))
    if config.tie_embeddings and embed is not None and unembed is not None:
        # The output matrix was trained on its own, whatever the config says; transformers does not tie them either.
        config = dataclasses.replace(config, tie_embeddings=np.array_equal(embed(), unembed()))
    return config, tensors


def _open_gguf(file: pathlib.Path) -> tuple[LlamaConfig, Tensors]:
    """A GGUF file as llama.cpp's converter writes it, dequantised tensor by tensor."""
    try:
        reader = gguf.GGUFReader(file)
    except (IndexError, KeyError) as error:  # what the reader runs into where a file is cut short or damaged
        raise InvalidConfigError("the GGUF file is cut short or damaged", hint="fetch the model again") from error
    split = reader.get_field("split.count")
    if split is not None and split.contents() > 1:
        raise InvalidConfigError(
            f"it is one of {split.contents()} GGUF files that the model is split into",
            hint="join them with llama.cpp's `llama-gguf-split --merge FIRST_FILE JOINED_FILE`",
        )
    found = {tensor.name: tensor for tensor in reader.tensors}
    config = _gguf_config(reader, found)
    # llama.cpp interleaves the halves of each rotated head (of its "llama" architecture only).
    heads = {"attn_q": config.num_heads, "attn_k": config.num_kv_heads} if config.model_type == "llama" else {}

    def read(tensor: gguf.ReaderTensor, num_heads: int | None) -> np.ndarray:
        try:
            value = gguf.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as error:
            raise InvalidConfigError(
                f"model {str(file)!r}: {tensor.name} is of type {tensor.tensor_type.name}, which is not supported",
                hint="convert the model to another type, such as F16 or Q8_0",
            ) from error
        if num_heads is not None:
            value = value.reshape(num_heads, config.head_dim // 2, 2, -1).swapaxes(1, 2).reshape(value.shape)
        return value

    tensors: Tensors = {}
    for name, tensor in found.items():
        parts = re.fullmatch(r"(?:blk\.(\d+)\.)?(.+)\.(weight|bias)", name)
        layer, stem, kind = parts.groups() if parts else (None, name, None)
        if parts and layer is None and stem in _GGUF_TOP:
            tensors[f"{_GGUF_TOP[stem]}.{kind}"] = functools.partial(read, tensor, None)
        elif layer is not None and stem in _GGUF_LAYER:
            hf_name = f"model.layers.{layer}.{_GGUF_LAYER[stem]}.{kind}"
            tensors[hf_name] = functools.partial(read, tensor, heads.get(stem))
        elif stem != "rope_freqs":
            tensors[name] = functools.partial(read, tensor, None)  # unknown: reported by _assemble
    return config, tensors


def _gguf_config(reader: gguf.GGUFReader, tensors: dict[str, gguf.ReaderTensor]) -> LlamaConfig:
    """The config that a GGUF file's metadata describes (keys: the GGUF specification).

    Raises:
        InvalidConfigError: another architecture, or metadata that is missing or not a number where one is needed.
    """

    def get(key: str, default: Any = None) -> Any:
        field = reader.get_field(key)
        return default if field is None else field.contents()

    family = get("general.architecture")
    if family not in ("llama", "qwen2", "qwen3"):
        raise InvalidConfigError(
            f"GGUF architecture {family!r} is not supported", hint="supported: llama, qwen2, qwen3"
        )
    _check_gguf_sizes(get, family, tensors)
    width, heads = get(f"{family}.embedding_length"), get(f"{family}.attention.head_count")
    head_dim = get(f"{family}.attention.key_length", width // heads)
    if get(f"{family}.rope.dimension_count", head_dim) != head_dim:
        raise InvalidConfigError("the file rotates a part of each head only, which is not supported")
    theta = get(f"{family}.rope.freq_base", 10000.0)
    end_keys = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id")
    return LlamaConfig(
        vocab_size=int(tensors["token_embd.weight"].shape[1]),
        hidden_size=width,
        intermediate_size=get(f"{family}.feed_forward_length"),
        num_layers=get(f"{family}.block_count"),
        num_heads=heads,
        num_kv_heads=get(f"{family}.attention.head_count_kv", heads),
        head_dim=head_dim,
        rope_theta=theta,
        rope_scaling=_gguf_rope_scaling(get, family, tensors, theta, head_dim),
        rms_norm_eps=float(str(np.float32(get(f"{family}.attention.layer_norm_rms_epsilon")))),
        tie_embeddings="output.weight" not in tensors,
        attention_bias=family == "qwen2",
        qk_norm=family == "qwen3",
        max_seq_len=get(f"{family}.context_length"),
        model_type=family,
        bos_id=get("tokenizer.ggml.bos_token_id"),
        eos_ids=tuple(dict.fromkeys(id for key in end_keys if (id := get(key)) is not None)),
        pad_id=get("tokenizer.ggml.padding_token_id"),
    )


def _check_gguf_sizes(get: Callable[..., Any], family: str, tensors: dict[str, gguf.ReaderTensor]) -> None:
    """Raises InvalidConfigError that names the metadata that is missing, or a size that is not one number."""
    names = ("embedding_length", "block_count", "feed_forward_length", "context_length", "attention.head_count")
    sizes = [f"{family}.{name}" for name in names]
    epsilon = f"{family}.attention.layer_norm_rms_epsilon"
    scales = {epsilon: get(epsilon)}
    kind, factor = _gguf_scaling(get, family)
    if kind == "linear":
        scales[f"{family}.rope.scaling.factor"] = factor
    if missing := [key for key, value in ({key: get(key) for key in sizes} | scales).items() if value is None]:
        raise InvalidConfigError(f"the GGUF file's metadata lacks {', '.join(missing)}", hint="convert the model again")
    sizes += [f"{family}.attention.head_count_kv", f"{family}.attention.key_length"]
    check_numbers("the GGUF file", {key: get(key, 1) for key in sizes})
    check_numbers("the GGUF file", scales | {f"{family}.rope.freq_base": get(f"{family}.rope.freq_base", 1)}, float)
    if "token_embd.weight" not in tensors:
        raise InvalidConfigError("the GGUF file lacks the tensor token_embd.weight", hint="fetch the model again")


def _gguf_scaling(get: Callable[..., Any], family: str) -> tuple[str, float | None]:
    """Kind and factor of rotary scaling; without a kind a factor's is linear, which older files name otherwise."""
    factor = get(f"{family}.rope.scaling.factor", get(f"{family}.rope.scale_linear"))
    return get(f"{family}.rope.scaling.type", "linear" if factor else "none"), factor


def _gguf_rope_scaling(
    get: Callable[..., Any], family: str, tensors: dict[str, gguf.ReaderTensor], theta: float, head_dim: int
) -> RopeScaling | None:
    """Rotary scaling; of Llama 3's only each frequency's divisor is stored, from which the formula is recovered."""
    if "rope_freqs.weight" not in tensors:
        kind, factor = _gguf_scaling(get, family)
        if kind == "linear":
            return RopeScaling(factor)
        if kind != "none":
            raise InvalidConfigError(f"rope scaling {kind!r} is not supported", hint="supported: none, linear, llama3")
        return None
    divisor = np.asarray(tensors["rope_freqs.weight"].data, np.float64)
    factor = float(divisor.max())
    original = int(get(f"{family}.rope.scaling.original_context_length", 8192))
    turns = original * theta ** -(np.arange(0, head_dim, 2) / head_dim) / (2 * np.pi)
    # 1 / divisor = keep + (1 - keep) / factor, and keep = (turns - low) / (high - low) where it is between 0 and 1.
    keep = (1 / divisor - 1 / factor) / (1 - 1 / factor)
    blended = (keep > 1e-4) & (keep < 1 - 1e-4)
    if blended.sum() < 2:
        raise InvalidConfigError("rope_freqs.weight does not follow Llama 3's rope scaling")
    slope, offset = np.polyfit(turns[blended], keep[blended], 1)
    low, high = round(-offset / slope, 3), round((1 - offset) / slope, 3)
    if not np.allclose(np.clip((turns - low) / (high - low), 0, 1), keep, atol=1e-3):
        raise InvalidConfigError("rope_freqs.weight does not follow Llama 3's rope scaling")
    return RopeScaling(factor, low, high, original)
