"""GGUF vocabularies against byte-pair encoding written out in Python, sentencepiece, and the gguf package's reader."""

import struct

import gguf
import pytest
import regex
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agent_lightning.exceptions import InvalidConfigError
from lightning_jax.text import load_tokenizer
from lightning_jax.text.gguf_vocab import read_metadata

SHARED = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
# Letters, digits and numerals of several scripts, white space and punctuation: what pre-tokenizers treat differently.
CHARACTERS = (
    "abcdefghistTHEé́ñßЖω日本語한  \t\n\r\u00a0\u2003\u30000123456789٣४²½Ⅷ㊈'’.,;:!?-_()[]{}<>|/\\@#$%&*+=~`\"🤖"
)
text_strategy = st.text(st.sampled_from(CHARACTERS), max_size=40)

GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def gpt2_bytes() -> dict[int, str]:
    """GPT-2's character for each byte, as its encoder.py makes it."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table, extra = {}, 0
    for byte in range(256):
        table[byte] = chr(byte) if byte in shown else chr(256 + extra)
        extra += byte not in shown
    return table


BYTES = gpt2_bytes()


class PlainBpe:
    """Byte-level BPE as the GPT-2 paper describes it: cut the text, then merge the best-ranked pair again and again."""

    def __init__(self, path, cut, whole_words=False):
        fields = gguf.GGUFReader(path).fields
        self.tokens = fields["tokenizer.ggml.tokens"].contents()
        self.vocab = {token: n for n, token in enumerate(self.tokens)}
        merges = fields["tokenizer.ggml.merges"].contents()
        self.ranks = {tuple(merge.split(" ")): n for n, merge in enumerate(merges)}
        self.cut, self.whole_words = cut, whole_words

    def encode(self, text: str) -> list[int]:
        return [self.vocab[symbol] for word in self.cut(text) for symbol in self.merge(word)]

    def merge(self, word: str) -> list[str]:
        symbols = [BYTES[byte] for byte in word.encode("utf-8")]
        if self.whole_words and "".join(symbols) in self.vocab:
            return ["".join(symbols)]
        while len(symbols) > 1:
            pairs = list(zip(symbols, symbols[1:], strict=False))
            best = min(pairs, key=lambda pair: self.ranks.get(pair, 1 << 60))
            if best not in self.ranks:
                break
            merged, n = [], 0
            while n < len(symbols):
                is_best = n + 1 < len(symbols) and (symbols[n], symbols[n + 1]) == best
                merged.append("".join(symbols[n : n + 1 + is_best]))
                n += 1 + is_best
            symbols = merged
        return symbols


def cut_digits_then_gpt2(text: str) -> list[str]:
    """`Digits(individual_digits=True)`, then `ByteLevel`: the pre-tokenizers in SmolLM2's tokenizer.json."""
    pieces = regex.findall(r"\p{N}|\P{N}+", text)
    return [word for piece in pieces for word in regex.findall(GPT2_PATTERN, piece)]


@pytest.fixture(scope="module")
def smollm2_plain(smollm2_gguf):
    return PlainBpe(smollm2_gguf, cut_digits_then_gpt2)


@pytest.mark.parametrize(
    "text",
    [
        "12 apples and 2025",
        "a   7\n\n 12",
        "x\t1",
        "٣४²½Ⅷ㊈ and 3.14",
        "2+2=4, it's 100% sure",
        "    9",
        "The quick brown fox\n\tdidn't 42nd",
    ],
)
def test_smollm2_digits(tokenizers, smollm2_plain, text):
    assert tokenizers["smollm2"].encode(text) == smollm2_plain.encode(text)


def test_smollm2_splits_every_digit(tokenizers):
    smollm2 = tokenizers["smollm2"]
    assert [smollm2.decode([index]) for index in smollm2.encode(" 2025")] == [" ", "2", "0", "2", "5"]


@SHARED
@given(text=text_strategy)
def test_smollm2_any_text(tokenizers, smollm2_plain, text):
    assert tokenizers["smollm2"].encode(text) == smollm2_plain.encode(text)


@SHARED
@given(text=text_strategy)
def test_smollm2_agrees_with_its_pre_tokenizers_put_together_by_hand(tokenizers, smollm2_by_hand, text):
    ids = smollm2_by_hand.encode(text, add_special_tokens=False).ids
    assert tokenizers["smollm2"].encode(text) == ids


@pytest.fixture(scope="module")
def smollm2_by_hand(smollm2_plain):
    from tokenizers import Tokenizer, models, pre_tokenizers

    backend = Tokenizer(models.BPE(vocab=smollm2_plain.vocab, merges=list(smollm2_plain.ranks)))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return backend


def test_metadata_agrees_with_the_gguf_package(smollm2_gguf):
    fields = gguf.GGUFReader(smollm2_gguf).fields
    metadata = read_metadata(smollm2_gguf)
    expected = {key: field.contents() for key, field in fields.items() if not key.startswith("GGUF.")}
    assert metadata == expected


def write_gguf(path, model, tokens, *, pre=None, merges=None, scores=None, types=None, more=()):
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model(model)
    writer.add_token_list(tokens)
    if pre:
        writer.add_tokenizer_pre(pre)
    if merges:
        writer.add_token_merges(merges)
    if scores:
        writer.add_token_scores(scores)
    if types:
        writer.add_token_types(types)
    for call, value in more:
        getattr(writer, call)(value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def byte_level_vocabulary(chatml_folder):
    """Tokens, types and merges of a trained vocabulary. One merge is missing: its token is reached as a word only."""
    import json

    saved = json.loads((chatml_folder / "tokenizer.json").read_text())
    tokens = [token for token, _ in sorted(saved["model"]["vocab"].items(), key=lambda item: item[1])]
    merges = [" ".join(merge) for merge in saved["model"]["merges"] if "".join(merge) != "Ġthe"]
    assert "Ġthe" in tokens
    special = [token["content"] for token in saved["added_tokens"]]
    return tokens + special + ["<think>"], [1] * len(tokens) + [3] * len(special) + [4], merges


@pytest.mark.parametrize(
    "pre, cut, whole_words",
    [
        ("gpt-2", lambda text: regex.findall(GPT2_PATTERN, text), False),
        ("starcoder", cut_digits_then_gpt2, False),
        ("llama-bpe", lambda text: regex.findall(LLAMA3_PATTERN, text), True),
    ],
)
def test_pre_tokenizers(tmp_path, byte_level_vocabulary, pre, cut, whole_words):
    tokens, types, merges = byte_level_vocabulary
    path = write_gguf(tmp_path / "model.gguf", "gpt2", tokens, pre=pre, merges=merges, types=types)
    tokenizer, plain = load_tokenizer(path), PlainBpe(path, cut, whole_words)
    assert (tokenizer.encode(" the") == [tokens.index("Ġthe")]) == whole_words

    @settings(max_examples=100, deadline=None)
    @given(text=text_strategy)
    def check(text):
        assert tokenizer.encode(text) == plain.encode(text)

    check()
    assert tokenizer.encode("<think>x") == [tokens.index("<think>"), *plain.encode("x")]
    assert tokenizer.decode(tokenizer.encode("a<think><|im_end|>"), skip_special=True) == "a<think>"


def test_qwen2_agrees_with_transformers(tmp_path, byte_level_vocabulary):
    """Qwen's own class: its pattern, and NFC before it."""
    from transformers import Qwen2Tokenizer

    tokens, types, merges = byte_level_vocabulary
    path = write_gguf(tmp_path / "model.gguf", "gpt2", tokens, pre="qwen2", merges=merges, types=types)
    tokenizer = load_tokenizer(path)
    reference = Qwen2Tokenizer(
        vocab={token: n for n, token in enumerate(tokens)}, merges=[tuple(merge.split(" ")) for merge in merges]
    )

    @settings(max_examples=100, deadline=None)
    @given(text=text_strategy)
    def check(text):
        assert tokenizer.encode(text) == reference.encode(text, add_special_tokens=False)

    check()
    assert tokenizer.encode("e\u0301") == tokenizer.encode("é")


@pytest.fixture(scope="module", params=[True, False], ids=["prefix", "no prefix"])
def sentencepiece_pair(request, sentencepiece_model, tmp_path_factory):
    """A GGUF made from a SentencePiece model as llama.cpp converts it, and the model's `encode` in the ids of the file.

    Its pieces stand in the opposite order, so that only their scores say which merge comes first.
    """
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_model))
    tokens, scores, types = [], [], []
    order = [0, 1, 2, *reversed(range(3, model.get_piece_size()))]
    for n in order:
        tokens.append(model.id_to_piece(n))
        scores.append(model.get_score(n))
        types.append(2 if model.is_unknown(n) else 3 if model.is_control(n) else 6 if model.is_byte(n) else 1)
    more = [("add_bos_token_id", 1), ("add_eos_token_id", 2), ("add_unk_token_id", 0)]
    more.append(("add_add_space_prefix", request.param))
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    write_gguf(path, "llama", tokens, scores=scores, types=types, more=more)
    position = {n: index for index, n in enumerate(order)}
    return request.param, path, lambda text: [position[n] for n in model.encode(text)]


def test_sentencepiece_vocabulary(sentencepiece_pair):
    has_prefix, path, reference = sentencepiece_pair
    tokenizer = load_tokenizer(path)
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (1, (2,))

    @settings(max_examples=200, deadline=None)
    @given(text=text_strategy)
    def check(text):
        if has_prefix:
            assert tokenizer.encode(text) == reference(text)
        else:  # the model's own prefix space, taken off again behind a newline, which never merges
            assert reference("\n") + tokenizer.encode(text) == reference("\n" + text)
        assert tokenizer.decode(tokenizer.encode(text)) == text

    check()


def test_byte_tokens_are_never_made_by_merging(tmp_path):
    """A text that spells a byte token is not that byte."""
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    pieces = ["<", "0", "x", "A", ">", "<0", "<0x", "<0x0", "A>"]
    tokens = ["<unk>", "<s>", "</s>", *byte_tokens, *pieces]
    path = write_gguf(
        tmp_path / "model.gguf",
        "llama",
        tokens,
        scores=[0.0] * 259 + [-float(n) for n in range(len(pieces))],
        types=[2, 3, 3] + [6] * 256 + [1] * len(pieces),
        more=[("add_add_space_prefix", False)],
    )
    tokenizer = load_tokenizer(path)
    ids = tokenizer.encode("<0x0A>\n")
    assert [tokens[index] for index in ids] == ["<0x0", "A>", "<0x0A>"]
    assert tokenizer.decode(ids) == "<0x0A>\n"


@pytest.mark.parametrize("scores", [None, [0.0]])
def test_sentencepiece_without_scores(tmp_path, scores):
    path = write_gguf(tmp_path / "model.gguf", "llama", ["<unk>", "a", "b"], scores=scores)
    with pytest.raises(InvalidConfigError, match="model.gguf has not a score and a type for each token"):
        load_tokenizer(path)


def test_special_ids_that_name_no_token(tmp_path):
    """llama.cpp takes them for none: some files have one more for padding than there are tokens."""
    more = [("add_bos_token_id", 3), ("add_eos_token_id", 2), ("add_eot_token_id", 2**32 - 1), ("add_pad_token_id", 3)]
    path = write_gguf(tmp_path / "model.gguf", "gpt2", ["a", "b", "</s>"], types=[1, 1, 3], more=more)
    tokenizer = load_tokenizer(path)
    assert (tokenizer.bos_id, tokenizer.pad_id, tokenizer.eos_ids) == (None, None, (2,))


def test_saved_sentencepiece_folder_adds_bos_for_others(sentencepiece_pair, tmp_path):
    from transformers import AutoTokenizer

    _, path, _ = sentencepiece_pair
    tokenizer = load_tokenizer(path)
    tokenizer.save(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).encode("hello there") == [1, *tokenizer.encode("hello there")]


@pytest.mark.parametrize(
    "pre, said, adds", [("llama-bpe", None, True), ("llama-bpe", False, False), ("qwen2", None, False)]
)
def test_byte_level_vocabularies_that_add_bos_where_the_file_does_not_say(
    tmp_path, byte_level_vocabulary, pre, said, adds
):
    """llama.cpp's defaults (`llama_vocab::impl::load`): Llama 3's texts begin with it, Qwen's do not."""
    tokens, types, merges = byte_level_vocabulary
    bos = types.index(3)
    more = [("add_bos_token_id", bos)] + ([] if said is None else [("add_add_bos_token", said)])
    path = write_gguf(tmp_path / "m.gguf", "gpt2", tokens, pre=pre, merges=merges, types=types, more=more)
    tokenizer = load_tokenizer(path)
    assert (tokenizer.encode_beginning("hi")[0] == bos) == adds


def test_unknown_pre_tokenizer(tmp_path):
    path = write_gguf(tmp_path / "model.gguf", "gpt2", ["a"], pre="tomorrow")
    with pytest.raises(InvalidConfigError, match="'tomorrow'.*smollm"):
        load_tokenizer(path)


def test_unknown_model_and_no_tokenizer(tmp_path):
    path = write_gguf(tmp_path / "model.gguf", "rwkv", ["a"])
    with pytest.raises(InvalidConfigError, match="'rwkv'"):
        load_tokenizer(path)
    empty = tmp_path / "empty.gguf"
    empty.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 0))
    with pytest.raises(InvalidConfigError, match="contains no tokenizer"):
        load_tokenizer(empty)


@pytest.mark.parametrize("length", [0, 3, 10, 100, 100_000])
def test_damaged_file(tmp_path, smollm2_gguf, length):
    path = tmp_path / "cut.gguf"
    with open(smollm2_gguf, "rb") as file:
        path.write_bytes(file.read(length))
    with pytest.raises(InvalidConfigError, match="GGUF"):
        load_tokenizer(path)
