"""`agent-lightning doctor`: what is installed, whether a server answers, and what the model needs of which devices.

The SDK stays light: JAX, where it is installed, runs in a process of its own (`lightning_jax.main` in mode "plan").
"""

import glob
import importlib.util
import os
import platform
import re
import subprocess
import sys
from importlib import metadata

from agent_lightning import __version__, settings
from agent_lightning.exceptions import AgentLightningError
from agent_lightning.transport import Transport

DISTRIBUTION = "lightning-jax"
# What makes an accelerator's extra more than `jax`, which is all that its requirement names.
PLUGINS = {"cuda12": "jax-cuda12-plugin", "cuda13": "jax-cuda13-plugin", "tpu": "libtpu"}
AGENT_PACKAGES = (
    *("openai", "anthropic", "langchain-openai", "langchain-anthropic", "langgraph", "openai-agents"),
    *("pydantic-ai-slim", "smolagents", "litellm", "crewai"),
)
SERVER_TIMEOUT_S = 5.0
MOST_NAMES = 4  # of missing packages


def examine(server_url: str | None, api_key: str | None, arguments: list[str]) -> int:
    """Prints the findings.

    Args:
        server_url, api_key: as `Client` takes them.
        arguments: of `lightning_jax.main`: the model and the settings to plan memory for.

    Returns:
        0, or 1 where something does not work: a package of the base is missing, a server that is named does not
        answer, or the model cannot be read or does not fit.
    """
    sound = [_system(), _packages(), _server(server_url, api_key), _devices(arguments)]
    return 0 if all(sound) else 1


def _system() -> bool:
    print(f"agent-lightning {__version__}")
    print(f"  Python {platform.python_version()} ({sys.executable}), {platform.system()} {platform.machine()}")
    print(f"  {os.cpu_count()} cores")
    return True


def _packages() -> bool:
    """What of each extra is installed."""
    print("packages")
    requirements = _requirements()
    if requirements is None:
        print(f"  {DISTRIBUTION} runs from its source folder and is not installed: {_install('')}")
        return True
    sound = True
    for extra, names in requirements.items():
        versions = {name: _version(name) for name in names}
        missing = [name for name, version in versions.items() if version is None]
        found = ", ".join(f"{name} {version}" for name, version in versions.items() if version is not None)
        if not missing:
            print(f"  {extra or 'base':8} {found}")
            continue
        names = ", ".join(missing) if len(missing) <= MOST_NAMES else f"{', '.join(missing[:MOST_NAMES])} and others"
        print(f"  {extra or 'base':8} missing {names}: {_install(extra)}")
        sound = sound and bool(extra)
    agents = [f"{name} {version}" for name in AGENT_PACKAGES if (version := _version(name))]
    print(f"  agents   {', '.join(agents) or 'none of ' + ', '.join(AGENT_PACKAGES)}")
    return sound


def _requirements() -> dict[str, list[str]] | None:
    """Extra ("" for the base) -> names of packages, as the installed distribution states them."""
    try:
        lines = metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        return None
    extras: dict[str, list[str]] = {}
    for line in lines:
        name = re.match(r"[\w.-]+", line)[0]
        extra = re.search(r"extra == ['\"]([\w-]+)['\"]", line)
        extra = extra[1] if extra else ""
        if name == "jax" and extra in PLUGINS:
            extras.setdefault(extra, []).append(PLUGINS[extra])
        if "platform_system" in line and platform.system() == "Windows":
            continue
        extras.setdefault(extra, []).append(name)
    return extras


def _install(extra: str) -> str:
    return f"pip install '.[{extra}]' in its source folder" if extra else "pip install . in its source folder"


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _server(server_url: str | None, api_key: str | None) -> bool:
    print("server")
    if not (server_url or os.environ.get(settings.SERVER_URL)):
        print(f"  no URL to ask: pass --server-url, or set {settings.SERVER_URL}")
        return True
    try:
        url = settings.server_url(server_url)
        transport = Transport(url, api_key=settings.api_key(api_key), timeout_s=SERVER_TIMEOUT_S, max_retries=0)
        try:
            health = transport.request("GET", "/health")
            transport.request("GET", "/v1/models")  # unlike /health, this asks for the key
        finally:
            transport.close()
        print(f"  {url} answers: {health['model']}, policy version {health['policy_version']}")
        return True
    except (AgentLightningError, KeyError, TypeError) as error:  # the latter two: something else answers there
        text = str(error) if isinstance(error, AgentLightningError) else "what answers there is no Lightning Server"
        print(f"  {text}")
        return False


def _devices(arguments: list[str]) -> bool:
    print("devices and memory")
    missing = [name for name in ("lightning_jax", "jax", "ml_collections") if importlib.util.find_spec(name) is None]
    if missing:
        print(f"  not known without the server's packages ({', '.join(missing)}): {_install('server')}")
        return not arguments
    _unused_accelerator()
    sys.stdout.flush()
    command = [sys.executable, "-m", "lightning_jax.main", "--config.mode=plan", *arguments]
    return subprocess.run(command).returncode == 0


def _unused_accelerator() -> None:
    """Says so where an accelerator is in the machine and JAX's package for it is not."""
    for pattern, what, extras in (
        ("/dev/nvidia[0-9]*", "NVIDIA GPUs", ("cuda13", "cuda12")),
        ("/dev/accel*", "TPUs", ("tpu",)),
    ):
        found = glob.glob(pattern)
        if found and not any(_version(PLUGINS[extra]) for extra in extras):
            print(f"  {len(found)} {what} are here that JAX cannot use: {_install(extras[0])}")
