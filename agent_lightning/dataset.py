"""Reading JSONL datasets before they are uploaded."""

import hashlib
import itertools
import json
import os
from collections.abc import Iterator

from agent_lightning.exceptions import DataUploadError

CHUNK_BYTES = 1 << 20


def check_file(path: str | os.PathLike, digest: "hashlib._Hash") -> int:
    """Checks every line of a file and feeds its bytes to `digest`; returns the number of tasks.

    Raises:
        DataUploadError: the file cannot be read, holds no task, or a line is not an object with a `question`; the
            line is named.
    """
    tasks = 0
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                digest.update(line)
                text = line.removeprefix(b"\xef\xbb\xbf").strip() if number == 1 else line.strip()
                if text:
                    if fault := line_fault(text):
                        raise DataUploadError(f"{os.fspath(path)}, line {number}: {fault[0]}", hint=fault[1])
                    tasks += 1
    except OSError as error:
        raise DataUploadError(f"cannot read {os.fspath(path)}: {error.strerror or error}") from error
    if not tasks:
        raise DataUploadError(f"{os.fspath(path)} holds no task", hint='write one JSON object a line: {"question": ""}')
    return tasks


def read_chunks(path: str | os.PathLike) -> Iterator[bytes]:
    """The file's bytes in pieces."""
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            yield chunk


def line_fault(line: bytes) -> tuple[str, str] | None:
    """What keeps one line of a dataset from being a task, and what would be right; None if it is one.

    The server asks the same of what it is sent.
    """
    try:
        task = json.loads(line.decode(), parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        return f"not valid JSON: {error.msg} at character {error.pos + 1}", "every line must be one JSON object"
    except (ValueError, RecursionError) as error:  # not UTF-8, a constant, a number of too many digits, deep nesting
        return f"not valid JSON: {error}", "every line must be one JSON object"
    if not isinstance(task, dict):
        kind = {list: "an array", str: "a string", bool: "a boolean", type(None): "null"}.get(type(task), "a number")
        return f"{kind}, not an object", 'write {"question": ...} on every line'
    if task.get("question") is None:
        found = ", ".join(map(repr, itertools.islice(task, 8))) or "none"
        return f"the field 'question' is missing (fields found: {found})", "rename the field that holds the question"
    return None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")
