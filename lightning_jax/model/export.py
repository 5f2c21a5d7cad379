"""Writes models as Hugging Face folders, which transformers, vLLM, llama.cpp's converter and this package read.

Adapters are merged into the model before (`lora.merged_arrays`), or written alone, as PEFT has them.
"""

import contextlib
import itertools
import json
import os
import pathlib
import shutil
from collections.abc import Iterator

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import safetensors.numpy

from lightning_jax.model.config import LlamaConfig
from lightning_jax.model.llama import Params, abstract_params, adapter_names
from lightning_jax.model.lora import TARGETS, Trainable
from lightning_jax.model.weights import LAYER_NAMES, TOP_NAMES
from lightning_jax.text.tokenizer import TOKENIZER_FILES

MAX_SHARD_BYTES = 5_000_000_000
_WEIGHT_FILES = ("model*.safetensors", "model.safetensors.index.json", "model.onnx*", "adapter_*")
_DTYPE_NAMES = {
    np.dtype(np.float32): "float32",
    np.dtype(np.float16): "float16",
    np.dtype(ml_dtypes.bfloat16): "bfloat16",
}


def save_hf(
    folder: str | pathlib.Path,
    config: LlamaConfig,
    params: Params,
    dtype: jnp.dtype = jnp.float32,
    tokenizer_files_from: str | pathlib.Path | None = None,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes a model folder, which is whole or not there; see `whole_folder`.

    Args:
        folder: the Hugging Face folder to make.
        config, params: the model, in the master (stacked) form; JAX or NumPy arrays.
        dtype: float32, bfloat16 or float16, of the stored weights.
        tokenizer_files_from: a folder whose tokenizer files and chat template are copied.
        max_shard_bytes: weights beyond this are split over several files with an index.
    """
    with whole_folder(folder) as partial:
        _write_weights(partial, config, params, np.dtype(dtype), max_shard_bytes)
        if tokenizer_files_from is not None:
            for name in TOKENIZER_FILES:
                if (source := pathlib.Path(tokenizer_files_from) / name).exists():
                    shutil.copyfile(source, partial / name)
        write_configs(partial, config, np.dtype(dtype))


def save_safetensors(
    folder: str | pathlib.Path,
    config: LlamaConfig,
    params: Params,
    dtype: jnp.dtype = jnp.float32,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes the weights alone, under their Hugging Face names. Arguments as for `save_hf`."""
    with whole_folder(folder) as partial:
        _write_weights(partial, config, params, np.dtype(dtype), max_shard_bytes)


def save_peft(folder: str | pathlib.Path, adapters: Params, trainable: Trainable, base: str) -> None:
    """Writes adapters alone, as PEFT's `save_pretrained` does and vLLM reads them: float32.

    Args:
        folder: the folder to make; see `whole_folder`.
        adapters: as `lora.trained_specs` describes them; NumPy arrays.
        trainable: what they are.
        base: path or name of the model that they belong to.
    """
    tensors = {}
    for target in trainable.lora_targets:
        module = LAYER_NAMES[TARGETS[target]].removesuffix(".weight")
        a, b = (np.asarray(adapters["layers"][name], np.float32) for name in adapter_names(TARGETS[target]))
        for layer, (a_l, b_l) in enumerate(zip(a, b, strict=True)):  # stored as [out, in], like every matrix
            prefix = f"base_model.model.model.layers.{layer}.{module}"
            tensors[f"{prefix}.lora_A.weight"] = np.ascontiguousarray(a_l.reshape(-1, trainable.lora_rank).T)
            tensors[f"{prefix}.lora_B.weight"] = np.ascontiguousarray(b_l.reshape(trainable.lora_rank, -1).T)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": trainable.lora_rank,
        "lora_alpha": trainable.lora_alpha,
        "target_modules": list(trainable.lora_targets),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    with whole_folder(folder) as partial:
        safetensors.numpy.save_file(tensors, partial / "adapter_model.safetensors", metadata={"format": "pt"})
        _write_json(partial / "adapter_config.json", config)


@contextlib.contextmanager
def whole_folder(folder: str | pathlib.Path) -> Iterator[pathlib.Path]:
    """Gives a folder to write a model into; a write that fails leaves what was there before.

    What is written goes to a sibling of `folder` and is synced to the disk first. A folder that did not exist then
    appears complete, at once. In one that did, this model's files replace those of the same name, the config last, and
    weights of an earlier model go; other files stay.
    """
    folder = pathlib.Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.parent / f".{folder.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
    partial.mkdir()
    try:
        yield partial
        for file in (*partial.iterdir(), partial):
            _sync(file)
        _move(partial, folder)
        _sync(folder.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_configs(folder: pathlib.Path, config: LlamaConfig, dtype: np.dtype) -> None:
    """Writes `generation_config.json` and `config.json`, which names the weights' dtype."""
    ids = {"bos_token_id": config.bos_id, "eos_token_id": list(config.eos_ids) or None, "pad_token_id": config.pad_id}
    _write_json(folder / "generation_config.json", {key: value for key, value in ids.items() if value is not None})
    _write_json(folder / "config.json", config.to_hf() | {"torch_dtype": _DTYPE_NAMES[np.dtype(dtype)]})


def _move(partial: pathlib.Path, folder: pathlib.Path) -> None:
    """Puts the finished files in place."""
    if not folder.exists():
        os.rename(partial, folder)
        return
    fresh = {file.name for file in partial.iterdir()}
    for name in sorted(fresh, key=lambda name: name == "config.json"):
        os.replace(partial / name, folder / name)
    for stale in itertools.chain.from_iterable(folder.glob(pattern) for pattern in _WEIGHT_FILES):
        if stale.name not in fresh:
            stale.unlink()
    _sync(folder)


def _write_weights(
    folder: pathlib.Path, config: LlamaConfig, params: Params, dtype: np.dtype, max_shard_bytes: int
) -> None:
    """One `model.safetensors`, or shards of at most `max_shard_bytes` (and one tensor) with an index."""
    shards: list[list[tuple[str, tuple[str, int | None]]]] = [[]]
    shard_bytes = total_bytes = 0
    for hf_name, where, size in _tensor_names(config):
        num_bytes = size * dtype.itemsize
        if shards[-1] and shard_bytes + num_bytes > max_shard_bytes:
            shards.append([])
            shard_bytes = 0
        shards[-1].append((hf_name, where))
        shard_bytes += num_bytes
        total_bytes += num_bytes
    weight_map = {}
    for number, names in enumerate(shards, start=1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {hf_name: _hf_tensor(params, where, dtype) for hf_name, where in names}
        # transformers refuses files without this note.
        safetensors.numpy.save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
        _write_json(folder / "model.safetensors.index.json", index)


def _tensor_names(config: LlamaConfig) -> Iterator[tuple[str, tuple[str, int | None], int]]:
    """Each tensor's Hugging Face name, its parameter and layer here, and how many numbers it holds."""
    specs = abstract_params(config)
    for name, hf_name in TOP_NAMES.items():
        if name in specs:
            yield hf_name, (name, None), int(np.prod(specs[name].shape))
    for layer in range(config.num_layers):
        for name, spec in specs["layers"].items():
            yield f"model.layers.{layer}.{LAYER_NAMES[name]}", (name, layer), int(np.prod(spec.shape[1:]))


def _hf_tensor(params: Params, where: tuple[str, int | None], dtype: np.dtype) -> np.ndarray:
    """One parameter of one layer, as Hugging Face stores it: [out, in], heads flattened."""
    name, layer = where
    value = np.asarray(params[name] if layer is None else params["layers"][name][layer]).astype(dtype)
    if name == "embed_vd":
        return value
    axes = name.rpartition("_")[2]
    if "d" not in axes or len(axes) == 1:  # biases and norms
        return value.reshape(-1)
    value = value.reshape(-1, value.shape[-1]) if axes[-1] == "d" else value.reshape(value.shape[0], -1)
    return np.ascontiguousarray(value.T)


def _write_json(file: pathlib.Path, value: dict) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n")


def _sync(path: pathlib.Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
