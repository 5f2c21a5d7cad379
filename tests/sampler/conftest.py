"""A small random model, an engine for it, and a way to run requests through one."""

import dataclasses
from collections.abc import Callable, Iterable

import jax
import numpy as np
import pytest

from lightning_jax.model import llama
from lightning_jax.sampler.engine import Completion, Engine, Request, SamplingParams

SMALL = llama.LlamaConfig(
    vocab_size=151,
    hidden_size=64,
    intermediate_size=96,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    max_seq_len=256,
    eos_ids=(150,),
)
DEFAULTS = {
    "max_slots": 8,
    "page_size": 16,
    "num_pages": 1024,
    "max_seq_len": 256,
    "decode_steps": 4,
    "prefill_chunk": 64,
}


@dataclasses.dataclass
class Model:
    config: llama.LlamaConfig
    params: llama.Params

    def engine(self, **changes) -> Engine:
        return Engine(self.config, self.params, **(DEFAULTS | changes))


def random_model(config: llama.LlamaConfig, seed: int = 0) -> Model:
    """Random weights whose logits spread enough that greedy and sampled replies vary."""
    params = llama.init_params(config, jax.random.key(seed))
    params["embed_vd"] *= 50.0
    if not config.tie_embeddings:
        params["unembed_dv"] *= 3.0
    return Model(config, params)


@pytest.fixture(scope="session")
def small() -> Model:
    return random_model(SMALL)


@pytest.fixture(scope="session")
def prompts() -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 150, length).tolist() for length in (40, 17, 100, 150, 3, 64, 16, 33)]


class Runner:
    """Requests into an engine and their completions out.

    Attributes:
        done: completions by request id.
    """

    def __init__(self, engine: Engine):
        self.engine = engine
        self.done: dict[str, Completion] = {}
        self.order: list[str] = []

    def submit(self, request_id: str, prompt: list[int], sampling: SamplingParams, **others) -> None:
        self.engine.submit(Request(request_id, prompt, sampling, on_done=self._on_done, **others))

    def finish(self, limit: int = 10_000) -> dict[str, Completion]:
        for _ in range(limit):
            if not self.engine.step():
                assert not self.engine.stats()["queue_length"], "nobody waits for an engine that does nothing"
                return self.done
        raise AssertionError("the engine does not come to rest")

    def _on_done(self, completion: Completion) -> None:
        assert completion.request_id not in self.done, "on_done is called once"
        self.done[completion.request_id] = completion
        self.order.append(completion.request_id)


def run(
    engine: Engine,
    requests: Iterable[tuple[str, list[int], SamplingParams]],
    between: Callable[[], object] | None = None,
) -> dict[str, Completion]:
    """Submits all, with `between` after each, and runs to the end."""
    runner = Runner(engine)
    for request in requests:
        runner.submit(*request)
        if between is not None:
            between()
    return runner.finish()
