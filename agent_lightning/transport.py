"""HTTP to the server: retries with backoff and jitter, and errors as this package's exceptions."""

import random
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from agent_lightning import exceptions, settings
from agent_lightning.loopback import loopback_host

RETRY_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})
FIRST_BACKOFF_S = 0.2
LONGEST_BACKOFF_S = 10.0


class Transport:
    """One server, many requests; thread-safe.

    Every request may be sent more than once, so the server's writes are idempotent.

    Args:
        server_url: base URL. On this machine's loopback it is reached directly, whatever proxy the environment names.
        api_key: sent as a bearer token.
        timeout_s: how long one request may go without an answer, in seconds.
        max_retries: how often it is sent again when the server cannot be reached or is not ready.
        verify_ssl: whether the server's certificate is checked.

    Raises:
        InvalidConfigError: it is no URL.
    """

    def __init__(
        self,
        server_url: str,
        *,
        api_key: str | None = None,
        timeout_s: float = 300.0,
        max_retries: int = settings.DEFAULT_MAX_RETRIES,
        verify_ssl: bool = True,
    ):
        import httpx

        self.server_url = server_url
        self.max_retries = max_retries
        self._timeout_s = timeout_s
        self._errors = httpx.TransportError
        try:
            httpx.URL(server_url)
        except httpx.InvalidURL as error:
            raise exceptions.InvalidConfigError(f"{server_url!r} is not a URL: {error}") from error
        limits = httpx.Limits(max_keepalive_connections=8, keepalive_expiry=60.0)
        # A transport of its own keeps the client from the environment's proxies, and still heeds SSL_CERT_FILE.
        direct = httpx.HTTPTransport(verify=verify_ssl, limits=limits) if loopback_host(server_url) else None
        self._http = httpx.Client(
            base_url=server_url,
            headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
            timeout=httpx.Timeout(timeout_s, connect=min(timeout_s, 10.0)),
            verify=verify_ssl,
            limits=limits,
            transport=direct,
        )

    def request(
        self,
        method: str,
        path: str,
        *,
        json: Any = None,
        params: dict | None = None,
        content: Callable[[], Iterable[bytes]] | None = None,
        max_retries: int | None = None,
    ) -> Any:
        """Sends one request and returns the decoded JSON reply.

        Args:
            json: the body, or what makes it, called again for every retry.
            content: makes the body's chunks; called again for every retry.
            max_retries: instead of the transport's own.

        Raises:
            ServerConnectionError: no usable answer after all retries, or something else than the server answers.
            KeyRefusedError: the API key was refused; this is a ServerConnectionError too.
            AgentLightningError: the server's own error, as the class it names.
        """
        retries = self.max_retries if max_retries is None else max_retries
        for attempt in range(retries + 1):
            failure, wait_s = None, backoff_s(attempt)
            try:
                body = content() if content else None
                value = json() if callable(json) else json
                response = self._http.request(method, path, json=value, params=params, content=body)
            except self._errors as error:
                failure = self._unreachable(error)
            else:
                if response.is_success:
                    return self._decoded(response)
                failure = _error_from(response)
                if response.status_code not in RETRY_STATUS:
                    raise failure
                wait_s = max(wait_s, _retry_after_s(response))
            if attempt == retries:
                raise failure
            time.sleep(wait_s)

    @contextmanager
    def stream(self, path: str, *, params: dict | None = None, headers: dict | None = None) -> Iterator[Any]:
        """Sends one GET, once, and gives the httpx response with its body still to be read.

        Raises:
            ServerConnectionError: the server cannot be reached, or the body breaks off while it is read.
            KeyRefusedError, AgentLightningError: as `request`.
        """
        try:
            with self._http.stream("GET", path, params=params, headers=headers) as response:
                if not response.is_success:
                    response.read()
                    raise _error_from(response)
                yield response
        except self._errors as error:
            raise self._unreachable(error) from error

    def poll_s(self, longest_s: float) -> float:
        """How long the server may hold a request that waits for news: well within the time-out."""
        return min(longest_s, self._timeout_s / 2)

    def close(self) -> None:
        self._http.close()

    def _decoded(self, response) -> Any:
        try:
            return response.json()
        except ValueError as error:
            raise exceptions.ServerConnectionError(
                f"something else answers at {self.server_url}: its reply to {response.request.url.path} is not JSON",
                hint="correct the URL; a proxy or another program may be listening there",
            ) from error

    def _unreachable(self, error: Exception) -> exceptions.ServerConnectionError:
        wrapped = exceptions.ServerConnectionError(
            f"cannot reach the server at {self.server_url}: {type(error).__name__}: {error}",
            hint="start it with `agent-lightning server start`, or correct the URL",
        )
        wrapped.__cause__ = error
        return wrapped


def backoff_s(attempt: int) -> float:
    """Seconds to wait behind try number `attempt`, from 0."""
    return random.uniform(0.5, 1.0) * min(LONGEST_BACKOFF_S, FIRST_BACKOFF_S * 2**attempt)


def _retry_after_s(response) -> float:
    try:
        return min(60.0, float(response.headers.get("retry-after", 0)))
    except ValueError:
        return 0.0


def _error_from(response) -> Exception:
    """The exception that a reply outside 2xx stands for: `{"error": {"type", "message", "hint"}}` where it has that."""
    try:
        error = response.json()["error"]
        name, message, hint, trace = error.get("type"), error["message"], error.get("hint"), error.get("traceback")
    except (ValueError, KeyError, TypeError, AttributeError):
        name, message, hint, trace = None, response.text[:500], None, None
    status = response.status_code
    if status in (401, 403):
        return exceptions.KeyRefusedError(
            f"the server refused the API key: {message}", hint=hint or f"pass api_key= or set {settings.API_KEY}"
        )
    kind = getattr(exceptions, str(name), None)
    if isinstance(kind, type) and issubclass(kind, exceptions.AgentLightningError):
        raised = kind(message, hint=hint)
        if trace:
            raised.__cause__ = exceptions.RemoteError(f"in the server:\n{trace.rstrip()}")
        return raised
    if status in RETRY_STATUS:
        return exceptions.ServerConnectionError(f"the server answered {status}: {message}", hint=hint)
    request = response.request
    return exceptions.AgentLightningError(
        f"{request.method} {request.url.path} failed ({status}): {message}", hint=hint
    )
