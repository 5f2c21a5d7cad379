"""Measures what the HTTP side costs: N concurrent clients against the engine's own rate on the same requests.

    python scripts/bench_http.py --model=models/smollm2-135m-instruct.gguf --new=128 --requests=128
    python scripts/bench_http.py --model=builtin:tiny --new=8 --requests=4000 --stream=off

One run measures both, on the same prompts. The engine's side hands token ids to the policy and keeps `concurrency`
requests in flight. The HTTP side sends chat completions to rollout URLs, which are recorded, from a process of its own
that does little but read and write sockets; its cost is in the figures. One JSON line per measurement: tokens and
requests per second of either side, their ratio, and the latency's median and 99th percentile.
"""

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import tempfile
import threading
import time

import jax
import numpy as np

from lightning_jax import config as config_lib
from lightning_jax import heap, server
from lightning_jax import main as program
from lightning_jax.policies import Policies
from lightning_jax.policy import Policy
from lightning_jax.sampler.request import SamplingParams, noise_key
from lightning_jax.store import RolloutEntry, Store
from lightning_jax.text import chat


def main() -> None:
    args = _parse_args()
    rng = np.random.default_rng(0)
    texts = [" ".join(map(str, rng.integers(10, 100, size=args.words))) for _ in range(args.requests)]
    with contextlib.ExitStack() as stack:
        config = _config(args, stack.enter_context(tempfile.TemporaryDirectory()))
        program.start_jax(config)
        policies = stack.enter_context(contextlib.closing(Policies(config)))
        store = stack.enter_context(contextlib.closing(Store(f"{config.workdir}/store.sqlite3")))
        policies.first.warmup()
        heap.freeze()
        app = server.create_app(config=config, policies=policies, store=store)
        running = server.RunningServer(app, server.bind("127.0.0.1", 0))
        stack.callback(running.stop)
        engine_s = min(_engine_s(policies.first, texts, args) for _ in range(args.repeats))
        for stream in {"off": (False,), "on": (True,), "both": (False, True)}[args.stream]:
            runs = [_http_latencies(running.url, store, texts, stream, args) for _ in range(args.repeats)]
            http_s, latency_n = min(runs, key=lambda run: run[0])
            median_s, p99_s = np.percentile(latency_n, [50, 99])
            line = {
                "benchmark": "http",
                "model": args.model,
                "backend": jax.default_backend(),
                "concurrency": args.concurrency,
                "requests": args.requests,
                "new_tokens": args.new,
                "stream": stream,
                "engine_tokens_per_s": args.requests * args.new / engine_s,
                "http_tokens_per_s": args.requests * args.new / http_s,
                "http_requests_per_s": args.requests / http_s,
                "fraction_of_engine": engine_s / http_s,
                "latency_median_s": float(median_s),
                "latency_p99_s": float(p99_s),
                "latency_p99_over_median": float(p99_s / median_s),
            }
            print(json.dumps(line), flush=True)


# ---- the engine alone ----


def _engine_s(policy: Policy, texts: list[str], args: argparse.Namespace) -> float:
    """Seconds for all requests, `concurrency` at a time, without HTTP, text or records."""
    messages = ([{"role": "user", "content": text}] for text in texts)
    prompts = [chat.build_prompt(policy.tokenizer, chat.canonical_messages(m), None, ()).ids for m in messages]
    free = threading.Semaphore(args.concurrency)
    start = time.perf_counter()
    futures = []
    for i, prompt in enumerate(prompts):
        free.acquire()
        parameters = SamplingParams(max_tokens=args.new, noise_key=noise_key("benchmark", i), ignore_eos=True)
        futures.append(policy.sample(prompt, parameters))
        futures[-1].add_done_callback(lambda _: free.release())
    sampled = sum(len(future.result().token_ids) for future in futures)
    seconds = time.perf_counter() - start
    assert sampled == args.requests * args.new, f"{sampled} tokens"
    return seconds


# ---- over HTTP ----


def _http_latencies(url: str, store: Store, texts: list[str], stream: bool, args) -> tuple[float, np.ndarray]:
    """Seconds for all requests, and of each; every client has a rollout of its own."""
    job_id = store.create_job({"kind": "train", "data_id": "benchmark"})
    store.update_job(job_id, status="running")
    entries = [RolloutEntry(f"task-{i}", i, i, 0, {"question": ""}) for i in range(args.concurrency)]
    store.open_rollouts(job_id, step=0, mode="train", entries=entries, timeout_s=3600.0)
    leases = store.grant(job_id, "benchmark", [], args.concurrency)["leases"]
    requests = [
        {
            "model": "any",
            "messages": [{"role": "user", "content": text}],
            "max_tokens": args.new,
            "ignore_eos": True,
            "stream": stream,
        }
        for text in texts
    ]
    host, _, port = url.removeprefix("http://").rpartition(":")
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        pool.apply(int)  # started, with its imports done
        tokens = [lease["token"] for lease in leases]
        seconds, latencies = pool.apply(_client, (host, int(port), tokens, [json.dumps(r).encode() for r in requests]))
    store.cancel_open(job_id)
    return seconds, np.array(latencies)


def _client(host: str, port: int, tokens: list[str], bodies: list[bytes]) -> tuple[float, list[float]]:
    """Sends all bodies, one connection a token, each the next body as soon as it has a reply."""
    return asyncio.run(_send_all(host, port, tokens, bodies))


async def _send_all(host: str, port: int, tokens: list[str], bodies: list[bytes]) -> tuple[float, list[float]]:
    waiting = iter(bodies)
    latencies = []

    async def connection(token: str) -> None:
        reader, writer = await asyncio.open_connection(host, port)
        path = f"/rollout/{token}/v1/chat/completions"
        for body in waiting:
            start = time.perf_counter()
            head = f"POST {path} HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\n"
            writer.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
            await _read_reply(reader)
            latencies.append(time.perf_counter() - start)
        writer.close()

    start = time.perf_counter()
    await asyncio.gather(*map(connection, tokens))
    return time.perf_counter() - start, latencies


async def _read_reply(reader: asyncio.StreamReader) -> None:
    """Reads one whole reply, of a known length or in chunks; RuntimeError unless it is a 200."""
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    status = head.split(b" ", 2)[1]
    if b"content-length: " in head:
        content = await reader.readexactly(int(head.partition(b"content-length: ")[2].split(b"\r\n")[0]))
        failed = status != b"200"
    else:
        content = b""
        while size := int(await reader.readline(), 16):
            content = (await reader.readexactly(size + 2))[:-2]
        await reader.readline()
        failed = b"[DONE]" not in content
    if failed:
        raise RuntimeError(f"status {status.decode()}: {content[:300].decode(errors='replace')}")


def _config(args: argparse.Namespace, workdir: str):
    config = config_lib.default_config()
    config.workdir = workdir
    config.model.path = args.model
    config.runtime.max_seq_len = args.max_seq_len
    config.sampler.max_slots = args.concurrency
    config.sampler.kv_cache_tokens = args.concurrency * args.max_seq_len
    return config


def _parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="builtin:tiny", help="a model path")
    parser.add_argument("--concurrency", type=int, default=64, help="clients, and slots of the engine")
    parser.add_argument("--requests", type=int, default=128, help="in all")
    parser.add_argument("--words", type=int, default=8, help="numbers in each prompt")
    parser.add_argument("--new", type=int, default=128, help="new tokens of each request")
    parser.add_argument("--max_seq_len", type=int, default=256)
    parser.add_argument("--stream", choices=("on", "off", "both"), default="both")
    parser.add_argument("--repeats", type=int, default=2, help="runs of each, of which the fastest counts")
    return parser.parse_args()


if __name__ == "__main__":
    main()
