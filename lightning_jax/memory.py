"""What a configuration needs of the devices' memory, known before anything is allocated.

Everything comes from shapes: the abstract parameter tree, the page arrays, the optimizer's state. What is allocated for
good (weights, pages, learner) is exact. What a program needs while it runs (activations, logits) is an estimate of what
XLA's buffer assignment makes of it; `tests/test_memory.py` holds both against the compiled programs.
"""

import bisect
import dataclasses
import functools
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections

from agent_lightning.exceptions import InvalidConfigError
from lightning_jax import config_models
from lightning_jax import mesh as mesh_lib
from lightning_jax.model import attention, llama, lora, weights
from lightning_jax.model.config import LlamaConfig
from lightning_jax.rl import critic, losses, packing
from lightning_jax.rl.settings import compute_dtype, learner_settings
from lightning_jax.rl.update import LearnerSettings
from lightning_jax.sampler import kv_cache

GB = 1e9
_PROCESS_BYTES = int(1.2 * GB)  # on CPU: Python and its packages (half of it), and what compiling takes at times


@dataclasses.dataclass(frozen=True)
class Need:
    """Bytes on the device that holds most.

    Attributes:
        process: of the program itself, where it shares the memory.
        loaded: the weights that learn as read, float32, which are kept until training begins.
        frozen: the others, in the compute dtype.
        sampler: the sampler's copy of them.
        kv_cache: pages, and on CPU the dense copy that decoding works on.
        sampling: what a dispatch works with, about.
        masters, optimizer, reference, gradients: the learner's; the reference's weights that do not learn are `frozen`.
        critic: its weights that learn and their moments; its gradients come and go before the policy's.
        update: what the largest micro-batch works with, about: its own gradients, activations, logits.
    """

    process: int
    loaded: int
    frozen: int
    sampler: int
    kv_cache: int
    sampling: int
    masters: int
    optimizer: int
    reference: int
    gradients: int
    critic: int
    update: int

    def beside(self, other: "Need") -> "Need":
        """Of two models on the same device. Neither samples or learns while the other does."""
        one_at_a_time = ("process", "sampling", "update")
        mine, others = dataclasses.asdict(self), dataclasses.asdict(other)
        return Need(**{k: max(mine[k], others[k]) if k in one_at_a_time else mine[k] + others[k] for k in mine})

    @property
    def serving(self) -> int:
        """To sample without training."""
        return self.process + self.loaded + self.frozen + self.sampler + self.kv_cache + self.sampling

    @property
    def training(self) -> int:
        """To train, before the first token of an update is counted; the learner is made while `loaded` is there."""
        learner = self.frozen + self.masters + self.optimizer + self.reference + self.critic
        return self.process + self.sampler + self.kv_cache + learner + max(self.loaded, self.gradients)

    @property
    def peak(self) -> int:
        """To train when every conversation is as long as it may be."""
        learner = self.frozen + self.masters + self.optimizer + self.reference + self.critic + self.gradients
        return max(self.training, self.process + self.sampler + self.kv_cache + learner + self.update)


def estimate(model: LlamaConfig, settings: ml_collections.ConfigDict, num_devices: int | None = None) -> Need:
    """What a model needs with these settings (those of `config.py`) on so many devices, by default those there are.

    Raises:
        InvalidConfigError: the devices or the model's sizes do not divide; see `mesh.axis_sizes`.
    """
    num_devices = num_devices or jax.device_count()
    sizes = mesh_lib.sizes_for(model, settings, num_devices)
    _, _, ways = sizes
    dtype = compute_dtype(settings.model.dtype)
    learner = learner_settings(settings, dtype)
    max_seq_len = min(settings.runtime.max_seq_len, model.max_seq_len)
    learned, frozen = lora.split(llama.abstract_params(model), learner.trainable)
    masters = _bytes(lora.trained_specs(model, learner.trainable), jnp.dtype("float32"), sizes)
    return Need(
        process=_PROCESS_BYTES // num_devices if jax.default_backend() == "cpu" else 0,
        loaded=_bytes(learned, jnp.dtype("float32"), sizes),
        frozen=_bytes(frozen, dtype, sizes),
        sampler=_bytes(llama.abstract_params(model), dtype, sizes),
        kv_cache=_kv_bytes(model, settings.sampler, dtype, ways),
        sampling=_sampling_bytes(model, settings.sampler, dtype, ways),
        masters=masters,
        optimizer=2 * masters,
        reference=_bytes(learned, dtype, sizes) if learner.kl_coef else 0,
        gradients=masters,
        critic=3 * _bytes(critic.abstract_params(model, learner), jnp.dtype("float32"), sizes) if learner.critic else 0,
        update=_update_bytes(model, learner, max_seq_len, sizes),
    )


def estimate_all(models: Mapping[str, LlamaConfig], settings: ml_collections.ConfigDict) -> Need:
    """What a run's models need together; their sizes by the names in `config_models.of_each`."""
    needs = [estimate(models[name], own) for name, own in config_models.of_each(settings).items()]
    return functools.reduce(Need.beside, needs)


# ---------------------------------------------------------------------------------------------------------------------
# Parts
# ---------------------------------------------------------------------------------------------------------------------


def _bytes(specs: dict[str, Any], dtype: jnp.dtype, sizes: tuple[int, int, int]) -> int:
    """One device's share of a tree of parameters on a mesh of these sizes."""
    mesh = jax.sharding.AbstractMesh(sizes, mesh_lib.AXES)

    def size(spec: llama.ParamSpec) -> int:
        axes = mesh_lib.partition_spec(mesh, spec.shape, spec.logical_axes)
        return math.prod(jax.sharding.NamedSharding(mesh, axes).shard_shape(spec.shape))

    return sum(size(spec) for spec in jax.tree.leaves(specs)) * dtype.itemsize


def _kv_bytes(model: LlamaConfig, sampler: ml_collections.ConfigDict, dtype: jnp.dtype, ways: int) -> int:
    """The pages, and on CPU a dense copy at its largest, which is as many tokens as the pages have."""
    num_pages = -(-sampler.kv_cache_tokens // sampler.page_size)
    arrays = [functools.partial(kv_cache.init_pages, model, num_pages, sampler.page_size, dtype)]
    if jax.default_backend() == "cpu":
        arrays.append(functools.partial(kv_cache.init_dense, model, 1, num_pages * sampler.page_size, dtype))
    total = sum(leaf.size for leaf in jax.tree.leaves([jax.eval_shape(make) for make in arrays])) * dtype.itemsize
    return total // _share(model.num_kv_heads, ways)


def _sampling_bytes(model: LlamaConfig, sampler: ml_collections.ConfigDict, dtype: jnp.dtype, ways: int) -> int:
    """A prefill's activations and attention scores, and the logits of everybody's next token."""
    tokens = max(4 * sampler.prefill_chunk, sampler.max_slots * sampler.page_size)
    heads, qkv, mlp, vocab = _shares(model, ways)
    layer = tokens * (4 * model.hidden_size + qkv + 2 * mlp) * dtype.itemsize
    scores = 3 * tokens * heads * kv_cache.BLOCK_TOKENS * 4
    return layer + scores + 8 * max(64, sampler.max_slots) * vocab * 4


def _update_bytes(model: LlamaConfig, learner: LearnerSettings, max_seq_len: int, sizes: tuple[int, int, int]) -> int:
    """`update.accumulate` for a micro-batch of conversations that are all as long as they may be.

    The multiples are those of XLA's buffers for programs that were compiled for the CPU, within 20%.
    """
    copies, shards, ways = sizes
    length = packing.block_length(max_seq_len, minimum=learner.min_block_length)
    blocks = packing.micro_batch_size(
        learner.batch_size,
        learner.gradient_accumulation,
        limit=learner.most_blocks(length),
        multiple=copies * shards,
    )
    chunk = losses.chunk_length(blocks, length, model.vocab_size)
    blocks //= copies * shards
    tokens, width = blocks * length, model.hidden_size
    heads, qkv, mlp, vocab = _shares(model, ways)
    itemsize = jnp.dtype(learner.compute_dtype).itemsize
    trained = lora.trained_specs(model, learner.trainable)
    params = _bytes(trained, jnp.dtype(learner.compute_dtype), sizes)

    # Inside one layer, or where logits are made of its output: the larger of the two.
    score_bytes = blocks * heads * min(length, attention.QUERY_CHUNK) * length * 4
    adapted = qkv + 2 * mlp if learner.trainable.lora_rank else 0  # the adapters' own products
    layer = tokens * (16 * width + 8.5 * qkv + 2 * adapted) * itemsize + 3 * score_bytes
    # The unembedding's gradient, or what bfloat16 is turned into to be multiplied.
    is_constant = learner.trainable.is_frozen("embed_vd" if model.tie_embeddings else "unembed_dv")
    matrices = 0 if is_constant and itemsize == 4 else 2
    logits = 4 * (3 * blocks * chunk * vocab + matrices * vocab * width + 4 * tokens * width)
    saved = {
        "full": width,
        "dots": 3 * width + qkv + 2 * mlp + adapted,
        None: 15 * width + 7 * qkv + (2 * heads * length if length <= attention.QUERY_CHUNK else 0),
    }[learner.remat]
    gradients = _bytes(trained, jnp.dtype("float32"), sizes) + (3 * params if itemsize < 4 else 0)
    return int(gradients + model.num_layers * tokens * saved * itemsize + max(layer, logits))


def _shares(model: LlamaConfig, ways: int) -> tuple[int, int, int, int]:
    """One device's query heads, columns of q, k and v together, feed-forward columns, and vocabulary."""
    kv_ways = _share(model.num_kv_heads, ways)
    heads, kv_heads = model.num_heads // kv_ways, model.num_kv_heads // kv_ways
    mlp = model.intermediate_size // _share(model.intermediate_size, ways)
    return heads, (heads + 2 * kv_heads) * model.head_dim, mlp, model.vocab_size // _share(model.vocab_size, ways)


def _share(size: int, ways: int) -> int:
    """How many devices an axis is divided over; one that does not divide evenly stays whole (see `mesh.py`)."""
    return ways if size % ways == 0 else 1


# ---------------------------------------------------------------------------------------------------------------------
# What there is, and what to change
# ---------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Plan:
    """A configuration's needs beside what there is.

    Attributes:
        models: their sizes, by name.
        settings: the configuration.
        need: of all of them.
        limit: bytes of one device, or None where that is not known.
    """

    models: Mapping[str, LlamaConfig]
    settings: ml_collections.ConfigDict
    need: Need
    limit: int | None

    @property
    def paths(self) -> str:
        """What is loaded."""
        return " and ".join(own.model.path for own in config_models.of_each(self.settings).values())

    def check(self) -> str | None:
        """What to expect, where that is not simply that everything fits.

        Raises:
            InvalidConfigError: what the mode allocates in any case does not fit; names the settings to change.
        """
        if self.limit is None:
            return None
        trains = self.settings.mode == "train"
        certain = self.need.training if trains else self.need.serving
        if certain > self.limit:
            raise InvalidConfigError(
                f"{self.paths} does not fit: {'training' if trains else 'serving'} it needs at least "
                f"{in_bytes(certain)} of a device's memory, and there are {in_bytes(self.limit)}",
                hint=self.advice("peak" if trains else "serving"),
            )
        if self.settings.mode == "evaluate" or self.need.peak <= self.limit:
            return None
        if self.need.training > self.limit:
            problem = f"there is room to serve, not to train, which needs at least {in_bytes(self.need.training)}"
        else:
            problem = f"an update in which every conversation is as long as it may be needs {in_bytes(self.need.peak)}"
        return f"{problem} (of {in_bytes(self.limit)}): {self.advice('peak')}"

    def advice(self, moment: str) -> str:
        """The settings to change, with values, for `Need.serving` or `Need.peak` to fit."""

        def fits(changes: dict[str, Any]) -> bool:
            settings = self.settings.copy_and_resolve_references()
            settings.update_from_flattened_dict(changes)
            return getattr(estimate_all(self.models, settings), moment) <= device_bytes()

        def mildest(key: str, others: dict[str, Any]) -> Any:
            """The first of the knob's values that fits; the last where none does."""
            values = knobs[key]
            return values[min(len(values) - 1, bisect.bisect_left(values, 1, key=lambda v: fits(others | {key: v})))]

        knobs = {key: values for key, values in _knobs(self.models, self.settings, moment) if values}
        alone = {key: mildest(key, {}) for key in knobs}
        alone = {key: value for key, value in alone.items() if fits({key: value})}
        if alone:
            return "set " + ", or ".join(self._change(key, value) for key, value in list(alone.items())[:3])
        changes: dict[str, Any] = {}
        for key, values in knobs.items():
            changes[key] = values[-1]
            if fits(changes):
                break
        else:
            return "no setting makes it fit: choose a smaller model, or devices with more memory"
        for key in list(changes):
            changes[key] = mildest(key, changes)
        return "set " + " and ".join(self._change(key, value) for key, value in changes.items())

    def _change(self, key: str, value: Any) -> str:
        section, name = key.split(".")
        return f"{key} to {value} (now {self.settings[section][name]})"

    def summary(self) -> str:
        """All in one line."""
        need = self.need
        text = f"{in_bytes(need.serving)} to serve"
        if self.settings.mode != "evaluate":
            text += f", {in_bytes(need.training)} to train, up to {in_bytes(need.peak)} with the longest conversations"
        return text

    def table(self) -> list[str]:
        """Every part, one a line."""
        need, s = self.need, self.settings
        dtype = compute_dtype(s.model.dtype).name
        parts = [
            ("the program itself", need.process),
            ("weights as loaded, float32, until training begins", need.loaded),
            (f"weights that do not learn, {dtype}", need.frozen),
            (f"sampler's weights, {dtype}", need.sampler),
            (f"KV cache of {s.sampler.kv_cache_tokens} tokens", need.kv_cache),
            (f"sampling for {s.sampler.max_slots} requests, about", need.sampling),
            ("what learns, float32", need.masters),
            ("Adam's moments, float32", need.optimizer),
            ("gradients, float32", need.gradients),
            ("critic and its moments, float32", need.critic),
            (f"reference for the KL term, {dtype}", need.reference),
            ("largest micro-batch, about", need.update),
        ]
        totals = [("to serve", need.serving), ("to train, at least", need.training), ("to train, at most", need.peak)]
        return [f"{name:52}{in_bytes(size):>10}" for name, size in [*parts, *totals] if size]


def plan(settings: ml_collections.ConfigDict) -> Plan:
    """The plan for a configuration; of the model only its config is read.

    Raises:
        InvalidConfigError: as `weights.load_config`.
    """
    models = {name: weights.load_config(own.model.path) for name, own in config_models.of_each(settings).items()}
    return Plan(models, settings, estimate_all(models, settings), device_bytes())


def fewest_devices(settings: ml_collections.ConfigDict) -> int:
    """The devices without which the settings of each model's mesh make no sense."""
    models = [own.model for own in config_models.of_each(settings).values()]
    return math.lcm(*(model.tensor_parallel * max(1, model.fsdp) for model in models))


def device_bytes() -> int | None:
    """Memory of one device; of the host's, where devices are CPU, an equal share. None if not known."""
    device = jax.local_devices()[0]
    if device.platform != "cpu":
        return (device.memory_stats() or {}).get("bytes_limit")
    return host_bytes() // jax.local_device_count()


def host_bytes() -> int:
    """Memory of this machine, or of the container that the process runs in."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            total = min(total, int(Path(path).read_text()))
        except (OSError, ValueError):  # another cgroup version, or "max"
            continue
    return total


def in_bytes(size: int) -> str:
    """As people read it."""
    return f"{size / GB:,.1f} GB" if size >= 0.1 * GB else f"{size / 1e6:,.0f} MB"


def _knobs(
    models: Mapping[str, LlamaConfig], settings: ml_collections.ConfigDict, moment: str
) -> Iterator[tuple[str, list]]:
    """Settings that save memory, the ones that cost least first, and their values, the mildest first."""
    runtime, sampler = settings.runtime, settings.sampler
    if moment == "peak":
        yield "runtime.gradient_accumulation", _doubled(runtime.gradient_accumulation, runtime.batch_size)
        if runtime.remat != "full":
            yield "runtime.remat", ["full"]
    tokens = range(sampler.kv_cache_tokens // 1024 * 1024, runtime.max_seq_len, -1024)
    yield "sampler.kv_cache_tokens", [n for n in (*tokens, runtime.max_seq_len) if n < sampler.kv_cache_tokens]
    if not config_models.names(settings) and jax.default_backend() != "cpu":
        (model,), ways = models.values(), settings.model.tensor_parallel
        if settings.model.fsdp == -1:
            divided = math.gcd(jax.device_count(), model.num_kv_heads, model.intermediate_size)
            yield "model.tensor_parallel", [n for n in range(ways + 1, divided + 1) if divided % n == 0]
        elif settings.model.fsdp < math.gcd(jax.device_count() // ways, model.hidden_size):
            yield "model.fsdp", [-1]
    longest = min(runtime.max_seq_len, max(model.max_seq_len for model in models.values()))
    yield "runtime.max_seq_len", [longest >> n for n in range(1, 6) if longest >> n >= 256]
    if not config_models.names(settings) and compute_dtype(settings.model.dtype) == jnp.float32:
        yield "model.dtype", ["bfloat16"]
    if moment == "peak" and settings.algorithm.kl_coef:
        yield "algorithm.kl_coef", [0.0]


def _doubled(first: int, last: int) -> list[int]:
    """first * 2, first * 4, ... below last, and last if it is more than first."""
    values = [first << n for n in range(1, 32) if first << n < last]
    return [*values, last] if last > first else values
