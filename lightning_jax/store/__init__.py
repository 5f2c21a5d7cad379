"""The SQLite record of everything: datasets, jobs, rollouts, attempts, model calls."""

from lightning_jax.store.records import (
    ENDED_JOB,
    Attempt,
    CallRecord,
    DataError,
    DatasetInfo,
    RolloutEntry,
    RolloutRecord,
    StoreError,
    UnknownError,
)
from lightning_jax.store.rollouts import POOL_SILENCE_S, is_idle
from lightning_jax.store.store import Store

__all__ = [
    "ENDED_JOB",
    "POOL_SILENCE_S",
    "Attempt",
    "CallRecord",
    "DataError",
    "DatasetInfo",
    "RolloutEntry",
    "RolloutRecord",
    "Store",
    "StoreError",
    "UnknownError",
    "is_idle",
]
