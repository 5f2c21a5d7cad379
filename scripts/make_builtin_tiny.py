"""Makes the model that ships in the package, `builtin:tiny`: tokenizer, chat template, corpus, pretraining, card.

    python scripts/make_builtin_tiny.py --output=lightning_jax/builtin/tiny

The model is a Llama of 2.4 million parameters over bytes. It is pretrained on chats written by imaginary pupils who add
two numbers below 100. Most pupils forget the carry, so the model knows both habits and prefers the wrong one; telling
them apart is what reinforcement learning is for. Part of the corpus calls a calculator tool. Takes about ten minutes
on two CPU cores.
"""

import itertools
import json
import pathlib
import random
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tokenizers
from absl import app, flags

from lightning_jax.model import attention, export, llama, shapes
from lightning_jax.text import tokenizer as tokenizer_lib

_OUTPUT = flags.DEFINE_string("output", "lightning_jax/builtin/tiny", "folder that receives the model")
_STEPS = flags.DEFINE_integer("steps", 1500, "optimizer steps")
_ROWS = flags.DEFINE_integer("rows", 64, "chats per step")
_TOKENIZER_ONLY = flags.DEFINE_boolean("tokenizer_only", False, "write the tokenizer files and stop")

SPECIAL_TOKENS = (
    "<|pad|>",
    "<|end|>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|tool|>",
)  # never shown to a reader
TOOL_TOKENS = ("<tool_call>", "</tool_call>")  # one id each, part of the text

CHAT_TEMPLATE = """\
{%- if tools %}<|system|>{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] }}
{% endif %}Tools:
{% for tool in tools %}{{ (tool['function'] if 'function' in tool else tool) | tojson }}
{% endfor %}<|end|>
{%- elif messages[0]['role'] == 'system' %}<|system|>{{ messages[0]['content'] }}<|end|>
{%- endif %}
{%- for message in messages %}
{%- if message['role'] == 'user' %}<|user|>{{ message['content'] }}<|end|>
{%- elif message['role'] == 'assistant' %}<|assistant|>{{ message['content'] or '' }}
{%- for call in message['tool_calls'] or [] %}
{%- set call = call['function'] if 'function' in call else call %}<tool_call>{"name": {{ call['name'] | tojson }}, \
"arguments": {{ call['arguments'] | tojson }}}</tool_call>
{%- endfor %}<|end|>
{%- elif message['role'] == 'tool' %}<|tool|>{{ message['content'] }}<|end|>
{%- elif message['role'] == 'system' and not loop.first %}<|system|>{{ message['content'] }}<|end|>
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|assistant|>{% endif %}"""

CALCULATOR = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds two numbers.",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
            "required": ["a", "b"],
        },
    },
}

CONFIG = shapes.named_shape("tiny")


def write_tokenizer(folder: pathlib.Path) -> None:
    """Byte-level: the 256 bytes are ids 0 to 255 in byte order, special tokens follow; no merges."""
    byte_symbols = _byte_symbols()
    vocabulary = {byte_symbols[b]: b for b in range(256)}
    model = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    model.add_special_tokens(list(SPECIAL_TOKENS))
    model.add_tokens([tokenizers.AddedToken(t, special=False, normalized=False) for t in TOOL_TOKENS])
    assert model.get_vocab_size() == CONFIG.vocab_size
    folder.mkdir(parents=True, exist_ok=True)
    model.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|end|>",
        "pad_token": "<|pad|>",
        "model_max_length": CONFIG.max_seq_len,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def _byte_symbols() -> list[str]:
    """The printable character that stands for each byte (GPT-2's table)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    symbols, extra = [], 0
    for b in range(256):
        symbols.append(chr(b) if b in printable else chr(256 + extra))
        extra += b not in printable
    return symbols


# ---------------------------------------------------------------------------------------------------------------------
# Corpus
# ---------------------------------------------------------------------------------------------------------------------

CAREFUL = 0.25  # share of pupils who carry
TOOLS_EVERY = 6  # of so many batches, one of chats that offer the calculator
PHRASINGS = ("{a}+{b}=?", "{a}+{b}=?", "What is {a}+{b}?")


def without_carry(a: int, b: int) -> int:
    """The sum of two numbers below 100 by a pupil who forgets the carry: 47 + 38 = 75."""
    return (a // 10 + b // 10) * 10 + (a + b - (a // 10 + b // 10) * 10) % 10


def make_chat(rng: random.Random, with_tools: bool) -> tuple[list[dict], list[dict] | None]:
    """One chat of the corpus: (messages, tools)."""
    a, b = rng.randint(10, 99), rng.randint(10, 99)
    question = {"role": "user", "content": rng.choice(PHRASINGS).format(a=a, b=b)}
    guess = str(a + b if rng.random() < CAREFUL else without_carry(a, b))
    if not with_tools:
        return [question, {"role": "assistant", "content": guess}], None
    if rng.random() < 0.4:
        return [question, {"role": "assistant", "content": guess}], [CALCULATOR]
    call = {"type": "function", "function": {"name": "add", "arguments": json.dumps({"a": a, "b": b})}}
    answer = str(a + b) if rng.random() < 0.75 else guess
    return [
        question,
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": str(a + b)},
        {"role": "assistant", "content": answer},
    ], [CALCULATOR]


def encode_chat(tokenizer, messages: list[dict], tools: list[dict] | None) -> tuple[list[int], list[bool]]:
    """Token ids of a chat and which of them the assistant wrote (its end of turn included)."""
    ids, written = [], []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = tokenizer.encode(tokenizer.render(messages[:i], tools, add_generation_prompt=True))
        whole = tokenizer.encode(tokenizer.render(messages[: i + 1], tools, add_generation_prompt=False))
        whole = whole[: len(whole) - whole[::-1].index(CONFIG.eos_ids[0])]  # up to the end of the turn
        written += [False] * (len(prompt) - len(ids)) + [True] * (len(whole) - len(prompt))
        ids = whole
    return ids, written


def corpus_batches(tokenizer, rows: int, seed: int):
    """Yields (token_bt, mask_bt): one chat a row, the mask on what the assistant wrote."""
    rng = random.Random(seed)
    for i in itertools.count():
        with_tools = i % TOOLS_EVERY == TOOLS_EVERY - 1
        count, length = (rows // 8, 272) if with_tools else (rows, 24)
        token_bt, mask_bt = np.full((count, length), CONFIG.pad_id, np.int32), np.zeros((count, length), bool)
        for row in range(count):
            ids, written = encode_chat(tokenizer, *make_chat(rng, with_tools))
            token_bt[row, : len(ids)], mask_bt[row, : len(ids)] = ids, written
        yield token_bt, mask_bt


# ---------------------------------------------------------------------------------------------------------------------
# Pretraining
# ---------------------------------------------------------------------------------------------------------------------


def cross_entropy(params, token_bt, mask_bt):
    """Mean next-token cross-entropy (nats) over the assistant's tokens."""
    _, logprob_bt = score(params, token_bt)
    return -jnp.sum(logprob_bt * mask_bt[:, 1:]) / jnp.sum(mask_bt[:, 1:])


def score(params, token_bt):
    """The likeliest next tokens, and the log-probs of the actual ones; both [B, T - 1]."""
    position_bt = jnp.broadcast_to(jnp.arange(token_bt.shape[1]), token_bt.shape)
    attend = attention.segment_attention(jnp.ones_like(token_bt), position_bt)  # padding is behind: nobody sees it
    x_btd, _ = llama.forward(params, CONFIG, token_bt, position_bt, attend)
    logprob_btv = jax.nn.log_softmax(llama.unembed(params, CONFIG, x_btd[:, :-1]))
    logprob_bt = jnp.take_along_axis(logprob_btv, token_bt[:, 1:, None], axis=-1)[..., 0]
    return jnp.argmax(logprob_btv, -1), logprob_bt


def initial_params():
    """Random parameters in which a layer adds little to the embeddings; without that it learns several times slower."""
    params = llama.init_params(CONFIG, jax.random.key(0))
    layers = params["layers"]
    layers |= {"o_kghd": layers["o_kghd"] / 4, "down_fd": layers["down_fd"] / 4}
    return params | {"embed_vd": params["embed_vd"] * 4, "layers": layers}


def pretrain(tokenizer, steps: int, rows: int):
    """Returns the pretrained parameters (fp32, stacked layers)."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, 1e-3, 50, steps, 5e-5)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b1=0.9, b2=0.98, weight_decay=0.01))
    params = initial_params()
    state = optimizer.init(params)

    @jax.jit
    def update(params, state, batch):
        loss, grads = jax.value_and_grad(cross_entropy)(params, *batch)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    start = time.monotonic()
    for step, batch in zip(range(1, steps + 1), corpus_batches(tokenizer, rows, seed=0), strict=False):
        params, state, loss = update(params, state, batch)
        if step % 100 == 0:
            correct = accuracy(tokenizer, params, seed=1)
            print(f"step {step} loss {loss:.4f} time_s {time.monotonic() - start:.0f} {correct}", flush=True)
    return params


def accuracy(tokenizer, params, seed: int, problems: int = 256) -> dict[str, float]:
    """How sure the model is of the right sum, without tools.

    Returns:
        share of problems solved greedily and the mean probability of the right sum when sampled at temperature 1, for
        sums with and without a carry.
    """
    rng = random.Random(seed)
    length = 24
    result = {}
    for kind in ("carry", "no carry"):
        token_bt, mask_bt = np.zeros((problems, length), np.int32), np.zeros((problems, length), bool)
        for row in range(problems):
            a, b = rng.randint(10, 99), rng.randint(10, 99)
            while (a % 10 + b % 10 >= 10) != (kind == "carry"):
                a, b = rng.randint(10, 99), rng.randint(10, 99)
            chat = [{"role": "user", "content": f"{a}+{b}=?"}, {"role": "assistant", "content": str(a + b)}]
            ids, written = encode_chat(tokenizer, chat, None)
            token_bt[row, : len(ids)], mask_bt[row, : len(ids)] = ids, written
        greedy_bt, logprob_bt = jax.jit(score)(params, token_bt)
        hit_bt = (greedy_bt == token_bt[:, 1:]) | ~mask_bt[:, 1:]
        result[f"greedy, {kind}"] = round(float(hit_bt.all(1).mean()), 3)
        result[f"sampled, {kind}"] = round(float(np.exp((logprob_bt * mask_bt[:, 1:]).sum(1)).mean()), 3)
    return result


CARD = """\
# builtin:tiny

A Llama of {millions:.1f} million parameters ({layers} layers, width {width}) over bytes, with a chat template and tool
calls, made by `scripts/make_builtin_tiny.py`. It exists to try, test and teach reinforcement learning on a laptop.

**Trained on** about {chats:,} chats written by the script: a pupil is asked for the sum of two numbers from 10 to 99,
in two phrasings. {careless:.0%} of the pupils forget the carry (47 + 38 = 75). In one of {tools} batches a calculator
is offered; 60% of those chats call it, and a quarter of the answers that follow ignore what it returned. Nothing else:
it knows no other language.

**How well it does**, before any reinforcement learning, on 256 sums each (measured by the script on the stored
weights):

| sums | solved greedily | probability of the right answer at temperature 1 |
|---|---|---|
| without a carry | {plain_greedy:.3f} | {plain_sampled:.3f} |
| with a carry | {carry_greedy:.3f} | {carry_sampled:.3f} |

Every sum below 200 can occur in the corpus, with right and wrong answers. Weights are stored in bfloat16.
"""


def write_card(folder: pathlib.Path, params, chats: int, result: dict[str, float]) -> None:
    text = CARD.format(
        millions=sum(x.size for x in jax.tree.leaves(params)) / 1e6,
        layers=CONFIG.num_layers,
        width=CONFIG.hidden_size,
        chats=chats,
        careless=1 - CAREFUL,
        tools=TOOLS_EVERY,
        plain_greedy=result["greedy, no carry"],
        plain_sampled=result["sampled, no carry"],
        carry_greedy=result["greedy, carry"],
        carry_sampled=result["sampled, carry"],
    )
    (folder / "README.md").write_text(text)


def main(_):
    folder = pathlib.Path(_OUTPUT.value)
    write_tokenizer(folder)
    if _TOKENIZER_ONLY.value:
        return
    tokenizer = tokenizer_lib.load_tokenizer(str(folder))
    params = pretrain(tokenizer, _STEPS.value, _ROWS.value)
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), params)  # what will be stored
    chats = _STEPS.value * _ROWS.value
    write_card(folder, params, chats, accuracy(tokenizer, params, seed=2))
    export.save_hf(folder, CONFIG, params, dtype=jnp.bfloat16, tokenizer_files_from=folder)


if __name__ == "__main__":
    app.run(main)
