"""What programs need of a device's memory while they run, estimated from shapes; and the arrays that they work on.

The multiples are those of XLA's buffer assignment for programs that were compiled; `tests/test_memory.py` holds them
against such programs.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections

from lightning_jax import mesh as mesh_lib
from lightning_jax.model import attention, llama, lora
from lightning_jax.model.config import LlamaConfig
from lightning_jax.rl import losses, packing
from lightning_jax.rl.update import LearnerSettings
from lightning_jax.sampler import kv_cache


def param_bytes(specs: dict[str, Any], dtype: jnp.dtype, sizes: tuple[int, int, int]) -> int:
    """One device's share of a tree of parameters on a mesh of these sizes."""
    mesh = jax.sharding.AbstractMesh(sizes, mesh_lib.AXES)

    def size(spec: llama.ParamSpec) -> int:
        axes = mesh_lib.partition_spec(mesh, spec.shape, spec.logical_axes)
        return math.prod(jax.sharding.NamedSharding(mesh, axes).shard_shape(spec.shape))

    return sum(size(spec) for spec in jax.tree.leaves(specs)) * dtype.itemsize


def kv_bytes(model: LlamaConfig, sampler: ml_collections.ConfigDict, dtype: jnp.dtype, ways: int, platform: str) -> int:
    """The pages, and on CPU a dense copy at its largest, which is as many tokens as the pages have."""
    num_pages = -(-sampler.kv_cache_tokens // sampler.page_size)
    arrays = [functools.partial(kv_cache.init_pages, model, num_pages, sampler.page_size, dtype)]
    if platform == "cpu":
        arrays.append(functools.partial(kv_cache.init_dense, model, 1, num_pages * sampler.page_size, dtype))
    total = sum(leaf.size for leaf in jax.tree.leaves([jax.eval_shape(make) for make in arrays])) * dtype.itemsize
    return total // _share(model.num_kv_heads, ways)


def sampling_bytes(model: LlamaConfig, sampler: ml_collections.ConfigDict, dtype: jnp.dtype, ways: int) -> int:
    """A prefill's activations and attention scores, and the logits of everybody's next token."""
    tokens = max(4 * sampler.prefill_chunk, sampler.max_slots * sampler.page_size)
    heads, qkv, mlp, vocab = _shares(model, ways)
    layer = tokens * (4 * model.hidden_size + qkv + 2 * mlp) * dtype.itemsize
    scores = 3 * tokens * heads * kv_cache.BLOCK_TOKENS * 4
    return layer + scores + 8 * max(64, sampler.max_slots) * vocab * 4


def update_bytes(
    model: LlamaConfig, learner: LearnerSettings, max_seq_len: int, sizes: tuple[int, int, int], platform: str
) -> int:
    """`update.accumulate` for a micro-batch of conversations that are all as long as they may be.

    Within 20% of what XLA compiles for the CPU, mostly. For TPU and GPU, held against Llama 3.2 1B in bfloat16 with 2
    and 8 rows of 2048 tokens on one device, and for TPU against 3B as well: between 4% below and 23% above, where all
    is recomputed with adapters up to twice as much; with four TPU chips along `fsdp` a third above.
    """
    copies, shards, ways = sizes
    blocks, length = largest_micro_batch(learner, max_seq_len, sizes)
    blocks //= copies * shards
    chunk = losses.chunk_length(blocks * length, model.vocab_size, platform)
    tokens, width = blocks * length, model.hidden_size
    heads, qkv, mlp, vocab = _shares(model, ways)
    itemsize = jnp.dtype(learner.compute_dtype).itemsize
    trained = lora.trained_specs(model, learner.trainable)
    params = param_bytes(trained, jnp.dtype(learner.compute_dtype), sizes)

    # Inside one layer, or where logits are made of its output: the larger of the two.
    has_kernel = platform == "tpu" or (platform == "gpu" and itemsize < 4)  # of attention, which keeps no scores
    is_dense = length <= attention.LONGEST_DENSE and not has_kernel  # or else of one row and one block after the other
    score_bytes = 4 * heads * (blocks * length**2 if is_dense else 0 if has_kernel else attention.SCORE_BLOCK**2)
    adapted = qkv + 2 * mlp if learner.trainable.lora_rank else 0  # the adapters' own products
    scores = (2.5 if platform == "cpu" else 3) * score_bytes
    layer = tokens * (16 * width + 8.5 * qkv + 2 * adapted) * itemsize + scores
    is_constant = learner.trainable.is_frozen("embed_vd" if model.tie_embeddings else "unembed_dv")
    in_place = learner.trainable.is_whole and (itemsize == 4 or platform != "cpu")
    if platform == "cpu":
        # The unembedding's gradient, or what bfloat16 is turned into to be multiplied.
        matrices = 0 if is_constant and itemsize == 4 else 1 if in_place else 2
        logits = 4 * (3 * chunk * vocab + matrices * vocab * width + 4 * tokens * width)
        gradients = 0 if in_place else param_bytes(trained, jnp.dtype("float32"), sizes)
        gradients += 3 * params if itemsize < 4 else 0
    else:
        layer *= 1.5  # attention's kernels have work space of their own
        # With their gradient; the unembedding's in float32 and, like itself, in the compute dtype.
        logits = (4 + itemsize) * chunk * vocab
        logits += 0 if is_constant else (4 if itemsize == 4 else 4 + 2 * itemsize) * vocab * width
        if in_place:
            gradients = params if platform == "tpu" else 0  # whose programs keep all weights in the compute dtype
        else:  # those weights, and their gradients
            gradients = 2 * params if itemsize < 4 else params
        if copies * shards > 1:  # the unembedding as it is gathered, and its gradient
            gradients += (1 if is_constant else 2) * vocab * width * itemsize
    saved = {
        "full": width,
        "dots": 3 * width + qkv + 2 * mlp + adapted,
        None: 15 * width + 7 * qkv + (2 * heads * length if is_dense else 0),
    }[learner.remat]
    needed = gradients + model.num_layers * tokens * saved * itemsize + max(layer, logits)
    return int(1.05 * needed if platform == "cpu" else needed)  # XLA's buffer assignment leaves gaps there


def largest_micro_batch(learner: LearnerSettings, max_seq_len: int, sizes: tuple[int, int, int]) -> tuple[int, int]:
    """Blocks, those of all devices, and tokens of each."""
    length = packing.block_length(max_seq_len, minimum=learner.min_block_length)
    blocks = packing.largest_micro_batch(
        learner.batch_size,
        learner.gradient_accumulation,
        limit=learner.most_blocks(length),
        multiple=sizes[0] * sizes[1],
    )
    return blocks, length


def _shares(model: LlamaConfig, ways: int) -> tuple[int, int, int, int]:
    """One device's query heads, columns of q, k and v together, feed-forward columns, and vocabulary."""
    kv_ways = _share(model.num_kv_heads, ways)
    heads, kv_heads = model.num_heads // kv_ways, model.num_kv_heads // kv_ways
    mlp = model.intermediate_size // _share(model.intermediate_size, ways)
    return heads, (heads + 2 * kv_heads) * model.head_dim, mlp, model.vocab_size // _share(model.vocab_size, ways)


def _share(size: int, ways: int) -> int:
    """How many devices an axis is divided over; one that does not divide evenly stays whole (see `mesh.py`)."""
    return ways if size % ways == 0 else 1
