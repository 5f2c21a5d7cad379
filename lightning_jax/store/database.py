"""One SQLite file, one thread that writes it.

Writes are queued and committed in order, many to a transaction, so that a model call costs its caller a queue append.
What is on disk is therefore always a prefix of what happened: a killed process loses its last moments, never its order.
"""

import concurrent.futures
import fcntl
import logging
import queue
import sqlite3
import threading
from collections.abc import Sequence
from pathlib import Path

from lightning_jax.store.records import StoreError

_log = logging.getLogger(__name__)

_FORMAT = 1  # PRAGMA user_version of this schema
_GATHER_S = 0.01  # how long the writer lets writes gather before it commits, unless somebody waits for them

_SCHEMA = """
CREATE TABLE datasets (
    data_id TEXT NOT NULL, split TEXT NOT NULL, version INTEGER NOT NULL, num_tasks INTEGER NOT NULL,
    created REAL NOT NULL, PRIMARY KEY (data_id, split));
CREATE TABLE tasks (
    version INTEGER NOT NULL, task_index INTEGER NOT NULL, line BLOB NOT NULL, PRIMARY KEY (version, task_index));
CREATE TABLE jobs (
    job_id TEXT PRIMARY KEY, created REAL NOT NULL, status TEXT NOT NULL, step INTEGER NOT NULL, total_steps INTEGER,
    error TEXT, traceback TEXT, result TEXT, spec TEXT NOT NULL);
CREATE TABLE events (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, job_id TEXT NOT NULL, created REAL NOT NULL, kind TEXT NOT NULL,
    step INTEGER NOT NULL, data TEXT NOT NULL);
CREATE INDEX events_of_job ON events (job_id, seq);
CREATE TABLE rollouts (
    rollout_id INTEGER PRIMARY KEY AUTOINCREMENT, job_id TEXT NOT NULL, step INTEGER NOT NULL, mode TEXT NOT NULL,
    task_id TEXT NOT NULL, task_index INTEGER NOT NULL, "group" INTEGER NOT NULL, sample INTEGER NOT NULL,
    task TEXT NOT NULL, status TEXT NOT NULL, cause TEXT, reward REAL, error TEXT, traceback TEXT,
    attempt INTEGER NOT NULL, attempt_id INTEGER, duration_s REAL NOT NULL DEFAULT 0);
CREATE INDEX rollouts_of_job ON rollouts (job_id, step);
CREATE TABLE attempts (
    attempt_id INTEGER PRIMARY KEY AUTOINCREMENT, rollout_id INTEGER NOT NULL, number INTEGER NOT NULL,
    pool_id TEXT NOT NULL, created REAL NOT NULL, cause TEXT, events TEXT);
CREATE INDEX attempts_of_rollout ON attempts (rollout_id);
CREATE TABLE calls (
    attempt_id INTEGER NOT NULL, call_index INTEGER NOT NULL, parent INTEGER, created REAL NOT NULL,
    prompt_ids BLOB NOT NULL, sampled_ids BLOB NOT NULL, logprobs BLOB NOT NULL, temperature REAL NOT NULL,
    top_p REAL NOT NULL, top_k INTEGER NOT NULL, policy_version INTEGER NOT NULL, finish_reason TEXT NOT NULL,
    reward REAL NOT NULL, content BLOB NOT NULL, PRIMARY KEY (attempt_id, call_index));
"""

Statement = tuple[str, Sequence[Sequence]]


class Database:
    """The file at `path`, made if absent. One process may have it open at a time.

    Raises:
        StoreError: it is open elsewhere, not SQLite, or of another format.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._lock_file = self._take_lock()
        self._queue: queue.SimpleQueue = queue.SimpleQueue()
        self._urgent = threading.Event()
        self._error: Exception | None = None
        self._readers: list[sqlite3.Connection] = []  # those that nobody reads through now
        try:
            self._connection = self._open()
        except sqlite3.Error as error:
            self._lock_file.close()
            raise StoreError(f"cannot open the store {self.path}: {error}") from error
        self._thread = threading.Thread(target=self._write_loop, name="store", daemon=True)
        self._thread.start()

    def _take_lock(self):
        lock_file = open(self.path.with_name(self.path.name + ".lock"), "w")
        try:
            fcntl.flock(lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock_file.close()
            raise StoreError(
                f"the store {self.path} is open in another process",
                hint="end that process, or choose another work directory",
            ) from None
        return lock_file

    def _open(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self.path, check_same_thread=False, isolation_level=None)
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=NORMAL")
        (found,) = connection.execute("PRAGMA user_version").fetchone()
        if found == 0:
            connection.executescript(f"BEGIN; {_SCHEMA} PRAGMA user_version={_FORMAT}; COMMIT;")
        elif found != _FORMAT:
            raise sqlite3.DatabaseError(f"its format is {found}, this program's is {_FORMAT}")
        connection.execute("CREATE INDEX IF NOT EXISTS rollouts_by_job ON rollouts (job_id)")  # in the order of ids
        return connection

    def read(self, sql: str, parameters: Sequence = ()) -> list[tuple]:
        """Rows as last committed; as many connections are open as threads have read at once."""
        try:
            connection = self._readers.pop()
        except IndexError:
            connection = sqlite3.connect(self.path, check_same_thread=False, isolation_level=None)
        try:
            return connection.execute(sql, parameters).fetchall()
        finally:
            self._readers.append(connection)

    def newest_id(self, table: str) -> int:
        """The largest id ever given in a table whose ids count up, rows deleted since included; 0 before the first."""
        rows = self.read("SELECT seq FROM sqlite_sequence WHERE name = ?", (table,))
        return rows[0][0] if rows else 0

    def write(self, *statements: Statement) -> None:
        """Queues statements, each (sql, rows of parameters), to be committed together after all queued before them.

        Nothing is kept once a write has failed, which `check` and `flush` say: what is in memory is changed together
        with what is queued, so that neither may end half-way.
        """
        self._queue.put((None, statements))

    @property
    def error(self) -> StoreError | None:
        """Why nothing is kept any more, None while all is well."""
        return None if self._error is None else self._failure(self._error)

    def check(self) -> None:
        """Raises StoreError once a write has failed."""
        if (error := self.error) is not None:
            raise error

    def execute(self, *statements: Statement) -> None:
        """Commits statements in a transaction of their own, after all that was queued before.

        Raises:
            StoreError: they failed and changed nothing; what comes after goes on.
        """
        done: concurrent.futures.Future = concurrent.futures.Future()
        self._queue.put((done, statements))
        self._urgent.set()
        self._await(done)

    def flush(self) -> None:
        """Returns when all that was queued before is committed.

        Raises:
            StoreError: a write failed. Nothing after it was kept either.
        """
        self.execute()
        self.check()

    def _await(self, done: concurrent.futures.Future) -> None:
        while True:
            try:
                error = done.exception(timeout=1.0)
                break
            except concurrent.futures.TimeoutError:
                if not self._thread.is_alive():
                    raise StoreError(f"the store {self.path} is closed") from None
        if error is not None:
            raise self._failure(error)

    def close(self) -> None:
        """Commits what is queued and lets go of the file."""
        if self._thread.is_alive():
            self._queue.put(None)
            self._urgent.set()
            self._thread.join()
            for reader in self._readers:
                reader.close()
            self._connection.close()
            self._lock_file.close()

    def _failure(self, error: BaseException) -> StoreError:
        return StoreError(
            f"cannot write the store {self.path}: {error}",
            hint="what was written before is intact; mend the cause (a full disk?) and start again",
        )

    def _write_loop(self) -> None:
        running = True
        while running:
            items = [self._queue.get()]
            self._urgent.wait(_GATHER_S)
            self._urgent.clear()
            while not self._queue.empty():
                items.append(self._queue.get())
            gathered: list[Statement] = []
            for item in items:
                if item is None:
                    running = False
                    continue
                done, statements = item
                if done is None:
                    gathered.extend(statements)
                    continue
                self._commit_gathered(gathered)
                gathered = []
                try:
                    self._commit(statements)
                    done.set_result(None)
                except Exception as error:
                    done.set_exception(error)
            self._commit_gathered(gathered)

    def _commit_gathered(self, statements: list[Statement]) -> None:
        if self._error is not None:
            return
        try:
            self._commit(statements)
        except Exception as error:  # later writes would break the order, so the first failure is the last write
            _log.exception("cannot write the store %s", self.path)
            self._error = error

    def _commit(self, statements: Sequence[Statement]) -> None:
        if not statements:
            return
        try:
            self._connection.execute("BEGIN IMMEDIATE")
            for sql, rows in statements:
                self._connection.executemany(sql, rows)
            self._connection.execute("COMMIT")
        except BaseException:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            raise
