"""Uploaded datasets: JSONL in, one task per line, kept byte for byte."""

import itertools
import json
import logging
import threading
import time
from collections.abc import Iterable

from agent_lightning.dataset import line_fault
from lightning_jax.store.database import Database
from lightning_jax.store.records import DataError, DatasetInfo, StoreError, UnknownError

_log = logging.getLogger(__name__)

_MAX_LINE_BYTES = 64 * 2**20
_BATCH_BYTES = 4 * 2**20
_INSERT = "INSERT INTO tasks VALUES (?, ?, ?)"


class Datasets:
    """The datasets of one database. Every upload gets a version of its own; the newest complete one is the dataset."""

    def __init__(self, database: Database):
        self._database = database
        self._lock = threading.Lock()
        database.write(("DELETE FROM tasks WHERE version NOT IN (SELECT version FROM datasets)", [()]))
        database.flush()
        rows = database.read("SELECT data_id, split, version, num_tasks FROM datasets")
        self._known = {(data_id, split): (version, count) for data_id, split, version, count in rows}
        self._versions = itertools.count(max((version for version, _ in self._known.values()), default=0) + 1)

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
            return [
                DatasetInfo(name, split, n) for (name, split), (_, n) in sorted(self._known.items()) if name == data_id
            ]

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
            found = self._known.get((data_id, split))
        if found is None:
            raise UnknownError(f"there is no dataset {data_id!r} with split {split!r}", hint="upload it first")
        return found

    def _replace(self, data_id: str, split: str, version: int, count: int) -> None:
        with self._lock:
            old, _ = self._known.get((data_id, split), (None, 0))
            self._database.execute(
                (
                    "INSERT OR REPLACE INTO datasets VALUES (?, ?, ?, ?, ?)",
                    [(data_id, split, version, count, time.time())],
                ),
                ("DELETE FROM tasks WHERE version = ?", [(old,)]),
            )
            self._known[data_id, split] = (version, count)


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
        if len(self._rest) > _MAX_LINE_BYTES:
            raise DataError(f"line {self._line_number + 1}: longer than {_MAX_LINE_BYTES} bytes", self._line_number + 1)

    def finish(self) -> DatasetInfo:
        """Makes this upload the dataset, in one step, in place of an earlier one of the same name and split."""
        if self._rest:
            self._take(self._rest)
        if self._count == 0:
            raise DataError("the file holds no task", hint='write one JSON object a line: {"question": "..."}')
        self._write_rows()
        self._datasets._replace(self._data_id, self._split, self._version, self._count)
        return DatasetInfo(self._data_id, self._split, self._count)

    def discard(self) -> None:
        """Forgets all that was fed."""
        try:
            self._database.execute(("DELETE FROM tasks WHERE version = ?", [(self._version,)]))
        except StoreError:  # on a full disk; what is left then goes at the next start
            _log.warning("an upload that failed could not be removed", exc_info=True)

    def _take(self, line: bytes) -> None:
        self._line_number += 1
        if self._line_number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")  # a byte order mark, which some editors write
        line = line.strip()
        if not line:
            return
        if fault := line_fault(line):
            raise DataError(f"line {self._line_number}: {fault[0]}", self._line_number, hint=fault[1])
        self._rows.append((self._version, self._count, line))
        self._rows_bytes += len(line)
        self._count += 1
        if self._rows_bytes > _BATCH_BYTES:
            self._write_rows()

    def _write_rows(self) -> None:
        self._database.execute((_INSERT, self._rows))
        self._rows, self._rows_bytes = [], 0
