"""Rows of all lengths to blocks of one length, several rows side by side in a block.

Shapes are a function of the rows alone, and take few values: a block is a power of two long, or of another length where
that saves much, and the number of blocks in a micro-batch is a power of two or one and a half times one, as is that of
the keys that its queries meet. So a run compiles a handful of programs, and a run that was killed and resumed computes
with the same shapes, hence to the same bits, as one that was not.

Rows of one prompt, a GRPO group's, share it: a block holds [prefix | rest of row 1 | rest of row 2 | ...], and every
rest sees the prefix and itself. The prompt's last token is not in the prefix but begins each rest: the hidden state
before a token is what predicts it, so every sampled token finds that state just before itself, as in a row alone.
"""

import collections
from collections.abc import Collection, Sequence
from typing import NamedTuple

import flax.struct
import jax
import numpy as np

from lightning_jax.model import attention, llama
from lightning_jax.rl.trajectory import Row


@flax.struct.dataclass
class Batch:
    """Packed rows. All arrays are [B, T] and about the token at their own position, not the next one."""

    token_bt: jax.Array  # int32; 0 in padding
    segment_bt: jax.Array  # int32, from 1 in each block; 0 is padding
    position_bt: jax.Array  # int32, each token's in its row
    loss_mask_bt: jax.Array  # bool, the sampled tokens
    advantage_bt: jax.Array  # float32; 0 where loss_mask_bt is False
    sampler_logprob_bt: jax.Array  # float32, nats; 0 where loss_mask_bt is False
    temperature_bt: jax.Array  # float32; 1 where loss_mask_bt is False
    on_policy_bt: jax.Array  # bool, see `trajectory.Row`; True in padding
    old_logprob_bt: jax.Array | None = None  # float32, nats; where the rows have it, like those below
    value_bt: jax.Array | None = None  # float32, see `trajectory.Row`
    value_target_bt: jax.Array | None = None  # float32
    weight_bt: jax.Array | None = None  # float32, of the token's policy loss
    share_bt: jax.Array | None = None  # float32, 1 / (tokens of the token's rollout)
    reference_logprob_bt: jax.Array | None = None  # float32, nats; where a pass of its own has computed them
    prefix_bt: jax.Array | None = None  # int32, the segment each token sees beside its own, or its own
    reach: attention.Reach | None = flax.struct.field(pytree_node=False, default=None)  # of its attention

    def attend(self, sliding_window: int | None) -> llama.Attend:
        """Attention within its rows, for `llama.forward`."""
        return attention.segment_attention(
            self.segment_bt, self.position_bt, sliding_window, self.prefix_bt, self.reach
        )


def block_length(longest: int, *, minimum: int = 256) -> int:
    """Tokens of a block: the power of two that holds the longest row and `minimum`, in which short rows pack well."""
    return 1 << (max(longest, minimum, 1) - 1).bit_length()


def block_lengths(longest: int, *, minimum: int = 256, unit: int = 64) -> list[int]:
    """Lengths that blocks may have: a power of two, and then others up to four times it, the rounder first.

    Args:
        longest: tokens of the longest row, which each of them holds, and `minimum`; so does the power of two.
        unit: of which the others must be multiples, for attention's sake.
    """
    power = block_length(longest, minimum=minimum)
    others = [power * eighths // 8 for eighths in (5, 6, 7, *range(10, 33, 2))]
    others = [n for n in others if n >= max(longest, minimum) and n % unit == 0]
    return [power, *sorted(others, key=lambda n: (-(n & -n), n))]  # by the power of two that divides it


# The arrays of a `Row` that a batch has where its rows have them.
OPTIONAL = {
    "old_logprob_bt": "old_logprob",
    "value_bt": "value",
    "value_target_bt": "value_target",
    "weight_bt": "weight",
    "share_bt": "share",
}


class Place(NamedTuple):
    """Where a row lies."""

    block: int
    position_t: np.ndarray  # [T] int, the positions in the block of its tokens
    shared: int  # the first so many of them may be other rows' too


def place(rows: Sequence[Row], length: int, *, share: bool = False) -> list[Place]:
    """Where each row lies, first fit: those that share a prefix together, long groups first, and in them long rows.

    The same rows in any order fill the same blocks.

    Args:
        rows: none longer than `length`.
        length: T, tokens of a block.
        share: rows with the same prompt share it where they are in the same block.

    Raises:
        ValueError: a row is longer than a block.
    """
    if rows and (longest := max(len(row) for row in rows)) > length:
        raise ValueError(f"a row of {longest} tokens does not fit a block of {length}")

    prefixes = _shared_prefixes(rows) if share else [b""] * len(rows)
    first: dict[bytes, int] = {}  # rollout with the prefix
    for row, prefix in zip(rows, prefixes, strict=True):
        first[prefix] = min(first.get(prefix, row.rollout_index), row.rollout_index)

    groups = [
        (first[prefix] if prefix else row.rollout_index, prefix) for row, prefix in zip(rows, prefixes, strict=True)
    ]
    tokens = collections.Counter()
    for row, group in zip(rows, groups, strict=True):
        tokens[group] += len(row)

    def key(i: int) -> tuple[int, tuple[int, bytes], int, int, bytes, bytes]:
        row, group = rows[i], groups[i]
        return -tokens[group], group, -len(row), row.rollout_index, row.token_ids.tobytes(), row.loss_mask.tobytes()

    places: list[Place | None] = [None] * len(rows)
    used: list[int] = []
    starts: dict[tuple[int, bytes], int] = {}  # of the prefixes in the blocks
    for i in sorted(range(len(rows)), key=key):
        prefix, shared = prefixes[i], len(prefixes[i]) // rows[i].token_ids.itemsize
        rest = len(rows[i]) - shared
        holding = (block for block, of_block in starts if of_block == prefix and used[block] + rest <= length)
        free = (block for block, tokens in enumerate(used) if tokens + len(rows[i]) <= length)
        block = next(holding, next(free, len(used)))
        if block == len(used):
            used.append(0)
        if shared and (block, prefix) not in starts:
            starts[block, prefix] = used[block]
            used[block] += shared
        start = starts.get((block, prefix), 0)
        position_t = np.r_[start : start + shared, used[block] : used[block] + rest]
        places[i] = Place(block, position_t, shared)
        used[block] += rest
    return places


def tokens_needed(rows: Sequence[Row], *, share: bool = False) -> int:
    """Tokens that blocks hold at least: each row's own, and a prefix that rows share once; see `place`."""
    prefixes = _shared_prefixes(rows) if share else []
    repeated = sum(map(len, prefixes)) - sum(map(len, set(prefixes)))
    return sum(len(row) for row in rows) - repeated // np.dtype(np.int32).itemsize


def reach(places: Sequence[Place], length: int) -> attention.Reach | None:
    """Of the attention in blocks of `length` tokens that are filled in this way; None for all of the block."""
    own = max((len(at.position_t) - at.shared - 1 for at in places), default=0)
    shared = max((at.shared for at in places), default=0)
    unit = attention.NEAR_QUERIES
    longest = attention.Reach(*(unit * _rounded_up(-(-tokens // unit)) for tokens in (own, shared)))
    return longest if attention.takes_reach(longest, length) else None


def _shared_prefixes(rows: Sequence[Row]) -> list[bytes]:
    """For each row the ids before its prompt's last one, where another row has the same, else nothing."""
    prefixes = [row.token_ids[: max(0, int(np.argmax(row.loss_mask)) - 1)].tobytes() for row in rows]
    count = collections.Counter(prefixes)
    return [prefix if count[prefix] > 1 else b"" for prefix in prefixes]


def pack(rows: Sequence[Row], advantage_n: np.ndarray, length: int, *, share: bool = False) -> Batch:
    """Packs rows into blocks, where `place` puts them.

    Args:
        rows: none longer than `length`; all of them have an optional array, or none has it.
        advantage_n: [N] float32, by `Row.rollout_index`, for rows that bring no advantages of their own.
        length: T, tokens of a block.
        share: as in `place`.

    Returns:
        A `Batch` of NumPy arrays with as many blocks as were needed.

    Raises:
        ValueError: a row is longer than a block.
    """
    places = place(rows, length, share=share)
    optional = {there: of_row for there, of_row in OPTIONAL.items() if rows and getattr(rows[0], of_row) is not None}
    batch = empty_blocks(1 + max((at.block for at in places), default=-1), length, optional)
    batch = batch.replace(reach=reach(places, length))
    if any(at.shared for at in places):
        batch = batch.replace(prefix_bt=np.zeros_like(batch.segment_bt))
    for row, at in sorted(zip(rows, places, strict=True), key=lambda pair: (pair[1].block, pair[1].position_t[-1])):
        span, rest = (at.block, at.position_t), (at.block, at.position_t[at.shared :])
        if at.shared and not batch.segment_bt[at.block, at.position_t[0]]:
            batch.segment_bt[at.block, at.position_t[: at.shared]] = batch.segment_bt[at.block].max() + 1
        batch.segment_bt[rest] = batch.segment_bt[at.block].max() + 1
        if batch.prefix_bt is not None:
            batch.prefix_bt[span] = batch.segment_bt[at.block, at.position_t[0]]
        batch.token_bt[span] = row.token_ids
        batch.position_bt[span] = np.arange(len(row))
        batch.loss_mask_bt[span] = row.loss_mask
        advantage = advantage_n[row.rollout_index] if row.advantage is None else row.advantage
        batch.advantage_bt[span] = np.where(row.loss_mask, advantage, 0)
        batch.sampler_logprob_bt[span] = row.sampler_logprob
        batch.temperature_bt[span] = row.temperature
        batch.on_policy_bt[span] = row.on_policy
        for there, of_row in optional.items():
            getattr(batch, there)[span] = np.where(row.loss_mask, getattr(row, of_row), 0)
    return batch


def empty_blocks(count: int, length: int, optional: Collection[str] = ()) -> Batch:
    """A `Batch` of padding, with these of the `OPTIONAL` arrays."""

    def full(value: float, dtype: type) -> np.ndarray:
        return np.full((count, length), value, dtype)

    return Batch(
        token_bt=full(0, np.int32),
        segment_bt=full(0, np.int32),
        position_bt=full(0, np.int32),
        loss_mask_bt=full(0, np.bool_),
        advantage_bt=full(0, np.float32),
        sampler_logprob_bt=full(0, np.float32),
        temperature_bt=full(1, np.float32),
        on_policy_bt=full(True, np.bool_),
        **{name: full(0, np.float32) for name in optional},
    )


def micro_batch_size(num_blocks: int, num_micro_batches: int, *, limit: int, multiple: int = 1) -> int:
    """Blocks of a micro-batch: the largest that there may be, or a smaller one, down to half of it, that saves 3%
    of the blocks, padding included. Arguments as of `largest_micro_batch`.
    """

    def computed(size: int) -> int:
        return -(-num_blocks // size) * size

    best = largest = largest_micro_batch(num_blocks, num_micro_batches, limit=limit, multiple=multiple)
    for size in range(largest - 1, (largest - 1) // 2, -1):
        if size == _rounded_up(size) and size % multiple == 0 and computed(size) < 0.97 * computed(best):
            best = size
    return best


def largest_micro_batch(num_blocks: int, num_micro_batches: int, *, limit: int, multiple: int = 1) -> int:
    """The most blocks of a micro-batch.

    Args:
        num_blocks: of the whole batch.
        num_micro_batches: to divide it into, if `limit` allows.
        limit: the most blocks that memory holds at once.
        multiple: of which the size must be one (the mesh's batch axes); wins over `limit`.

    Returns:
        The power of two, or one and a half times one, that holds a share; at most `limit`; then made a multiple.
    """
    share = max(1, -(-num_blocks // num_micro_batches))
    size = max(1, min(_rounded_up(share), limit))
    return -(-size // multiple) * multiple


def _rounded_up(count: int) -> int:
    """To a power of two, or one and a half times one; 0 is 0."""
    power = 1 << max(count - 1, 0).bit_length()
    return power * 3 // 4 if count <= power * 3 // 4 else power


def even_parts(num_blocks: int, num_parts: int) -> list[int]:
    """Sizes of as many parts, or of one for each block where there are fewer; they differ by one at the most."""
    parts = min(num_parts, num_blocks)
    return [num_blocks // parts + (i < num_blocks % parts) for i in range(parts)]


def micro_batches(batch: Batch, size: int) -> list[Batch]:
    """Divides a batch into micro-batches of `size` blocks; the last one is filled up with padding."""
    count, length = batch.token_bt.shape
    optional = [name for name in OPTIONAL if getattr(batch, name) is not None]
    filling = empty_blocks(-count % size, length, optional).replace(reach=batch.reach)
    if batch.prefix_bt is not None:
        filling = filling.replace(prefix_bt=np.zeros_like(filling.segment_bt))
    batch = jax.tree.map(lambda blocks, more: np.concatenate([blocks, more]), batch, filling)
    return [jax.tree.map(lambda x, i=i: x[i : i + size], batch) for i in range(0, count, size)]
