"""Proxies and this machine: a proxy that the environment names cannot reach a server on the caller's own loopback."""

import ipaddress
import os
from collections.abc import Mapping
from urllib.parse import urlsplit


def loopback_host(url: str) -> str | None:
    """The URL's host, without an IPv6 address's brackets, if it is this machine's loopback; otherwise None."""
    host = urlsplit(url).hostname or ""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host if host == "localhost" or host.endswith(".localhost") else None
    return host if address.is_loopback or address.is_unspecified else None


def direct(url: str, environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Variables that make HTTP libraries reach a loopback URL directly; none where that needs none.

    Nothing is set where the environment names no proxy, because a lone NO_PROXY makes urllib and httpx on macOS
    disregard the proxies of the system's settings.

    Args:
        url: of the server.
        environ: what is there already, and stays in force.

    Returns:
        NO_PROXY and no_proxy, or nothing.
    """
    host = loopback_host(url)
    if host is None or not any(name.lower().endswith("_proxy") and value for name, value in environ.items()):
        return {}
    variables = {}
    for name, other in (("NO_PROXY", "no_proxy"), ("no_proxy", "NO_PROXY")):
        before = environ.get(name, environ.get(other, "")).strip()
        # An IPv6 address goes in without brackets, which httpx cannot parse here; urllib alone would want them.
        # "*" has its meaning, no proxy for anything, only where it stands alone.
        variables[name] = before if before == "*" else ",".join(filter(None, [before, host]))
    return variables
