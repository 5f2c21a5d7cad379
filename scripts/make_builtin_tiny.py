"""Makes the model that ships in the package, `builtin:tiny`: tokenizer, chat template, corpus, pretraining, card.

    python scripts/make_builtin_tiny.py --output=lightning_jax/builtin/tiny

The model is a Llama of 2.8 million parameters over bytes. It is pretrained on chats written by imaginary pupils who add
two numbers below 100. Most pupils forget the carry, so the model knows both habits and prefers the wrong one; telling
them apart is what reinforcement learning is for. Part of the corpus calls a calculator tool. Takes about half an hour
on two CPU cores.
"""

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

from lightning_jax.model import attention, export, llama
from lightning_jax.text import tokenizer as tokenizer_lib

_OUTPUT = flags.DEFINE_string("output", "lightning_jax/builtin/tiny", "folder that receives the model")
_STEPS = flags.DEFINE_integer("steps", 1500, "optimizer steps")
_ROWS = flags.DEFINE_integer("rows", 32, "rows per step")
_TOKENIZER_ONLY = flags.DEFINE_boolean("tokenizer_only", False, "write the tokenizer files and stop")

SPECIAL_TOKENS = ("<|pad|>", "<|bos|>", "<|im_start|>", "<|im_end|>")  # never shown to a reader
TOOL_TOKENS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")  # one id each, part of the text

CHAT_TEMPLATE = """\
{%- if tools %}<|im_start|>system
{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] }}
{% endif %}Tools:
{% for tool in tools %}{{ (tool['function'] if 'function' in tool else tool) | tojson }}
{% endfor %}<|im_end|>
{% elif messages[0]['role'] == 'system' %}<|im_start|>system
{{ messages[0]['content'] }}<|im_end|>
{% endif %}
{%- for message in messages %}
{%- if message['role'] == 'user' %}<|im_start|>user
{{ message['content'] }}<|im_end|>
{% elif message['role'] == 'assistant' %}<|im_start|>assistant
{{ message['content'] or '' }}
{%- for call in message['tool_calls'] or [] %}
{%- set call = call['function'] if 'function' in call else call %}<tool_call>{"name": {{ call['name'] | tojson }}, \
"arguments": {{ call['arguments'] | tojson }}}</tool_call>
{%- endfor %}<|im_end|>
{% elif message['role'] == 'tool' %}<|im_start|>tool
<tool_response>{{ message['content'] }}</tool_response><|im_end|>
{% elif message['role'] == 'system' and not loop.first %}<|im_start|>system
{{ message['content'] }}<|im_end|>
{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

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

CONFIG = llama.LlamaConfig(
    vocab_size=264,
    hidden_size=256,
    intermediate_size=640,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    rope_theta=10000.0,
    rope_scaling=None,
    rms_norm_eps=1e-5,
    tie_embeddings=True,
    attention_bias=False,
    qk_norm=False,
    sliding_window=None,
    max_seq_len=2048,
    model_type="llama",
    bos_id=257,
    eos_ids=(259,),
    pad_id=256,
)


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
        "bos_token": "<|bos|>",
        "eos_token": "<|im_end|>",
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


def main(_):
    folder = pathlib.Path(_OUTPUT.value)
    write_tokenizer(folder)


if __name__ == "__main__":
    app.run(main)
