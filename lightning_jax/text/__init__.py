"""Text: tokenizers, chat templates under the exact-token rule, and tool calls."""

from lightning_jax.text.chat import Call, Prompt, build_continuation, build_prompt, canonical_messages
from lightning_jax.text.tokenizer import StreamDecoder, Tokenizer, load_tokenizer
from lightning_jax.text.tools import family_of, parse_reply

__all__ = [
    "Call",
    "Prompt",
    "StreamDecoder",
    "Tokenizer",
    "build_continuation",
    "build_prompt",
    "canonical_messages",
    "family_of",
    "load_tokenizer",
    "parse_reply",
]
