"""Datasets over HTTP: one request holds all of a dataset's files, so that it is replaced as a whole or not at all."""

import asyncio
import hashlib

from fastapi import APIRouter, Request, Response
from starlette.concurrency import run_in_threadpool

from agent_lightning.dataset import SPLITS, check_name
from agent_lightning.exceptions import DataUploadError
from lightning_jax.server import wire
from lightning_jax.store import DataError, Store, StoreError, UnknownError

_PIECE_BYTES = 2**20

router = APIRouter()


@router.put("/api/datasets/{data_id}")
async def put_dataset(
    request: Request, data_id: str, test: int | None = None, train: int | None = None, sha256: str | None = None
) -> Response:
    """Makes the body the dataset, in place of an earlier one at once, or changes nothing.

    Args:
        test, train: how many bytes of the body, JSONL, are test tasks, and then how many training tasks; a split that
            is not named is none of the dataset.
        sha256: of the body, in hexadecimal digits; a body that has another is refused.
    """
    check_name(data_id)
    sizes = {split: size for split, size in zip(SPLITS, (test, train), strict=True) if size is not None}
    if not sizes or min(sizes.values()) < 0:
        raise DataError("?train=BYTES, ?test=BYTES or both must say what the body holds")
    body = _Body(request.app.state.store, data_id, sizes, sha256)
    try:
        piece = bytearray()
        async for chunk in request.stream():
            piece += chunk
            if len(piece) >= _PIECE_BYTES:
                await run_in_threadpool(body.feed, bytes(piece))
                piece.clear()
        await run_in_threadpool(body.feed, bytes(piece))
        splits = await run_in_threadpool(body.finish)
    except BaseException as error:  # a wrong line, a full disk, a client that went away, a server that ends
        await asyncio.shield(run_in_threadpool(body.discard))
        if isinstance(error, StoreError):
            raise DataUploadError(f"the upload could not be stored: {error}") from error
        raise
    return wire.json_response({"data_id": data_id, "splits": splits})


@router.get("/api/datasets/{data_id}")
async def get_dataset(request: Request, data_id: str) -> Response:
    """Which splits a dataset has, and how many tasks each."""
    splits = {info.split: info.num_tasks for info in request.app.state.store.dataset(data_id)}
    if not splits:
        raise UnknownError(f"there is no dataset {data_id!r}")
    return wire.json_response({"data_id": data_id, "splits": splits})


class _Body:
    """A request's body on its way into the store, split after split."""

    def __init__(self, store: Store, data_id: str, sizes: dict[str, int], sha256: str | None):
        self._store, self._data_id, self._sha256 = store, data_id, sha256
        self._uploads = {split: store.upload(data_id, split) for split in sizes}
        self._left = dict(sizes)
        self._digest = hashlib.sha256()

    def feed(self, piece: bytes) -> None:
        self._digest.update(piece)
        for split, left in self._left.items():
            mine, piece = piece[:left], piece[left:]
            self._left[split] -= len(mine)
            self._checked(split, lambda u, mine=mine: u.feed(mine))
        if piece:
            raise self._other_body("is longer")

    def finish(self) -> dict[str, int]:
        """Number of tasks by split."""
        if any(self._left.values()):
            raise self._other_body("is shorter")
        if self._sha256 not in (None, self._digest.hexdigest()):
            raise self._other_body("is another")
        for split in self._uploads:
            self._checked(split, lambda u: u.end())
        infos = self._store.replace_dataset(self._data_id, list(self._uploads.values()))
        return {info.split: info.num_tasks for info in infos}

    def discard(self) -> None:
        for upload in self._uploads.values():
            upload.discard()

    def _checked(self, split: str, act) -> None:
        try:
            act(self._uploads[split])
        except DataError as error:
            raise error.within(f"{split} tasks") from None

    def _other_body(self, how: str) -> DataError:
        return DataError(f"what arrived {how} than was announced", hint="was a file written to during the upload?")
