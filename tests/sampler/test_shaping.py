"""Requests that do not sample from the model's own distribution: grammars, penalties, biases, least lengths; and those
who want to know the likeliest tokens. References are written out in NumPy from the logits of the learner's forward.
"""

import collections
import dataclasses
import json
import logging

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_jax.model import llama
from lightning_jax.model.attention import segment_attention
from lightning_jax.sampler import programs
from lightning_jax.sampler.engine import SamplingParams, noise_key
from lightning_jax.text import load_tokenizer
from lightning_jax.text.guided import Guide
from tests.sampler.conftest import SMALL, Model, Runner, random_model, run
from tests.sampler.test_engine import assert_same
from tests.sampler.test_sampling import reference_distribution

TOKENIZER = load_tokenizer("builtin:tiny")
GUIDE = Guide(TOKENIZER)
EOS = TOKENIZER.eos_ids[0]
SIZES = {"max_slots": 16, "max_seq_len": 128, "num_pages": 1024, "prefill_chunk": 32}
POINT = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "kind": {"enum": ["big", "small"]},
        "x": {"type": "integer", "minimum": 0, "maximum": 999},
    },
    "required": ["name", "kind", "x"],
    "additionalProperties": False,
}
# A model that knows no JSON writes long white space and long strings; this is what ends both.
CLOSERS = tuple((TOKENIZER.encode(text)[0], 4.0) for text in '",}]:')


@pytest.fixture(scope="module")
def model() -> Model:
    config = dataclasses.replace(SMALL, vocab_size=TOKENIZER.vocab_size, eos_ids=TOKENIZER.eos_ids)
    return random_model(config)


@pytest.fixture(scope="module")
def engine(model):
    """For all tests that do not care what ran before."""
    return model.engine(**SIZES)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    rng = np.random.default_rng(5)
    return [rng.integers(0, 256, length).tolist() for length in (20, 1, 33, 16, 17, 48, 5, 40)]


def sampling(i: int, **changes) -> SamplingParams:
    return SamplingParams(**({"max_tokens": 40, "noise_key": noise_key("shaping", i)} | changes))


def pointed(i: int, **changes) -> SamplingParams:
    """For a reply that is a `POINT`."""
    changes = {"grammar": GUIDE.json_schema(POINT), "logit_bias": CLOSERS, "max_tokens": 80} | changes
    return sampling(i, **changes)


def model_logits(model: Model, tokens: list[int]) -> np.ndarray:
    """The logits after every position, [len(tokens), V], by the learner's attention on the whole sequence."""
    length = 256
    token_bt = np.zeros((1, length), np.int32)
    token_bt[0, : len(tokens)] = tokens
    segment_bt = (np.arange(length) < len(tokens)).astype(np.int32)[None]
    position_bt = np.arange(length, dtype=np.int32)[None]
    attend = segment_attention(segment_bt, position_bt, None)
    x_btd, _ = llama.forward(model.params, model.config, token_bt, position_bt, attend)
    return np.asarray(llama.unembed(model.params, model.config, x_btd[0]))[: len(tokens)]


def reference_logits(logits: np.ndarray, s: SamplingParams, prompt: list[int], sampled: list[int]) -> np.ndarray:
    """OpenAI's formula for penalties and bias behind CTRL's repetition penalty, then what is not allowed."""
    logits = logits.astype(np.float64)
    seen = sorted({*prompt, *sampled})
    logits[seen] = np.where(logits[seen] > 0, logits[seen] / s.repetition_penalty, logits[seen] * s.repetition_penalty)
    for token, count in collections.Counter(sampled).items():
        logits[token] -= count * s.frequency_penalty + (count > 0) * s.presence_penalty
    for token, bias in s.logit_bias:
        logits[token] += bias
    allowed = np.ones(len(logits), bool)
    if s.grammar is not None:
        cursor = s.grammar.start()
        for token in sampled:
            cursor.accept(token)
        allowed = np.unpackbits(cursor.mask().view(np.uint8), bitorder="little")[: len(logits)] > 0
    if len(sampled) < s.min_tokens:
        allowed[EOS] = False
    return np.where(allowed, logits, -np.inf)


SHAPES = {
    "grammar": {"grammar": GUIDE.json_schema(POINT)},
    "grammar, cooler and filtered": {
        "grammar": GUIDE.json_schema(POINT),
        "temperature": 0.7,
        "top_k": 20,
        "top_p": 0.9,
        "top_logprobs": 20,
    },
    "presence": {"presence_penalty": 1.5, "ignore_eos": True},
    "frequency": {"frequency_penalty": -0.8, "ignore_eos": True},
    "repetition": {"repetition_penalty": 1.7, "ignore_eos": True, "top_logprobs": 2},
    "bias": {"logit_bias": ((5, 6.0), (77, -100.0), (5, 1.0)), "top_logprobs": 5},
    "least length": {"min_tokens": 12, "logit_bias": ((EOS, 30.0),)},
    "everything": {
        "grammar": GUIDE.json_schema(POINT),
        "presence_penalty": 0.5,
        "frequency_penalty": 0.3,
        "repetition_penalty": 1.2,
        "logit_bias": CLOSERS,
        "min_tokens": 3,
        "top_logprobs": 3,
        "temperature": 1.2,
        "top_p": 0.95,
    },
    "top only": {"top_logprobs": 4, "temperature": 0.8, "ignore_eos": True},
    "greedy": {"temperature": 0.0, "grammar": GUIDE.json_schema(POINT), "top_logprobs": 1},
}


@pytest.fixture(scope="module")
def shaped(engine, prompts):
    """One request of each kind, together with some that have no shape."""
    requests = [(name, prompts[i % 8], sampling(i, **shape)) for i, (name, shape) in enumerate(SHAPES.items())]
    free = [(f"free {i}", prompts[i], sampling(100 + i, ignore_eos=True)) for i in range(5)]
    return requests, run(engine, [*requests, *free])


@pytest.mark.parametrize("name", SHAPES)
def test_logprobs_are_those_of_the_distribution_sampled_from(model, shaped, name):
    requests, done = shaped
    _, prompt, s = next(request for request in requests if request[0] == name)
    completion = done[name]
    tokens = completion.token_ids
    assert completion.finish_reason in ("stop", "length") and len(tokens) >= min(5, s.max_tokens)
    assert completion.constrained == (name != "top only")
    logits = model_logits(model, prompt + tokens)[len(prompt) - 1 : -1]
    for t, token in enumerate(tokens):
        x = reference_logits(logits[t], s, prompt, tokens[:t])
        greedy = s.temperature == 0.0
        p = reference_distribution(x, *((1.0, 0, 1.0) if greedy else (s.temperature, s.top_k, s.top_p)))
        np.testing.assert_allclose(completion.logprobs[t], np.log(p[token]), atol=2e-4, err_msg=f"token {t}")
        if greedy:
            assert token == x.argmax()
        if s.top_logprobs:
            top = completion.top_logprobs[t]
            order = np.argsort(-p, kind="stable")[: min(s.top_logprobs, (p > 0).sum())]
            assert [index for index, _ in top] == order.tolist()
            np.testing.assert_allclose([logprob for _, logprob in top], np.log(p[order]), atol=2e-4)
    assert (completion.top_logprobs is None) == (s.top_logprobs == 0)
    if s.min_tokens:
        assert EOS not in tokens[: s.min_tokens] and len(tokens) >= s.min_tokens


def test_a_grammars_replies_are_in_its_language(engine, prompts):
    done = run(engine, [(f"{i}", prompts[i % 8], pointed(i)) for i in range(24)])
    finished = [completion for completion in done.values() if completion.finish_reason == "stop"]
    assert len(finished) > 12
    for completion in finished:
        assert completion.token_ids[-1] == EOS and completion.constrained
        jsonschema.validate(json.loads(TOKENIZER.decode(completion.token_ids[:-1])), POINT)
    assert len({tuple(completion.token_ids) for completion in finished}) > 8


NAMES = st.sampled_from(["a", "b", "size", "\u00e9"])
LEAVES = st.sampled_from(
    [
        {"type": "boolean"},
        {"type": "string", "maxLength": 4},
        {"type": "integer", "minimum": -5, "maximum": 120},
        {"enum": ["x", 3, None, "\u2603"]},
        {"type": "array", "items": {"type": "boolean"}, "maxItems": 2},
    ]
)
OBJECTS = st.dictionaries(NAMES, LEAVES, max_size=3).map(
    lambda properties: {
        "type": "object",
        "properties": properties,
        "required": sorted(properties)[:2],
        "additionalProperties": False,
    }
)


@given(schemas=st.lists(st.one_of(LEAVES, OBJECTS), min_size=1, max_size=6), seed=st.integers(0, 2**20))
@settings(max_examples=12, deadline=None)
def test_any_schemas_at_once(engine, schemas, seed):
    requests = [(f"{i}", [i], pointed(seed + i, grammar=GUIDE.json_schema(s))) for i, s in enumerate(schemas)]
    done = run(engine, requests)
    for i, schema in enumerate(schemas):
        if done[f"{i}"].finish_reason == "stop":
            text = TOKENIZER.decode(done[f"{i}"].token_ids[:-1])
            jsonschema.validate(json.loads(text), schema)
        else:
            assert len(done[f"{i}"].token_ids) == 80


@pytest.fixture(scope="module")
def mixed(prompts) -> list[tuple[str, list[int], SamplingParams]]:
    """Grammars, penalties and free requests; several of each share a prompt."""
    requests = []
    for i in range(8):
        prompt = prompts[i // 2]
        requests.append((f"json {i}", prompt, pointed(i, max_tokens=50)))
        requests.append((f"free {i}", prompt, sampling(i, temperature=0.8, ignore_eos=True)))
        if i % 2:
            requests.append((f"penalty {i}", prompt, sampling(i, frequency_penalty=0.5, ignore_eos=True)))
            requests.append((f"top {i}", prompt, sampling(i, top_logprobs=3, top_k=30, ignore_eos=True)))
    return requests


@pytest.fixture(scope="module")
def together(model, mixed):
    return run(model.engine(**SIZES), mixed)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"max_slots": 3}, id="few slots"),
        pytest.param({"num_pages": 9}, id="few pages, so preemption, and decoding that reads them"),
    ],
)
def test_company_layout_and_preemption_change_no_bit(model, mixed, together, changes):
    engine = model.engine(**SIZES | changes)
    assert_same(run(engine, reversed(mixed)), together)
    assert_same(run(engine, mixed, between=engine.step), together)  # now with prefixes in the cache
    stats = engine.stats()
    assert stats["cached_tokens"] > 0
    assert (stats["preemptions"] > 0) == ("num_pages" in changes)
    assert stats["running"] == 0 and stats["free_pages"] == stats["num_pages"]


def test_alone_is_as_in_company(engine, mixed, together):
    for request in mixed[::7]:
        assert_same(run(engine, [request]), together)


def test_requests_without_a_shape_do_not_notice(engine, mixed, together):
    free = [request for request in mixed if request[0].startswith("free")]
    assert_same(run(engine, free), together)


def test_asking_for_the_likeliest_tokens_changes_none(engine, prompts):
    plain = sampling(3, temperature=0.9, ignore_eos=True)
    done = run(engine, [("a", prompts[2], plain)])["a"]
    ranked = run(engine, [("a", prompts[2], dataclasses.replace(plain, top_logprobs=20))])["a"]
    assert_same({"a": ranked}, {"a": done})
    assert not ranked.constrained and all(len(top) == 20 for top in ranked.top_logprobs)


def test_a_prompt_is_computed_once_for_shaped_and_free(model, prompts):
    engine = model.engine(**SIZES)
    requests = [(f"{i}", prompts[2], pointed(i) if i % 2 else sampling(i)) for i in range(8)]
    run(engine, requests)
    assert engine.stats()["prefill_tokens"] <= 2 * len(prompts[2])  # without its last token, and with it


def test_the_end_at_max_tokens_leaves_the_beginning_of_a_reply(engine, prompts):
    done = run(engine, [("a", prompts[0], pointed(1, max_tokens=9))])["a"]
    assert done.finish_reason == "length" and len(done.token_ids) == 9
    cursor = GUIDE.json_schema(POINT).start()
    for token in done.token_ids:
        cursor.accept(token)
    assert not cursor.finished


def test_a_grammar_ends_the_reply_even_if_eos_does_not(engine, prompts):
    grammar = GUIDE.choice(["yes", "no"])
    done = run(engine, [("a", prompts[0], sampling(0, grammar=grammar, ignore_eos=True, min_tokens=8))])["a"]
    assert done.finish_reason == "stop" and TOKENIZER.decode(done.token_ids[:-1]) in ("yes", "no")


def test_streams_and_stop_strings(engine, prompts):
    whole = run(engine, [("a", prompts[0], pointed(2, top_logprobs=2))])["a"]
    streamed, tops = [], []
    runner = Runner(engine)
    runner.submit(
        "a",
        prompts[0],
        pointed(2, top_logprobs=2),
        on_tokens=lambda ids, logprobs, _: streamed.extend(zip(ids, logprobs.tolist(), strict=True)),
        on_top_logprobs=tops.extend,
        should_stop=lambda ids: 5 if len(ids) >= 7 else None,
    )
    done = runner.finish()["a"]
    assert done.token_ids == whole.token_ids[:5] and done.top_logprobs == whole.top_logprobs[:5]
    assert streamed[:5] == list(zip(done.token_ids, done.logprobs.tolist(), strict=True))
    assert tops[:5] == done.top_logprobs


def test_cancel_while_waiting_for_the_host(engine, prompts):
    runner = Runner(engine)
    for i in range(4):
        runner.submit(f"json {i}", prompts[i], pointed(i))
        runner.submit(f"free {i}", prompts[i], sampling(i, ignore_eos=True))
    for _ in range(6):
        engine.step()
    for i in range(3):
        engine.cancel(f"json {i}")
    done = runner.finish()
    assert [done[f"json {i}"].finish_reason for i in range(3)] == ["cancelled"] * 3
    assert 0 < len(done["json 0"].token_ids) < 10
    assert done["json 3"].finish_reason in ("stop", "length")
    assert all(len(done[f"free {i}"].token_ids) == 40 for i in range(4))
    assert engine.stats()["free_pages"] == engine.stats()["num_pages"]


class Stuck:
    """A grammar that gives up after three tokens."""

    finished = False

    def __init__(self):
        self.left = 3

    def start(self):
        return Stuck()

    def mask(self):
        return np.full(-(-TOKENIZER.vocab_size // 32), 0xFFFFFFFF, np.uint32)

    def accept(self, token_id):
        self.left -= 1
        if not self.left:
            raise ValueError("too complex")


def test_a_grammar_that_cannot_go_on_ends_its_own_request_only(engine, prompts, caplog):
    requests = [("stuck", prompts[0], sampling(0, grammar=Stuck())), ("fine", prompts[0], pointed(0))]
    with caplog.at_level(logging.CRITICAL):
        done = run(engine, requests)
    assert done["stuck"].finish_reason == "error" and "too complex" in done["stuck"].error
    assert done["fine"].finish_reason == "stop"


@pytest.mark.parametrize(
    "wrong",
    [
        {"presence_penalty": 2.5},
        {"frequency_penalty": float("nan")},
        {"repetition_penalty": 0.0},
        {"logit_bias": ((3, 101.0),)},
        {"min_tokens": -1},
        {"top_logprobs": 21},
    ],
)
def test_parameters_are_checked(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        SamplingParams(**wrong)


def test_a_bias_of_no_token_is_refused(engine, prompts):
    with pytest.raises(ValueError, match="outside the vocabulary of 264"):
        Runner(engine).submit("a", prompts[0], sampling(0, logit_bias=((264, 1.0),)))


def test_what_is_compiled(model, prompts):
    """For each decode shape in use, one program for grammars and one for penalties; nothing more for anybody."""
    engine = model.engine(**SIZES, decode_steps=3)
    run(engine, [(f"{i}", prompts[4], sampling(i, max_tokens=20)) for i in range(6)])
    warm = programs.jitted().compilations()
    short = {"max_tokens": 20, "logit_bias": ()}
    run(engine, [(f"{i}", prompts[4], pointed(i, **short, top_logprobs=i % 2)) for i in range(6)])
    assert programs.jitted().compilations() == warm + 1
    run(engine, [(f"{i}", prompts[4], sampling(i, max_tokens=20, presence_penalty=1.0)) for i in range(6)])
    assert programs.jitted().compilations() == warm + 2
    run(engine, [(f"{i}", prompts[4], [sampling, pointed][i % 2](i, max_tokens=20)) for i in range(6)])
    run(engine, [(f"{i}", prompts[4], sampling(i, max_tokens=20)) for i in range(6)])
    assert programs.jitted().compilations() == warm + 2


def test_one_grammar_slows_nobody_down_much(model, prompts):
    """In rounds, not seconds: what the free requests of a batch have to wait for."""
    engine = model.engine(**SIZES)
    free = [(f"{i}", prompts[0], sampling(i, max_tokens=60, ignore_eos=True)) for i in range(8)]
    run(engine, free)
    alone = engine.stats()["decode_rounds"]
    done = run(engine, [*free, ("json", prompts[0], pointed(0, max_tokens=20))])
    assert engine.stats()["decode_rounds"] - alone < 3 * alone
    assert len(done["json"].token_ids) == 20


@pytest.mark.parametrize("free", [0, 2])
def test_who_waits_for_the_host_samples_in_the_same_rounds_as_the_others_who_do(model, prompts, free):
    """Though they came at other times; and a few who need not wait are no reason to take turns."""
    engine = model.engine(**SIZES)
    runner = Runner(engine)
    counted = {"max_tokens": 40, "ignore_eos": True, "presence_penalty": 1.0}
    for i in range(8):
        runner.submit(f"{i}", prompts[0], sampling(i, **counted))
        engine.step()
    for i in range(free):
        runner.submit(f"free {i}", prompts[0], sampling(i, max_tokens=40, ignore_eos=True))
    runner.finish()
    assert engine.stats()["decode_steps"] < 40 + 16
