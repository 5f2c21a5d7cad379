"""What a configuration needs of the devices' memory, known before anything is allocated.

Everything comes from shapes: the abstract parameter tree, the page arrays, the optimizer's state. What is allocated for
good (weights, pages, learner) is exact. What a program needs while it runs is an estimate (`temporaries.py`), or after
`Plan.compiled` the compiler's own figure.
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
from lightning_jax import aot, config_models, temporaries
from lightning_jax import mesh as mesh_lib
from lightning_jax.model import llama, lora, weights
from lightning_jax.model.config import LlamaConfig
from lightning_jax.rl import critic, offload
from lightning_jax.rl.settings import compute_dtype, learner_settings

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
        resting: what of it is not there while the learner is made or learns, since nobody samples meanwhile.
        kv_cache: pages, and on CPU the dense copy that decoding works on.
        sampling: what a dispatch works with, about.
        masters, optimizer, reference, gradients: the learner's; the reference's weights that do not learn are `frozen`.
        hosted_optimizer, hosted_reference: what of these is in the host's memory while it is not used.
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
    resting: int = 0
    hosted_optimizer: int = 0
    hosted_reference: int = 0

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
        return max(self.serving, self._learning + self.hosted_optimizer + max(self.loaded, self.gradients))

    @property
    def peak(self) -> int:
        """To train when every conversation is as long as it may be."""
        return max(self.training, self._learning + self.gradients + self.update, self._kept + self.sampling)

    @property
    def _learning(self) -> int:
        """While the learner works."""
        return self._kept - self.resting

    @property
    def _kept(self) -> int:
        """All the time, from the first update on, but for what rests."""
        learner = self.masters + self.optimizer - self.hosted_optimizer + self.reference - self.hosted_reference
        return self.process + self.sampler + self.kv_cache + self.frozen + learner + self.critic


def estimate(
    model: LlamaConfig,
    settings: ml_collections.ConfigDict,
    num_devices: int | None = None,
    platform: str | None = None,
) -> Need:
    """What a model needs with these settings (those of `config.py`) on so many devices, by default those there are.

    `platform` is "cpu", "gpu" or "tpu", by default what there is.

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
    platform, float32 = platform or jax.default_backend(), jnp.dtype("float32")

    def size(specs: dict[str, Any], dtype: jnp.dtype) -> int:
        return temporaries.param_bytes(specs, dtype, sizes)

    masters = size(lora.trained_specs(model, learner.trainable), float32)
    reference = size(learned, dtype) if learner.kl_coef else 0
    kv_cache = temporaries.kv_bytes(model, settings.sampler, dtype, ways, platform)
    sampler = size(llama.abstract_params(model), dtype)
    hosted = () if platform == "cpu" else offload.parts(learner)  # there it is the same memory
    return Need(
        process=_PROCESS_BYTES // num_devices if platform == "cpu" else 0,
        loaded=size(learned, float32),
        frozen=size(frozen, dtype),
        sampler=sampler,
        kv_cache=kv_cache,
        sampling=temporaries.sampling_bytes(model, settings.sampler, dtype, ways),
        masters=masters,
        optimizer=2 * masters,
        reference=reference,
        gradients=masters,
        critic=3 * size(critic.abstract_params(model, learner), float32) if learner.critic else 0,
        update=temporaries.update_bytes(model, learner, max_seq_len, sizes, platform),
        resting=0 if settings.runtime.max_staleness else sampler,
        hosted_optimizer=2 * masters if "optimizer" in hosted else 0,
        hosted_reference=reference if "reference" in hosted else 0,
    )


def estimate_all(models: Mapping[str, LlamaConfig], settings: ml_collections.ConfigDict) -> Need:
    """What a run's models need together; their sizes by the names in `config_models.of_each`."""
    needs = [estimate(models[name], own) for name, own in config_models.of_each(settings).items()]
    return functools.reduce(Need.beside, needs)


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
        is_compiled: `need.update` is the compiler's own figure.
    """

    models: Mapping[str, LlamaConfig]
    settings: ml_collections.ConfigDict
    need: Need
    limit: int | None
    is_compiled: bool = False

    def compiled(self) -> "Plan":
        """The same, but what the largest micro-batch needs is read from its program, compiled for the devices here.

        It takes seconds, or minutes for large models on accelerators.
        """
        update = 0
        for name, own in config_models.of_each(self.settings).items():
            model = self.models[name]
            learner = learner_settings(own, compute_dtype(own.model.dtype))
            sizes = mesh_lib.sizes_for(model, own, jax.device_count())
            longest = min(own.runtime.max_seq_len, model.max_seq_len)
            blocks, length = temporaries.largest_micro_batch(learner, longest, sizes)
            programs = aot.compile_learner(model, learner, mesh_lib.make_mesh(*sizes), blocks=blocks, length=length)
            update = max(update, *(p.memory_analysis().temp_size_in_bytes for p in programs.values()))
        return dataclasses.replace(self, need=dataclasses.replace(self.need, update=update), is_compiled=True)

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
            ("largest micro-batch" if self.is_compiled else "largest micro-batch, about", need.update),
        ]
        totals = [("to serve", need.serving), ("to train, at least", need.training), ("to train, at most", need.peak)]
        lines = [f"{name:52}{in_bytes(size):>10}" for name, size in [*parts, *totals] if size]
        hosted = need.hosted_optimizer + need.hosted_reference
        return lines + [f"{'of that, on the host between uses':52}{in_bytes(hosted):>10}"] * bool(hosted)


def plan(settings: ml_collections.ConfigDict) -> Plan:
    """The plan for a configuration; of the model only its config is read.

    Raises:
        InvalidConfigError: as `weights.load_config` and `Trainable.check`.
    """
    models = {}
    for name, own in config_models.of_each(settings).items():
        models[name] = weights.load_config(own.model.path)
        lora.Trainable.of(own.model).check(models[name])
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
        if runtime.offload == "none" and jax.default_backend() != "cpu":
            yield "runtime.offload", ["reference", "optimizer", "both"]
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
    if moment == "peak" and not config_models.names(settings) and not settings.model.lora_rank:
        yield "model.lora_rank", [32]
    if moment == "peak" and settings.algorithm.kl_coef:
        yield "algorithm.kl_coef", [0.0]


def _doubled(first: int, last: int) -> list[int]:
    """first * 2, first * 4, ... below last, and last if it is more than first."""
    values = [first << n for n in range(1, 32) if first << n < last]
    return [*values, last] if last > first else values
