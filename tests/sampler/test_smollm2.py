"""The engine on a real model: greedy replies are transformers', token for token."""

import json
import pathlib
import runpy

import numpy as np
import pytest

from lightning_jax.model import weights
from lightning_jax.sampler.engine import Engine, SamplingParams
from tests.sampler.conftest import run

HERE = pathlib.Path(__file__).parent
GOLDEN = json.loads((HERE / "goldens" / "smollm2_greedy.json").read_text())
PROMPTS, REPLIES = GOLDEN["prompts"], GOLDEN["replies"]
SAMPLING = SamplingParams(temperature=0.0, max_tokens=16)


@pytest.fixture(scope="module")
def engine(smollm2_gguf) -> Engine:
    """Too few pages for 8 requests at their full length; short ones decode on a dense copy, long ones on the pages."""
    config, params = weights.load_model(smollm2_gguf)
    sizes = {"max_slots": 8, "page_size": 8, "num_pages": 64, "max_seq_len": 128, "prefill_chunk": 32}
    return Engine(config, params, **sizes, decode_steps=4, row_floor=8)


def assert_replies(engine: Engine, indices, others=()) -> None:
    done = run(engine, [*others, *((str(i), PROMPTS[i], SAMPLING) for i in indices)])
    for i in indices:
        assert done[str(i)].token_ids == REPLIES[i], f"prompt {i}"
        assert done[str(i)].finish_reason == ("stop" if REPLIES[i][-1] == 2 else "length")


def test_twenty_prompts_at_once_across_preemption_then_with_their_prefixes_cached(engine):
    assert len(PROMPTS) == 20
    rng = np.random.default_rng(0)
    long = SamplingParams(max_tokens=70, ignore_eos=True)  # of random prompts, to make pages scarce
    assert_replies(engine, range(20), [(f"long {i}", rng.integers(3, 49152, 20).tolist(), long) for i in range(7)])
    first = engine.stats()
    assert first["preemptions"] > 0
    assert_replies(engine, range(19, -1, -1))
    assert engine.stats()["cached_tokens"] > first["cached_tokens"] > 0


def test_alone(engine):
    for i in range(0, 20, 3):
        assert_replies(engine, [i])


def test_alone_without_any_prefix(engine):
    for i in (0, 13):
        engine._scheduler.flush()
        before = engine.stats()["cached_tokens"]
        assert_replies(engine, [i])
        assert engine.stats()["cached_tokens"] == before


def test_goldens_are_what_transformers_says_now(smollm2_gguf):
    """Every token of a reply is the likeliest after all before it: that is what greedy means."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    torch.set_num_threads(1)  # its threads wait by spinning, which is slow next to other busy processes
    model = runpy.run_path(str(HERE.parent / "model" / "make_goldens.py"))["transformers_gguf"](smollm2_gguf)
    with torch.no_grad():
        for prompt, reply in zip(PROMPTS, REPLIES, strict=True):
            logits_tv = model(torch.tensor(prompt + reply[:-1])[None]).logits[0]
            assert logits_tv[len(prompt) - 1 :].argmax(-1).tolist() == reply


def test_goldens_are_varied():
    assert len({tuple(prompt) for prompt in PROMPTS}) == 20
    assert len({tuple(reply) for reply in REPLIES}) > 15
    assert len({token for reply in REPLIES for token in reply}) > 50
    assert np.ptp([len(prompt) for prompt in PROMPTS]) > 20
