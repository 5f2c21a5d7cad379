"""Measures the sampler: one JSON line per combination of batch, prompt length and new tokens.

    python scripts/bench_sampler.py --model=builtin:tiny --batch=16,64 --prompt=40 --new=64
    python scripts/bench_sampler.py --model=random:smollm2-135m --batch=32 --prompt=36 --new=64 --group=8
    python scripts/bench_sampler.py --model=builtin:tiny --batch=64 --prompt=40 --shortest=16 --new=1024

A measurement goes through the whole engine: `batch` requests of random prompts are submitted at once, `group` of them
with each prompt, and run to their last token (no stop id); log-probs are always recorded. `prefill_s` is the same with
one new token each, and the decode rate is what the rest of the time gives for the rest of the tokens.
`prefill_work` is how many tokens were prefilled for each token of a distinct prompt.

With `--shortest` the requests' new tokens are spread evenly from there to `--new`, in random order. Then, and with
`--top_p` or `--top_k`, `plain_tokens_per_s` is of as many requests that all get the mean number and have neither,
measured in turn with the others, and `fraction_of_plain` what they reach of that rate.

`fraction_of_bandwidth_limit` is the decode rate over the one at which memory could deliver what a step must read: all
weights once, and each request's keys and values at half of its new tokens. The bandwidth is measured by copying, as
are the seconds that `publish_s`, new weights for the sampler, would take at that rate (`publish_limit_s`).
"""

import argparse
import dataclasses
import itertools
import json
import time

import jax
import jax.numpy as jnp
import numpy as np

from lightning_jax import heap
from lightning_jax.model import llama, shapes
from lightning_jax.sampler import programs
from lightning_jax.sampler.engine import Engine, Request, SamplingParams, noise_key


def main() -> None:
    args = _parse_args()
    heap.keep_freed_memory()  # as the program does
    config, params = shapes.load_or_random(args.model)
    dtype = args.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    bandwidth = copy_bytes_per_s()
    item_bytes = jnp.dtype(dtype).itemsize
    publish_bytes = sum(leaf.size * (leaf.dtype.itemsize + item_bytes) for leaf in jax.tree.leaves(params))
    published = {"publish_s": publish_seconds(params, dtype), "publish_limit_s": publish_bytes / bandwidth}
    for batch, prompt, new in itertools.product(args.batch, args.prompt, args.new):
        max_seq_len = prompt + new
        engine = Engine(
            config,
            params,
            max_slots=args.slots or batch,
            page_size=args.page_size,
            num_pages=-(-max_seq_len // args.page_size) * (args.slots or batch) + batch,
            max_seq_len=max_seq_len,
            decode_steps=args.decode_steps,
            prefill_chunk=args.prefill_chunk,
            dtype=dtype,
            row_floor=args.row_floor,
        )
        spread = np.linspace(args.shortest or new, new, batch).round().astype(int)
        new_tokens = np.random.default_rng(0).permutation(spread).tolist()
        mean = round(np.mean(new_tokens))
        truncation = {"top_p": args.top_p, "top_k": args.top_k}
        load = Load(args.group, prompt, new_tokens, {"temperature": args.temperature, **truncation})
        plain = Load(args.group, prompt, [mean] * batch, {"temperature": args.temperature, "top_p": 1.0, "top_k": 0})
        result = measure(engine, load, plain, args.repeats)
        read_bytes = weight_bytes(config, dtype) + batch * kv_bytes(config, prompt + mean / 2, dtype)
        limit = batch * bandwidth / read_bytes
        device = jax.devices()[0]
        line = {
            "benchmark": "sampler",
            "model": args.model,
            "backend": jax.default_backend(),
            "device": device.device_kind,
            "dtype": dtype,
            "batch": batch,
            "slots": args.slots or batch,
            "group": args.group,
            "prompt_tokens": prompt,
            "shortest": args.shortest or new,
            "new_tokens": new,
            "decode_steps": args.decode_steps,
            "page_size": args.page_size,
            **load.sampling,
            **result,
            **published,
            "bandwidth_bytes_per_s": bandwidth,
            "limit_tokens_per_s": limit,
        }
        if result["decode_tokens_per_s"] is not None:
            line["fraction_of_bandwidth_limit"] = result["decode_tokens_per_s"] / limit
        if stats := device.memory_stats():
            line["peak_memory_bytes"] = stats["peak_bytes_in_use"]
        print(json.dumps(line), flush=True)


@dataclasses.dataclass(frozen=True)
class Load:
    """What one run submits at once.

    Attributes:
        group: requests with the same prompt.
        prompt: its tokens.
        new_tokens: of each request.
        sampling: keywords of `SamplingParams`.
    """

    group: int
    prompt: int
    new_tokens: list[int]
    sampling: dict[str, float]


def measure(engine: Engine, load: Load, plain: Load, repeats: int) -> dict[str, float | None]:
    """Medians over `repeats` runs with fresh prompts, after one run of each kind that compiles."""
    rng = np.random.default_rng(0)
    names = itertools.count()

    def seconds(load: Load) -> float:
        batch = len(load.new_tokens)
        prompts = rng.integers(engine.config.vocab_size, size=(-(-batch // load.group), load.prompt)).tolist()
        left = batch

        def on_done(completion) -> None:
            nonlocal left
            assert completion.finish_reason == "length", completion
            left -= 1

        start = time.perf_counter()
        for i, new in enumerate(load.new_tokens):
            name = f"{next(names)}"
            noise = noise_key("benchmark", name)
            params = SamplingParams(**load.sampling, max_tokens=new, noise_key=noise, ignore_eos=True)
            engine.submit(Request(name, prompts[i // load.group], params, on_done))
        while left:
            engine.step()
        taken = time.perf_counter() - start
        while engine.step():
            pass
        return taken

    batch, new = len(load.new_tokens), sum(load.new_tokens)
    prompts_only = dataclasses.replace(load, new_tokens=[1] * batch)
    first = seconds(load)
    before = engine.stats()["prefill_tokens"]
    seconds(prompts_only)
    prefilled = engine.stats()["prefill_tokens"] - before
    kinds = [load, prompts_only]
    if plain != load:
        seconds(plain)
        kinds.append(plain)
    total, prefill, *others = np.median([[seconds(kind) for kind in kinds] for _ in range(repeats)], axis=0).tolist()
    decode = total - prefill
    result = {
        "first_s": first,
        "total_s": total,
        "prefill_s": prefill,
        "prefill_work": prefilled / (-(-batch // load.group) * load.prompt),
        "tokens_per_s": new / total,
        "prompt_tokens_per_s": batch * load.prompt / prefill,
        "decode_tokens_per_s": (new - batch) / decode if new > batch and decode > 0 else None,
    }
    if others:
        result["plain_tokens_per_s"] = sum(plain.new_tokens) / others[0]
        result["fraction_of_plain"] = result["tokens_per_s"] / result["plain_tokens_per_s"]
    return result


def publish_seconds(params: llama.Params, dtype: str, repeats: int = 5) -> float:
    """The least that master weights took to become the sampler's, as `Engine.publish` makes them."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(programs.jitted().prepare_params(params, dtype=jnp.dtype(dtype)))
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def weight_bytes(config: llama.LlamaConfig, dtype: str) -> int:
    """Bytes of the weights that a decode step reads; of an embedding of its own it reads a few rows."""
    specs = llama.abstract_params(config)
    if not config.tie_embeddings:
        del specs["embed_vd"]
    return sum(int(np.prod(spec.shape)) for spec in jax.tree.leaves(specs)) * jnp.dtype(dtype).itemsize


def kv_bytes(config: llama.LlamaConfig, length: float, dtype: str) -> float:
    """Bytes of one request's keys and values at this length."""
    seen = min(length, config.sliding_window or length)
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * seen * jnp.dtype(dtype).itemsize


def copy_bytes_per_s() -> float:
    """Bytes read and written per second by the best of a few copies of a large array."""
    size = 2**26 if jax.default_backend() == "cpu" else 2**29
    x = jnp.ones(size, jnp.float32)
    copy = jax.jit(lambda x: -x, donate_argnums=0)
    x = copy(x).block_until_ready()
    seconds = []
    for _ in range(7):
        start = time.perf_counter()
        x = copy(x).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return 2 * x.nbytes / min(seconds)


def _parse_args() -> argparse.Namespace:
    def numbers(text: str) -> list[int]:
        return [int(part) for part in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a model path, or random:SHAPE")
    parser.add_argument("--batch", type=numbers, default=[64], help="requests, separated by commas")
    parser.add_argument("--prompt", type=numbers, default=[40], help="prompt tokens of each, separated by commas")
    parser.add_argument("--new", type=numbers, default=[64], help="new tokens of each, separated by commas")
    parser.add_argument("--shortest", type=int, help="new tokens from here to --new, instead of --new for each request")
    parser.add_argument("--group", type=int, default=1, help="requests that have the same prompt")
    parser.add_argument("--slots", type=int, help="requests that run at once; as many as there are by default")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--top_p", type=float, default=1.0)
    parser.add_argument("--top_k", type=int, default=0)
    parser.add_argument("--decode_steps", type=int, default=8, help="tokens per dispatch")
    parser.add_argument("--prefill_chunk", type=int, default=256)
    parser.add_argument("--page_size", type=int, default=16)
    parser.add_argument("--row_floor", type=int, help="see Engine")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="float32 on CPU by default, bfloat16 elsewhere"
    )
    parser.add_argument("--repeats", type=int, default=3, help="runs to take the median of")
    args = parser.parse_args()
    if args.shortest is not None and not 1 <= args.shortest <= min(args.new):
        parser.error(f"--shortest={args.shortest} is not among 1 to --new, {min(args.new)}")
    return args


if __name__ == "__main__":
    main()
