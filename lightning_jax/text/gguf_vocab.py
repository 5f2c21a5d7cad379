"""The tokenizer inside a GGUF file, rebuilt with the model's own normalizer and pre-tokenizer.

A GGUF file stores a vocabulary, merges or scores, and the name of a pre-tokenizer, but no `tokenizer.json`.
transformers rebuilds one too, but for names that it does not know (SmolLM2's `smollm` among them) it falls back to
GPT-2's splitting: digits are then no longer split one by one, and the ids differ from those the model was trained on.
An unknown name is an error here, because nothing that follows would show the mistake.

Names and meanings: `docs/gguf.md` of ggml and `llama_vocab` in llama.cpp.
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agent_lightning.exceptions import InvalidConfigError

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

# How text is cut before the merges, by `tokenizer.ggml.pre`. The patterns are those of the models' own tokenizer.json.
_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_SPLIT = _LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN_SPLIT = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT2_NAMES = ("default", "gpt-2")
_DIGIT_NAMES = ("smollm", "starcoder", "refact", "codeshell", "command-r")  # each digit alone, then GPT-2's pattern
_SPLITS = {
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "smaug-bpe", "falcon3"), _LLAMA3_SPLIT),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), _QWEN2_SPLIT),
    "tekken": _TEKKEN_SPLIT,
}
_NFC_NAMES = ("qwen2", "deepseek-r1-qwen")  # Qwen's tokenizer.json normalizes to NFC
# llama.cpp puts the beginning of a sequence in front of these where the file does not say whether to.
_BOS_NAMES = ("llama-bpe", "llama3", "llama-v3", "falcon3", "tekken")
_WHOLE_WORD_NAMES = ("llama-bpe", "llama3", "llama-v3", "smaug-bpe", "tekken")  # a word in the vocabulary is one token

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4  # `tokenizer.ggml.token_type`

# GGUF value types, by their number in the file: struct format, or what needs more than one unpack.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


def read_metadata(path: str | Path) -> dict[str, Any]:
    """Reads the key-value part of a GGUF file: key -> int, float, bool, str or list of them.

    `gguf.GGUFReader` builds several NumPy views per string, seconds for a vocabulary with its merges; this reads only
    what is needed here.

    Raises:
        InvalidConfigError: the file is not a GGUF file (version 2 or 3, little-endian) or ends too early.
    """
    with open(path, "rb") as file:
        if file.read(4) != b"GGUF":
            raise InvalidConfigError(f"{path} is not a GGUF file: it does not begin with the bytes 'GGUF'")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                return _read_pairs(data)
            except (struct.error, UnicodeDecodeError, KeyError) as error:
                raise InvalidConfigError(
                    f"the metadata of {path} cannot be read ({type(error).__name__}: {error})",
                    hint="the file may be cut short, damaged, or of a GGUF version other than 2 and 3",
                ) from error


def _read_pairs(data: mmap.mmap) -> dict[str, Any]:
    version, _, num_pairs = struct.unpack_from("<IQQ", data, 4)
    if version not in (2, 3):
        raise KeyError(f"GGUF version {version}")
    position = 24
    pairs = {}
    for _ in range(num_pairs):
        key, position = _read_string(data, position)
        (value_type,) = struct.unpack_from("<I", data, position)
        pairs[key], position = _read_value(data, position + 4, value_type)
    return pairs


def _read_string(data: mmap.mmap, position: int) -> tuple[str, int]:
    (length,) = struct.unpack_from("<Q", data, position)
    start = position + 8
    text = data[start : start + length]
    if len(text) != length:
        raise struct.error("a string reaches beyond the end of the file")
    return text.decode("utf-8"), start + length


def _read_value(data: mmap.mmap, position: int, value_type: int) -> tuple[Any, int]:
    if value_type == _STRING:
        return _read_string(data, position)
    if value_type != _ARRAY:
        code = "<" + _SCALARS[value_type]
        return struct.unpack_from(code, data, position)[0], position + struct.calcsize(code)
    item_type, length = struct.unpack_from("<IQ", data, position)
    position += 12
    if item_type in _SCALARS:
        code = f"<{length}{_SCALARS[item_type]}"
        return list(struct.unpack_from(code, data, position)), position + struct.calcsize(code)
    items = []
    for _ in range(length):
        item, position = _read_value(data, position, item_type)
        items.append(item)
    return items, position


def build_backend(metadata: dict[str, Any], path: str | Path) -> Backend:
    """Builds a `tokenizers.Tokenizer` from a GGUF file's metadata; ids are positions in `tokenizer.ggml.tokens`.

    Args:
        metadata: what `read_metadata` returned.
        path: only for error texts.

    Raises:
        InvalidConfigError: no tokenizer in the file, or a kind that is not known here.
    """
    from tokenizers import AddedToken, processors

    model = metadata.get("tokenizer.ggml.model")
    if not metadata.get("tokenizer.ggml.tokens"):
        raise InvalidConfigError(f"{path} contains no tokenizer (no tokenizer.ggml.tokens)")
    if model == "gpt2":
        backend = _byte_level(metadata, path)
    elif model == "llama":
        backend = _sentencepiece(metadata, path)
    else:
        raise InvalidConfigError(
            f"{path} has a tokenizer of kind {model!r}; known are 'gpt2' (byte-level) and 'llama' (SentencePiece BPE)",
            hint="use the model's Hugging Face folder instead",
        )
    tokens = metadata["tokenizer.ggml.tokens"]
    kinds = metadata.get("tokenizer.ggml.token_type") or []
    # The content is in the vocabulary already, so each added token keeps its id.
    for kind, special in ((_CONTROL, True), (_USER_DEFINED, False)):
        found = [token for token, token_kind in zip(tokens, kinds, strict=False) if token_kind == kind]
        added = [AddedToken(token, normalized=False, special=special) for token in found]
        backend.add_special_tokens(added) if special else backend.add_tokens(added)
    bos = special_token(metadata, "bos")
    adds_bos = model == "llama" or metadata.get("tokenizer.ggml.pre") in _BOS_NAMES
    if bos is not None and metadata.get("tokenizer.ggml.add_bos_token", adds_bos):
        # Only for others who load what `Tokenizer.save` wrote; `Tokenizer.encode` never adds special tokens.
        bos_id = metadata["tokenizer.ggml.bos_token_id"]
        backend.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, bos_id)])
    return backend


def special_token(metadata: dict[str, Any], name: str) -> str | None:
    """The text of the `bos`, `eos`, `unknown` or `padding` token; None where the file names none of its tokens."""
    tokens, token_id = metadata["tokenizer.ggml.tokens"], metadata.get(f"tokenizer.ggml.{name}_token_id")
    return tokens[token_id] if token_id is not None and 0 <= token_id < len(tokens) else None


def _byte_level(metadata: dict[str, Any], path: str | Path) -> Backend:
    from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    name = metadata.get("tokenizer.ggml.pre", "default")
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if name in _GPT2_NAMES:
        pre_tokenizer = gpt2
    elif name in _DIGIT_NAMES:
        pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), gpt2])
    elif name in _SPLITS:
        split = pre_tokenizers.Split(Regex(_SPLITS[name]), behavior="isolated")
        pre_tokenizer = pre_tokenizers.Sequence(
            [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
    else:
        known = ", ".join(sorted({*_GPT2_NAMES, *_DIGIT_NAMES, *_SPLITS}))
        raise InvalidConfigError(
            f"{path} asks for the pre-tokenizer {name!r}; known are {known}",
            hint="use the model's Hugging Face folder, whose tokenizer.json says how text is split",
        )
    vocab = {token: index for index, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    merges = [tuple(merge.split(" ", 1)) for merge in metadata.get("tokenizer.ggml.merges", [])]
    backend = Backend(models.BPE(vocab=vocab, merges=merges, ignore_merges=name in _WHOLE_WORD_NAMES))
    backend.normalizer = normalizers.NFC() if name in _NFC_NAMES else None
    backend.pre_tokenizer = pre_tokenizer
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(metadata: dict[str, Any], path: str | Path) -> Backend:
    """SentencePiece BPE with byte fallback, in the form of Llama 2's own tokenizer.json.

    The prefix space is prepended by the normalizer: `Metaspace`, which transformers uses, drops it before text that
    begins with a space, where SentencePiece writes both.
    """
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models

    tokens = metadata["tokenizer.ggml.tokens"]
    vocab = {token: index for index, token in enumerate(tokens)}
    merges = [tuple(merge.split(" ", 1)) for merge in metadata.get("tokenizer.ggml.merges", [])]
    if not merges:
        scores, kinds = (metadata.get(f"tokenizer.ggml.{name}") for name in ("scores", "token_type"))
        if len(scores or ()) != len(tokens) or (kinds and len(kinds) != len(tokens)):
            raise InvalidConfigError(
                f"{path} has not a score and a type for each token (tokenizer.ggml.scores, tokenizer.ggml.token_type)",
                hint="convert the model again, or use its Hugging Face folder instead",
            )
        merges = _merges_from_scores(vocab, scores, kinds)
    unknown = special_token(metadata, "unknown") or next(
        (
            token
            for token, kind in zip(tokens, metadata.get("tokenizer.ggml.token_type", []), strict=False)
            if kind == _UNKNOWN
        ),
        None,
    )
    backend = Backend(models.BPE(vocab=vocab, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    has_prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    set_sentencepiece_spaces(backend, has_prefix)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(steps + [decoders.Strip(content=" ", left=1)] if has_prefix else steps)
    return backend


def set_sentencepiece_spaces(backend: Backend, has_prefix: bool) -> None:
    """Writes spaces as SentencePiece does: "▁" for each, and one more in front of the text when `has_prefix`."""
    from tokenizers import normalizers

    replace = normalizers.Replace(" ", "▁")
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace]) if has_prefix else replace
    backend.pre_tokenizer = None


def _merges_from_scores(vocab: dict[str, int], scores: list[float], kinds: list[int] | None) -> list[tuple[str, str]]:
    """Every way to make a piece from two others, best score first (what SentencePiece's BPE does pair by pair).

    Control, byte and user-defined pieces are never made by merging.
    """
    merges = []
    for piece, index in vocab.items():
        if kinds and kinds[index] != _NORMAL:
            continue
        pairs = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        pairs = [pair for pair in pairs if pair[0] in vocab and pair[1] in vocab]
        pairs.sort(key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
        merges += [(-scores[index], pair) for pair in pairs]
    merges.sort(key=lambda item: item[0])
    return [pair for _, pair in merges]
