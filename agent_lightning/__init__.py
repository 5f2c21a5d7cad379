"""Train LLM agents with reinforcement learning: what agents and clients import.

Starts in milliseconds: everything that needs a third-party package is imported on first use.
"""

import importlib

from agent_lightning.exceptions import (
    AgentLightningError,
    DataUploadError,
    InvalidConfigError,
    KeyRefusedError,
    ServerConnectionError,
    TrainingError,
)
from agent_lightning.types import EvalResult, Resource, Task, TrainingResult, Trajectory, Transition

__version__ = "0.1.0"

__all__ = [
    "AgentLightningError",
    "Client",
    "DataUploadError",
    "EvalResult",
    "InvalidConfigError",
    "KeyRefusedError",
    "Pool",
    "Resource",
    "ServerConnectionError",
    "Task",
    "TrainingError",
    "TrainingResult",
    "Trajectory",
    "Transition",
]

_ON_FIRST_USE = {"Client": "agent_lightning.client", "Pool": "agent_lightning.pool"}


def __getattr__(name: str):
    if name in _ON_FIRST_USE:
        return getattr(importlib.import_module(_ON_FIRST_USE[name]), name)
    raise AttributeError(f"module 'agent_lightning' has no attribute {name!r}")


def __dir__():
    return sorted(__all__)
