"""Uploaded datasets: JSONL in, one task per line, kept byte for byte."""

import itertools
import json
import logging
import threading
import time
from collections.abc import Iterable, Mapping, Sequence

from agent_lightning.dataset import MAX_LINE_BYTES, LineError, parse_task
from lightning_jax.store.database import Database
from lightning_jax.store.records import DataError, DatasetInfo, StoreError, UnknownError

_log = logging.getLogger(__name__)

_BATCH_BYTES = 4 * 2**20
_REMOVED_TASKS = 20_000  # at a time
_INSERT = "INSERT INTO tasks VALUES (?, ?, ?)"


class Datasets:
    """The datasets of one database. Every upload gets a version of its own; the newest complete one is the dataset."""

    def __init__(self, database: Database):
        self._database = database
        self._lock = threading.RLock()
        database.write(("DELETE FROM tasks WHERE version NOT IN (SELECT version FROM datasets)", [()]))
        database.flush()
        self._known: dict[str, dict[str, tuple[int, int]]] = {}  # data id: split: (version, number of tasks)
        newest = 0
        for data_id, split, version, count in database.read("SELECT data_id, split, version, num_tasks FROM datasets"):
            self._known.setdefault(data_id, {})[split] = version, count
            newest = max(newest, version)
        self._versions = itertools.count(newest + 1)

    def put(self, data_id: str, split: str, chunks: Iterable[bytes]) -> DatasetInfo:
        """See `Store.put_dataset`."""
        upload = Upload(self, data_id, split)
        try:
            for chunk in chunks:
                upload.feed(chunk)
            return upload.finish()
        except BaseException:
            upload.discard()
            raise

    def info(self, data_id: str) -> list[DatasetInfo]:
        """The dataset's splits, by name; empty if there is no such dataset."""
        with self._lock:
            splits = self._known.get(data_id, {})
            return [DatasetInfo(data_id, split, count) for split, (_, count) in sorted(splits.items())]

    def num_tasks(self, data_id: str, split: str) -> int:
        return self._find(data_id, split)[1]

    def line(self, data_id: str, split: str, index: int) -> bytes:
        """Task `index` as uploaded.

        Raises:
            UnknownError: no such dataset or split.
            IndexError: no such task.
        """
        version, count = self._find(data_id, split)
        if not 0 <= index < count:
            raise IndexError(f"dataset {data_id!r}, split {split!r}: task {index} of {count}")
        sql = "SELECT line FROM tasks WHERE version = ? AND task_index = ?"
        return self._database.read(sql, (version, index))[0][0]

    def task(self, data_id: str, split: str, index: int) -> dict:
        return json.loads(self.line(data_id, split, index))

    def _find(self, data_id: str, split: str) -> tuple[int, int]:
        with self._lock:
            found = self._known.get(data_id, {}).get(split)
        if found is None:
            raise UnknownError(f"there is no dataset {data_id!r} with split {split!r}", hint="upload it first")
        return found

    def replace(self, data_id: str, uploads: Sequence["Upload"]) -> list[DatasetInfo]:
        """See `Store.replace_dataset`."""
        splits = dict(upload.end() for upload in uploads)
        with self._lock:
            replaced = self._set(data_id, splits)
        self.remove(replaced)
        return [DatasetInfo(data_id, split, count) for split, (_, count) in sorted(splits.items())]

    def replace_split(self, data_id: str, upload: "Upload") -> DatasetInfo:
        """See `Store.put_dataset`."""
        split, content = upload.end()
        with self._lock:
            replaced = self._set(data_id, self._known.get(data_id, {}) | {split: content})
        self.remove(replaced)
        return DatasetInfo(data_id, split, content[1])

    def hold(self, name: str, splits: Mapping[str, str]) -> None:
        """See `Store.hold_data`."""
        with self._lock:
            replaced = self._set(name, {split: self._find(data_id, split) for split, data_id in splits.items()})
        self.remove(replaced)

    def _set(self, data_id: str, splits: Mapping[str, tuple[int, int]]) -> list[tuple[int, int]]:
        """Makes these (version, number of tasks) the dataset's splits, all at once; returns what they replaced."""
        now = time.time()
        rows = [(data_id, split, version, count, now) for split, (version, count) in splits.items()]
        self._database.execute(
            ("DELETE FROM datasets WHERE data_id = ?", [(data_id,)]),
            ("INSERT INTO datasets VALUES (?, ?, ?, ?, ?)", rows),
        )
        old = self._known.pop(data_id, {})
        if splits:
            self._known[data_id] = dict(splits)
        return list(old.values())

    def remove(self, versions: Iterable[tuple[int, int]]) -> None:
        """Removes the tasks of (version, number of tasks) that no dataset has any more.

        In pieces, since whoever writes to the store meanwhile waits for the piece in hand. What a kill leaves goes at
        the next start.
        """
        sql = (
            "DELETE FROM tasks WHERE version = ? AND task_index BETWEEN ? AND ? "
            "AND version NOT IN (SELECT version FROM datasets)"
        )
        for version, count in versions:
            for first in range(0, count, _REMOVED_TASKS):
                self._database.execute((sql, [(version, first, first + _REMOVED_TASKS - 1)]))


class Upload:
    """One upload in progress: feed it the file's bytes in any pieces, then `finish` or `discard`."""

    def __init__(self, datasets: Datasets, data_id: str, split: str):
        self._datasets, self._database = datasets, datasets._database
        self._data_id, self._split = data_id, split
        self._version = next(datasets._versions)
        self._rest = b""
        self._rows: list[tuple[int, int, bytes]] = []
        self._rows_bytes = 0
        self._line_number = 0
        self._count = 0

    def feed(self, chunk: bytes) -> None:
        """Takes the next piece of the file.

        Raises:
            DataError: a line is wrong; its number is named. The caller must `discard`.
        """
        lines = (self._rest + chunk).split(b"\n") if self._rest else chunk.split(b"\n")
        self._rest = lines.pop()
        for line in lines:
            self._take(line)
        if len(self._rest) > MAX_LINE_BYTES:
            raise DataError(f"line {self._line_number + 1}: longer than {MAX_LINE_BYTES} bytes", self._line_number + 1)

    def end(self) -> tuple[str, tuple[int, int]]:
        """Writes what is left, which nobody sees yet: (split, (version, number of tasks))."""
        if self._rest:
            self._take(self._rest)
            self._rest = b""
        if self._count == 0:
            raise DataError("the file holds no task", hint='write one JSON object a line: {"question": "..."}')
        self._write_rows()
        return self._split, (self._version, self._count)

    def finish(self) -> DatasetInfo:
        """Makes this upload a split of the dataset, in one step, in place of an earlier one; other splits stay."""
        return self._datasets.replace_split(self._data_id, self)

    def discard(self) -> None:
        """Forgets all that was fed."""
        try:
            self._datasets.remove([(self._version, self._count)])
        except StoreError:  # on a full disk; what is left then goes at the next start
            _log.warning("an upload that failed could not be removed", exc_info=True)

    def _take(self, line: bytes) -> None:
        self._line_number += 1
        if self._line_number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")  # a byte order mark, which some editors write
        line = line.strip()
        if not line:
            return
        try:
            parse_task(line)
        except LineError as error:
            raise DataError(f"line {self._line_number}: {error}", self._line_number, hint=error.hint) from None
        self._rows.append((self._version, self._count, line))
        self._rows_bytes += len(line)
        self._count += 1
        if self._rows_bytes > _BATCH_BYTES:
            self._write_rows()

    def _write_rows(self) -> None:
        self._database.execute((_INSERT, self._rows))
        self._rows, self._rows_bytes = [], 0
