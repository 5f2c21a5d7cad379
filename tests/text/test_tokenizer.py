"""Encoding, decoding, special tokens, saving and loading; transformers and sentencepiece say what is right."""

import json
import shutil
import subprocess
import sys
import types

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agent_lightning.exceptions import InvalidConfigError
from lightning_jax.text import StreamDecoder, load_tokenizer
from lightning_jax.text.plain import build_plain_prompt
from lightning_jax.text.tools import family_of

SHARED = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
TEXTS = [
    "Hello, world!",
    " leading and  double spaces ",
    "tabs\tand\n\nnew lines\r\n",
    "in 2025 there were 1234567 of them, 12 left",
    "naïve café, 日本語, Ελληνικά, 🤖👩‍👩‍👧",
    "def f(x):\n    return x**2  # it's",
    "",
]


@pytest.mark.parametrize("text", TEXTS)
def test_text_survives(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@SHARED
@given(text=st.text(max_size=60))
def test_any_text_survives(tokenizers, text):
    for name, tokenizer in tokenizers.items():
        if name != "smollm2":  # its vocabulary lacks some bytes: control characters and rare planes are dropped
            assert tokenizer.decode(tokenizer.encode(text)) == text, name


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("folder", ["chatml_folder", "llama3_folder", "mistral_folder"])
def test_folder_agrees_with_transformers(request, folder, text):
    from transformers import AutoTokenizer

    path = request.getfixturevalue(folder)
    reference = AutoTokenizer.from_pretrained(path)
    ids = load_tokenizer(path).encode(text)
    assert ids == reference.encode(text, add_special_tokens=False)
    assert load_tokenizer(path).decode(ids) == reference.decode(ids)


@SHARED
@given(text=st.text(st.characters(max_codepoint=0x3000), max_size=40) | st.sampled_from(TEXTS))
def test_sentencepiece_folder_agrees_with_sentencepiece(llama2_folder, tokenizers, text):
    import sentencepiece

    reference = sentencepiece.SentencePieceProcessor(model_file=str(llama2_folder / "tokenizer.model"))
    if "\0" not in text:  # sentencepiece drops it
        assert tokenizers["llama2"].encode(text) == reference.encode(text)


@pytest.mark.parametrize("legacy", [True, False])
def test_sentencepiece_folder_agrees_with_transformers_behind_special_tokens(llama2_folder, tmp_path, legacy):
    """Whether a space is put behind a special token too is what `legacy` says."""
    from transformers import AutoTokenizer

    load_tokenizer(llama2_folder).save(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "legacy": legacy}))
    text = "<s>[INST] What is 12 + 30? [/INST] 42 </s><s>[INST] And 7?"
    ids = load_tokenizer(tmp_path).encode(text)
    assert ids == AutoTokenizer.from_pretrained(tmp_path).encode(text, add_special_tokens=False)


def test_special_tokens_are_ids_and_never_added(tokenizers):
    chatml = tokenizers["chatml"]
    assert chatml.encode("<|im_start|>") == [1002]
    assert chatml.encode("a<|im_end|>")[-1] == 1001
    for name, tokenizer in tokenizers.items():
        assert tokenizer.bos_id not in tokenizer.encode("text"), name
        assert not set(tokenizer.eos_ids) & set(tokenizer.encode("text")), name


@pytest.mark.parametrize("text", ["and then", " and then", "\nand 12", "</s>[INST] x", "", "é日"])
def test_encode_after_text_adds_no_space(llama2_folder, tokenizers, text):
    """SentencePiece puts a space in front of a text; in the middle of one there is none."""
    import sentencepiece

    reference = sentencepiece.SentencePieceProcessor(model_file=str(llama2_folder / "tokenizer.model"))
    llama2 = tokenizers["llama2"]
    before = reference.encode("\n")  # merges with nothing
    plain, end, rest = text.partition("</s>")
    expected = reference.encode("\n" + plain)[len(before) :] + ([2, *reference.encode(rest)] if end else [])
    assert llama2.encode_after(reference.encode("x")[-1], text) == expected
    assert llama2.encode_after(2, text) == llama2.encode("</s>" + text)[1:]


def test_encode_after_a_token_that_swallows_white_space(chatml_folder, tmp_path):
    """Phi's special tokens take the white space behind them, wherever a text is cut."""
    load_tokenizer(chatml_folder).save(tmp_path)
    saved = json.loads((tmp_path / "tokenizer.json").read_text())
    for token in saved["added_tokens"]:
        token["rstrip"] = True
    (tmp_path / "tokenizer.json").write_text(json.dumps(saved))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode_after(1001, "\n<|im_start|>\nuser") == [1002, *tokenizer.encode("user")]
    assert tokenizer.encode_after(tokenizer.encode("x")[-1], "\nuser") == tokenizer.encode("\nuser")


def test_ends_of_a_reply(tokenizers):
    """The tokenizer's own, the generation config's, and the one that the template writes."""
    assert tokenizers["chatml"].eos_ids == (1001, 1000)
    assert tokenizers["llama3"].eos_ids == (1001, 1002)
    assert tokenizers["smollm2"].eos_ids == (2,)
    assert tokenizers["llama2"].eos_ids == (2,)


def test_smollm2_special_ids(tokenizers):
    smollm2 = tokenizers["smollm2"]
    assert (smollm2.vocab_size, smollm2.bos_id, smollm2.pad_id) == (49152, 1, 2)
    assert smollm2.encode("<|im_start|>user\n<|im_end|>")[::3] == [1, 2]


def test_skip_special_keeps_tool_markers(tokenizers):
    tiny = tokenizers["tiny"]
    ids = tiny.encode("a<tool_call>b</tool_call>") + [tiny.eos_ids[0], tiny.pad_id]
    assert tiny.decode(ids, skip_special=True) == "a<tool_call>b</tool_call>"
    mistral = tokenizers["mistral"]  # where the marker is flagged special
    assert mistral.decode(mistral.encode("[TOOL_CALLS][]</s>"), skip_special=True) == "[TOOL_CALLS][]"
    assert mistral.decode(mistral.encode("hi</s>")) == "hi</s>"


def test_what_is_listed_as_special_and_is_text_in_the_vocabulary_is_shown(chatml_folder, tmp_path):
    from transformers import AutoTokenizer

    load_tokenizer(chatml_folder).save(tmp_path)
    saved = json.loads((tmp_path / "tokenizer.json").read_text())
    think = max(token["id"] for token in saved["added_tokens"]) + 1
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    saved["added_tokens"].append({"id": think, "content": "<think>"} | flags)
    (tmp_path / "tokenizer.json").write_text(json.dumps(saved))
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    listed = {"additional_special_tokens": ["<think>", "<|im_start|>"]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | listed))
    tokenizer, text = load_tokenizer(tmp_path), "<|im_start|><think>so<|im_end|>"
    ids = tokenizer.encode(text)
    assert think in ids and tokenizer.decode(ids, skip_special=True) == "<think>so"
    hf = AutoTokenizer.from_pretrained(tmp_path)
    assert "<think>" in hf.all_special_tokens and hf.decode(ids, skip_special_tokens=True) == "<think>so"


def test_a_turn_ends_with_a_token_that_is_only_listed_as_special(llama3_folder, tmp_path):
    load_tokenizer(llama3_folder).save(tmp_path)
    saved = json.loads((tmp_path / "tokenizer.json").read_text())
    (end,) = [token for token in saved["added_tokens"] if token["content"] == "<|eot_id|>"]
    end["special"] = False
    (tmp_path / "tokenizer.json").write_text(json.dumps(saved))
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    listed = {"additional_special_tokens": ["<|eot_id|>"]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | listed))
    assert end["id"] in load_tokenizer(tmp_path).eos_ids


def test_a_template_of_its_own_for_tools(chatml_folder, llama3_folder, tmp_path):
    """Where there are two, transformers renders conversations with tools with that of the name "tool_use"."""
    from transformers import AutoTokenizer

    load_tokenizer(chatml_folder).save(tmp_path)
    with_tools = (tmp_path / "chat_template.jinja").read_text()
    (tmp_path / "chat_template.jinja").unlink()
    plain = "{% for message in messages %}{{ '<|im_start|>' + message.role + message.content }}{% endfor %}"
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config["chat_template"] = [{"name": "default", "template": plain}, {"name": "tool_use", "template": with_tools}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer, hf = load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    messages = [{"role": "user", "content": "1+2?"}]
    tools = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]
    for offered in (None, tools):
        expected = hf.apply_chat_template(messages, tools=offered, tokenize=False, add_generation_prompt=True)
        assert tokenizer.render(messages, offered) == expected
    assert "You may call" in expected and family_of(tokenizer) == "hermes"


def test_ids_outside_the_vocabulary_decode_to_nothing(tokenizer):
    """A model's embedding is often padded beyond the vocabulary, and such an id can be sampled."""
    inside = tokenizer.encode("ok")
    assert tokenizer.decode([*inside, tokenizer.vocab_size + 5]) == "ok"


@SHARED
@given(data=st.data())
def test_stream_decoder_gives_the_whole_text(tokenizers, data):
    name = data.draw(st.sampled_from(sorted(tokenizers)))
    tokenizer = tokenizers[name]
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=30))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(ids)), max_size=6)))
    skip = data.draw(st.booleans())
    decoder = StreamDecoder(tokenizer, skip_special=skip)
    pieces = [decoder.push(ids[a:b]) for a, b in zip([0, *cuts], [*cuts, len(ids)], strict=True)]
    assert "".join(pieces) + decoder.flush() == tokenizer.decode(ids, skip_special=skip)


@SHARED
@given(text=st.text(max_size=30))
def test_stream_decoder_never_emits_half_a_character(tokenizers, text):
    for name, tokenizer in tokenizers.items():
        decoder = StreamDecoder(tokenizer)
        ids = tokenizer.encode(text)
        whole, seen = tokenizer.decode(ids), ""
        for index in ids:
            seen += decoder.push([index])
            assert whole.startswith(seen), name
        assert name == "smollm2" or (seen == text and decoder.flush() == "")


def test_a_text_goes_on_where_it_was_cut(tokenizer):
    """SentencePiece's first word keeps its space, in the reply and where the next prompt is compared with it."""
    ids = tokenizer.encode_beginning("This is the end of it")
    whole, words = tokenizer.decode(ids, skip_special=True), 0
    for cut in range(2, len(ids)):
        before, after = tokenizer.decode(ids[:cut], skip_special=True), ids[cut:]
        text = tokenizer.decode(after, skip_special=True, continues=True)
        assert before + text == whole
        assert StreamDecoder(tokenizer, skip_special=True, continues=True).push(after) == text
        call = types.SimpleNamespace(prompt_text=before, prompt_ids=ids[:cut], sampled_ids=after)
        prompt = build_plain_prompt(tokenizer, whole + " all", [call])
        assert prompt.parent == 0 and prompt.ids[: len(ids)] == ids
        words += text.startswith(" ")
    assert words


def test_stream_decoder_flushes_an_unfinished_character(tokenizers):
    decoder = StreamDecoder(tokenizers["tiny"])
    assert decoder.push(tokenizers["tiny"].encode("é")[:1]) == ""
    assert decoder.flush() == "�"


@pytest.mark.parametrize("name", ["tiny", "smollm2", "chatml", "llama2", "llama3"])
def test_saved_folder_is_an_ordinary_one(tokenizers, tmp_path, name):
    """transformers and this project read the same tokenizer back."""
    from transformers import AutoTokenizer

    tokenizer = tokenizers[name]
    tokenizer.save(tmp_path)
    reference, again = AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(tmp_path)
    messages = [{"role": "user", "content": "What is 12 + 30?"}, {"role": "assistant", "content": "42"}]
    rendered = reference.apply_chat_template(messages, tokenize=False)
    assert rendered == tokenizer.render(messages, add_generation_prompt=False)
    assert again.encode(rendered) == tokenizer.encode(rendered)
    assert again.chat_template == tokenizer.chat_template
    assert reference.encode(rendered, add_special_tokens=False) == tokenizer.encode(rendered)
    assert (reference.eos_token_id, reference.pad_token_id) == (again.eos_ids[0], again.pad_id)


def test_truncation_and_padding_of_the_file_are_ignored(chatml_folder, tmp_path):
    """tokenizer.json keeps the truncation of whoever saved it; a prompt must never be cut silently."""
    load_tokenizer(chatml_folder).save(tmp_path)
    saved = json.loads((tmp_path / "tokenizer.json").read_text())
    saved["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    (tmp_path / "tokenizer.json").write_text(json.dumps(saved))
    assert load_tokenizer(tmp_path).decode(load_tokenizer(tmp_path).encode("a b c d e f g h")) == "a b c d e f g h"


def test_no_chat_template_is_an_error_only_when_rendering(chatml_folder, tmp_path):
    load_tokenizer(chatml_folder).save(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.chat_template is None and tokenizer.encode("hi")
    with pytest.raises(InvalidConfigError, match="no chat template.*\n.*chat_template.jinja"):
        tokenizer.render([{"role": "user", "content": "hi"}])


@pytest.mark.parametrize("path", ["no/such/folder", "builtin:huge"])
def test_missing_model(path):
    with pytest.raises(InvalidConfigError, match=f"no model at {path}"):
        load_tokenizer(path)


def test_folder_without_tokenizer(tmp_path):
    with pytest.raises(InvalidConfigError, match="tokenizer.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(InvalidConfigError, match="cannot be read"):
        load_tokenizer(tmp_path)


def test_tokenizers_of_other_kinds(tmp_path):
    """Pieces of words whose spaces are nowhere: their texts would come back as others."""
    from tokenizers import Tokenizer, decoders, models

    backend = Tokenizer(models.WordPiece({"[UNK]": 0, "wor": 1, "##ld": 2}, unk_token="[UNK]"))
    backend.decoder = decoders.WordPiece()
    backend.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(InvalidConfigError, match=f"{tmp_path}.*decoder is WordPiece.*not supported"):
        load_tokenizer(tmp_path)


def test_ends_that_are_no_ids(chatml_folder, tmp_path):
    folder = shutil.copytree(chatml_folder, tmp_path / "model")
    (folder / "config.json").write_text('{"eos_token_id": [5, -1]}')
    assert set(load_tokenizer(folder).eos_ids) == {5, *load_tokenizer(chatml_folder).eos_ids}
    (folder / "generation_config.json").write_text('{"eos_token_id": "5"}')
    with pytest.raises(InvalidConfigError, match=r"eos_token_id of .*model must be one id .*\['5', 5, -1\]"):
        load_tokenizer(folder)
    (folder / "generation_config.json").write_text("[]")
    with pytest.raises(InvalidConfigError, match="generation_config.json holds no JSON object"):
        load_tokenizer(folder)


def test_neither_importing_nor_loading_brings_heavy_packages():
    """Importing the package stays cheap, and loading a tokenizer never imports torch where it is installed."""
    code = (
        "import sys, lightning_jax.text as text\n"
        "assert not {'transformers', 'tokenizers', 'numpy', 'jax', 'torch'} & set(sys.modules), sorted(sys.modules)\n"
        "tokenizer = text.load_tokenizer('builtin:tiny')\n"
        "tokenizer.render([{'role': 'user', 'content': 'hi'}])\n"
        "assert not {'jax', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
