"""Rows of all lengths to blocks of one length, several rows side by side in a block.

Shapes are a function of the rows alone, and take few values: a block is a power of two long, and the number of blocks
in a micro-batch is a power of two or one and a half times one. So a run compiles a handful of programs, and a run that
was killed and resumed computes with the same shapes, hence to the same bits, as one that was not.
"""

from collections.abc import Collection, Sequence

import flax.struct
import jax
import numpy as np

from lightning_jax.rl.trajectory import Row


@flax.struct.dataclass
class Batch:
    """Packed rows. All arrays are [B, T] and about the token at their own position, not the next one."""

    token_bt: jax.Array  # int32; 0 in padding
    segment_bt: jax.Array  # int32, from 1 in each block; 0 is padding
    position_bt: jax.Array  # int32, from 0 in each segment
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


def block_length(longest: int, *, minimum: int = 256) -> int:
    """Tokens of a block: the power of two that holds the longest row and `minimum`, in which short rows pack well."""
    return 1 << (max(longest, minimum, 1) - 1).bit_length()


# The arrays of a `Row` that a batch has where its rows have them.
OPTIONAL = {
    "old_logprob_bt": "old_logprob",
    "value_bt": "value",
    "value_target_bt": "value_target",
    "weight_bt": "weight",
    "share_bt": "share",
}


def place(rows: Sequence[Row], length: int) -> list[tuple[int, slice]]:
    """Where each row lies, first fit, in the order of rollouts; the same rows in any order fill the same blocks.

    Args:
        rows: none longer than `length`.
        length: T, tokens of a block.

    Returns:
        For each row its block and the positions in it: the index of a [B, T] array that gives the row's [T].

    Raises:
        ValueError: a row is longer than a block.
    """
    if rows and (longest := max(len(row) for row in rows)) > length:
        raise ValueError(f"a row of {longest} tokens does not fit a block of {length}")

    def key(i: int) -> tuple[int, bytes, bytes]:
        return rows[i].rollout_index, rows[i].token_ids.tobytes(), rows[i].loss_mask.tobytes()

    places: list[tuple[int, slice]] = [(0, slice(0))] * len(rows)
    used: list[int] = []
    for i in sorted(range(len(rows)), key=key):
        block = next((b for b, tokens in enumerate(used) if tokens + len(rows[i]) <= length), len(used))
        if block == len(used):
            used.append(0)
        places[i] = block, slice(used[block], used[block] + len(rows[i]))
        used[block] += len(rows[i])
    return places


def pack(rows: Sequence[Row], advantage_n: np.ndarray, length: int) -> Batch:
    """Packs rows into blocks, where `place` puts them.

    Args:
        rows: none longer than `length`; all of them have an optional array, or none has it.
        advantage_n: [N] float32, by `Row.rollout_index`, for rows that bring no advantages of their own.
        length: T, tokens of a block.

    Returns:
        A `Batch` of NumPy arrays with as many blocks as were needed.

    Raises:
        ValueError: a row is longer than a block.
    """
    places = place(rows, length)
    optional = {there: of_row for there, of_row in OPTIONAL.items() if rows and getattr(rows[0], of_row) is not None}
    batch = empty_blocks(1 + max((block for block, _ in places), default=-1), length, optional)
    for row, span in sorted(zip(rows, places, strict=True), key=lambda pair: (pair[1][0], pair[1][1].start)):
        batch.token_bt[span] = row.token_ids
        batch.segment_bt[span] = batch.segment_bt[span[0]].max() + 1
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
    """Blocks of a micro-batch.

    Args:
        num_blocks: of the whole batch.
        num_micro_batches: to divide it into, if `limit` allows.
        limit: the most blocks that memory holds at once.
        multiple: of which the size must be one (the mesh's batch axes); wins over `limit`.

    Returns:
        The power of two, or one and a half times one, that holds a share; at most `limit`; then made a multiple.
    """
    share = max(1, -(-num_blocks // num_micro_batches))
    power = 1 << (share - 1).bit_length()
    size = power * 3 // 4 if power >= 4 and share <= power * 3 // 4 else power
    size = max(1, min(size, limit))
    return -(-size // multiple) * multiple


def micro_batches(batch: Batch, size: int) -> list[Batch]:
    """Divides a batch into micro-batches of `size` blocks; the last one is filled up with padding."""
    count, length = batch.token_bt.shape
    optional = [name for name in OPTIONAL if getattr(batch, name) is not None]
    filling = empty_blocks(-count % size, length, optional)
    batch = jax.tree.map(lambda blocks, more: np.concatenate([blocks, more]), batch, filling)
    return [jax.tree.map(lambda x, i=i: x[i : i + size], batch) for i in range(0, count, size)]
