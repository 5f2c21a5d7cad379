"""JSONL datasets: what a line must be, and reading files before they are uploaded."""

import hashlib
import itertools
import json
import math
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass

from agent_lightning.exceptions import DataUploadError

SPLITS = ("test", "train")  # in the order in which they are read and sent: training tasks are compared with test tasks
MAX_LINE_BYTES = 1 << 26
CHUNK_BYTES = 1 << 20
COMPARED_TASKS = 1 << 18  # of a test file, with the training file: what is remembered of them takes some 40 MB
SHOWN_OVERLAPS = 3


_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


class LineError(ValueError):
    """A line of a dataset that is no task. `hint` says what would be right."""

    def __init__(self, problem: str, hint: str):
        self.hint = hint
        super().__init__(problem)


@dataclass(frozen=True)
class Checked:
    """Files that hold nothing but tasks.

    Attributes:
        num_bytes: the size of each split's file.
        sha256: of all their bytes, one file after the other.
        overlap: says how many test tasks are training tasks too, and where; None if none is.
    """

    num_bytes: dict[str, int]
    sha256: str
    overlap: str | None


def check_name(data_id: str) -> None:
    """Raises DataUploadError unless a dataset can have this name."""
    if not isinstance(data_id, str) or not _NAME.fullmatch(data_id):
        raise DataUploadError(
            f"data_id {data_id!r} is not a name of letters, digits, '.', '_' and '-'",
            hint="it begins with a letter or a digit and has at most 128 characters",
        )


def check_files(files: dict[str, str | os.PathLike]) -> Checked:
    """Checks every line of a dataset's files, whose size memory does not depend on.

    Args:
        files: path by split, in the order SPLITS.

    Raises:
        DataUploadError: a file cannot be read, holds no task, or a line is not an object with a `question`; the
            file and the line are named.
    """
    for path in files.values():
        _check_can_be_read_twice(path)
    digest = hashlib.sha256()
    num_bytes = {}
    overlap = Overlap()
    for split, path in files.items():
        file = _File(path, digest)
        for number, task in file.tasks():
            overlap.add(split, number, task)
        num_bytes[split] = file.num_bytes
    return Checked(num_bytes, digest.hexdigest(), overlap.report(files))


def _check_can_be_read_twice(path: str | os.PathLike) -> None:
    """For it is: once to be checked, once to be sent. A pipe would be empty by then."""
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        raise _unreadable(path, error) from error
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):  # opening a folder says what it is
        raise DataUploadError(
            f"cannot read {os.fspath(path)} twice: not a regular file",
            hint="write the tasks to a file first, and upload that",
        )


def read_chunks(files: dict[str, str | os.PathLike], num_bytes: dict[str, int]) -> Iterator[bytes]:
    """The first so many bytes of each file, one file after the other, in pieces.

    Raises:
        DataUploadError: a file cannot be read.
    """
    for split, path in files.items():
        left = num_bytes[split]
        try:
            with open(path, "rb") as file:
                while left and (chunk := file.read(min(left, CHUNK_BYTES))):
                    left -= len(chunk)
                    yield chunk
        except OSError as error:
            raise _unreadable(path, error) from error


def parse_task(line: bytes) -> dict:
    """One line of a dataset. The server asks the same of what it is sent.

    Raises:
        LineError: it is not a JSON object with a `question`.
    """
    every_line = "every line must be one JSON object"
    if len(line) > MAX_LINE_BYTES:
        raise LineError(f"longer than {MAX_LINE_BYTES} bytes", every_line)
    try:
        task = json.loads(line.decode(), parse_constant=_refuse_constant, parse_float=_finite)
    except json.JSONDecodeError as error:
        problem = error.msg.removesuffix(" at")
        raise LineError(f"not valid JSON: {problem} at character {error.pos + 1}", every_line) from None
    except (ValueError, RecursionError) as error:  # not UTF-8, a constant, a number of too many digits, deep nesting
        raise LineError(f"not valid JSON: {error}", every_line) from None
    if not isinstance(task, dict):
        kind = {list: "an array", str: "a string", bool: "a boolean", type(None): "null"}.get(type(task), "a number")
        raise LineError(f"{kind}, not an object", 'write {"question": ...} on every line')
    if "question" not in task:
        found = ", ".join(map(repr, itertools.islice(task, 8))) or "none"
        raise LineError(
            f"the field 'question' is missing (fields found: {found})", "rename the field that holds the question"
        )
    if task["question"] is None:
        raise LineError("the field 'question' is null", "give the task a question, or leave the line out")
    return task


class Overlap:
    """Finds the test tasks that are training tasks too: those that ask the same `question` about the same `context`.

    A task is remembered by 64 bits of a hash, and no more than COMPARED_TASKS of them, so that memory is bounded.
    """

    def __init__(self):
        self._test: dict[int, int] = {}  # line of the first test task of this content
        self._repeated: dict[int, int] = {}
        self._found: dict[int, int] = {}  # line of the first training task of this content
        self._num_test = 0

    def add(self, split: str, line: int, task: dict) -> None:
        """Takes one task; those of the test file come first."""
        if split == "train":
            if self._test and (key := _content_key(task)) in self._test:
                self._found.setdefault(key, line)
            return
        self._num_test += 1
        if self._num_test <= COMPARED_TASKS:
            key = _content_key(task)
            if key in self._test:
                self._repeated[key] = self._repeated.get(key, 0) + 1
            else:
                self._test[key] = line

    def report(self, files: dict[str, str | os.PathLike]) -> str | None:
        """What was found, with the first few pairs of lines; None for nothing."""
        if not self._found:
            return None
        count = sum(1 + self._repeated.get(key, 0) for key in self._found)
        compared = min(self._num_test, COMPARED_TASKS)
        of = f"{compared:,}" if compared == self._num_test else f"the first {compared:,}"
        pairs = sorted((self._test[key], line) for key, line in self._found.items())
        shown = [f"test line {test} = training line {train}" for test, train in pairs[:SHOWN_OVERLAPS]]
        more = [f"{len(pairs) - SHOWN_OVERLAPS:,} more"] if len(pairs) > SHOWN_OVERLAPS else []
        return (
            f"{count:,} of {of} test tasks {'are' if count > 1 else 'is'} also in the training file, "
            "which flatters held-out rewards: "
            f"{', '.join([*shown, *more])} ({os.fspath(files['test'])}, {os.fspath(files['train'])})"
        )


def _content_key(task: dict) -> int:
    parts = [task["question"], task.get("context")]
    text = "\0".join(" ".join(p.split()) if isinstance(p, str) else json.dumps(p, sort_keys=True) for p in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest())


class _File:
    """A file that is read once. `num_bytes` counts what has been read, and `digest` is fed with it."""

    def __init__(self, path: str | os.PathLike, digest: "hashlib._Hash"):
        self._path, self._digest = path, digest
        self.num_bytes = 0

    def tasks(self) -> Iterator[tuple[int, dict]]:
        """(line number, task) of every line that is not blank."""
        name, found = os.fspath(self._path), False
        for number, line in enumerate(self._lines(), 1):
            text = line.removeprefix(b"\xef\xbb\xbf").strip() if number == 1 else line.strip()
            if text:
                try:
                    task = parse_task(text)
                except LineError as error:
                    raise DataUploadError(f"{name}, line {number}: {error}", hint=error.hint) from None
                found = True
                yield number, task
        if not found:
            raise DataUploadError(f"{name} holds no task", hint='write one JSON object a line: {"question": ""}')

    def _lines(self) -> Iterator[bytes]:
        try:
            with open(self._path, "rb") as file:
                while line := file.readline(MAX_LINE_BYTES + 1):
                    self.num_bytes += len(line)
                    self._digest.update(line)
                    yield line
        except OSError as error:
            raise _unreadable(self._path, error) from error


def _unreadable(path: str | os.PathLike, error: OSError) -> DataUploadError:
    return DataUploadError(f"cannot read {os.fspath(path)}: {error.strerror or error}")


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):  # JSON has no word for it, and the agent would get nothing
        raise ValueError(f"{text} is more than a number here can be")
    return value
