"""The engine: the same tokens in any company, and what happens to requests that do not end by themselves."""

import collections
import dataclasses
import logging
import pathlib
import re
import subprocess
import sys
import threading
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lightning_jax.model import llama, weights
from lightning_jax.model.attention import segment_attention
from lightning_jax.sampler import kv_cache, programs
from lightning_jax.sampler.engine import QueueFull, Request, SamplingParams, noise_key
from lightning_jax.sampler.scheduler import PrefillShape
from tests.sampler.conftest import SMALL, Model, Runner, random_model, run

GREEDY = SamplingParams(temperature=0.0, max_tokens=12)


def plain_logprobs(model, tokens: list[int]) -> np.ndarray:
    """log-softmax of every position, [len(tokens), V], by the learner's attention on the whole sequence."""
    token_bt = np.zeros((1, 256), np.int32)
    token_bt[0, : len(tokens)] = tokens
    segment_bt = (np.arange(256) < len(tokens)).astype(np.int32)[None]
    position_bt = np.arange(256, dtype=np.int32)[None]

    @jax.jit
    def forward(params, token_bt):
        attend = segment_attention(segment_bt, position_bt, model.config.sliding_window)
        x_btd, _ = llama.forward(params, model.config, token_bt, position_bt, attend)
        return jax.nn.log_softmax(llama.unembed(params, model.config, x_btd[0]))

    return np.asarray(forward(model.params, token_bt))[: len(tokens)]


def mixed_requests(prompts) -> list[tuple[str, list[int], SamplingParams]]:
    """Different lengths, temperatures and filters; several share a prompt."""
    rng = np.random.default_rng(1)
    requests = []
    for i in range(20):
        sampling = SamplingParams(
            temperature=float(rng.choice([0.0, 0.7, 1.0])),
            top_p=float(rng.choice([0.8, 1.0])),
            top_k=int(rng.choice([0, 10])),
            max_tokens=int(rng.integers(1, 90)),
            noise_key=noise_key("mixed", i),
        )
        requests.append((f"r{i}", prompts[i % len(prompts)], sampling))
    return requests


# To the last bit on CPUs whose matrix kernels were looked at; elsewhere rounding may differ by shape.
CPUINFO = pathlib.Path("/proc/cpuinfo")
EXACT = CPUINFO.exists() and "avx512f" in CPUINFO.read_text()


def assert_same(found, expected, *, bits: bool = EXACT) -> None:
    for name, completion in found.items():
        assert completion.token_ids == expected[name].token_ids, name
        assert completion.finish_reason == expected[name].finish_reason, name
        if bits:
            np.testing.assert_array_equal(completion.logprobs, expected[name].logprobs, err_msg=name)
        else:
            np.testing.assert_allclose(completion.logprobs, expected[name].logprobs, atol=1e-4, err_msg=name)


@pytest.fixture(scope="module")
def expected(small, prompts):
    """`mixed_requests`, all at once, with room for everyone."""
    return run(small.engine(max_slots=32), mixed_requests(prompts))


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"max_slots": 3}, id="few slots"),
        pytest.param({"num_pages": 18}, id="few pages, so preemption, and decoding that reads them"),
        pytest.param({"decode_steps": 7, "page_size": 8}, id="other rounds and pages"),
        pytest.param({"prefill_chunk": 16}, id="chunks of 16"),
    ],
)
def test_company_layout_and_preemption_change_no_bit(small, prompts, expected, changes):
    engine = small.engine(**changes)
    requests = mixed_requests(prompts)
    assert_same(run(engine, reversed(requests)), expected)
    assert_same(run(engine, requests, between=engine.step), expected)  # now with prefixes in the cache
    stats = engine.stats()
    assert stats["cached_tokens"] > 0
    assert (stats["preemptions"] > 0) == ("num_pages" in changes)
    assert stats["running"] == 0 and stats["free_pages"] == stats["num_pages"]


def test_the_shipped_model_samples_the_same_whoever_comes_first():
    model = Model(*weights.load_model("builtin:tiny"))
    rng = np.random.default_rng(0)
    tasks = [rng.integers(32, 127, 40).tolist() for _ in range(3)]
    requests = [(f"{i}", tasks[i % 3], SamplingParams(max_tokens=8, noise_key=(i, 9))) for i in range(12)]
    sizes = {"max_slots": 16, "max_seq_len": 64, "num_pages": 256}
    together = run(model.engine(**sizes), requests)
    engine = model.engine(**sizes)
    assert_same(run(engine, reversed(requests), between=engine.step), together)


def test_alone_is_as_in_company(small, prompts, expected):
    engine = small.engine(max_slots=32)
    for request in mixed_requests(prompts)[::3]:
        assert_same(run(engine, [request]), expected)


@pytest.mark.parametrize("width", [64, 576, 1536])
def test_a_product_has_the_same_bits_beside_any_number_of_rows(width):
    config = dataclasses.replace(SMALL, hidden_size=width, tie_embeddings=True)
    x_nd, embed_vd = (jax.random.normal(jax.random.key(i), (shape, width)) for i, shape in enumerate((300, 151)))
    params = llama.turn_matrices({"embed_vd": embed_vd, "layers": []})
    unembed = jax.jit(lambda x: llama.unembed(params, config, x), compiler_options=programs.compiler_options("cpu"))
    expected = np.asarray(unembed(x_nd))
    np.testing.assert_allclose(expected, x_nd @ embed_vd.T, atol=1e-3)
    for rows in (2, 3, 16, 32, 33, 48, 56, 64, 65, 128):
        np.testing.assert_array_equal(unembed(x_nd[:rows]), expected[:rows], err_msg=f"{rows} rows")


@pytest.mark.parametrize("row_floor", [2, 64])
def test_the_number_of_rows_changes_no_bit(small, prompts, expected, row_floor):
    assert_same(run(small.engine(row_floor=row_floor), mixed_requests(prompts)), expected)


@pytest.mark.parametrize("window", [None, 24])
def test_recorded_logprobs_are_the_models(prompts, window):
    model = random_model(dataclasses.replace(SMALL, sliding_window=window, num_kv_heads=4))
    sampling = SamplingParams(max_tokens=60, noise_key=(1, 2), ignore_eos=True)
    done = run(model.engine(), [(str(i), prompt, sampling) for i, prompt in enumerate(prompts)])
    for i, prompt in enumerate(prompts):
        tokens = done[str(i)].token_ids
        logprobs = plain_logprobs(model, prompt + tokens)[len(prompt) - 1 : -1]
        np.testing.assert_allclose(done[str(i)].logprobs, logprobs[np.arange(len(tokens)), tokens], atol=1e-4)


def test_greedy_is_the_argmax_of_the_whole_sequence(small, prompts):
    done = run(small.engine(), [(str(i), prompt, GREEDY) for i, prompt in enumerate(prompts)])
    for i, prompt in enumerate(prompts):
        tokens = done[str(i)].token_ids
        likeliest = plain_logprobs(small, prompt + tokens)[len(prompt) - 1 : -1].argmax(axis=-1)
        assert tokens == likeliest.tolist()


def test_sampling_again_with_another_key_gives_other_tokens(small, prompts):
    keys = [noise_key("seed", i) for i in range(8)]
    requests = [(str(i), prompts[0], SamplingParams(max_tokens=20, noise_key=key)) for i, key in enumerate(keys)]
    done = run(small.engine(), requests)
    assert len({tuple(completion.token_ids) for completion in done.values()}) == 8


def test_a_groups_prompt_is_computed_once(small, prompts):
    engine = small.engine()
    requests = [(str(i), prompts[2], SamplingParams(max_tokens=3, noise_key=(i, 0))) for i in range(8)]
    done = run(engine, requests)
    assert engine.stats()["prefill_tokens"] == len(prompts[2])
    assert sorted(completion.cached_tokens for completion in done.values()) == [0] + [len(prompts[2])] * 7


def test_a_next_turn_reuses_the_pages_of_prompt_and_reply(small, prompts):
    engine = small.engine()
    first = run(engine, [("a", prompts[2], SamplingParams(max_tokens=30, ignore_eos=True))])["a"]
    conversation = [*prompts[2], *first.token_ids, 5, 6, 7]
    second = run(engine, [("b", conversation, GREEDY)])["b"]
    full_pages = (len(prompts[2]) + 30 - 1) // 16  # the last token was never fed
    assert second.cached_tokens == full_pages * 16
    assert_same({"b": second}, run(small.engine(), [("b", conversation, GREEDY)]))


def test_stop_ids_eos_and_length(small, prompts):
    free = SamplingParams(max_tokens=40, noise_key=(3, 3), ignore_eos=True)
    tokens = run(small.engine(), [("free", prompts[0], free)])["free"].token_ids
    stop = tokens[10]
    cut = tokens[: tokens.index(stop) + 1]
    engine = small.engine(eos_ids=(stop,))
    done = run(
        engine,
        [
            ("stop", prompts[0], dataclasses.replace(free, stop_ids=(stop,))),
            ("eos", prompts[0], dataclasses.replace(free, ignore_eos=False)),
            ("free", prompts[0], free),
            ("one", prompts[0], dataclasses.replace(free, max_tokens=1)),
            ("full", prompts[3], dataclasses.replace(free, max_tokens=1000)),
        ],
    )
    assert done["stop"].token_ids == cut and done["stop"].finish_reason == "stop"
    assert done["eos"].token_ids == cut and done["eos"].finish_reason == "stop"
    assert done["free"].token_ids == tokens and done["free"].finish_reason == "length"
    assert done["one"].token_ids == tokens[:1] and done["one"].finish_reason == "length"
    assert len(done["full"].token_ids) == 256 - len(prompts[3]) and done["full"].finish_reason == "length"


def test_a_stop_string_keeps_what_the_caller_says(small, prompts):
    sampling = SamplingParams(max_tokens=50, noise_key=(3, 3), ignore_eos=True)
    tokens = run(small.engine(), [("a", prompts[0], sampling)])["a"].token_ids
    seen, streamed = [], []

    def should_stop(ids):
        seen.append(list(ids))
        return 9 if len(ids) >= 11 else None

    runner = Runner(small.engine())
    on_tokens = lambda ids, logprobs, _: streamed.extend(zip(ids, logprobs, strict=True))  # noqa: E731
    runner.submit("a", prompts[0], sampling, should_stop=should_stop, on_tokens=on_tokens)
    done = runner.finish()["a"]
    assert done.token_ids == tokens[:9] and done.finish_reason == "stop" and len(done.logprobs) == 9
    assert all(ids == tokens[: len(ids)] for ids in seen)
    assert [token for token, _ in streamed] == tokens[:9]
    np.testing.assert_array_equal([logprob for _, logprob in streamed], done.logprobs)


def test_cancel_while_waiting_prefilling_and_running(small, prompts):
    engine = small.engine(max_slots=2, prefill_chunk=16)
    runner = Runner(engine)
    sampling = SamplingParams(max_tokens=100, ignore_eos=True)
    for name in ("running", "other", "waiting"):
        runner.submit(name, prompts[0], sampling)
    runner.submit("at once", prompts[1], sampling)
    engine.cancel("at once")
    engine.step()
    engine.step()
    engine.cancel("waiting")
    engine.cancel("running")
    engine.cancel("nobody")
    engine.step()
    assert {name: done.finish_reason for name, done in runner.done.items()} == dict.fromkeys(
        ("at once", "waiting", "running"), "cancelled"
    )
    assert 0 < len(runner.done["running"].token_ids) < 100 and runner.done["waiting"].token_ids == []
    done = runner.finish()
    assert len(done["other"].token_ids) == 100
    assert_same({"other": done["other"]}, run(small.engine(), [("other", prompts[0], sampling)]))
    assert engine.stats()["free_pages"] == engine.stats()["num_pages"]


def test_who_comes_and_goes_while_others_are_taken_in_is_cancelled(small, prompts):
    class Inbox(collections.deque):
        has_looked = False

        def __len__(self):
            length = super().__len__()
            if not self.has_looked:
                self.has_looked = True
                runner.submit("at once", prompts[0], GREEDY)  # as by another thread, behind the look
                engine.cancel("at once")
            return length

    engine = small.engine()
    runner = Runner(engine)
    engine._inbox = Inbox()
    engine.step()
    assert runner.finish()["at once"].finish_reason == "cancelled"


def test_who_waits_for_pages_is_sampled_when_all_others_end_at_once(small, prompts):
    """Two fill the pages, and end in the round that is read because one of them needs another page."""
    engine = small.engine(num_pages=8, max_seq_len=96)
    free = SamplingParams(max_tokens=40, ignore_eos=True)
    members = {name: prompts[number][:30] for name, number in (("a", 2), ("b", 3), ("c", 5))}
    alone = {name: run(engine, [(name, prompt, free)])[name].token_ids for name, prompt in members.items()}
    for length in range(26, 36):
        requests = []
        for name, prompt in members.items():
            stop = () if name == "c" else (alone[name][length],)
            requests.append((name, prompt, dataclasses.replace(free, stop_ids=stop)))
        assert run(engine, requests).keys() == members.keys()


def test_turns_of_two_callers_alternate(small, prompts):
    engine = small.engine(max_slots=1)
    runner = Runner(engine)
    for name in ("a1", "a2", "a3", "b1"):
        runner.submit(name, prompts[4], SamplingParams(max_tokens=2, noise_key=noise_key(name)), fairness_key=name[0])
    runner.finish()
    assert runner.order == ["a1", "b1", "a2", "a3"]


def test_after_a_pause_rounds_begin_short(small, prompts):
    """So that whoever comes a moment later does not wait for a whole round, and is done little later."""
    engine = small.engine(decode_steps=8)
    runner = Runner(engine)
    sampling = SamplingParams(max_tokens=25, noise_key=noise_key("a"), ignore_eos=True)
    for _ in range(2):
        before = engine.stats()
        runner.submit("a", prompts[0], sampling)
        steps = []
        while engine.step():
            steps.append(engine.stats()["decode_steps"] - before["decode_steps"])
        assert np.diff(steps, prepend=0).tolist() == [1, 2, 4, 8, 8, 8, 0], "24 steps: the prefill samples a token, too"


def test_what_does_not_fit_is_refused(small, prompts):
    engine = small.engine(max_queue=2)
    runner = Runner(engine)
    with pytest.raises(ValueError, match="256 tokens; with room for a reply no more than 255 fit"):
        runner.submit("long", [1] * 256, GREEDY)
    with pytest.raises(ValueError, match="empty"):
        runner.submit("empty", [], GREEDY)
    with pytest.raises(ValueError, match="outside the vocabulary of 151"):
        runner.submit("foreign", [151], GREEDY)
    with pytest.raises(ValueError, match="stop ids"):
        runner.submit("stops", [1], SamplingParams(stop_ids=tuple(range(16))))
    for index in (-1, -100_000, 151, 2**31):  # with a least length they say which tokens may come
        with pytest.raises(ValueError, match="stop id is outside the vocabulary of 151"):
            runner.submit("foreign stop", [1], SamplingParams(stop_ids=(index,), min_tokens=2))
    runner.submit("a", prompts[0], GREEDY)
    with pytest.raises(ValueError, match="in flight"):
        runner.submit("a", prompts[0], GREEDY)
    runner.submit("b", prompts[0], GREEDY)
    with pytest.raises(QueueFull):
        runner.submit("c", prompts[0], GREEDY)
    with pytest.raises(ValueError, match="3 samples"):  # which there will never be room for
        engine.check_room(3)
    assert set(runner.finish()) == {"a", "b"}
    runner.submit("c", prompts[0], GREEDY)  # there is room again
    assert "c" in runner.finish()


@pytest.mark.parametrize("wrong", [{"temperature": -1.0}, {"temperature": float("nan")}, {"top_p": 1.5}, {"top_k": -1}])
def test_sampling_parameters_are_checked(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        SamplingParams(**wrong)


def test_idle_does_nothing(small):
    engine = small.engine()
    before = engine.stats()
    assert not engine.step()
    assert engine.stats() == before


def test_published_weights_are_used_at_once_and_old_prefixes_forgotten(small, prompts):
    other = random_model(SMALL, seed=7)
    engine = small.engine(version=3)
    sampling = SamplingParams(max_tokens=60, noise_key=(5, 5), ignore_eos=True)
    runner, versions = Runner(engine), []
    runner.submit("across", prompts[2], sampling, on_tokens=lambda ids, logprobs, both: versions.append(both))
    for _ in range(3):
        engine.step()
    engine.publish(other.params, version=4)
    runner.submit("after", prompts[2], sampling)
    done = runner.finish()
    assert done["across"].policy_version == 3 and done["after"].policy_version == 4
    assert done["across"].last_policy_version == done["after"].last_policy_version == 4
    # Also of what was sampled before the publication and read after it.
    assert versions == sorted(versions) and set(versions) == {(3, 3), (3, 4)}
    assert done["after"].cached_tokens == 0
    assert_same({"after": done["after"]}, run(other.engine(), [("after", prompts[2], sampling)]))
    before = run(small.engine(), [("across", prompts[2], sampling)])["across"].token_ids
    common = [a == b for a, b in zip(done["across"].token_ids, before, strict=True)]
    assert common[0] and not all(common)


@pytest.mark.parametrize("changes", [{}, {"num_pages": 18}], ids=["decoding copies pages", "decoding reads them"])
def test_what_was_not_finite_is_nothing_to_later_requests(small, prompts, expected, changes):
    engine = small.engine(**changes)
    engine.publish(jax.tree.map(lambda leaf: leaf * jnp.nan, small.params), version=1)
    diverged = run(engine, [(str(i), prompt, GREEDY) for i, prompt in enumerate(prompts)])
    assert {completion.finish_reason for completion in diverged.values()} == {"error"}
    engine.publish(small.params, version=2)
    for request in mixed_requests(prompts):
        assert_same(run(engine, [request]), expected)


@pytest.mark.parametrize("page_size", [16, 128])
def test_decoding_sums_as_prefill_does_whatever_the_pages(page_size):
    rng, heads, rows, length = np.random.default_rng(0), (2, 2, 64), 16, 256
    k, g, h = heads
    shape = rows * length // page_size + 1, page_size, k, h
    pages = kv_cache.Pages(*(jnp.asarray(rng.standard_normal(shape), jnp.float32) for _ in range(2)))
    table_bp = jnp.arange(1, shape[0], dtype=jnp.int32).reshape(rows, -1)
    position_b, row_b = jnp.arange(rows, dtype=jnp.int32) * 15, jnp.arange(rows, dtype=jnp.int32)
    q, new_k, new_v = (jnp.asarray(rng.standard_normal((rows, 1, *s)), jnp.float32) for s in (heads, (k, h), (k, h)))

    def both(pages):
        attend = kv_cache.prefill_attention(table_bp, position_b[:, None], jnp.ones((rows, 1), bool), None)
        dense = kv_cache.Dense(jnp.zeros((rows, k, h, length)), jnp.zeros((rows, k, length, h)))
        dense = kv_cache.load(pages, dense, table_bp, row_b, position_b)
        return attend(q, new_k, new_v, pages)[0], kv_cache.decode_attention(position_b, None, page_size)(
            q, new_k, new_v, dense
        )[0]

    on_pages, on_copy = jax.jit(both, compiler_options=programs.compiler_options("cpu"))(pages)
    np.testing.assert_allclose(on_copy, on_pages, atol=1e-5)
    if EXACT:
        np.testing.assert_array_equal(on_copy, on_pages)


def test_the_engine_keeps_its_own_copy_of_the_weights(small, prompts):
    params = jax.tree.map(jnp.copy, small.params)
    engine = dataclasses.replace(small, params=params).engine()
    jax.tree.map(lambda leaf: leaf.delete(), params)
    assert_same(run(engine, [("a", prompts[0], GREEDY)]), run(small.engine(), [("a", prompts[0], GREEDY)]))


def test_who_runs_goes_on_after_a_rest(small, prompts):
    engine = small.engine()
    sampling = SamplingParams(max_tokens=60, noise_key=(5, 5), ignore_eos=True)
    runner = Runner(engine)
    runner.submit("across", prompts[2], sampling)
    for _ in range(3):
        engine.step()
    held = [weakref.ref(leaf) for leaf in jax.tree.leaves(engine._executor._params)]
    engine.rest()
    assert not any(ref() for ref in held)
    engine.publish(small.params, version=1)
    assert_same(runner.finish(), run(small.engine(), [("across", prompts[2], sampling)]))


@pytest.mark.parametrize("num_pages, kept", [(448, 3), (256, 1)])
def test_workspaces_are_kept_while_they_are_no_larger_than_the_pages(small, num_pages, kept):
    executor = small.engine(num_pages=num_pages)._executor
    shapes = [shape for shape, dense in executor._decode_shapes.items() if dense]
    assert shapes == [(16, 4), (16, 8), (16, 16)]

    def use(shape: tuple[int, int]) -> list[int]:
        executor._use_workspace(*shape)
        return [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(executor._workspace.arrays)]

    first = {shape: use(shape) for shape in shapes}
    assert len(executor._idle) + 1 == kept
    if kept == len(shapes):
        assert {shape: use(shape) for shape in shapes} == first


def test_nothing_is_compiled_after_warmup(small, prompts):
    engine = small.engine(max_slots=16, decode_steps=5)
    begun, seen = programs.jitted().begin._cache_size(), []
    engine.warmup(lambda done, total: seen.append((done, total)))
    assert programs.jitted().begin._cache_size() <= begun + 1 < begun + len(engine._executor._prefill_shapes)
    assert [done for done, _ in seen] == list(range(1, seen[0][1] + 1))
    compiled = programs.jitted().compilations()
    run(engine, mixed_requests(prompts), between=engine.step)
    for version, params in enumerate([small.params, jax.device_put(small.params, jax.devices()[0])], 1):
        engine.publish(params, version)  # a learner's weights are committed to their device, fresh ones are not
        run(engine, mixed_requests(prompts))
    assert programs.jitted().compilations() == compiled


def test_no_program_copies_the_pages_and_none_computes_angles_in_a_layer(small):
    """They are donated and written in place, however many there are. The angles are found once for all layers."""
    executor = small.engine()._executor
    control, samples = executor._prefill_control(PrefillShape(4, 16, 32))
    sizes = {"config": SMALL, "chunk": 16, "tokens": 32}
    compiled = [executor._programs.prefill.lower(executor._params, executor._pages, control, samples, **sizes)]
    for (rows, width), dense in executor._decode_shapes.items():
        executor._use_workspace(rows, width)
        assert (executor._workspace.arrays is not None) == dense
        compiled.append(
            executor._programs.decode.lower(
                executor._params,
                executor._pages,
                executor._workspace.arrays,
                executor._state,
                np.zeros((rows, 2 + width), np.int32),
                np.int32(4),
                config=SMALL,
                steps=4,
            )
        )
    shape = ",".join(str(size) for size in executor._pages[0].k.shape)
    assert len(compiled) == 4
    for i, lowered in enumerate(compiled):
        text = lowered.compile().as_text()
        assert f"f32[{shape}]" in text
        assert not re.search(rf"f32\[{shape}\]\S* copy\(", text)
        assert text.count(" cosine(") == 1
        donated = re.search(r"input_output_alias=\{(.*?)\}, entry", text)[1]
        state = i > 0  # prefill has none
        assert donated.count("alias)") >= 2 * SMALL.num_layers + state  # keys and values of each layer
    logits_nv = np.zeros((len(samples), SMALL.vocab_size), np.float32)
    text = executor._programs.begin.lower(executor._state, logits_nv, samples).compile().as_text()
    assert "input_output_alias={ {}: (0" in text  # the state


ON_FOUR = """
import jax, numpy as np
jax.config.update("jax_num_cpu_devices", 4)
from lightning_jax import mesh
from lightning_jax.model import llama
from lightning_jax.sampler.engine import SamplingParams
from tests.sampler.conftest import SMALL, Model, random_model, run

model = random_model(SMALL)
rng = np.random.default_rng(0)
sampling = [SamplingParams(max_tokens=16, noise_key=(i, 1)) for i in range(5)]
requests = [(str(i), rng.integers(0, 150, 5 + 8 * i).tolist(), sampling[i]) for i in range(5)]
sizes = {"max_seq_len": 64, "prefill_chunk": 16, "max_slots": 4}
expected = run(model.engine(**sizes), requests)
devices = mesh.make_mesh(fsdp=2, tensor=2)
params = jax.device_put(model.params, mesh.shardings(devices, llama.abstract_params(SMALL)))
engine = Model(SMALL, params).engine(**sizes, mesh=devices)
done = run(engine, requests)
for name in expected:
    assert done[name].token_ids == expected[name].token_ids
    np.testing.assert_allclose(done[name].logprobs, expected[name].logprobs, atol=1e-4)
part = engine._executor._pages[0].k.addressable_shards[0].data.shape
assert part[2] == SMALL.num_kv_heads // 2, part
print("all equal")
"""


def test_a_sharded_engine_samples_what_one_device_does():
    done = subprocess.run([sys.executable, "-c", ON_FOUR], capture_output=True, text=True)
    assert done.stdout.strip() == "all equal", done.stderr


def test_weights_that_are_not_finite_end_requests_with_an_error(small, prompts):
    engine = small.engine()
    engine.publish(jax.tree.map(lambda leaf: leaf * jnp.nan, small.params), 1)
    done = run(engine, [("a", prompts[0], SamplingParams(max_tokens=20))])["a"]
    assert done.finish_reason == "error" and "not finite" in done.error


def test_a_callers_error_ends_its_own_request_only(small, prompts, caplog):
    runner = Runner(small.engine())
    sampling = SamplingParams(max_tokens=20, ignore_eos=True)

    def broken(ids):
        raise KeyError("mine")

    with caplog.at_level(logging.CRITICAL):
        runner.submit("broken", prompts[0], sampling, should_stop=broken)
        runner.submit("fine", prompts[0], sampling)
        done = runner.finish()
    assert done["broken"].finish_reason == "error" and "mine" in done["broken"].error
    assert len(done["fine"].token_ids) == 20


def test_fail_all_ends_everyone(small, prompts):
    engine = small.engine(max_slots=1)
    runner = Runner(engine)
    for name in "ab":
        runner.submit(name, prompts[0], SamplingParams(max_tokens=50, ignore_eos=True))
    engine.step()
    runner.submit("c", prompts[0], GREEDY)
    engine.fail_all("out of memory")
    assert {done.error for done in runner.done.values()} == {"out of memory"} and len(runner.done) == 3
    with pytest.raises(RuntimeError, match="out of memory"):  # it would wait for ever
        runner.submit("d", prompts[0], GREEDY)


def test_submitting_from_many_threads(small, prompts):
    engine = small.engine()
    done = {}

    def caller(i):
        for j in range(5):
            name = f"{i}-{j}"
            engine.submit(Request(name, prompts[j], GREEDY, on_done=lambda c: done.__setitem__(c.request_id, c)))

    threads = [threading.Thread(target=caller, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads) or engine.step():
        engine.step()
    assert len(done) == 40
    for j in range(5):
        assert len({tuple(done[f"{i}-{j}"].token_ids) for i in range(8)}) == 1


def test_bfloat16_agrees_with_float32_up_to_its_rounding(small, prompts):
    engine = small.engine(dtype=jnp.bfloat16)
    sampling = SamplingParams(max_tokens=20, noise_key=(1, 1), ignore_eos=True)
    done = run(engine, [(str(i), prompt, sampling) for i, prompt in enumerate(prompts)])
    differences = []
    for i, prompt in enumerate(prompts):
        tokens = done[str(i)].token_ids
        logprobs = plain_logprobs(small, prompt + tokens)[len(prompt) - 1 : -1][np.arange(len(tokens)), tokens]
        differences.append(np.abs(done[str(i)].logprobs - logprobs))
    assert np.concatenate(differences).mean() < 0.05
