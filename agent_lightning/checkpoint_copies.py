"""Copies of a job's checkpoints in a folder of the client's machine, made while the job goes on."""

import os
import queue
import shutil
import threading
import warnings
from collections.abc import Callable
from pathlib import Path

from agent_lightning.exceptions import AgentLightningError, InvalidConfigError


class CheckpointCopies:
    """Keeps `step-N`, a model folder for each checkpoint, and the link `latest` in `folder`.

    A copy that cannot be made ends nothing; `finish` tries once more and then warns.

    Args:
        folder: made if it is not there. A `step-N` of an earlier job is replaced. A folder named `latest` stays, and
            there is no link.
        download: `(output_dir, checkpoint)`; raises AgentLightningError or OSError.

    Raises:
        InvalidConfigError: the folder cannot be made or written.
    """

    def __init__(self, folder: str | os.PathLike, download: Callable[[str, str], None]):
        self._folder, self._download = Path(folder).expanduser().absolute(), download
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            probe = self._folder / ".writable"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise InvalidConfigError(
                f"checkpoint_dir={os.fspath(folder)!r} cannot be written: {error.strerror or error}",
                hint="it is a folder on this machine, for copies of the server's checkpoints",
            ) from error
        self._waiting: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._made: set[str] = set()
        self._is_latest_folder = False
        self._thread = threading.Thread(target=self._work, name="checkpoint-copies", daemon=True)
        self._thread.start()

    def add(self, path: str) -> None:
        """Takes a checkpoint, by its path on the server, and returns at once."""
        self._waiting.put(path)

    def close(self) -> None:
        """Ends the thread once it has made the copies asked for so far; does not wait for that."""
        self._waiting.put(None)

    def finish(self, paths: list[str]) -> None:
        """Returns when there are copies of all these checkpoints, which the server still has; warns of what failed.

        Ctrl-C ends the copying alone.
        """
        failures: dict[str, str] = {}
        names = [_name(path) for path in paths]
        try:
            self.close()
            self._thread.join()
            for name in names:
                if name not in self._made:
                    try:
                        self._copy(name)
                    except (AgentLightningError, OSError) as error:
                        failures[name] = str(error)
        except KeyboardInterrupt:
            failures = {name: "interrupted" for name in names if name not in self._made}
        if failures:
            first = next(iter(failures.values()))
            warnings.warn(f"not copied to {self._folder}: {', '.join(failures)}: {first}", stacklevel=5)
        if self._is_latest_folder:
            warnings.warn(f"{self._folder / 'latest'} is a folder, which was left as it is, and no link", stacklevel=5)

    def _work(self) -> None:
        while (path := self._waiting.get()) is not None:
            try:
                self._copy(_name(path))
            except (AgentLightningError, OSError):  # the server may have removed it by now, or `finish` tries again
                pass

    def _copy(self, name: str) -> None:
        final, partial, replaced = (self._folder / f"{prefix}{name}" for prefix in ("", "tmp.", "tmp.replaced-"))
        for leftover in (partial, replaced):
            shutil.rmtree(leftover, ignore_errors=True)
        self._download(str(partial), name)
        if final.exists():
            os.rename(final, replaced)  # a folder cannot be renamed onto another
        os.rename(partial, final)
        shutil.rmtree(replaced, ignore_errors=True)
        self._made.add(name)
        link, latest = self._folder / "tmp.latest", self._folder / "latest"
        self._is_latest_folder = latest.is_dir() and not latest.is_symlink()
        if self._is_latest_folder:
            return
        link.unlink(missing_ok=True)
        link.symlink_to(max(self._made, key=lambda made: int(made.partition("-")[2])))
        os.replace(link, latest)


def _name(path: str) -> str:
    """`step-N`, of a path of whatever system the server runs on."""
    return path.replace("\\", "/").rpartition("/")[2]
