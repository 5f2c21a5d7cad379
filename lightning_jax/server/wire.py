"""JSON and event streams in and out of the dialects."""

import json
import logging
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any, TypeVar

import orjson
import pydantic
from fastapi import Request, Response

from lightning_jax.server.contract import ApiError, ClientGone
from lightning_jax.server.generation import Generation

_log = logging.getLogger(__name__)

Model = TypeVar("Model", bound=pydantic.BaseModel)

COMMENT = b": waiting\n\n"  # an event that is none, for streams that are silent
# What JSON leaves as it is in a text and some clients take for the end of an event's line.
_LINE_ENDS = {"\x85".encode(): rb"\u0085", "\u2028".encode(): rb"\u2028", "\u2029".encode(): rb"\u2029"}
MAX_BODY_BYTES = 32 * 2**20


async def body_of(request: Request) -> bytes:
    """The request's body. Raises ApiError (413) where it is larger than `MAX_BODY_BYTES`."""
    declared = request.headers.get("content-length", "0")
    size, pieces = int(declared) if declared.isdecimal() else 0, []
    if size <= MAX_BODY_BYTES:
        size = 0
        async for piece in request.stream():
            size += len(piece)
            pieces.append(piece)
            if size > MAX_BODY_BYTES:
                break
    if size > MAX_BODY_BYTES:
        text = f"the body is too large: a request may have {MAX_BODY_BYTES} bytes"
        raise ApiError(text, status=413, kind="too_large")
    return b"".join(pieces)


def parse(model: type[Model], body: bytes) -> Model:
    """The request body as `model`. Raises ApiError that names the field."""
    try:
        return model.model_validate_json(body)
    except pydantic.ValidationError as error:
        field, text = first_problem(error.errors(include_url=False, include_context=False))
        raise ApiError(f"{field}: {text}" if field else text, param=field or None) from None


def first_problem(errors: Sequence[dict]) -> tuple[str, str]:
    """Where and what the first of pydantic's errors is."""
    first = errors[0]
    return ".".join(str(part) for part in first["loc"]), first["msg"]


def refuse(body: pydantic.BaseModel, neutral: dict[str, tuple]) -> None:
    """Raises ApiError if a field of `neutral` is set to something other than None or one of its neutral values."""
    given = body.model_extra | {name: getattr(body, name) for name in body.model_fields_set & neutral.keys()}
    for name in given.keys() & neutral.keys():
        value = given[name]
        if value is not None and value not in neutral[name]:
            raise ApiError(f"{name}={_short(value)} is not supported by this server", param=name)


def stop_strings(stop: Sequence[str] | None, name: str) -> tuple[str, ...]:
    """Checked stop strings."""
    if stop and "" in stop:
        raise ApiError(f"{name}: a stop string must not be empty", param=name)
    return tuple(stop or ())


def dumps(content: Any) -> bytes:
    """JSON text; NaN and infinities, which JSON does not know, become null."""
    try:
        return orjson.dumps(content)
    except TypeError:  # an integer beyond 64 bits in a task, half of a surrogate pair in a sample
        return json.dumps(json.loads(json.dumps(content), parse_constant=lambda name: None)).encode()


def json_response(content: Any, status: int = 200, retry_after_s: int | None = None) -> Response:
    """`content` as the reply's body."""
    headers = {"retry-after": str(retry_after_s)} if retry_after_s is not None else None
    return Response(dumps(content), status, headers, media_type="application/json")


def event(content: Any, name: str | None = None) -> bytes:
    """One server-sent event."""
    data = b"data: " + dumps(content) + b"\n\n"
    for end, escape in _LINE_ENDS.items():
        data = data.replace(end, escape)
    return data if name is None else f"event: {name}\n".encode() + data


class EventStream(Response):
    """A reply as server-sent events.

    Args:
        generations: what the events tell of; they are closed when the events end, however they do.
        events: each one's bytes.
        failed: the bytes that tell of an error once the reply has begun.
    """

    def __init__(
        self,
        generations: Sequence[Generation],
        events: AsyncGenerator[bytes, None],
        failed: Callable[[ApiError], bytes],
    ):
        super().__init__(
            media_type="text/event-stream", headers={"cache-control": "no-cache", "x-accel-buffering": "no"}
        )
        del self.headers["content-length"]
        self._generations, self._events, self._failed = generations, events, failed

    async def __call__(self, scope, receive, send) -> None:
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            async for data in self._guarded():
                await send({"type": "http.response.body", "body": data, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        except ClientGone:
            pass
        finally:
            for generation in self._generations:
                generation.close()
            await self._events.aclose()

    async def _guarded(self) -> AsyncGenerator[bytes, None]:
        try:
            async for data in self._events:
                yield data
        except ClientGone:
            raise
        except ApiError as error:
            yield self._failed(error)
        except Exception as error:
            _log.exception("a stream failed")
            yield self._failed(ApiError(f"{type(error).__name__}: {error}", status=500, kind="server"))


def _short(value: Any) -> str:
    text = dumps(value).decode()
    return text if len(text) <= 60 else text[:57] + "..."
