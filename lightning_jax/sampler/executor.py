"""What lives on the device, and the dispatches: the scheduler's plans become arrays here.

Nothing in this file waits for the device, but `Executor.score`.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lightning_jax import heap
from lightning_jax import mesh as mesh_lib
from lightning_jax.model.llama import LlamaConfig, Params
from lightning_jax.sampler import kv_cache, programs, sampling, scoring, shaping
from lightning_jax.sampler.scheduler import PrefillBatch, PrefillShape, Sequence


@dataclasses.dataclass
class _Workspace:
    """The dense copy that decode rounds work on (see `kv_cache`), and whose keys and values its rows hold.

    Attributes:
        shape: rows, and pages per row.
        arrays: None where decoding reads the pages themselves.
        members: row of each admission (`Sequence.admitted_at`) that has one.
    """

    shape: tuple[int, int] = (0, 0)
    arrays: list[kv_cache.Dense] | None = None
    members: dict[int, int] = dataclasses.field(default_factory=dict)

    def seat(self, members: list[Sequence]) -> tuple[list[int], list[int]]:
        """Gives every member a row, its old one if it has one. Returns their rows, and the rows that must be loaded."""
        kept = {m.admitted_at: self.members[m.admitted_at] for m in members if m.admitted_at in self.members}
        free = iter(sorted(set(range(self.shape[0])).difference(kept.values())))
        self.members = {m.admitted_at: kept[m.admitted_at] if m.admitted_at in kept else next(free) for m in members}
        loads = [row for admission, row in self.members.items() if admission not in kept]
        return list(self.members.values()), loads


class Executor:
    """Weights, pages and slot state on the device, and the programs that advance them.

    Args:
        config, max_slots, page_size, num_pages, max_seq_len, decode_steps, prefill_chunk, dtype, row_floor, mesh: as in
            `Engine`.
        page_table: [max_slots, P] int32, the scheduler's; read at each dispatch.
        tell: called before each dispatch with the method of this class that makes it and its arguments, for the
            executors of other processes to call as well.
    """

    def __init__(
        self,
        config: LlamaConfig,
        *,
        max_slots: int,
        page_size: int,
        num_pages: int,
        max_seq_len: int,
        decode_steps: int,
        prefill_shapes: list[PrefillShape],
        dtype: jnp.dtype,
        row_floor: int,
        mesh: jax.sharding.Mesh | None,
        page_table: np.ndarray,
        tell: Callable[..., None] | None = None,
    ):
        self._programs = programs.jitted()
        self._config = config
        self._page_size = page_size
        self._num_pages = num_pages
        self._decode_steps = decode_steps
        # Enough rows for everyone to sample at once; the slot after theirs is for padding.
        self._sample_rows = self._padding_slot = max(row_floor, power_of_two(max_slots))
        self._dtype = jnp.dtype(dtype)
        self._mesh = mesh
        self._page_table = page_table
        self._tell = tell
        self._prefill_shapes = prefill_shapes
        batch_sizes = multiples(row_floor, max(row_floor, power_of_two(max_slots)), 2)
        self._decode_shapes = _decode_shapes(batch_sizes, page_size, num_pages, max_seq_len)
        page_axes = (num_pages, page_size, config.num_kv_heads, config.head_dim), (None, None, "kv_heads", None)
        self._pages = kv_cache.init_pages(config, num_pages, page_size, self._dtype, self._sharding(*page_axes))
        self._state = programs.init_state(self._padding_slot, self._sharding((), ()))
        self._workspace = _Workspace()
        self._idle: dict[tuple[int, int], list[kv_cache.Dense]] = {}  # workspaces' arrays by shape, latest used last
        self._params: Params = {}

    def publish(self, params: Params) -> None:
        """Copies stacked master weights; programs dispatched from now on use them."""
        if self._mesh is None:
            # Everything is committed to the device from the start, as a learner's and a checkpoint's arrays are: for
            # arrays that are not, JAX compiles programs of their own.
            params = jax.device_put(params, self._sharding((), ()))
        self._params = {}  # the old copy goes first: there may be no room for two
        with self._device():
            self._params = self._programs.prepare_params(params, dtype=self._dtype)

    def rest(self) -> None:
        """Frees weights and workspaces; nothing can be dispatched before `publish`."""
        self._params = {}
        self._workspace = _Workspace()
        self._idle.clear()
        heap.give_back_freed_memory()

    def score(self, token_ids: list[int]) -> scoring.Scores:
        """Log-probs of a sequence under the weights in use."""
        if self._tell is not None:
            self._tell(Executor.score, token_ids)
        with self._device():
            return scoring.score(self._params, self._config, token_ids)

    def prefill(self, batch: PrefillBatch) -> None:
        """Dispatches one prefill."""
        control, samples = self._prefill_control(batch.shape)
        first = programs.PREFILL_WIDTH
        for row, (sequence, start, length) in zip(control, batch.items, strict=False):
            row[programs.START], row[programs.LENGTH] = start, length
            row[first : first + length] = sequence.tokens[start : start + length]
            row[first + batch.shape.chunk :] = self._page_table[sequence.slot]
        for sample, (row, sequence) in zip(samples, batch.samples(), strict=False):
            sample[programs.ROW] = row
            if sequence.shape is None:  # else a decode round samples its next token, and only pages are copied here
                sample[programs.SLOT] = sequence.slot
                sample[programs.ROOM], sample[programs.FIRST] = sequence.limit - sequence.target, sequence.target
                sample[programs.TOP_K : programs.STATE_WIDTH] = sequence.sampling_columns
            if sequence.leader is not None and sequence.target % self._page_size:
                last = sequence.target // self._page_size
                sample[programs.COPY_FIRST] = last * self._page_size - batch.items[row][1]
                sample[programs.COPY_PAGE] = sequence.pages[last]
        self._run_prefill(control, samples, batch.shape)

    def _prefill_control(self, shape: PrefillShape) -> tuple[np.ndarray, np.ndarray]:
        """What `programs.prefill` takes from the host, for no sequence at all."""
        control = np.zeros((shape.rows, programs.PREFILL_WIDTH + shape.chunk + self._page_table.shape[1]), np.int32)
        samples = np.zeros((self._sample_rows, programs.SAMPLE_WIDTH), np.int32)
        samples[:, programs.SLOT] = self._padding_slot
        return control, samples

    def decode(
        self, members: list[Sequence], waiting: list[Sequence], steps: int
    ) -> tuple[jax.Array, jax.Array | None, list[int]]:
        """Dispatches one decode round.

        Args:
            members: who samples.
            waiting: who runs and cannot sample yet, so that their places in the workspace are kept.
            steps: tokens to sample of each, at most.

        Returns:
            What `programs.decode` sampled, the likeliest tokens if somebody wants to know, and each member's row.
        """
        present = [*members, *waiting]
        longest = max(len(sequence.pages) for sequence in present)
        rows, width = next(shape for shape in self._decode_shapes if shape[0] >= len(present) and shape[1] >= longest)
        self._use_workspace(rows, width)
        seats, loads = self._workspace.seat(present)
        slots = [sequence.slot for sequence in present]
        table = self._page_table[slots, :width]
        control = np.zeros((rows, 2 + width), np.int32)
        control[:, 0] = self._padding_slot
        control[seats, 0] = slots
        control[:, 1] = -1
        control[: len(loads), 1] = loads
        control[seats, 2 : 2 + table.shape[1]] = table
        shaped = [(seat, m) for seat, m in zip(seats, members, strict=False) if m.shape is not None]
        round_shaping, wants_top = None, False
        if waiting or any(m.shape.in_force or not m.shape.placed for _, m in shaped):
            round_shaping = self._shaping(shaped, rows)
            wants_top = bool(round_shaping.rank)
        sampled, top = self._run_decode(control, np.int32(steps), round_shaping)
        sampled.copy_to_host_async()
        if wants_top:
            top.copy_to_host_async()
        return sampled, top if wants_top else None, seats[: len(members)]

    def _shaping(self, shaped: list[tuple[int, Sequence]], rows: int) -> programs.Shaping:
        """What the device is told of the rows that have a shape, given as (row, sequence)."""
        vocab_size = self._config.vocab_size
        placed_b = np.zeros(rows, bool)
        state_bs = np.zeros((rows, programs.STATE_WIDTH), np.int32)
        allowed_bw = shaping.all_allowed(rows, vocab_size)
        penalties, shaped_steps = None, 0
        if any(sequence.shape.penalized for _, sequence in shaped):
            bias_bv = np.zeros((rows, vocab_size), np.float32)
            penalties = sampling.Penalties(bias_bv, np.zeros_like(allowed_bw), np.ones(rows, np.float32))
        for row, sequence in shaped:
            shape = sequence.shape
            if shape.stepwise or not shape.placed:
                left = 1 if shape.stepwise else sequence.limit - len(sequence.tokens)
                placed_b[row] = True
                state_bs[row, : programs.TOP_K] = sequence.tokens[-1], len(sequence.tokens) - 1, left, 0
                state_bs[row, programs.TOP_K :] = sequence.sampling_columns
                shape.placed = not shape.stepwise
            shape.write_mask(allowed_bw[row])
            if shape.penalized:
                repetition = shape.write_penalties(penalties.bias_bv[row], penalties.seen_bw[row])
                penalties.repetition_b[row] = repetition
            if shape.stepwise:
                shaped_steps = max(shaped_steps, 1)
            elif shape.penalized:
                shaped_steps = self._decode_steps
        return programs.Shaping(
            placed_b=placed_b,
            state_bs=state_bs,
            allowed_bw=allowed_bw,
            shaped_steps=np.int32(shaped_steps),
            rank=np.bool_(any(sequence.shape.wants_top for _, sequence in shaped)),
            penalties=penalties,
        )

    def warmup(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Compiles, or loads from the compilation cache, every program that a plan can need."""
        total = len(self._prefill_shapes) + len(self._decode_shapes)
        for done, shape in enumerate(self._prefill_shapes, 1):
            self._run_prefill(*self._prefill_control(shape), shape)
            if progress is not None:
                progress(done, total)
        for done, (rows, width) in enumerate(self._decode_shapes, len(self._prefill_shapes) + 1):
            control = np.full((rows, 2 + width), -1, np.int32)
            control[:, 0] = self._padding_slot
            control[:, 2:] = 0
            self._run_decode(control, np.int32(self._decode_steps))
            if progress is not None:
                progress(done, total)

    def _run_prefill(self, control: np.ndarray, samples: np.ndarray, shape: PrefillShape) -> None:
        if self._tell is not None:
            self._tell(Executor._run_prefill, control, samples, shape)
        with self._device():
            self._pages, logits_nv = self._programs.prefill(
                self._params,
                self._pages,
                control,
                samples,
                config=self._config,
                chunk=shape.chunk,
                tokens=shape.tokens,
            )
            self._state = self._programs.begin(self._state, logits_nv, samples)

    def _run_decode(
        self, control: np.ndarray, steps: np.int32, round_shaping: programs.Shaping | None = None
    ) -> tuple[jax.Array, jax.Array | None]:
        if self._tell is not None:
            self._tell(Executor._run_decode, control, steps, round_shaping)
        self._use_workspace(control.shape[0], control.shape[1] - 2)
        arrays = self._workspace.arrays
        with self._device():
            self._pages, self._workspace.arrays, self._state, sampled, top = self._programs.decode(
                self._params,
                self._pages,
                arrays,
                self._state,
                control,
                steps,
                round_shaping,
                config=self._config,
                steps=self._decode_steps,
            )
        return sampled, top

    def _use_workspace(self, rows: int, width: int) -> None:
        """Makes the workspace one of this shape; what another held is dropped.

        Arrays of other shapes are kept while all together are no larger than the pages: new memory costs as much as a
        step or two of decoding.
        """
        old, shape = self._workspace, (rows, width)
        if old.shape == shape:
            return
        if old.arrays is not None:
            self._idle[old.shape] = old.arrays
        old.arrays = None
        self._workspace = _Workspace(shape, self._idle.pop(shape, None))
        if self._workspace.arrays is None and self._decode_shapes[shape]:
            while self._idle and sum(map(math.prod, [shape, *self._idle])) > self._num_pages:
                del self._idle[next(iter(self._idle))]  # freed before new ones are made
            length, k, h = width * self._page_size, self._config.num_kv_heads, self._config.head_dim
            sharding = self._sharding((rows, k, length, h), (None, "kv_heads", None, None))
            self._workspace.arrays = kv_cache.init_dense(self._config, rows, length, self._dtype, sharding)

    def _device(self) -> Any:
        """Inside it the mesh is current."""
        return mesh_lib.current(self._mesh)

    def _sharding(self, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> jax.sharding.Sharding:
        if self._mesh is None:
            return jax.sharding.SingleDeviceSharding(jax.devices()[0])
        return jax.sharding.NamedSharding(self._mesh, mesh_lib.partition_spec(self._mesh, shape, axes))


def prefill_shapes(prefill_chunk: int, page_size: int, max_slots: int, row_floor: int) -> list[PrefillShape]:
    """Shapes of the prefill programs: short chunks in many rows, long ones in few, and tokens for half of them."""
    shapes = []
    for chunk in multiples(page_size, prefill_chunk, 4):
        few = max(1, row_floor // chunk)
        many = max(few, min(power_of_two(max_slots), 4 * prefill_chunk // chunk))
        shapes += [PrefillShape(2 * full, chunk, full * chunk) for full in multiples(few, many, 4)]
    return shapes


def _decode_shapes(
    batch_sizes: list[int], page_size: int, num_pages: int, max_seq_len: int
) -> dict[tuple[int, int], bool]:
    """(rows, pages per row) of the decode programs, smallest first, and whether each works on a dense copy.

    The copy pays on CPU. It must not be larger than all pages together, but for what its length is rounded up; where it
    would be, the pages are read, by one program for all lengths.
    """
    block = kv_cache.block_length(page_size)
    needed = -(-max_seq_len // page_size)
    longest = -(-max_seq_len // block) * block
    lengths = [length for length in (64, 128, 256, *(4**i for i in range(5, 12))) if length >= page_size]
    widths = [length // page_size for length in [*(length for length in lengths if length < longest), longest]]
    shapes: dict[tuple[int, int], bool] = {}
    for rows in batch_sizes:
        dense = [width for width in widths if jax.default_backend() == "cpu" and rows * min(width, needed) <= num_pages]
        shapes |= {(rows, width): True for width in dense}
        if dense != widths:
            shapes[rows, needed] = False
    return shapes


def multiples(first: int, last: int, factor: int) -> list[int]:
    """first, first * factor, ... below last, and last."""
    sizes = []
    while first < last:
        sizes.append(first)
        first *= factor
    return [*sizes, last]


def power_of_two(n: int) -> int:
    """The smallest that is at least n."""
    return 1 << (n - 1).bit_length()
