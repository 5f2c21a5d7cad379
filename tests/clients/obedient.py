"""A model made by hand that does as it is told, so that an agent's conversation takes a known course.

The last of these words anywhere in its prompt decides what a reply is:

| word | reply |
|---|---|
| `(call)` | maybe some text, then one or more calls of `add` or `look_up` |
| `(say)`, or none of the words | some text |
| `(ramble)` | text without end |

What exactly it says is random, and spelled in every way that could be lost between here and there and back: bytes that
are no text, white space at the ends, JSON with other spaces, other orders of keys and escapes than anybody's encoder.
It has one layer. A token's embedding is its own dimension, from which the unembedding reads the log-probs of what
follows it. The first attention head finds the last command word, which adds to them. The second head, the MLP and the
last dimensions are random and small: they make every log-prob depend on all that came before, and on where it stands.
"""

import shutil
from pathlib import Path

import jax
import numpy as np
import tokenizers

from lightning_jax import config as config_lib
from lightning_jax.model import export, llama
from lightning_jax.model.config import LlamaConfig
from lightning_jax.text.tokenizer import load_tokenizer

CALLS = (
    '{"name": "add", "arguments": {"a": 2, "b": 3}}',
    '{"arguments":{"b":-1,"a":7},"name":"add"}',
    ' {"name": "add", "arguments": {"b": 12,  "a": 30}} ',
    '{"name": "look_up", "arguments": {"key": "caf\\u00e9 \\n"}}',
    '{"name": "look_up", "arguments": {"key": "é: \\"<b>\\" 1/2\\/3"}}',
)
MAX_SEQ_LEN = 4096

_COMMANDS = ("(call)", "(ramble)", "(say)")
_TEXT = b"abcdefgh ij klmn \n\t.,'\"{}<>&\\\xc3\xa9\xff"
_NEVER = -60.0
_NOISE_WIDTH = 24
_HEAD_WIDTH = 8
# The last pair of a head turns by 1e-5 radians a position. With the keys of command words in it and the query an
# eighth of a turn ahead, scores fall by about 20 a position: the last word wins, however far back it is.
_ROPE_THETA = 1e5 ** (_HEAD_WIDTH / (_HEAD_WIDTH - 2))
_SCORE = 3e6


def write(folder: Path) -> None:
    """Writes the model to `folder`, in the Hugging Face form."""
    builtin = Path(config_lib.__file__).parent / "builtin" / "tiny"
    shutil.copytree(builtin, folder.with_suffix(".tokenizer"))
    file = folder.with_suffix(".tokenizer") / "tokenizer.json"
    made = tokenizers.Tokenizer.from_file(str(file))
    made.add_tokens([tokenizers.AddedToken(text, normalized=False) for text in (*_COMMANDS, *CALLS)])
    made.save(str(file))
    tokenizer = load_tokenizer(file.parent)
    vocab = tokenizer.vocab_size
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=vocab + len(_COMMANDS) + _NOISE_WIDTH,
        intermediate_size=32,
        num_layers=1,
        num_heads=2,
        num_kv_heads=2,
        head_dim=_HEAD_WIDTH,
        rope_theta=_ROPE_THETA,
        max_seq_len=MAX_SEQ_LEN,
        eos_ids=tokenizer.eos_ids,
    )
    export.save_hf(folder, config, _params(config, made), tokenizer_files_from=file.parent)


def _params(config: LlamaConfig, tokenizer: tokenizers.Tokenizer) -> llama.Params:
    vocab, width = config.vocab_size, config.hidden_size
    commands = [tokenizer.token_to_id(word) for word in _COMMANDS]
    command_dims = slice(vocab, vocab + len(_COMMANDS))
    noise_dims = slice(vocab + len(_COMMANDS), width)
    rng = np.random.default_rng(0)

    def noise(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32) / np.sqrt(shape[0])

    params = jax.tree.map(lambda spec: np.zeros(spec.shape, np.float32), llama.abstract_params(config))
    layer = params["layers"]
    layer["attn_norm_d"] += 1
    layer["mlp_norm_d"] += 1
    params["final_norm_d"] = np.ones(width, np.float32)
    params["embed_vd"] = np.eye(vocab, width, dtype=np.float32)
    noise_vd = rng.normal(size=(vocab, _NOISE_WIDTH))
    params["embed_vd"][:, noise_dims] = 0.3 * noise_vd / np.linalg.norm(noise_vd, axis=-1, keepdims=True)
    scale = np.sqrt(width / (1 + 0.3**2))  # of a one after the norm

    # Head 0: from everywhere to the last command.
    first, second = _HEAD_WIDTH // 2 - 1, _HEAD_WIDTH - 1  # the pair that turns slowest
    layer["q_dkgh"][0, :vocab, 0, 0, [first, second]] = np.sqrt(0.5) / scale
    layer["k_dkh"][0, commands, 0, first] = _SCORE / scale
    for i, command in enumerate(commands):
        layer["v_dkh"][0, command, 0, i] = 1 / scale
        layer["o_kghd"][0, 0, 0, i, vocab + i] = 1
    # Head 1 and the MLP: noise that sees everything.
    layer["q_dkgh"][0, noise_dims, 1, 0] = noise(_NOISE_WIDTH, _HEAD_WIDTH)
    layer["k_dkh"][0, noise_dims, 1] = noise(_NOISE_WIDTH, _HEAD_WIDTH)
    layer["v_dkh"][0, noise_dims, 1] = noise(_NOISE_WIDTH, _HEAD_WIDTH)
    layer["o_kghd"][0, 1, 0, :, noise_dims] = 0.02 * noise(_HEAD_WIDTH, _NOISE_WIDTH)
    for name in ("gate_df", "up_df"):
        layer[name][0, noise_dims] = noise(_NOISE_WIDTH, config.intermediate_size)
    layer["down_fd"][0, :, noise_dims] = 0.02 * noise(config.intermediate_size, _NOISE_WIDTH)

    # After the last norm a one is about `last`, with a command in force or without.
    follows_vv, told_cv = _log_probs(tokenizer)
    last = np.sqrt(width / (2 + 0.3**2))
    unembed = params["unembed_dv"] = np.zeros((width, vocab), np.float32)
    unembed[:vocab] = follows_vv / last
    unembed[command_dims] = told_cv / last
    unembed[noise_dims] = 0.25 * rng.normal(size=(_NOISE_WIDTH, vocab))
    return params


def _log_probs(tokenizer: tokenizers.Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """[V, V] what follows each token, and [C, V] what each command adds to that; both up to a constant."""
    vocab = tokenizer.get_vocab_size()
    text = list(_TEXT)  # a byte is its own id
    marks = ("<|assistant|>", "<|end|>", "<tool_call>", "</tool_call>")
    assistant, end, call, call_end = map(tokenizer.token_to_id, marks)
    follows = np.full((vocab, vocab), _NEVER, np.float32)
    for before in (assistant, *range(256)):  # any byte: grammars choose others than `text`
        follows[before, text] = -np.log(len(text))
        follows[before, end] = -1.5
        follows[before, call] = -31.0
    follows[assistant, end] = _NEVER
    calls = [tokenizer.token_to_id(text) for text in CALLS]
    follows[call, calls] = 0.0
    follows[calls, call_end] = 0.0
    follows[call_end, end] = 30.0
    follows[call_end, call] = -31.5
    told = np.zeros((len(_COMMANDS), vocab), np.float32)
    told[0, call], told[0, end] = 30.0, -30.0
    told[1, end] = -30.0
    return follows, told
