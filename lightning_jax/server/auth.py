"""Who may ask what: the API key where one is configured; a rollout's URL carries its own credential."""

import hmac

import orjson

_OPEN = ("/rollout/", "/health")
_BODY = orjson.dumps(
    {
        "type": "error",
        "error": {
            "type": "authentication_error",
            "message": "the API key is missing or wrong: send it as `Authorization: Bearer KEY` or `x-api-key: KEY`",
            "param": None,
            "code": "invalid_api_key",
        },
    }
)


class RequireKey:
    """ASGI middleware that answers 401 to requests without the key, in a shape that every client here understands."""

    def __init__(self, app, api_key: str):
        self._app = app
        self._accepted = {b"authorization": f"Bearer {api_key}".encode(), b"x-api-key": api_key.encode()}

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http" or scope["path"].startswith(_OPEN) or self._has_key(scope["headers"]):
            await self._app(scope, receive, send)
            return
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(_BODY)).encode())]
        await send({"type": "http.response.start", "status": 401, "headers": headers})
        await send({"type": "http.response.body", "body": _BODY})

    def _has_key(self, headers) -> bool:
        return any(
            name in self._accepted and hmac.compare_digest(value, self._accepted[name]) for name, value in headers
        )
