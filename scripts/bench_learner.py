"""Measures the learner: one JSON line per combination of rows and length.

    python scripts/bench_learner.py --model=builtin:tiny --rows=64 --length=256
    python scripts/bench_learner.py --model=random:llama3.2-1b --rows=8,32 --length=1024,4096 --remat=full
    python scripts/bench_learner.py --model=builtin:tiny --rows=16 --length=1152 --prompt=1024 --group=8
    python scripts/bench_learner.py --model=builtin:tiny --rows=64 --length=512 --prompt=64 --shortest=32

A measurement is a whole GRPO update as training makes it: packing, micro-batches, reference, gradient, optimizer step
and reading the metrics. The rows are random tokens of one length, and all but the prompt is sampled. With `--shortest`
what is sampled is spread evenly from there to the rest of the length, in random order; `padding_fraction` is what
packing leaves of the blocks.

With `--group` that many rows have the same prompt. Then `unshared_update_s` is of rows as long whose prompts are all
different, measured in turn with the others, and `sharing_ratio` how much faster the groups are.

`fraction_of_matmul_limit` is the model's floating point operations over what a large matrix product reaches on this
device in the same time and dtype. Counted are 2 per matrix weight and token forwards, twice that backwards, 2 more for
the reference, and causal attention alike; recomputation (`--remat`) is not counted.
"""

import argparse
import json
import math
import time

import jax
import jax.numpy as jnp
import numpy as np

from lightning_jax import heap
from lightning_jax.model import llama, shapes
from lightning_jax.rl import packing, trajectory
from lightning_jax.rl.learner import Learner, LearnerSettings


def main() -> None:
    args = _parse_args()
    heap.keep_freed_memory()  # as the program does
    config, params = shapes.load_or_random(args.model)
    dtype = args.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    limit = matmul_flops_per_s(dtype)
    for num_rows in args.rows:
        for length in args.length:
            settings = LearnerSettings(
                kl_coef=args.kl_coef,
                gradient_accumulation=args.gradient_accumulation,
                batch_size=num_rows,
                max_seq_len=length,
                remat=None if args.remat == "none" else args.remat,
                compute_dtype=dtype,
            )
            prompt = args.prompt or length // 2
            spread = np.linspace(args.shortest or length - prompt, length - prompt, num_rows).round().astype(int)
            sampled_n = np.random.default_rng(0).permutation(spread)
            result = measure(config, params, settings, prompt, sampled_n, args.group, args.repeats)
            length_n = prompt + sampled_n
            flops = sum(flops_per_token(config, n, reference=args.kl_coef > 0) * n for n in length_n.tolist())
            device = jax.devices()[0]
            line = {
                "benchmark": "learner",
                "model": args.model,
                "backend": jax.default_backend(),
                "device": device.device_kind,
                "dtype": dtype,
                "remat": args.remat,
                "batch": num_rows,
                "length": length,
                "prompt": prompt,
                "shortest": args.shortest or length - prompt,
                "group": args.group,
                "gradient_accumulation": args.gradient_accumulation,
                **result,
                "tokens_per_s": int(length_n.sum()) / result["update_s"],
                "flops_per_s": flops / result["update_s"],
                "matmul_limit_flops_per_s": limit,
                "fraction_of_matmul_limit": flops / result["update_s"] / limit,
            }
            if stats := device.memory_stats():
                line["peak_memory_bytes"] = stats["peak_bytes_in_use"]
            print(json.dumps(line), flush=True)


def measure(
    config: llama.LlamaConfig,
    params: llama.Params,
    settings: LearnerSettings,
    prompt: int,
    sampled_n: np.ndarray,
    group: int,
    repeats: int,
) -> dict[str, float]:
    """Seconds of an update (the median) and of the first one, which compiles; of both kinds where there are groups."""
    learner = Learner(config, params, settings)
    advantage_n = np.random.default_rng(0).normal(size=len(sampled_n)).astype(np.float32)
    groups = (group, 1) if group > 1 else (1,)
    kinds = [random_rows(config.vocab_size, prompt, sampled_n, size) for size in groups]
    seconds, padding = np.zeros((1 + repeats, len(kinds))), np.zeros(len(kinds))
    for repeat, kind in np.ndindex(seconds.shape):
        start = time.perf_counter()
        metrics = learner.update(kinds[kind], advantage_n)
        seconds[repeat, kind] = time.perf_counter() - start
        padding[kind] = metrics["train/padding_fraction"]
    update_s = np.median(seconds[1:], axis=0).tolist()
    compared = {} if group == 1 else {"unshared_update_s": update_s[1], "sharing_ratio": update_s[1] / update_s[0]}
    return {
        "update_s": update_s[0],
        "first_update_s": float(seconds[0, 0]),
        **compared,
        "block_length": packing.block_length(settings.max_seq_len, minimum=settings.min_block_length),
        "padding_fraction": float(padding[0]),
    }


def random_rows(vocab_size: int, prompt: int, sampled_n: np.ndarray, group: int) -> list[trajectory.Row]:
    """Rows of random tokens, every `group` of them with the same prompt, and so many sampled tokens each."""
    rng = np.random.default_rng(0)
    prompts = rng.integers(vocab_size, size=(-(-len(sampled_n) // group), prompt)).tolist()
    rows = []
    for rollout, count in enumerate(sampled_n):
        sampled = rng.integers(vocab_size, size=count).tolist()
        logprobs = np.full(len(sampled), -math.log(vocab_size), np.float32)
        call = trajectory.TokenCall(0, None, prompts[rollout // group], sampled, logprobs)
        rows += trajectory.build_rows([call], rollout)
    return rows


def flops_per_token(config: llama.LlamaConfig, length: int, *, reference: bool) -> float:
    """Floating point operations per token of an update on rows of this length."""
    layers = llama.abstract_params(config)["layers"]
    matrices = sum(math.prod(s.shape) for name, s in layers.items() if "norm" not in name and "bias" not in name)
    matrices += config.vocab_size * config.hidden_size  # the unembedding; the embedding is a look-up
    seen = length / 2 if config.sliding_window is None else min(length / 2, config.sliding_window)
    attention = 2 * config.num_layers * config.num_heads * config.head_dim * seen  # scores, and weighted values
    forward = 2 * (matrices + attention)
    return forward * (3 + reference)


def matmul_flops_per_s(dtype: str) -> float:
    """What the best of a few products of large square matrices reaches on the default device."""
    size = 2048 if jax.default_backend() == "cpu" else 8192
    a = jnp.ones((size, size), dtype)
    product = jax.jit(lambda a: a @ a)
    product(a).block_until_ready()
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        product(a).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)


def _parse_args() -> argparse.Namespace:
    def numbers(text: str) -> list[int]:
        return [int(part) for part in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a model path, or random:SHAPE")
    parser.add_argument("--rows", type=numbers, default=[16], help="rows of an update, separated by commas")
    parser.add_argument("--length", type=numbers, default=[256], help="tokens of a row, separated by commas")
    parser.add_argument("--prompt", type=int, help="tokens of a row that are its prompt, half of them by default")
    parser.add_argument("--shortest", type=int, help="sampled tokens of the shortest row; as many as the others'")
    parser.add_argument("--group", type=int, default=1, help="rows that have the same prompt")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="float32 on CPU by default, bfloat16 elsewhere"
    )
    parser.add_argument("--remat", choices=("none", *llama.REMAT_POLICIES), default="none")
    parser.add_argument("--kl_coef", type=float, default=0.001, help="0 leaves the reference out")
    parser.add_argument("--gradient_accumulation", type=int, default=1, help="micro-batches of an update")
    parser.add_argument("--repeats", type=int, default=3, help="updates to take the median of")
    args = parser.parse_args()
    if args.prompt and args.prompt >= min(args.length):
        parser.error(f"--prompt={args.prompt} leaves nothing to sample of {min(args.length)} tokens")
    sampled = min(length - (args.prompt or length // 2) for length in args.length)
    if args.shortest is not None and not 1 <= args.shortest <= sampled:
        parser.error(f"--shortest={args.shortest} is not among 1 to what is sampled of a row, {sampled} tokens")
    return args


if __name__ == "__main__":
    main()
