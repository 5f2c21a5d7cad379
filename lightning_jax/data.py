"""From a stored dataset to each step's tasks: shuffled once an epoch, in the same order for the same seed."""

import dataclasses

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
    store: Store, data_id: str, batch_size: int, epochs: int, seed: int, split: str = "train"
) -> grain.DatasetIterator:
    """Batches of tasks, `epochs` times over the split, each epoch in its own order drawn from `seed`.

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
