"""Text to token ids and back, for Hugging Face folders, GGUF files and the shipped model.

`Tokenizer` keeps to what this project needs and makes two things certain: encoding never adds tokens of its own, and
decoding ids in pieces gives the same text as decoding them at once.
"""

from __future__ import annotations

import codecs
import json
import os
import shutil
from collections.abc import Iterable, Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agent_lightning.exceptions import InvalidConfigError
from lightning_jax.text import gguf_vocab
from lightning_jax.text.tools import TOOL_MARKERS, without_tool_support

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_BUILTIN = Path(__file__).parent.parent / "builtin"
TOKENIZER_FILES = (  # in a Hugging Face folder, the chat template among them
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)


class Tokenizer:
    """A model's vocabulary, special tokens and chat template. Safe to use from several threads.

    Attributes:
        name_or_path: where it was loaded from.
        vocab_size: one more than the largest id; a model's embedding may have more rows than this.
        bos_id: the beginning-of-sequence id, or None.
        eos_ids: every id that ends a reply: the tokenizer's, those of generation_config.json or config.json, and the
            special token with which the chat template closes an assistant's turn.
        pad_id: the padding id, or None. Some models pad with a token that also ends each turn (SmolLM2 does), so a
            mask must never be made by comparing with it.
        chat_template: the Jinja source, or None.
        tool_template: likewise, of conversations with tools; some models have two.
    """

    def __init__(
        self, hf: PreTrainedTokenizerFast, name_or_path: str, *, eos_ids: Iterable[int] = (), folder: Path | None = None
    ):
        """Wraps a fast transformers tokenizer; `load_tokenizer` is the usual way.

        Args:
            hf: the tokenizer; its truncation and padding are switched off.
            name_or_path: for error texts.
            eos_ids: more ids that end a reply.
            folder: the folder that `hf` was read from, whose files `save` then copies as they are.

        Raises:
            InvalidConfigError: its tokens are neither bytes nor SentencePiece's.
        """
        self._hf = hf
        self._backend = hf.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        self._folder = folder
        if not (self._is_byte_level or self._is_sentencepiece):
            kinds = ", ".join(step["type"] for step in self._decoder_steps)
            raise InvalidConfigError(
                f"the tokenizer of {name_or_path} (its decoder is {kinds}) is of a kind that is not supported",
                hint="supported: byte-level BPE, and SentencePiece, whose tokens have ▁ for a space",
            )
        added = self._backend.get_added_tokens_decoder()
        self._added = {index: token.content for index, token in added.items()}
        # Listed as special, some tokens are text all the same: "<think>" is, where the vocabulary says so.
        named = {hf.bos_token_id, hf.eos_token_id, hf.pad_token_id, hf.unk_token_id}
        self._special = {index for index, token in added.items() if token.special}
        self._special |= {index for index in hf.all_special_ids if index in named or index not in added}
        self._hidden = {index for index in self._special if self._added.get(index) not in TOOL_MARKERS}
        self._bytes: dict[int, bytes] = {}
        self.name_or_path = name_or_path
        self.vocab_size: int = max(self._backend.get_vocab(with_added_tokens=True).values()) + 1
        self.bos_id: int | None = hf.bos_token_id
        self.pad_id: int | None = hf.pad_token_id
        template = hf.chat_template
        named_templates = template if isinstance(template, dict) else {"default": template}
        self.chat_template: str | None = named_templates.get("default")
        self.tool_template: str | None = named_templates.get("tool_use", self.chat_template)
        ends = [hf.eos_token_id, *eos_ids, self._turn_end_id()]
        self.eos_ids: tuple[int, ...] = tuple(dict.fromkeys(index for index in ends if index is not None))

    @cached_property
    def control_ids(self) -> frozenset[int]:
        """Tokens that no ordinary text is made of: special ones, those that end a reply or mark tool calls."""
        markers = (index for index, content in self._added.items() if content in TOOL_MARKERS)
        return frozenset(self._special).union(self.eos_ids, markers)

    def encode(self, text: str) -> list[int]:
        """Encodes text; special tokens written in it become their ids, and nothing is added (templates write bos)."""
        return self._backend.encode(text, add_special_tokens=False).ids

    def encode_beginning(self, text: str) -> list[int]:
        """Encodes a text that is no chat: with the token that this model's texts begin with, if they do with one."""
        start = self._backend.encode("", add_special_tokens=True).ids[:1]
        ids = self.encode(text)
        return [*start, *ids] if start == [self.bos_id] and ids[:1] != start else ids

    def encode_after(self, previous_id: int, text: str) -> list[int]:
        """Encodes text as it would be encoded inside a longer text, right after the token `previous_id`.

        It matters where the beginning of a text is special: SentencePiece puts a space in front, and a special token
        may swallow the white space behind it.
        """
        before = self._added.get(previous_id)
        if before is not None:
            ids = self.encode(before + text)
            if ids[:1] == [previous_id]:
                return ids[1:]
        if self._newline_ids:
            # A newline never merges with what follows in a SentencePiece vocabulary, and takes the added space.
            ids = self.encode("\n" + text)
            if ids[: len(self._newline_ids)] == self._newline_ids:
                return ids[len(self._newline_ids) :]
        return self.encode(text)

    def decode(self, ids: Iterable[int], skip_special: bool = False, *, continues: bool = False) -> str:
        """Decodes ids; bytes that are not UTF-8 become U+FFFD.

        Args:
            ids: token ids; ids that are not in the vocabulary decode to nothing.
            skip_special: leaves out special tokens, except those that mark tool calls (`tools.parse_reply` reads them).
            continues: they go on from a text; the space that SentencePiece puts in front of a first word is then one.
        """
        hidden = self._hidden if skip_special else ()
        data = b"".join([self.token_bytes(index) for index in ids if index not in hidden])
        if self._strips_first_space and not continues and data.startswith(b" "):
            data = data[1:]
        return data.decode("utf-8", "replace")

    def token_bytes(self, index: int) -> bytes:
        """The UTF-8 bytes of one token, which may be part of a character; empty for ids outside the vocabulary."""
        data = self._bytes.get(index)
        if data is None:
            data = self._bytes[index] = self._spell(index)
        return data

    def render(
        self, messages: Sequence[dict], tools: Sequence[dict] | None = None, add_generation_prompt: bool = True
    ) -> str:
        """Renders canonical messages (see `chat.canonical_messages`) with the chat template.

        A template that knows nothing of tools gets them in the system message, in the Hermes form.

        Raises:
            InvalidConfigError: there is no chat template.
            ValueError: the template refuses these messages.
        """
        if self.chat_template is None:
            raise InvalidConfigError(
                f"the tokenizer of {self.name_or_path} has no chat template, so it cannot answer chat messages",
                hint="use the instruct version of the model, or put a chat_template.jinja beside its tokenizer.json",
            )
        if not _knows_tools((self.tool_template if tools else None) or self.chat_template):
            messages, tools = without_tool_support(messages, tools), None
        else:
            messages = [
                _with_parsed_arguments(message) if message.get("tool_calls") else message for message in messages
            ]
        try:
            return self._hf.apply_chat_template(
                list(messages),
                tools=list(tools) if tools else None,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            )
        except Exception as error:  # whatever a template's code runs into, the messages are what it did not like
            raise ValueError(f"the model's chat template refuses these messages: {error}") from error

    def save(self, folder: str | Path) -> None:
        """Writes the files that make `folder` an ordinary Hugging Face tokenizer folder."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if self._folder is not None:
            for name in TOKENIZER_FILES:
                if (self._folder / name).is_file():
                    shutil.copyfile(self._folder / name, folder / name)
            return
        self._hf.save_pretrained(folder)
        config_path = folder / "tokenizer_config.json"
        config = json.loads(config_path.read_text(encoding="utf-8"))
        # The name that every transformers version loads as it is; version 5 alone knows the one it writes.
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        for key in ("backend", "is_local", "local_files_only"):
            config.pop(key, None)
        config_path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    @cached_property
    def _decoder_steps(self) -> list[dict[str, Any]]:
        decoder = self._backend.decoder
        state = json.loads(decoder.__getstate__()) if decoder is not None else {"type": "None"}
        return state["decoders"] if state["type"] == "Sequence" else [state]

    @cached_property
    def _is_byte_level(self) -> bool:
        return any(step["type"] == "ByteLevel" for step in self._decoder_steps)

    @cached_property
    def _is_sentencepiece(self) -> bool:
        steps = self._decoder_steps
        return any(step["type"] == "Metaspace" or step.get("pattern") == {"String": "▁"} for step in steps)

    @cached_property
    def _strips_first_space(self) -> bool:
        for step in self._decoder_steps:
            if step["type"] == "Strip" and step.get("content") == " " and step.get("start"):
                return True
            if step["type"] == "Metaspace" and step.get("prepend_scheme", "always") != "never":
                return True
        return False

    @cached_property
    def _newline_ids(self) -> list[int]:
        """The ids of "\\n" where encoding puts a space in front of a text; empty where it does not."""
        newline = self.encode("\n")
        return newline if self.encode("\na") != newline + self.encode("a") else []

    def _spell(self, index: int) -> bytes:
        if index in self._added:
            return self._added[index].encode("utf-8")
        token = self._backend.id_to_token(index)
        if token is None:
            return b""
        if self._is_byte_level:
            try:
                return bytes(_BYTE_OF_CHARACTER[character] for character in token)
            except KeyError:
                return token.encode("utf-8")
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return bytes.fromhex(token[3:5])
        return token.replace("▁", " ").encode("utf-8")

    def _turn_end_id(self) -> int | None:
        """The special token that the chat template writes behind an assistant's message, if any."""
        if self.chat_template is None:
            return None
        probe = "aReplyOfTheAssistant"
        messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": probe}]
        try:
            text = self.render(messages, add_generation_prompt=False)
        except ValueError:
            return None
        ids = self.encode(text.rpartition(probe)[2].lstrip())
        return ids[0] if ids and ids[0] in self._special.union(self._hf.all_special_ids) else None


class StreamDecoder:
    """Decodes ids as they arrive; the pieces together are `tokenizer.decode` of all ids, never half a character."""

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = False, *, continues: bool = False):
        """Arguments as for `Tokenizer.decode`."""
        self._tokenizer = tokenizer
        self._hidden = tokenizer._hidden if skip_special else ()
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._strip = tokenizer._strips_first_space and not continues

    def push(self, ids: Iterable[int]) -> str:
        """Takes the next ids; returns the text that is now certain (perhaps "")."""
        data = b"".join([self._tokenizer.token_bytes(index) for index in ids if index not in self._hidden])
        if self._strip and data:
            data = data[1:] if data.startswith(b" ") else data
            self._strip = False
        return self._utf8.decode(data)

    def flush(self) -> str:
        """Returns what is left when no more ids come: U+FFFD for an unfinished character, else ""."""
        return self._utf8.decode(b"", final=True)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Loads the tokenizer of a model: a Hugging Face folder, a `.gguf` file, or `builtin:NAME`.

    A folder's `tokenizer.json` is taken as it is; without one, transformers builds the tokenizer from
    `tokenizer.model`, or `vocab.json` and `merges.txt`. A missing chat template is no error until `render`.

    Raises:
        InvalidConfigError: nothing is there, or no tokenizer is in it.
    """
    name = str(path)
    location = _BUILTIN / name.removeprefix("builtin:") if name.startswith("builtin:") else Path(path).expanduser()
    if location.is_dir():
        return _load_folder(location, name)
    if location.is_file() and location.suffix == ".gguf":
        return _load_gguf(location, name)
    if location.is_file():
        raise InvalidConfigError(f"{name} is neither a folder nor a .gguf file")
    raise InvalidConfigError(
        f"there is no model at {name}",
        hint="model.path is a Hugging Face model folder on this machine, a .gguf file, or builtin:tiny",
    )


@cache
def _knows_tools(template: str) -> bool:
    from jinja2 import nodes
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    try:
        tree = ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"]).parse(template)
    except Exception:  # a tag of its own ({% generation %}): then the word decides
        return "tools" in template
    return any(node.name == "tools" for node in tree.find_all(nodes.Name))


def _load_folder(folder: Path, name: str) -> Tokenizer:
    transformers = _import_transformers()
    try:
        if (folder / "tokenizer.json").is_file():
            hf = transformers.PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
        elif (folder / "tokenizer.model").is_file() or (folder / "vocab.json").is_file():
            hf = _convert_slow(transformers, folder)
        else:
            raise InvalidConfigError(
                f"{name} has no tokenizer: neither tokenizer.json nor tokenizer.model nor vocab.json is in the folder",
                hint="copy the tokenizer files of the model there",
            )
    except InvalidConfigError:
        raise
    except Exception as error:  # the readers below raise whatever their parsers do
        raise InvalidConfigError(f"the tokenizer in {name} cannot be read: {error}") from error
    eos_ids: list[int] = []
    for file in ("generation_config.json", "config.json"):
        found = _read_json(folder / file).get("eos_token_id")
        eos_ids += found if isinstance(found, list) else [] if found is None else [found]
    if not all(type(index) is int for index in eos_ids):
        raise InvalidConfigError(f"the eos_token_id of {name} must be one id or a list of them, not {eos_ids}")
    return Tokenizer(hf, name, eos_ids=[index for index in eos_ids if index >= 0], folder=folder)


def _convert_slow(transformers: Any, folder: Path) -> PreTrainedTokenizerFast:
    """Builds the fast tokenizer from SentencePiece or vocab-and-merges files with the class that the folder names."""
    is_sentencepiece = (folder / "tokenizer.model").is_file()
    class_name = _read_json(folder / "tokenizer_config.json").get("tokenizer_class")
    class_name = class_name or ("LlamaTokenizer" if is_sentencepiece else "GPT2Tokenizer")
    kind = getattr(transformers, class_name.removesuffix("Fast"), None)
    if kind is None:
        raise InvalidConfigError(f"{folder}/tokenizer_config.json names tokenizer_class {class_name!r}, not known here")
    hf = kind.from_pretrained(folder, local_files_only=True)
    pre_tokenizer = hf.backend_tokenizer.pre_tokenizer
    state = json.loads(pre_tokenizer.__getstate__()) if pre_tokenizer is not None else {}
    if is_sentencepiece and state.get("type") == "Metaspace" and state.get("prepend_scheme") == "always":
        # Metaspace adds no space before text that begins with one; SentencePiece, and Llama 2's tokenizer.json, do.
        gguf_vocab.set_sentencepiece_spaces(hf.backend_tokenizer, has_prefix=True)
    return hf


def _load_gguf(path: Path, name: str) -> Tokenizer:
    transformers = _import_transformers()
    metadata = gguf_vocab.read_metadata(path)
    backend = gguf_vocab.build_backend(metadata, name)
    tokens = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    hf = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        clean_up_tokenization_spaces=False,
        chat_template=metadata.get("tokenizer.chat_template"),
        **{key: gguf_vocab.special_token(metadata, value) for key, value in tokens.items()},
    )
    ends = [kind for kind in ("eos", "eot", "eom") if gguf_vocab.special_token(metadata, kind) is not None]
    return Tokenizer(hf, name, eos_ids=[metadata[f"tokenizer.ggml.{kind}_token_id"] for kind in ends])


def _import_transformers() -> Any:
    # Half a second, so only when a tokenizer is loaded; AutoTokenizer would import torch wherever it is installed.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # else it warns that torch is not there
    import transformers

    return transformers


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise InvalidConfigError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise InvalidConfigError(f"{path} holds no JSON object")
    return content


def _with_parsed_arguments(message: dict) -> dict:
    """Chat templates want a call's arguments as an object where the wire has JSON text."""
    calls = []
    for call in message["tool_calls"]:
        try:
            arguments = json.loads(call["function"]["arguments"])
        except (ValueError, RecursionError):
            arguments = call["function"]["arguments"]
        calls.append({**call, "function": {**call["function"], "arguments": arguments}})
    return {**message, "tool_calls": calls}


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte, the other way round (`bytes_to_unicode` in its encoder.py)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


_BYTE_OF_CHARACTER = _byte_alphabet()
