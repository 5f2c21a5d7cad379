"""Builds the app, and runs it."""

import contextlib
import functools
import logging
import pathlib
import socket
import threading
import time
import traceback

import ml_collections
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect

from agent_lightning import cli
from agent_lightning.exceptions import AgentLightningError, InvalidConfigError
from lightning_jax.policies import Policies
from lightning_jax.server import (
    control,
    datasets,
    dialects,
    downloads,
    openai_shared,
    openapi,
    rollout_calls,
    trajectories,
    wire,
)
from lightning_jax.server.auth import RequireKey
from lightning_jax.server.contract import ApiError, ClientGone
from lightning_jax.server.roles import Generators
from lightning_jax.store import Store

_log = logging.getLogger(__name__)

_KEEP_ALIVE_S = 120  # longer than clients keep idle connections, so that it is they who close them
_BACKLOG = 2048
_CLOSED_REQUEST = 499  # as nginx has it; nobody reads it


def create_app(
    *, config: ml_collections.ConfigDict, policies: Policies, store: Store, jobs: control.JobRunner | None = None
) -> FastAPI:
    """The server's app.

    Args:
        config: the program's configuration; `server` and `sampler` are read.
        policies: the models to serve.
        jobs: runs jobs for clients; None where the program runs one job of its own.
    """

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI):
        app.state.pulse = control.Pulse(store)
        app.state.exports = downloads.Exports(policies, pathlib.Path(config.workdir) / "exports")
        yield
        await run_in_threadpool(app.state.exports.close)
        app.state.pulse.close()

    app = FastAPI(title="Lightning JAX", lifespan=lifespan)
    app.state.store, app.state.jobs, app.state.policies = store, jobs, policies
    app.state.generators = Generators(policies, store, config.sampler)
    app.state.closing = lambda: False
    dialects.add_to(app)
    app.add_route("/rollout/{token}/calls", rollout_calls.calls, methods=["GET"])
    app.add_route("/rollout/{token}/tool_calls", rollout_calls.tool_calls, methods=["GET"])
    for part in (control, datasets, downloads, trajectories):
        app.include_router(part.router, responses=openapi.CLIENT_ERRORS)
    app.add_api_route("/health", _health, methods=["GET"])
    app.add_exception_handler(ApiError, _api_error)
    for gone in (ClientGone, ClientDisconnect):
        app.add_exception_handler(gone, lambda request, error: Response(status_code=_CLOSED_REQUEST))
    app.add_exception_handler(AgentLightningError, lambda request, error: control.error_response(error))
    app.add_exception_handler(RequestValidationError, _invalid_body)
    app.add_exception_handler(Exception, _crash)
    app.openapi = functools.partial(openapi.document, app)
    if config.server.api_key:
        app.add_middleware(RequireKey, api_key=config.server.api_key)
    return app


async def _health(request: Request) -> Response:
    """Answers as soon as requests are served, with no key; 503 once what everything needs has failed."""
    policies: Policies = request.app.state.policies
    jobs: control.JobRunner | None = request.app.state.jobs
    content = {"status": "ok", "model": policies.first.name, "policy_version": policies.first.version}
    store: Store = request.app.state.store
    failures = {"the device": policies.error, "the store": store.error, "the jobs' thread": jobs and jobs.error}
    if failed := [f"{name} failed: {error}" for name, error in failures.items() if error is not None]:
        return wire.json_response(content | {"status": "failing", "error": "; ".join(failed)}, 503)
    return wire.json_response(content)


def _api_error(request: Request, error: ApiError) -> Response:
    store: Store = request.app.state.store
    attempt = store.attempt_by_token(request.path_params.get("token", ""))
    if attempt is not None:  # agents are known to swallow it
        store.note_refusal(attempt, str(error))
    return (dialects.error_shape(request.url.path) or openai_shared.error_response)(error)


def _invalid_body(request: Request, error: RequestValidationError) -> Response:
    field, text = wire.first_problem(error.errors())
    message = f"{field.removeprefix('body.').removeprefix('query.')}: {text}"
    return wire.json_response({"error": {"type": "InvalidConfigError", "message": message, "hint": None}}, 422)


def _crash(request: Request, error: Exception) -> Response:
    message = f"{type(error).__name__}: {error}"
    shape = dialects.error_shape(request.url.path)
    if shape is not None:
        response = shape(ApiError(message, status=500, kind="server"))
    else:
        text = "".join(traceback.format_exception(error))
        content = {"type": "AgentLightningError", "message": message, "hint": None, "traceback": text}
        response = wire.json_response({"error": content}, 500)
    response.headers["connection"] = "close"  # as Starlette lets uvicorn do; a client that was not told is cut off
    return response


# ---- running it ----


def bind(host: str, port: int) -> socket.socket:
    """Takes the port before anything slow is done; port 0 takes any free one.

    Raises:
        InvalidConfigError: it is in use, or the address is not one of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
        sock.listen(_BACKLOG)
    except (OSError, OverflowError) as error:
        sock.close()
        message = f"cannot serve on {host}:{port}: {getattr(error, 'strerror', None) or error}"
        raise InvalidConfigError(
            message, hint=f"choose another with {cli.flag_of('server.port')}; 0 takes any free one"
        ) from None
    return sock


def url_of(sock: socket.socket) -> str:
    """The URL at which this machine reaches a bound socket."""
    host, port = sock.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def serve(app: FastAPI, sock: socket.socket) -> None:
    """Serves on a bound socket until SIGINT or SIGTERM; from the main thread."""
    _server(app).run(sockets=[sock])


class RunningServer:
    """Serves in a thread of its own, from the construction until `stop`.

    Attributes:
        url: where it answers.

    Raises:
        RuntimeError: it did not start.
    """

    def __init__(self, app: FastAPI, sock: socket.socket):
        self.url = url_of(sock)
        self._server = _server(app)
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [sock]}, name="http", daemon=True)
        self._thread.start()
        while not self._server.started:
            if not self._thread.is_alive():
                raise RuntimeError(f"the server on {self.url} did not start")
            time.sleep(0.005)

    def stop(self) -> None:
        """Ends requests that wait, lets the others finish for a few seconds, and closes the socket."""
        self._server.should_exit = True
        self._thread.join()


def _server(app: FastAPI) -> uvicorn.Server:
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            proxy_headers=False,
            timeout_keep_alive=_KEEP_ALIVE_S,
            timeout_graceful_shutdown=5,
            backlog=_BACKLOG,
        )
    )
    app.state.closing = lambda: server.should_exit
    return server
