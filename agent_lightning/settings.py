"""What the environment sets. An argument always wins over a variable, a variable over the default."""

import os
from urllib.parse import urlsplit

from agent_lightning.exceptions import InvalidConfigError

SERVER_URL = "AGENT_LIGHTNING_SERVER_URL"
API_KEY = "AGENT_LIGHTNING_API_KEY"
MAX_RETRIES = "LIGHTNING_MAX_RETRIES"

DEFAULT_MAX_RETRIES = 3


def server_url(argument: str | None = None) -> str:
    """The server's base URL without a trailing slash.

    Raises:
        InvalidConfigError: neither the argument nor AGENT_LIGHTNING_SERVER_URL is given, or it is not an HTTP URL.
    """
    source, given = ("server_url", argument) if argument else (SERVER_URL, os.environ.get(SERVER_URL))
    url = str(given or "").strip()
    if not url:
        raise InvalidConfigError(
            "no server URL",
            hint=f"set {SERVER_URL} to http://localhost:8000 or the like, or pass it as server_url= or --server-url",
        )
    try:
        parts = urlsplit(url)
        is_url = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0 and url.isprintable()
    except ValueError:  # of an IPv6 address without its end, of a port that is no number
        is_url = False
    if not is_url or " " in url:
        raise InvalidConfigError(f"{source}={given!r} is not a URL", hint="it looks like http://localhost:8000")
    return url.rstrip("/")


def api_key(argument: str | None = None) -> str | None:
    """The API key, or None where the server needs none. White space around it, as a file's last line break, is no part.

    Raises:
        InvalidConfigError: no HTTP header can carry it; says where it came from, and never what it is.
    """
    source, key = ("api_key", argument) if argument else (API_KEY, os.environ.get(API_KEY))
    key = str(key or "").strip()
    if not (key.isascii() and key.isprintable()):
        raise InvalidConfigError(
            f"{source} has a character that no API key can have",
            hint="letters, digits and punctuation of ASCII are good",
        )
    return key or None


def max_retries(argument: int | None = None) -> int:
    """How often one HTTP request is tried again.

    Raises:
        InvalidConfigError: LIGHTNING_MAX_RETRIES or the argument is not a whole number from 0 on.
    """
    source, value = ("max_retries", argument) if argument is not None else (MAX_RETRIES, os.environ.get(MAX_RETRIES))
    if value is None or value == "":
        return DEFAULT_MAX_RETRIES
    try:
        number = int(value)
    except (TypeError, ValueError):
        number = -1
    if number < 0:
        raise InvalidConfigError(f"{source}={value!r} is not a whole number from 0 on")
    return number


def timeout_s(argument: float) -> float:
    """How long one HTTP request may go without an answer, in seconds.

    Raises:
        InvalidConfigError: it is not a positive number.
    """
    if isinstance(argument, bool) or not isinstance(argument, int | float) or not 0 < argument < float("inf"):
        raise InvalidConfigError(f"timeout={argument!r} is not a positive number of seconds")
    return float(argument)
