"""From a stored dataset to each step's tasks: shuffled once an epoch, in the same order for the same seed."""

import dataclasses
from collections.abc import Sequence

import grain

from lightning_jax.store import Store


@dataclasses.dataclass(frozen=True)
class TaskItem:
    """One task of a dataset, by its position in the uploaded file."""

    task_index: int
    task_id: str
    task: dict

    @property
    def source(self) -> str | None:
        """What the task's field of this name says, by which rewards are shown apart."""
        source = self.task.get("source")
        return source if isinstance(source, str) else None


class TaskSource:
    """A split as a random-access sequence of `TaskItem`. Raises UnknownError when there is no such split."""

    def __init__(self, store: Store, data_id: str, split: str):
        self._store, self._data_id, self._split = store, data_id, split
        self._count = store.num_tasks(data_id, split)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> TaskItem:
        task = self._store.task(self._data_id, self._split, index)
        return TaskItem(task_index=int(index), task_id=f"{self._split}-{index}", task=task)


def num_batches(num_tasks: int, batch_size: int, epochs: int) -> int:
    """How many batches `task_batches` yields: every task once an epoch, an epoch's last batch may be short."""
    return epochs * -(-num_tasks // batch_size)


def task_batches(
    store: Store, data_id: str, batch_size: int, epochs: int | None, seed: int, split: str = "train"
) -> grain.DatasetIterator:
    """Batches of tasks, `epochs` times over the split or without end, each epoch in its own order drawn from `seed`.

    Returns:
        an iterator over lists of up to `batch_size` TaskItem; its get_state() is a JSON-ready dict of the position, and
        set_state(state) continues behind it.
    """
    dataset = (
        grain.MapDataset.source(TaskSource(store, data_id, split))
        .shuffle(seed=seed)
        .batch(batch_size, batch_fn=list)
        .repeat(epochs)
    )
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)))


class TaskQueue:
    """A job's tasks in the order of endless `task_batches`, for steps and for what takes the place of groups left out.

    What a replacement leaves of a batch comes first in what is drawn next. Nothing drawn at once holds a task twice.
    """

    def __init__(self, store: Store, data_id: str, batch_size: int, seed: int):
        """Arguments as for `task_batches`."""
        self._batches = task_batches(store, data_id, batch_size, None, seed)
        self._source = TaskSource(store, data_id, "train")
        self._spare: list[TaskItem] = []

    def batch(self) -> list[TaskItem]:
        """A step's."""
        drawn = next(self._batches)
        self._spare += drawn
        return self._take(len(drawn), set())

    def replacements(self, count: int, beside: Sequence[TaskItem]) -> list[TaskItem]:
        """Up to `count` tasks for a step that has those of `beside`: theirs would be the same rollouts to the token."""
        known = {item.task_index for item in beside}
        count = min(count, len(self._source) - len(known))
        while len({item.task_index for item in self._spare} - known) < count:
            self._spare += next(self._batches)
        return self._take(count, known)

    def _take(self, count: int, known: set[int]) -> list[TaskItem]:
        taken, left = [], []
        for item in self._spare:
            if len(taken) < count and item.task_index not in known:
                taken.append(item)
                known.add(item.task_index)
            else:
                left.append(item)
        self._spare = left
        return taken

    def items(self, indices: Sequence[int]) -> list[TaskItem]:
        """Tasks by their positions in the file, those that it has: it may have become shorter since they were drawn."""
        return [self._source[i] for i in indices if i < len(self._source)]

    def get_state(self) -> dict:
        """The position, JSON-ready: of the batches, and the tasks that are left of them."""
        return {"batches": self._batches.get_state(), "spare": [item.task_index for item in self._spare]}

    def set_state(self, state: dict) -> None:
        """Continues behind a position; before there were replacements it was that of the batches alone."""
        self._batches.set_state(state.get("batches", state))
        self._spare = self.items(state.get("spare", ()))
