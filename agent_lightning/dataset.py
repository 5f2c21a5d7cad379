"""Reading JSONL datasets before they are uploaded."""

import hashlib
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
                    _check_line(text, f"{os.fspath(path)}, line {number}")
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


def _check_line(text: bytes, where: str) -> None:
    try:
        task = json.loads(text)
    except ValueError as error:
        raise DataUploadError(f"{where}: not valid JSON: {error}", hint="every line must be one JSON object") from None
    if not isinstance(task, dict):
        kind = {list: "an array", str: "a string", bool: "a boolean", type(None): "null"}.get(type(task), "a number")
        raise DataUploadError(f"{where}: {kind}, not an object", hint='write {"question": ...} on every line')
    if task.get("question") is None:
        found = ", ".join(map(repr, list(task)[:8])) or "none"
        raise DataUploadError(f"{where}: the field 'question' is missing (fields found: {found})")
