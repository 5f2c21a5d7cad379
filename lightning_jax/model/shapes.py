"""Published sizes by name, for measurements with random weights."""

import jax

from agent_lightning.exceptions import InvalidConfigError
from lightning_jax.model import llama, weights
from lightning_jax.model.config import LlamaConfig, RopeScaling

_LLAMA32 = {
    "vocab_size": 128256,
    "num_kv_heads": 8,
    "rope_theta": 500000.0,
    "rope_scaling": RopeScaling(32.0, 1.0, 4.0, 8192),
    "rms_norm_eps": 1e-5,
    "tie_embeddings": True,
    "max_seq_len": 131072,
    "bos_id": 128000,
    "eos_ids": (128001, 128008, 128009),
}
_LLAMA31 = _LLAMA32 | {"rope_scaling": RopeScaling(8.0, 1.0, 4.0, 8192), "tie_embeddings": False}

SHAPES = {
    # https://huggingface.co/meta-llama/Llama-3.2-1B-Instruct, config.json
    "llama3.2-1b": LlamaConfig(
        hidden_size=2048, intermediate_size=8192, num_layers=16, num_heads=32, head_dim=64, **_LLAMA32
    ),
    # https://huggingface.co/meta-llama/Llama-3.2-3B-Instruct, config.json
    "llama3.2-3b": LlamaConfig(
        hidden_size=3072, intermediate_size=8192, num_layers=28, num_heads=24, head_dim=128, **_LLAMA32
    ),
    # https://huggingface.co/meta-llama/Llama-3.1-8B-Instruct, config.json
    "llama3.1-8b": LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_layers=32, num_heads=32, head_dim=128, **_LLAMA31
    ),
    # https://huggingface.co/meta-llama/Llama-3.1-70B-Instruct, config.json
    "llama3.1-70b": LlamaConfig(
        hidden_size=8192, intermediate_size=28672, num_layers=80, num_heads=64, head_dim=128, **_LLAMA31
    ),
    # https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct, config.json
    "smollm2-135m": LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_layers=30,
        num_heads=9,
        num_kv_heads=3,
        head_dim=64,
        rope_theta=100000.0,
        rms_norm_eps=1e-5,
        tie_embeddings=True,
        max_seq_len=8192,
        bos_id=1,
        eos_ids=(2,),
        pad_id=2,
    ),
    # builtin:tiny, the model that ships in this package
    "tiny": LlamaConfig(
        vocab_size=264,
        hidden_size=256,
        intermediate_size=512,
        num_layers=4,
        num_heads=8,
        num_kv_heads=4,
        head_dim=32,
        rms_norm_eps=1e-5,
        tie_embeddings=True,
        max_seq_len=2048,
        eos_ids=(257,),
        pad_id=256,
    ),
}


def named_shape(name: str) -> LlamaConfig:
    """The config called `name`.

    Raises:
        InvalidConfigError: there is none.
    """
    if name not in SHAPES:
        raise InvalidConfigError(f"no model shape is called {name!r}", hint=f"known shapes: {', '.join(SHAPES)}")
    return SHAPES[name]


def load_or_random(model: str) -> tuple[LlamaConfig, llama.Params]:
    """The model at a path, or for `random:NAME` weights drawn for the shape of that name.

    Raises:
        InvalidConfigError: there is no such shape, or the model cannot be read.
    """
    if not model.startswith("random:"):
        return weights.load_model(model)
    config = named_shape(model.removeprefix("random:"))
    return config, jax.jit(llama.init_params, static_argnums=0)(config, jax.random.key(0))
