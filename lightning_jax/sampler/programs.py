"""The device programs: prefill, the first token after it, a decode round, and making weights ready for them.

The state of all slots is one int32 matrix with a column per fact, floats bit-cast, and so is everything the host sends
with a dispatch: few arrays in, one array out, one scatter. The last row of the state belongs to padding.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lightning_jax import mesh as mesh_lib
from lightning_jax.model import llama, lora
from lightning_jax.model.llama import LlamaConfig
from lightning_jax.sampler import kv_cache, sampling
from lightning_jax.sampler.request import MAX_STOP_IDS, MAX_TOP_LOGPROBS, SamplingParams

# Columns of a slot's state. The token at `POSITION` has been sampled but not been fed to the model.
TOKEN, POSITION, REMAINING, LOGPROB, TOP_K, KEY_0, KEY_1, TEMPERATURE, TOP_P, STOP = range(10)
STATE_WIDTH = STOP + MAX_STOP_IDS
# What the host sends for each row of a prefill: these columns, the chunk's tokens, the page table.
START, LENGTH, PREFILL_WIDTH = range(3)
# And for each sequence that samples after it: its slot, its row, how many tokens it may sample, at which position the
# first of them will be (these stand where the state has what is not known yet), the columns from `TOP_K` on as in the
# state, and for a sequence that shares its row with another the page that it will write to, and which token of the
# chunk is the first that belongs there.
SLOT, ROW, ROOM, FIRST = range(4)
COPY_FIRST, COPY_PAGE, SAMPLE_WIDTH = range(STATE_WIDTH, STATE_WIDTH + 3)


class Shaping(NamedTuple):
    """What a decode round is told where a request does not sample from the model's own distribution.

    A row that the host must see a token of before it can say more takes one step: its state then has 1 at `REMAINING`.
    """

    placed_b: jax.Array  # [B] bool, rows that go on from `state_bs` and not from their slot
    state_bs: jax.Array  # [B, STATE_WIDTH] int32
    allowed_bw: jax.Array  # [B, W] uint32, see `sampling.shape`
    shaped_steps: jax.Array  # [] int32, the steps, from the first on, for which `allowed_bw` and `penalties` hold
    rank: jax.Array  # [] bool, whether the likeliest tokens are wanted
    penalties: sampling.Penalties | None


def init_state(num_slots: int, device: jax.sharding.Sharding | None = None) -> jax.Array:
    """The state of idle slots, [num_slots + 1, STATE_WIDTH] int32."""
    return jnp.zeros((num_slots + 1, STATE_WIDTH), jnp.int32, device=device)


@dataclasses.dataclass(frozen=True)
class Programs:
    """The jitted functions; `jitted` makes them. Each call compiles for new shapes or static arguments only."""

    prepare_params: Callable
    prefill: Callable
    begin: Callable
    decode: Callable

    def compilations(self) -> int:
        """Programs compiled so far."""
        return sum(program._cache_size() for program in (self.prepare_params, self.prefill, self.begin, self.decode))


def jitted() -> Programs:
    """The programs for the current platform; one set for all engines of the process."""
    return _jitted(mesh_lib.platform())


@functools.cache
def _jitted(platform: str) -> Programs:
    options = compiler_options(platform)
    return Programs(
        prepare_params=jax.jit(prepare_params, static_argnames="dtype"),
        prefill=jax.jit(
            prefill,
            static_argnames=("config", "chunk", "tokens"),
            donate_argnames="pages",
            compiler_options=options,
        ),
        begin=jax.jit(begin, donate_argnames="state", compiler_options=options),
        decode=jax.jit(
            decode,
            static_argnames=("config", "steps"),
            donate_argnames=("pages", "dense", "state"),
            compiler_options=options,
        ),
    )


def compiler_options(platform: str) -> dict[str, str] | None:
    """On CPU: only matrix products go to the YNNPACK library, each by itself, and summed in one order.

    XLA gives it softmaxes as well, but only large ones, and its exp differs from XLA's own in the last bit; so a
    request's log-probs would depend on how many others run. Two products in one call, with what is between them, are
    rounded in one way for fewer than 64 rows and in another for more. And where results may depend on the processor,
    the library adds up products of few rows in two or four sums.
    """
    if platform != "cpu":
        return None
    options = {
        "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT",
        "xla_cpu_enable_platform_dependent_math": "False",
    }
    try:
        jax.jit(lambda x: x + 1, compiler_options=options).lower(jax.ShapeDtypeStruct((), jnp.float32)).compile()
    except Exception:  # an XLA without those options
        return None
    return options


def prepare_params(params: llama.Params, dtype: jnp.dtype) -> llama.Params:
    """Master weights to what the other programs take: cast, unstacked, and sharing no buffer with the master.

    Adapters become a part of their matrices, in float32 and before the cast. On CPU matrices are turned, see
    `llama.turn_matrices`: so XLA multiplies few rows faster, and sums in one order for all numbers of rows from 2 on.
    """
    params = llama.unstack_layers(params)
    params |= {"layers": [lora.merged(layer) for layer in params["layers"]]}
    if mesh_lib.platform() == "cpu":
        params = llama.turn_matrices(params)
    params = llama.cast_params(params, dtype)
    return jax.tree.map(lambda leaf: jax.lax.optimization_barrier(jnp.copy(leaf)), params)


def prefill(
    params: llama.Params,
    pages: list[kv_cache.Pages],
    control: jax.Array,
    samples: jax.Array,
    *,
    config: LlamaConfig,
    chunk: int,
    tokens: int,
) -> tuple[list[kv_cache.Pages], jax.Array]:
    """Computes a chunk of each row's prompt, and the logits after it for those whose prompt ends there.

    All but attention is computed of the rows' tokens without the gaps between them.

    Args:
        params: as `prepare_params` makes them.
        pages: donated.
        control: [B, PREFILL_WIDTH + chunk + P] int32.
        samples: [N, SAMPLE_WIDTH] int32; unused ones have the slot of padding.
        tokens: how many all rows together may have.

    Returns:
        The new pages, and the logits, [N, V] float32.
    """
    token_bt = control[:, PREFILL_WIDTH : PREFILL_WIDTH + chunk]
    page_table_bp = control[:, PREFILL_WIDTH + chunk :]
    start_b, length_b = control[:, START], control[:, LENGTH]
    offset_t = jnp.arange(chunk, dtype=jnp.int32)
    position_bt = start_b[:, None] + offset_t
    valid_bt = offset_t < length_b[:, None]
    copies = kv_cache.Copies(samples[:, ROW], samples[:, COPY_FIRST], samples[:, COPY_PAGE])
    packing = kv_cache.pack(length_b, chunk, tokens)
    attend = kv_cache.prefill_attention(page_table_bp, position_bt, valid_bt, config.sliding_window, copies, packing)
    row_n = samples[:, ROW]
    last_n = packing.n_bt[row_n, jnp.maximum(length_b[row_n] - 1, 0)]
    token_m1, position_m1 = (x_bt.reshape(-1)[packing.bt_n][:, None] for x_bt in (token_bt, position_bt))
    few = last_n.size < token_m1.size  # or else the last layer has less to do for all of them
    x_n1d, pages = llama.forward(params, config, token_m1, position_m1, attend, pages, wanted_n=last_n if few else None)
    logits_nv = llama.unembed(params, config, (x_n1d if few else x_n1d[last_n])[:, 0])
    return pages, mesh_lib.constrain(logits_nv, None, "vocab")


def begin(state: jax.Array, logits_nv: jax.Array, samples: jax.Array) -> jax.Array:
    """Samples the tokens after a prefill. A program of its own, and so compiled once for all shapes of prefills.

    Args:
        state: donated.
        logits_nv: as `prefill` returns them.
        samples: what that was given.

    Returns:
        The new state.
    """
    position_n = samples[:, FIRST]
    noise_n1 = sampling.uniform_noise(_noise_key(samples), position_n[:, None])
    token_n, logprob_n = _sample(logits_nv, samples, noise_n1[:, 0])
    remaining_n = jnp.where(_stops(token_n, samples), 0, samples[:, ROOM] - 1)
    known_n4 = jnp.stack([token_n, position_n, remaining_n, _bits(logprob_n)], axis=-1)
    rows = jnp.concatenate([known_n4, samples[:, TOP_K:STATE_WIDTH]], axis=-1)
    return state.at[samples[:, SLOT]].set(rows, mode="promise_in_bounds")


def decode(
    params: llama.Params,
    pages: list[kv_cache.Pages],
    dense: list[kv_cache.Dense] | None,
    state: jax.Array,
    control: jax.Array,
    last_step: jax.Array,
    shaping: Shaping | None = None,
    *,
    config: LlamaConfig,
    steps: int,
) -> tuple[list[kv_cache.Pages], list[kv_cache.Dense] | None, jax.Array, jax.Array, jax.Array | None]:
    """Samples `last_step` tokens for each row, or until every row has stopped.

    Args:
        params: as `prepare_params` makes them.
        pages, dense, state: donated. Without `dense` attention reads the pages.
        control: [B, 2 + P] int32, the row's slot, the rows to load into `dense` (see `kv_cache.load`), and the row's
            page table, which covers the positions of this round and has the length of `dense`.
        last_step: [] int32, at most `steps`.
        shaping: None where every row samples from the model's own distribution; that is a program of its own.

    Returns:
        The new pages, dense copy and state, and what was sampled: [B, 2 * (1 + steps)] int32, first the ids, then the
        log-probs' bits. The first of each is the token that the round began with; ids are -1 after a row has stopped.
        Last, with `shaping`, the likeliest tokens of each step, ids and then log-probs' bits, [B, steps, 2 * N] int32.
    """
    slot_b, load_b, page_table_bp = control[:, 0], control[:, 1], control[:, 2:]
    rows = state.at[slot_b].get(mode="promise_in_bounds")
    num_top, top_btn = 0, None
    if shaping is not None:
        rows = jnp.where(shaping.placed_b[:, None], shaping.state_bs, rows)
        num_top = min(MAX_TOP_LOGPROBS, config.vocab_size)
        top_btn = jnp.zeros((slot_b.shape[0], steps, 2 * num_top), jnp.int32)
    start_b = rows[:, POSITION]
    offset_t = jnp.arange(steps, dtype=jnp.int32)
    noise_bt = sampling.uniform_noise(_noise_key(rows), start_b[:, None] + 1 + offset_t)
    rope_bth = llama.rope_angles(config, start_b[:, None] + offset_t)  # of rows until they stop

    def step(carry):
        i, token_b, position_b, remaining_b, cache, tokens_bt, logprobs_bt, top_btn = carry
        active_b = remaining_b > 0
        if dense is None:
            attend = kv_cache.prefill_attention(
                page_table_bp, position_b[:, None], active_b[:, None], config.sliding_window
            )
        else:
            attend = kv_cache.decode_attention(position_b, config.sliding_window, pages[0].k.shape[1])
        rope = jax.tree.map(lambda x_bth: jax.lax.dynamic_slice_in_dim(x_bth, i, 1, axis=1), rope_bth)
        x_btd, cache = llama.forward(params, config, token_b[:, None], position_b[:, None], attend, cache, rope=rope)
        logits_bv = llama.unembed(params, config, x_btd[:, 0])
        noise_b = jax.lax.dynamic_index_in_dim(noise_bt, i, axis=1, keepdims=False)
        if shaping is None:
            sampled_b, logprob_b = _sample(logits_bv, rows, noise_b)
        else:
            sampled_b, logprob_b, top_bn = _sample_shaped(logits_bv, rows, noise_b, shaping, i, num_top)
            top_btn = top_btn.at[:, i].set(top_bn)
        tokens_bt = tokens_bt.at[:, i].set(jnp.where(active_b, sampled_b, -1))
        logprobs_bt = logprobs_bt.at[:, i].set(logprob_b)
        token_b = jnp.where(active_b, sampled_b, token_b)
        position_b = position_b + active_b
        remaining_b = jnp.where(active_b & ~_stops(sampled_b, rows), remaining_b - 1, 0)
        return i + 1, token_b, position_b, remaining_b, cache, tokens_bt, logprobs_bt, top_btn

    cache = pages
    if dense is not None:
        cache = [kv_cache.load(*layer, page_table_bp, load_b, start_b) for layer in zip(pages, dense, strict=True)]
    shape = (slot_b.shape[0], steps)
    carry = (0, rows[:, TOKEN], start_b, rows[:, REMAINING], cache)
    carry += (jnp.full(shape, -1, jnp.int32), jnp.zeros(shape, jnp.float32), top_btn)
    carry = jax.lax.while_loop(lambda carry: (carry[0] < last_step) & jnp.any(carry[3] > 0), step, carry)
    _, token_b, position_b, remaining_b, cache, tokens_bt, logprobs_bt, top_btn = carry

    if dense is None:
        pages = cache
    else:
        dense, valid_b = cache, rows[:, REMAINING] > 0
        pages = [
            kv_cache.write_back(*layer, page_table_bp, start_b, valid_b, steps)
            for layer in zip(pages, dense, strict=True)
        ]
    known_b3 = jnp.stack([token_b, position_b, remaining_b], axis=-1)
    state = state.at[slot_b].set(jnp.concatenate([known_b3, rows[:, LOGPROB:]], axis=-1), mode="promise_in_bounds")
    sampled = [rows[:, TOKEN, None], tokens_bt, rows[:, LOGPROB, None], _bits(logprobs_bt)]
    sampled = mesh_lib.constrain(jnp.concatenate(sampled, axis=-1), None, None)  # whole in every process, for the host
    if top_btn is not None:
        top_btn = mesh_lib.constrain(top_btn, None, None, None)
    return pages, dense, state, sampled, top_btn


def sampling_columns(sampling: SamplingParams, stop_ids: tuple[int, ...]) -> np.ndarray:
    """The columns from `TOP_K` on, [STATE_WIDTH - TOP_K] int32."""
    columns = np.full(STATE_WIDTH, -1, np.int32)
    columns[TOP_K] = min(sampling.top_k, np.iinfo(np.int32).max)
    columns[KEY_0 : KEY_1 + 1] = np.asarray(sampling.noise_key, np.uint32).view(np.int32)
    columns[TEMPERATURE : TOP_P + 1] = np.asarray([sampling.temperature, sampling.top_p], np.float32).view(np.int32)
    columns[STOP : STOP + len(stop_ids)] = stop_ids
    return columns[TOP_K:]


def read_sampled(sampled: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What `decode` returned, on the host: ids and log-probs, both [B, 1 + steps]."""
    half = sampled.shape[1] // 2
    return sampled[:, :half], np.ascontiguousarray(sampled[:, half:]).view(np.float32)


def read_top(top: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The likeliest tokens that `decode` returned, on the host: ids and log-probs, both [B, steps, N]."""
    half = top.shape[2] // 2
    return top[:, :, :half], np.ascontiguousarray(top[:, :, half:]).view(np.float32)


def _sample(logits_bv: jax.Array, rows: jax.Array, uniform_b: jax.Array) -> tuple[jax.Array, jax.Array]:
    with jax.named_scope("sample"):
        return sampling.sample(
            logits_bv, _float(rows[:, TEMPERATURE]), rows[:, TOP_K], _float(rows[:, TOP_P]), uniform_b
        )


def _sample_shaped(
    logits_bv: jax.Array, rows: jax.Array, uniform_b: jax.Array, shaping: Shaping, i: jax.Array, num_top: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Token, log-prob, and the likeliest tokens, [B, 2 * num_top] int32, of step `i`."""
    filters = _float(rows[:, TEMPERATURE]), rows[:, TOP_K], _float(rows[:, TOP_P])
    with jax.named_scope("sample"):
        x_bv = jax.lax.cond(
            i < shaping.shaped_steps,
            lambda x: sampling.shape(x, filters[0], shaping.allowed_bw, shaping.penalties),
            lambda x: x,
            sampling.temper(logits_bv, filters[0]),
        )
        token_b, logprob_b = sampling.draw(x_bv, *filters, uniform_b)

    def ranked(x_bv: jax.Array) -> jax.Array:
        top_bn, top_logprob_bn = sampling.rank(x_bv, *filters, num_top)
        return jnp.concatenate([top_bn, _bits(top_logprob_bn)], axis=-1)

    def unranked(x_bv: jax.Array) -> jax.Array:
        return jnp.zeros((x_bv.shape[0], 2 * num_top), jnp.int32)

    return token_b, logprob_b, jax.lax.cond(shaping.rank, ranked, unranked, x_bv)


def _stops(token_b: jax.Array, rows: jax.Array) -> jax.Array:
    return jnp.any(token_b[:, None] == rows[:, STOP:STATE_WIDTH], axis=-1)


def _noise_key(rows: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(rows[:, KEY_0 : KEY_1 + 1], jnp.uint32)


def _bits(x: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(x, jnp.int32)


def _float(x: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(x, jnp.float32)
