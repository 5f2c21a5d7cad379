"""Fetching a trained model: into a hidden folder beside the target, checked, and put in place at the end."""

import contextlib
import hashlib
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from agent_lightning.exceptions import (
    AgentLightningError,
    InvalidConfigError,
    KeyRefusedError,
    ServerConnectionError,
)
from agent_lightning.transport import Transport, backoff_s

_WAIT_S = 2.0  # that one request waits for the server to have the files ready
_ARRIVING = ".part"  # ends the name of a file that has not arrived whole
_MOST_RENEWALS = 3  # of an export, between which nothing arrives
# Of a model that the folder held before: no file of it may be taken for one of the new model's.
_WEIGHT_FILES = ("model*.safetensors", "model.safetensors.index.json", "model.onnx*", "adapter_*")

Progress = Callable[[int, int], None]  # (bytes that are here, bytes in all)


def download_model(
    transport: Transport, output_dir: str | os.PathLike, params: dict[str, str], progress: Progress
) -> Path:
    """Makes `output_dir` the model that the server exports for `params`; see `Client.download_model`.

    The files arrive in `.NAME.partial` beside it, or in it where it is on a file system of its own, each under a name
    of its own until its SHA-256 is right. A download that breaks off leaves that folder, and the next one goes on from
    it.
    """
    target = Path(output_dir).expanduser().resolve()
    export = _export(transport, params)
    try:
        with _own_folder(target) as partial:
            renewals, here = 0, _size(partial)
            while True:
                try:
                    _fetch_all(transport, export, partial, progress)
                    break
                except InvalidConfigError:  # the server has started again, or has tidied up
                    before, here = here, _size(partial)
                    renewals = 1 if here > before else renewals + 1
                    if renewals > _MOST_RENEWALS:
                        raise
                    export = _export(transport, params | _same(export))
            _put_in_place(partial, target, [file["name"] for file in export["files"]])
    except OSError as error:
        raise InvalidConfigError(
            f"cannot write the model to {target}: {error.strerror or error}",
            hint="what has arrived is kept: make room or choose another folder, and download again",
        ) from error
    return target


def _export(transport: Transport, params: dict[str, str]) -> dict:
    """The server's description of the files, once it has made them; the checkpoint it names is looked at throughout."""
    while True:
        export = transport.request("GET", "/api/models/exports", params=params | {"wait_s": transport.poll_s(_WAIT_S)})
        if export["files"] is not None:
            return export
        params = params | _same(export)


def _same(export: dict) -> dict[str, str]:
    """What to ask for to get this export again, though `latest` may mean another by now."""
    return {"model": export["model"], "checkpoint": export["checkpoint"]}


# ---- fetching ----


def _fetch_all(transport: Transport, export: dict, partial: Path, progress: Progress) -> None:
    files = export["files"]
    wanted = {name for file in files for name in (file["name"], file["name"] + _ARRIVING)}
    for path in partial.iterdir():
        if path.name not in wanted:
            path.unlink()  # of another format, or of a model in more pieces
    _check_room(partial, files)
    total = sum(file["size"] for file in files)
    here = 0
    for file in files:
        path = f"/api/models/exports/{export['export_id']}/{file['name']}"
        _fetch(transport, path, file, partial, lambda size, before=here: progress(before + size, total))
        here += file["size"]
        progress(here, total)


def _fetch(transport: Transport, path: str, file: dict, folder: Path, progress: Callable[[int], None]) -> None:
    """Fetches one file, going on behind what is here of it, and checks it."""
    final = folder / file["name"]
    if final.exists() and final.stat().st_size == file["size"] and _digest(final) == file["sha256"]:
        return
    arriving = folder / (file["name"] + _ARRIVING)
    failures, is_leftover = 0, arriving.exists()
    while True:
        before = arriving.stat().st_size if arriving.exists() else 0
        try:
            if before < file["size"]:
                _receive(transport, path, arriving, before, progress)
            if arriving.stat().st_size == file["size"] and _digest(arriving) == file["sha256"]:
                os.replace(arriving, final)
                return
            arriving.unlink()
            if is_leftover:  # of another checkpoint, most likely
                is_leftover = False
                continue
            failure = ServerConnectionError(f"what arrived of {file['name']} is not what the server sent (SHA-256)")
            failures += 1
        except KeyRefusedError:
            raise
        except ServerConnectionError as error:
            failure = error
            moved = arriving.exists() and arriving.stat().st_size > before
            failures = 0 if moved else failures + 1
        if failures > transport.max_retries:
            raise failure
        time.sleep(backoff_s(failures))


def _receive(transport: Transport, path: str, arriving: Path, before: int, progress: Callable[[int], None]) -> None:
    """Appends what the server has behind the first `before` bytes."""
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={before}-"} if before else {})
    with transport.stream(path, headers=headers) as response:
        resumed = response.status_code == 206
        with open(arriving, "ab" if resumed else "wb") as out:
            for chunk in response.iter_raw():  # as it comes, so that a break loses nothing
                out.write(chunk)
                progress(out.tell())
            out.flush()
            os.fsync(out.fileno())


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def _check_room(partial: Path, files: list[dict]) -> None:
    missing, free = sum(file["size"] for file in files) - _size(partial), shutil.disk_usage(partial).free
    if missing > free:
        raise AgentLightningError(
            f"the model needs {missing / 1e9:.2f} GB more in {partial.parent}, where {free / 1e9:.2f} GB are free"
        )


# ---- folders ----


@contextlib.contextmanager
def _own_folder(target: Path) -> Iterator[Path]:
    """The folder in which the target's files arrive; one download has it at a time, and it goes when empty."""
    if target.exists() and not target.is_dir():
        raise InvalidConfigError(f"{target} is not a folder", hint="output_dir is the folder to make")
    target.parent.mkdir(parents=True, exist_ok=True)
    home = target.parent if not target.exists() or _takes_from_beside(target) else target
    partial = home / f".{target.name}.partial"
    while True:
        partial.mkdir(exist_ok=True)
        try:
            lock = _lock(partial)
        except BlockingIOError:
            raise InvalidConfigError(
                f"another download to {target} is running", hint="wait for it, or end it"
            ) from None
        if lock is None or _is_same(lock, partial):
            break
        os.close(lock)  # of a folder that the other download has just put in place
    try:
        yield partial
    finally:
        with contextlib.suppress(OSError):
            partial.rmdir()
        if lock is not None:
            os.close(lock)


def _takes_from_beside(target: Path) -> bool:
    """Whether a file beside a folder can be moved into it: not if it is a mount point, such as a volume of a container.

    Tried, since a mount of the very file system that it lies on does not show in another way.
    """
    try:
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as probe:
            os.rename(probe, target / Path(probe).name)
            os.rename(target / Path(probe).name, probe)
    except OSError:
        return False
    return True


def _lock(folder: Path) -> int | None:
    """A descriptor that holds the folder's lock until it is closed, by the end of the process at the latest.

    None on Windows, which has no such locks. Raises BlockingIOError where another holds it.
    """
    try:
        import fcntl
    except ImportError:
        return None
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise
    return descriptor


def _is_same(descriptor: int, folder: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(folder))
    except FileNotFoundError:
        return False


def _put_in_place(partial: Path, target: Path, names: list[str]) -> None:
    """Makes the fetched files the model in `target`: at once where it is new, else so that a stop leaves no model.

    Args:
        names: the files; the last ones are those without which no program takes a folder for a model.
    """
    if not target.exists():
        os.rename(partial, target)
        return
    weights = [path.name for pattern in _WEIGHT_FILES for path in target.glob(pattern)]
    for name in dict.fromkeys([*reversed(names), *weights]):
        (target / name).unlink(missing_ok=True)
    for name in names:
        os.replace(partial / name, target / name)


# ---- progress ----


@contextlib.contextmanager
def shown_progress(title: str) -> Iterator[Progress]:
    """A bar in a terminal or notebook; nothing elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    console = Console(file=sys.stderr)
    columns = (TextColumn("[bold]{task.description}"), BarColumn(bar_width=24), DownloadColumn())
    with Progress(
        *columns,
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not (console.is_terminal or console.is_jupyter),
    ) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
