"""Jobs and their events."""

import itertools
import json
import secrets
import threading
import time
from collections.abc import Callable

from lightning_jax.store.database import Database
from lightning_jax.store.records import ENDED_JOB, UnknownError

_SMALL = ("status", "step", "total_steps", "error")
_LARGE = ("traceback", "result")  # an ended job's are in memory only until they are on disk
_FIELDS = (*_SMALL, *_LARGE)


class Jobs:
    """The jobs of one database, held in memory and written behind.

    Args:
        changed: notified whenever a job or its events change.
        announce: called, without the lock, after every change.
    """

    def __init__(self, database: Database, changed: threading.Condition, announce: Callable[[], None]):
        self._database, self._changed, self._announce = database, changed, announce
        columns = ("job_id", "created", *_SMALL, "spec")
        rows = database.read(f"SELECT {', '.join(columns)} FROM jobs ORDER BY created")
        self._jobs = {row[0]: dict(zip(columns, row, strict=True)) for row in rows}
        for job in self._jobs.values():
            job["spec"] = json.loads(job["spec"])
        self._sequence = itertools.count(database.newest_id("events") + 1)  # followers count on its only ever growing
        self._newest: dict[str, int] = dict(database.read("SELECT job_id, max(seq) FROM events GROUP BY job_id"))

    def create(self, spec: dict, job_id: str | None = None) -> str:
        """See `Store.create_job`."""
        with self._changed:
            key = spec.get("key")
            for job in self._jobs.values():
                if job["job_id"] == job_id or (key and job["spec"].get("key") == key):
                    return job["job_id"]
            job_id = job_id or f"job-{secrets.token_hex(6)}"
            job = dict.fromkeys(_FIELDS) | {"job_id": job_id, "created": time.time(), "status": "queued", "step": 0}
            self._jobs[job_id] = job | {"spec": dict(spec)}
            sql = "INSERT INTO jobs (job_id, created, status, step, spec) VALUES (?, ?, 'queued', 0, ?)"
            self._database.write((sql, [(job_id, job["created"], json.dumps(spec))]))
        self._database.flush()
        self._announce()
        return job_id

    def restart(self, job_id: str, spec: dict) -> None:
        """See `Store.restart_job`."""
        self.update(job_id, spec=dict(spec), status="queued", error=None, traceback=None, result=None)

    def discard_events(self, job_id: str, step: int) -> None:
        """Forgets the job's events of steps after `step`."""
        with self._changed:
            self._database.write(("DELETE FROM events WHERE job_id = ? AND step > ?", [(job_id, step)]))
            self._database.flush()
            rows = self._database.read("SELECT max(seq) FROM events WHERE job_id = ?", (job_id,))
            self._newest[job_id] = rows[0][0] or 0

    def get(self, job_id: str) -> dict:
        """See `Store.job`."""
        with self._changed:
            job = self._find(job_id)
            if job.keys() >= set(_LARGE):
                return dict(job)
            ((traceback, result),) = self._database.read(
                "SELECT traceback, result FROM jobs WHERE job_id = ?", (job_id,)
            )
            return {"traceback": traceback, "result": json.loads(result) if result else None} | job

    def status(self, job_id: str) -> str:
        """See `Store.job_status`."""
        with self._changed:
            return self._find(job_id)["status"]

    def all(self) -> list[dict]:
        """See `Store.jobs`."""
        with self._changed:
            return [{name: value for name, value in job.items() if name not in _LARGE} for job in self._jobs.values()]

    def ended(self, job_id: str) -> bool:
        return self.status(job_id) in ENDED_JOB

    def _find(self, job_id: str) -> dict:
        if job_id not in self._jobs:
            raise UnknownError(f"there is no job {job_id!r}")
        return self._jobs[job_id]

    def update(self, job_id: str, **fields) -> None:
        """See `Store.update_job`. Who follows the job sees the change even where the file cannot be written."""
        unknown = fields.keys() - {*_FIELDS, "spec"}
        if unknown:
            raise TypeError(f"a job has no field {', '.join(sorted(unknown))}")
        stored = [json.dumps(value) if isinstance(value, dict) else value for value in fields.values()]
        with self._changed:
            self._find(job_id).update(fields)
            self._changed.notify_all()
            assignments = ", ".join(f"{name} = ?" for name in fields)
            self._database.write((f"UPDATE jobs SET {assignments} WHERE job_id = ?", [(*stored, job_id)]))
        if "status" in fields or "spec" in fields:
            self._database.flush()
            self._let_go(job_id)
        else:
            self._database.check()
        self._announce()

    def _let_go(self, job_id: str) -> None:
        with self._changed:
            if self.ended(job_id):
                for name in _LARGE:
                    self._jobs[job_id].pop(name, None)

    def add_event(self, job_id: str, kind: str, step: int, data: dict) -> int:
        """See `Store.add_event`."""
        with self._changed:
            sequence = next(self._sequence)
            self._newest[job_id] = sequence
            row = (sequence, job_id, time.time(), kind, step, json.dumps(data))
            self._database.write(("INSERT INTO events VALUES (?, ?, ?, ?, ?, ?)", [row]))
            self._changed.notify_all()
        self._announce()
        return sequence

    def has_events(self, job_id: str, after: int) -> bool:
        """See `Store.has_events`."""
        self._find(job_id)
        return self._newest.get(job_id, 0) > after

    def events(self, job_id: str, after: int = 0, wait_s: float = 0.0, limit: int = 1000) -> list[dict]:
        """See `Store.events`."""
        deadline = time.monotonic() + wait_s
        with self._changed:
            while not self.has_events(job_id, after) and not self.ended(job_id):
                left = deadline - time.monotonic()
                if left <= 0:
                    break
                self._changed.wait(left)
            if not self.has_events(job_id, after):
                return []
        self._database.flush()
        sql = "SELECT seq, created, kind, step, data FROM events WHERE job_id = ? AND seq > ? ORDER BY seq LIMIT ?"
        rows = self._database.read(sql, (job_id, after, limit))
        return [
            {"seq": seq, "time": created, "kind": kind, "step": step, "data": json.loads(data)}
            for seq, created, kind, step, data in rows
        ]
