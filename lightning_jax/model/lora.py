"""Which parameters learn: all of them, all but some, or low-rank adapters beside a frozen model (LoRA).

What learns and what stays are two trees with the names of `llama.abstract_params`. `whole` puts them together into what
the forward pass takes. An adapter of the matrix `q_dkgh`, W, is two leaves beside it, `q_a_dr` (A) and `q_b_rkgh` (B)
with the rank as the axis `r`, and the forward pass computes x W + (alpha / r) (x A) B (arXiv:2106.09685, eq. 3) without
ever adding A B to W. B begins at 0: the policy begins as the model, and without its adapters it is the model again,
which is how the reference of the KL term costs nothing. `merged` is what the sampler and exports get: W + A B.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from agent_lightning.exceptions import InvalidConfigError
from lightning_jax.model.config import LlamaConfig
from lightning_jax.model.llama import Params, ParamSpec, abstract_params, adapter_names
from lightning_jax.model.weights import LAYER_NAMES, TOP_NAMES

# Name of the projection, as Hugging Face and PEFT have it -> of its matrix here.
TARGETS = {hf.split(".")[1]: name for name, hf in LAYER_NAMES.items() if hf.endswith("_proj.weight")}


@dataclasses.dataclass(frozen=True)
class Trainable:
    """What learns. Hashable, as a part of the learner's static settings.

    Attributes:
        lora_rank: r of the adapters; 0 for none, and then the model's own parameters learn.
        lora_alpha: adapters count alpha / r times.
        lora_targets: projections that have one, keys of `TARGETS`.
        frozen: without adapters, a regular expression: parameters in whose name (see `full_name`) it is found do not
            learn; empty for none.
    """

    lora_rank: int = 0
    lora_alpha: float = 32.0
    lora_targets: tuple[str, ...] = tuple(TARGETS)
    frozen: str = ""

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> "Trainable":
        """What the settings `model.*` say."""
        names = tuple(TARGETS) if settings["lora_targets"] == "all-linear" else settings["lora_targets"].split(",")
        targets = tuple(dict.fromkeys(name.strip() for name in names))
        return cls(settings["lora_rank"], settings["lora_alpha"], targets, settings["frozen"])

    @property
    def is_whole(self) -> bool:
        """Whether all of the model's own parameters learn."""
        return not (self.lora_rank or self.frozen)

    def is_frozen(self, name: str) -> bool:
        """Whether one of the model's own parameters stays as it is; `name` is a leaf's, "q_dkgh"."""
        return bool(self.lora_rank or (self.frozen and re.search(self.frozen, full_name(name))))

    def check(self, config: LlamaConfig) -> None:
        """Raises InvalidConfigError where `frozen` leaves nothing to learn, or finds no parameter of the model."""
        if not self.frozen or self.lora_rank:
            return
        specs = abstract_params(config)
        names = [name for name in (*specs, *specs["layers"]) if name != "layers"]
        for count, wrong in ((0, "finds none"), (len(names), "finds all")):
            if sum(map(self.is_frozen, names)) == count:
                shown = ", ".join(map(full_name, names))
                raise InvalidConfigError(
                    f"model.frozen {self.frozen!r} {wrong} of the model's parameters", hint=f"they are {shown}"
                )


def full_name(name: str) -> str:
    """A parameter's Hugging Face name, that of all layers' without the layer's number: "model.layers.mlp.up_proj"."""
    hf = TOP_NAMES[name] if name in TOP_NAMES else f"model.layers.{LAYER_NAMES[name]}"
    return hf.removesuffix(".weight")


def split(params: Params, trainable: Trainable) -> tuple[Params, Params]:
    """The model's own parameters, or anything by their names: (those that learn, those that stay)."""

    def part(is_frozen: bool) -> Params:
        top = {n: leaf for n, leaf in params.items() if n != "layers" and trainable.is_frozen(n) == is_frozen}
        layers = {n: leaf for n, leaf in params["layers"].items() if trainable.is_frozen(n) == is_frozen}
        return top | ({"layers": layers} if layers else {})

    return part(False), part(True)


def trained_specs(config: LlamaConfig, trainable: Trainable) -> dict[str, Any]:
    """The tree of `ParamSpec` of what learns: a part of the model's, or the adapters."""
    specs = abstract_params(config)
    if not trainable.lora_rank:
        return split(specs, trainable)[0]
    layers, rank = {}, trainable.lora_rank
    for target in trainable.lora_targets:
        spec = specs["layers"][TARGETS[target]]
        a, b = adapter_names(TARGETS[target])
        num_in = len(a.rpartition("_")[2]) - 1
        shape_in, shape_out = spec.shape[1 : 1 + num_in], spec.shape[1 + num_in :]
        axes_in, axes_out = spec.logical_axes[1 : 1 + num_in], spec.logical_axes[1 + num_in :]
        # The variance of PEFT's default, which is uniform in +-1 / sqrt(in).
        normal = jax.nn.initializers.normal((3 * np.prod(shape_in)) ** -0.5)
        layers[a] = ParamSpec((config.num_layers, *shape_in, rank), ("layers", *axes_in, None), normal)
        zeros = jax.nn.initializers.zeros
        layers[b] = ParamSpec((config.num_layers, rank, *shape_out), ("layers", None, *axes_out), zeros)
    return {"layers": layers}


def whole(trained: Params, frozen: Params | None, trainable: Trainable) -> Params:
    """What learns and what stays, as one tree for the forward pass; alpha / r has become a part of B.

    Without `frozen`, `trained` is taken to be whole.
    """
    if not frozen:
        return trained
    layers = trained.get("layers", {})
    if trainable.lora_rank:
        scale = trainable.lora_alpha / trainable.lora_rank
        layers = {name: leaf * scale if "_b_" in name else leaf for name, leaf in layers.items()}
    return frozen | trained | {"layers": frozen.get("layers", {}) | layers}


def merged(layer: Params) -> Params:
    """One layer of `whole` (no leading axis) without adapters: float32 W + A B where there was one.

    Of JAX or NumPy arrays; what had no adapter is as it was.
    """
    plain = {name: leaf for name, leaf in layer.items() if not re.search("_[ab]_", name)}
    for name in plain.keys() & set(TARGETS.values()):
        a_name, b_name = adapter_names(name)
        if a_name in layer:
            a, b = (layer[n].astype(np.float32) for n in (a_name, b_name))
            a, b = a.reshape(-1, a.shape[-1]), b.reshape(b.shape[0], -1)
            # Accelerators multiply float32 in fewer bits unless they are told not to.
            product = a @ b if isinstance(a, np.ndarray) else jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
            plain[name] = plain[name].astype(np.float32) + product.reshape(plain[name].shape)
    return plain


def merged_arrays(params: Params, dtype: np.dtype) -> Params:
    """All of `whole`, of NumPy arrays, in a dtype and without adapters; a layer at a time, which saves memory."""
    num_layers = len(params["layers"]["attn_norm_d"])
    layers: Params = {}
    for number in range(num_layers):
        for name, leaf in merged({n: stacked[number] for n, stacked in params["layers"].items()}).items():
            layers.setdefault(name, np.empty((num_layers, *leaf.shape), dtype))[number] = leaf
    return {name: leaf.astype(dtype) for name, leaf in params.items() if name != "layers"} | {"layers": layers}
