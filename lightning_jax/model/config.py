"""What is fixed about a model: its sizes and its family's switches, and how `config.json` spells them."""

import dataclasses
from typing import Any

from agent_lightning.exceptions import InvalidConfigError

# What a family's `config.json` means when it leaves a key out (the defaults of transformers' config classes).
_FAMILY_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048},
    "mistral": {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"max_position_embeddings": 32768, "sliding_window": 4096, "use_sliding_window": False},
    "qwen3": {"max_position_embeddings": 32768, "sliding_window": 4096, "use_sliding_window": False, "head_dim": 128},
}
_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Stretched rotary frequencies.

    Attributes:
        factor: how many times longer the context becomes.
        low_freq_factor, high_freq_factor, original_max_position_embeddings: the blend of Llama 3.1, where short wave
            lengths keep their frequency and long ones are divided by `factor`. All None: every frequency is divided
            by `factor` (position interpolation, "linear").
    """

    factor: float
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    original_max_position_embeddings: int | None = None


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Sizes and switches of a Llama-like model. Hashable: a static argument of `jax.jit`.

    Attributes:
        attention_bias: q, k and v have a bias (Qwen2).
        qk_norm: q and k are RMS-normalised per head before the rotation (Qwen3).
        sliding_window: a query sees this many positions, itself included; None for all.
        max_seq_len: positions that the model was made for.
        model_type: the family's name in `config.json`.
        eos_ids: every id that ends a reply.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    rms_norm_eps: float = 1e-6
    tie_embeddings: bool = False
    attention_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None
    max_seq_len: int = 2048
    model_type: str = "llama"
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    pad_id: int | None = None

    def __post_init__(self):
        if self.num_heads % self.num_kv_heads:
            raise InvalidConfigError(
                f"{self.num_heads} attention heads cannot share {self.num_kv_heads} key/value heads evenly"
            )

    @classmethod
    def from_hf(cls, hf: dict[str, Any]) -> "LlamaConfig":
        """Reads the contents of a Hugging Face `config.json`.

        Raises:
            InvalidConfigError: the family, or a switch of it, is not one this package computes; or a size is missing
                or makes no sense.
        """
        family = hf.get("model_type")
        if family not in _FAMILY_DEFAULTS:
            raise InvalidConfigError(
                f"model_type {family!r} is not supported", hint=f"supported: {', '.join(_FAMILY_DEFAULTS)}"
            )
        hf = _FAMILY_DEFAULTS[family] | hf
        sizes = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
        sizes += ["max_position_embeddings"]
        if missing := [key for key in sizes if hf.get(key) is None]:
            raise InvalidConfigError(f"config.json lacks {', '.join(missing)}")
        sizes += [key for key in ("num_key_value_heads", "head_dim") if hf.get(key) is not None]
        check_numbers("config.json", {key: hf[key] for key in sizes})
        window = _sliding_window(hf)
        check_numbers("config.json", {"sliding_window": 1 if window is None else window})
        check_numbers("config.json", {"rms_norm_eps": hf.get("rms_norm_eps", 1e-6)}, float)
        _reject_unsupported(hf)
        theta, scaling = _rope(hf)
        eos = hf.get("eos_token_id")
        bos = hf.get("bos_token_id")
        heads = hf["num_attention_heads"]
        return cls(
            vocab_size=hf["vocab_size"],
            hidden_size=hf["hidden_size"],
            intermediate_size=hf["intermediate_size"],
            num_layers=hf["num_hidden_layers"],
            num_heads=heads,
            num_kv_heads=hf.get("num_key_value_heads") or heads,
            head_dim=hf.get("head_dim") or hf["hidden_size"] // heads,
            rope_theta=theta,
            rope_scaling=scaling,
            rms_norm_eps=hf.get("rms_norm_eps", 1e-6),
            tie_embeddings=bool(hf.get("tie_word_embeddings", False)),
            attention_bias=family == "qwen2",
            qk_norm=family == "qwen3",
            sliding_window=window,
            max_seq_len=hf["max_position_embeddings"],
            model_type=family,
            bos_id=next(iter(bos), None) if isinstance(bos, list) else bos,
            eos_ids=() if eos is None else tuple(eos) if isinstance(eos, list) else (eos,),
            pad_id=hf.get("pad_token_id"),
        )

    def to_hf(self) -> dict[str, Any]:
        """Contents of a `config.json` that transformers 4 and 5 both read."""
        hf: dict[str, Any] = {
            "architectures": [_ARCHITECTURES[self.model_type]],
            "model_type": self.model_type,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "max_position_embeddings": self.max_seq_len,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_theta": self.rope_theta,
            "rope_scaling": None,
            "tie_word_embeddings": self.tie_embeddings,
            "bos_token_id": self.bos_id,
            "eos_token_id": self.eos_ids[0] if len(self.eos_ids) == 1 else list(self.eos_ids) or None,
            "pad_token_id": self.pad_id,
        }
        if self.rope_scaling is not None:
            given = {key: value for key, value in dataclasses.asdict(self.rope_scaling).items() if value is not None}
            hf["rope_scaling"] = {"rope_type": "linear" if len(given) == 1 else "llama3"} | given
        if self.model_type == "mistral":
            hf["sliding_window"] = self.sliding_window
        if self.model_type in ("qwen2", "qwen3"):
            hf["sliding_window"] = self.sliding_window
            hf["use_sliding_window"] = self.sliding_window is not None
            hf["max_window_layers"] = 0 if self.sliding_window is not None else self.num_layers
        return hf


def check_numbers(source: str, numbers: dict[str, Any], kind: type = int) -> None:
    """Raises InvalidConfigError that names the first number that is not one number above 0 of its kind."""
    for key, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, (int, kind)) or value <= 0:
            shown = repr(value)[:40]  # some models give each layer a size of its own, as a list
            raise InvalidConfigError(
                f"{source}'s {key} is {shown}; only one number above 0 is supported ({kind.__name__})"
            )


def _reject_unsupported(hf: dict[str, Any]) -> None:
    """Raises for switches that would change the result and are not computed here."""
    wrong = {
        "hidden_act": hf.get("hidden_act", "silu") not in ("silu", "swish"),
        "mlp_bias": bool(hf.get("mlp_bias")),
        # transformers gives the output projection a bias too, which Qwen2 (biased without this key) has not.
        "attention_bias": bool(hf.get("attention_bias")),
        "partial_rotary_factor": hf.get("partial_rotary_factor", 1.0) != 1.0,
        "quantization_config": hf.get("quantization_config") is not None,
    }
    if found := [key for key, is_wrong in wrong.items() if is_wrong]:
        described = ", ".join(f"{key}={hf[key]!r}" for key in found)
        raise InvalidConfigError(f"this {hf['model_type']} model uses {described}, which is not supported")


def _rope(hf: dict[str, Any]) -> tuple[float, RopeScaling | None]:
    """Base and scaling, from transformers 5's `rope_parameters` or the older `rope_theta` and `rope_scaling`.

    A `rope_scaling` beside `rope_parameters` takes their place, as in transformers 5; but not that of their base.
    """
    parameters = hf.get("rope_parameters") or {}
    rope = hf.get("rope_scaling") or parameters
    theta = float(rope.get("rope_theta") or hf.get("rope_theta") or parameters.get("rope_theta") or 10000.0)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return theta, None
    if kind == "linear":
        return theta, RopeScaling(float(rope["factor"]))
    if kind == "llama3":
        name = "original_max_position_embeddings"  # beside the scaling, in it, or nowhere
        original = hf.get(name) or rope.get(name) or hf["max_position_embeddings"]
        return theta, RopeScaling(
            float(rope["factor"]),
            float(rope["low_freq_factor"]),
            float(rope["high_freq_factor"]),
            int(original),
        )
    raise InvalidConfigError(f"rope scaling {kind!r} is not supported", hint="supported: default, linear, llama3")


def _sliding_window(hf: dict[str, Any]) -> int | None:
    """The window that all layers share."""
    window, family = hf.get("sliding_window"), hf["model_type"]
    if window is None or family == "llama" or (family != "mistral" and not hf.get("use_sliding_window")):
        return None
    full_layers = 0 if family == "mistral" else min(hf.get("max_window_layers", 28), hf["num_hidden_layers"])
    sliding = [kind == "sliding_attention" for kind in hf.get("layer_types") or ()]
    sliding = sliding or [layer >= full_layers for layer in range(hf["num_hidden_layers"])]
    if all(sliding):
        return window
    if not any(sliding):
        return None
    raise InvalidConfigError(
        "a sliding window in some layers only is not supported", hint="set sliding_window to null in its config.json"
    )
