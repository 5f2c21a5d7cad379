"""What the environment sets. An argument always wins over a variable, a variable over the default."""

import os
import threading
from urllib.parse import urlsplit

from agent_lightning.exceptions import InvalidConfigError

SERVER_URL = "AGENT_LIGHTNING_SERVER_URL"
API_KEY = "AGENT_LIGHTNING_API_KEY"
MAX_RETRIES = "LIGHTNING_MAX_RETRIES"

DEFAULT_MAX_RETRIES = 3


def server_url(argument: str | None = None) -> str:
    """The server's base URL without a trailing slash.

    Raises:
        InvalidConfigError: neither the argument nor AGENT_LIGHTNING_SERVER_URL is given, or it is not an HTTP URL, or
            more than the base of one.
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
    if "?" in url or "#" in url or parts.path.rstrip("/").endswith("/v1"):
        raise InvalidConfigError(
            f"{source}={given!r} is more than the server's base URL", hint="it looks like http://localhost:8000"
        )
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
    if argument is not None:
        check_whole(0, max_retries=argument)
        return argument
    given = os.environ.get(MAX_RETRIES) or str(DEFAULT_MAX_RETRIES)
    if not given.strip().isdecimal():
        raise InvalidConfigError(f"{MAX_RETRIES}={given!r} is not a whole number from 0 on")
    return int(given)


def check_whole(least: int, **arguments: int) -> None:
    """Raises InvalidConfigError unless all are whole numbers from `least` on."""
    for name, value in arguments.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise InvalidConfigError(f"{name}={value!r} is not a whole number from {least} on")


def check_seconds(**arguments: float) -> None:
    """Raises InvalidConfigError unless all are positive numbers."""
    for name, value in arguments.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
            raise InvalidConfigError(f"{name}={value!r} is not a positive number of seconds")


def timeout_s(argument: float) -> float:
    """How long one HTTP request may go without an answer, in seconds.

    Raises:
        InvalidConfigError: it is not a positive number.
    """
    check_seconds(timeout=argument)
    return min(float(argument), threading.TIMEOUT_MAX)  # sockets take no more


def verify_ssl(argument: bool) -> bool:
    """Whether the server's certificate is checked.

    Raises:
        InvalidConfigError: it is not a bool.
    """
    if not isinstance(argument, bool):
        raise InvalidConfigError(
            f"verify_ssl={argument!r} is neither True nor False",
            hint="certificates of your own authority are checked with SSL_CERT_FILE=/its/certificate.pem",
        )
    return argument
