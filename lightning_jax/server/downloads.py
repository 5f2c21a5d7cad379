"""Models for download: exports, made from checkpoints on demand and kept for a while, and their files.

An export is made by one thread of its own, from what is on the disk, so that neither the device nor the event loop
waits for it; those who ask for the same one share it. Its id follows from what it is made of: after a restart of the
server the same request finds, or makes, the same files, and a client goes on where it was.
"""

import asyncio
import concurrent.futures
import dataclasses
import hashlib
import logging
import os
import pathlib
import queue
import shutil
import threading
import time
from typing import Any

import numpy as np
from fastapi import APIRouter, Request, Response
from fastapi.responses import FileResponse
from starlette.concurrency import run_in_threadpool
from starlette.types import Message, Receive, Scope, Send

from agent_lightning.exceptions import AgentLightningError, InvalidConfigError
from lightning_jax.model import export, llama, onnx_export
from lightning_jax.policies import Policies
from lightning_jax.policy import Policy
from lightning_jax.server import wire
from lightning_jax.store import UnknownError

_log = logging.getLogger(__name__)

FORMATS = ("huggingface", "safetensors", "onnx", "peft")
INITIAL = "initial"  # the model as it was before training
_KEEP_S = 900.0  # an export nobody reads goes after this time
_SWEEP_S = 60.0
_CLOSE_S = 5.0
_LONGEST_WAIT_S = 25.0  # under the time-outs of clients
_CHUNK_BYTES = 2**20


@dataclasses.dataclass(eq=False)
class Export:
    """One checkpoint of one model in one format.

    Attributes:
        model: its policy's name.
        checkpoint: "step-N" or "initial".
        path: the checkpoint's folder; None for the initial weights.
        files: when it is whole: {"name", "size", "sha256"} of each, in the order in which a reader should fetch them:
            what makes a folder look like a model comes last.
        used: `time.monotonic()` when somebody last asked for it, or got a piece of a file.
    """

    export_id: str
    model: str
    checkpoint: str
    path: pathlib.Path | None
    format: str
    folder: pathlib.Path
    used: float
    files: concurrent.futures.Future = dataclasses.field(default_factory=concurrent.futures.Future)


class Exports:
    """The exports of a run's models, in a folder that is this object's alone and is emptied when it begins and ends."""

    def __init__(self, policies: Policies, folder: str | os.PathLike):
        self._policies, self._folder = policies, pathlib.Path(folder).absolute()
        self._lock = threading.Lock()
        self._exports: dict[str, Export] = {}
        self._queue: queue.SimpleQueue[Export | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        shutil.rmtree(self._folder, ignore_errors=True)  # of a process that was killed

    def open(self, checkpoint: str, format: str, model: str | None = None) -> Export:
        """The export of a checkpoint, which is begun if there is none.

        Args:
            model: its name, or its number from 1 on; None for the one whose part of a checkpoint `checkpoint` names,
                or the first.
            checkpoint: as `rl.checkpoint.resolve` takes it, or "initial"; "latest" is "initial" before the first one.

        Raises:
            InvalidConfigError: there is no such model, checkpoint or format, or a package that the format needs; or
                `checkpoint` names another model's part.
        """
        if format not in FORMATS:
            raise InvalidConfigError(f"format {format!r} is not one of {', '.join(FORMATS)}")
        if format == "onnx":
            onnx_export.check_available()
        checkpoint, part = self._policies.split_part(checkpoint)
        policy = self._policy(part if model is None else model)
        if part not in (None, policy.name):
            raise InvalidConfigError(
                f"{checkpoint}/{part} is not of the model {policy.name!r}",
                hint=f"give {checkpoint}, or leave out the model",
            )
        path = self._resolve(checkpoint)
        if format == "peft" and (path is None or not policy.trainable.lora_rank):
            raise InvalidConfigError(
                f"{checkpoint} of {policy.name} has no adapters to export as peft",
                hint="they are in the checkpoints of a run with model.lora_rank; 'huggingface' is the whole model",
            )
        stat = path.stat() if path else None
        made_of = (str(path), stat and (stat.st_mtime_ns, stat.st_ino), format, _dtype(policy, format).name)
        export_id = hashlib.sha256(repr((policy.name, *made_of)).encode()).hexdigest()[:16]
        with self._lock:
            known = self._exports.get(export_id)
            if known is None or (known.files.done() and known.files.exception() is not None):
                folder = self._folder / export_id
                name = path.name if path else INITIAL
                known = Export(export_id, policy.name, name, path, format, folder, time.monotonic())
                self._exports[export_id] = known
                self._queue.put(known)
                if self._thread is None:
                    self._thread = threading.Thread(target=self._loop, name="exports", daemon=True)
                    self._thread.start()
            known.used = time.monotonic()
            return known

    def with_file(self, export_id: str, name: str) -> Export:
        """The whole export that has this file. Raises UnknownError."""
        with self._lock:
            export = self._exports.get(export_id)
            if export is not None and export.files.done() and export.files.exception() is None:
                if any(file["name"] == name for file in export.files.result()):
                    export.used = time.monotonic()
                    return export
        raise UnknownError(f"there is no file {name!r} in an export {export_id!r}", hint="ask for the export again")

    def close(self) -> None:
        """Ends the thread and removes all exports; one in hand that takes long is left to fail."""
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join(_CLOSE_S)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _policy(self, name: str | None) -> Policy:
        if name is None:
            return self._policies.first
        found = self._policies.find(name)
        if found is None:
            raise InvalidConfigError(f"there is no model {name!r}", hint=f"there are {', '.join(self._policies)}")
        return found

    def _resolve(self, name: str) -> pathlib.Path | None:
        last = pathlib.PurePath(name).name
        if last == INITIAL or (last == "latest" and not self._policies.checkpoints()):
            return None
        return self._policies.find_checkpoint(name)

    # ---- the thread ----

    def _loop(self) -> None:
        while True:
            try:
                export = self._queue.get(timeout=_SWEEP_S)
            except queue.Empty:
                self._remove_unused()
                continue
            if export is None:
                return
            try:
                export.files.set_result(self._make(export))
            except BaseException as error:
                shutil.rmtree(export.folder, ignore_errors=True)
                export.files.set_exception(self._explained(export, error))
            self._remove_unused()

    def _make(self, item: Export) -> list[dict[str, Any]]:
        policy = self._policies[item.model]
        dtype, part = _dtype(policy, item.format), self._policies.checkpoint_item(item.model)
        if item.format == "peft":
            adapters = policy.read_trained(item.path, dtype, part)
            export.save_peft(item.folder, adapters, policy.trainable, policy.origin["path"])
        else:
            self._make_model(item, policy, policy.read_weights(item.path, dtype, part), dtype)
        names = sorted((file.name for file in item.folder.iterdir()), key=lambda name: (_RANK.get(name, 0), name))
        return [_described(item.folder / name) for name in names]

    @staticmethod
    def _make_model(item: Export, policy: Policy, params: llama.Params, dtype: np.dtype) -> None:
        # It is to end its replies where the sampler did: of a base model only the chat template knows that.
        eos_ids = tuple(dict.fromkeys((*policy.config.eos_ids, *policy.tokenizer.eos_ids)))
        config = dataclasses.replace(policy.config, eos_ids=eos_ids)
        if item.format == "safetensors":
            export.save_safetensors(item.folder, config, params, dtype)
        elif item.format == "huggingface":
            export.save_hf(item.folder, config, params, dtype)
        else:
            onnx_export.save_onnx(item.folder, config, params)
        if item.format != "safetensors":
            policy.tokenizer.save(item.folder)

    def _explained(self, item: Export, error: BaseException) -> BaseException:
        if item.path is not None and not item.path.exists():
            return InvalidConfigError(
                f"{item.checkpoint} was removed while it was read", hint="runtime.max_to_keep says how many are kept"
            )
        if isinstance(error, AgentLightningError):
            return error
        _log.error("could not export %s as %s", item.checkpoint, item.format, exc_info=error)
        return AgentLightningError(
            f"the server could not export {item.checkpoint} as {item.format}: {type(error).__name__}: {error}"
        )

    def _remove_unused(self) -> None:
        with self._lock:
            old = time.monotonic() - _KEEP_S
            unused = [e for e in self._exports.values() if e.used < old and e.files.done()]
            for item in unused:
                del self._exports[item.export_id]
        for item in unused:  # whoever is reading a file of it has it open
            shutil.rmtree(item.folder, ignore_errors=True)


def _dtype(policy: Policy, format: str) -> np.dtype:
    """What the sampler computes in. Float32 for adapters, and for ONNX: every runtime has every kernel for that."""
    return np.dtype(np.float32) if format in ("onnx", "peft") else np.dtype(policy.dtype)


# A folder without these is not yet a model to anybody.
_RANK = {"model.safetensors.index.json": 1, "model.onnx": 1, "config.json": 2, "adapter_config.json": 2}


def _described(file: pathlib.Path) -> dict[str, Any]:
    with open(file, "rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    return {"name": file.name, "size": file.stat().st_size, "sha256": digest}


# ---- endpoints ----

router = APIRouter()


@router.get("/api/models/exports")
async def get_export(
    request: Request,
    checkpoint: str = "latest",
    format: str = "huggingface",
    model: str | None = None,
    wait_s: float = 0.0,
) -> Response:
    """An export's files once it is whole, waiting for that; `checkpoint` in the reply is what to ask for next time."""
    exports: Exports = request.app.state.exports
    item = await run_in_threadpool(exports.open, checkpoint, format, model)
    reply = {name: getattr(item, name) for name in ("export_id", "model", "checkpoint", "format")} | {"files": None}
    loop = asyncio.get_running_loop()
    deadline = loop.time() + min(wait_s, _LONGEST_WAIT_S)
    while not item.files.done() and not request.app.state.closing():
        left = deadline - loop.time()
        if left <= 0:
            break
        done = asyncio.wrap_future(item.files)
        done.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
        await asyncio.wait([done], timeout=min(left, 1.0))
    if item.files.done():
        reply["files"] = item.files.result()
    return wire.json_response(reply)


@router.get("/api/models/exports/{export_id}/{name}")
async def get_export_file(request: Request, export_id: str, name: str) -> Response:
    """A file of a whole export; ranges are served."""
    return _File(request.app.state.exports.with_file(export_id, name), name)


class _File(FileResponse):
    """A file of an export, which is in use for as long as it is sent."""

    chunk_size = _CHUNK_BYTES  # each costs the event loop a turn

    def __init__(self, export: Export, name: str):
        super().__init__(export.folder / name, media_type="application/octet-stream")
        self._export = export

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_used(message: Message) -> None:
            self._export.used = time.monotonic()
            await send(message)

        await super().__call__(scope, receive, send_used)
