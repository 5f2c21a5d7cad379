"""Tokenizers of every kind that the text tests run on.

Two are real (builtin:tiny, SmolLM2 from its GGUF); the others are small vocabularies trained on Python's own manual,
under chat templates that behave like those of Qwen, Llama 2, Llama 3 and Mistral.
"""

import json
from pathlib import Path
from pydoc_data.topics import topics

import pytest

CHATML = """
{%- if tools %}{{ '<|im_start|>system\n' }}
{%- if messages[0].role == 'system' %}{{ messages[0].content + '\n\n' }}{% endif %}
{{- 'You may call:' }}{% for tool in tools %}{{ '\n' + (tool | tojson) }}{% endfor %}
{{- '\nCall with <tool_call></tool_call><|im_end|>\n' }}
{%- elif messages[0].role == 'system' %}{{ '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}{% endif %}
{%- for message in messages %}
{%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}
{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
{%- elif message.role == 'assistant' %}
{%- set content = message.content if loop.last else message.content.split('</think>')[-1] %}
{{- '<|im_start|>assistant\n' + content }}
{%- for call in message.tool_calls or [] %}
{{- ('\n' if loop.first and content or not loop.first else '') + '<tool_call>\n{"name": "' + call.function.name }}
{{- '", "arguments": ' + (call.function.arguments | tojson) + '}\n</tool_call>' }}
{%- endfor %}{{ '<|im_end|>\n' }}
{%- elif message.role == 'tool' %}
{%- if messages[loop.index0 - 1].role != 'tool' %}{{ '<|im_start|>user' }}{% endif %}
{{- '\n<tool_response>\n' + message.content + '\n</tool_response>' }}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{ '<|im_end|>\n' }}{% endif %}
{%- endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

LLAMA2 = """
{%- set system = messages[0].content if messages[0].role == 'system' else '' %}
{%- for message in (messages[1:] if system else messages) %}
{%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}
{%- set content = message.content | trim %}
{%- if system and loop.first %}{% set content = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' + content %}{% endif %}
{%- if message.role == 'user' %}{{ bos_token + '[INST] ' + content + ' [/INST]' }}
{%- else %}{{ ' ' + content + ' ' + eos_token }}{% endif %}{% endfor %}"""

LLAMA3 = """
{{- bos_token }}
{%- for message in messages %}
{%- if 'tool_calls' in message %}
{%- if message.tool_calls | length != 1 %}{{ raise_exception('one call at a time') }}{% endif %}
{%- set call = message.tool_calls[0].function %}
{{- '<|start_header_id|>assistant<|end_header_id|>\n\n{"name": "' + call.name + '", "parameters": ' }}
{{- (call.arguments | tojson) + '}<|eot_id|>' }}
{%- else %}
{{- '<|start_header_id|>' + ('ipython' if message.role == 'tool' else message.role) + '<|end_header_id|>\n\n' }}
{%- if loop.first and tools %}{% for tool in tools %}{{ (tool | tojson) + '\n\n' }}{% endfor %}{% endif %}
{{- message.content | trim + '<|eot_id|>' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"""

MISTRAL = """
{{- bos_token }}
{%- for message in messages %}
{%- if message.role == 'user' %}
{%- if tools and loop.last %}{{ '[AVAILABLE_TOOLS]' + (tools | tojson) + '[/AVAILABLE_TOOLS]' }}{% endif %}
{{- '[INST]' + message.content + '[/INST]' }}
{%- elif message.tool_calls %}
{{- '[TOOL_CALLS][' }}{% for call in message.tool_calls %}{{ {"name": call.function.name, "arguments":
call.function.arguments, "id": call.id} | tojson }}{% if not loop.last %}, {% endif %}{% endfor %}{{ ']' + eos_token }}
{%- elif message.role == 'assistant' %}{{ message.content + eos_token }}
{%- elif message.role == 'tool' %}
{%- if not messages[loop.index0 - 1].tool_calls %}{{ raise_exception('a result must follow its call') }}{% endif %}
{{- '[TOOL_RESULTS]{"content": ' + message.content + ', "call_id": "' + message.tool_call_id + '"}[/TOOL_RESULTS]' }}
{%- endif %}{% endfor %}"""


@pytest.fixture(scope="session")
def corpus() -> list[str]:
    """About 200 kB of English with code."""
    return [text[:8000] for _, text in sorted(topics.items())][:40]


def byte_level_folder(folder: Path, corpus: list[str], specials: list[str], template: str, pattern: str) -> Path:
    """Trains a byte-level BPE of 1,000 tokens and writes it as a Hugging Face folder."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        corpus, trainers.BpeTrainer(vocab_size=1000, initial_alphabet=alphabet, show_progress=False)
    )
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in specials])
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": specials[0], "eos_token": specials[1]}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").write_text(template)
    return folder


LLAMA3_PATTERN = (  # as Meta published it
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@pytest.fixture(scope="session")
def chatml_folder(tmp_path_factory, corpus):
    specials = ["<|endoftext|>", "<|im_end|>", "<|im_start|>"]
    folder = byte_level_folder(tmp_path_factory.mktemp("chatml"), corpus, specials, CHATML, LLAMA3_PATTERN)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1001, 1000]}))
    return folder


@pytest.fixture(scope="session")
def llama3_folder(tmp_path_factory, corpus):
    # The folder's eos is not what ends a turn, as in base models and some conversions.
    specials = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"]
    return byte_level_folder(tmp_path_factory.mktemp("llama3"), corpus, specials, LLAMA3, LLAMA3_PATTERN)


@pytest.fixture(scope="session")
def mistral_folder(tmp_path_factory, corpus):
    words = ["[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"]
    specials = ["<s>", "</s>", *words, "[TOOL_RESULTS]", "[/TOOL_RESULTS]"]
    return byte_level_folder(tmp_path_factory.mktemp("mistral"), corpus, specials, MISTRAL, LLAMA3_PATTERN)


@pytest.fixture(scope="session")
def sentencepiece_model(tmp_path_factory, corpus) -> Path:
    """A SentencePiece BPE model with byte fallback, trained with the settings of Llama 2's."""
    import sentencepiece

    folder = tmp_path_factory.mktemp("sentencepiece")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line for text in corpus for line in text.splitlines() if line.strip()]),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=1500,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        minloglevel=2,
    )
    return folder / "tokenizer.model"


@pytest.fixture(scope="session")
def llama2_folder(sentencepiece_model):
    """Only `tokenizer.model` beside the template: no `tokenizer.json`."""
    folder = sentencepiece_model.parent
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    config = {"tokenizer_class": "LlamaTokenizer", "legacy": True, **names, "chat_template": LLAMA2}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def tokenizers(chatml_folder, llama2_folder, llama3_folder, mistral_folder, smollm2_gguf):
    """Every tokenizer by name, loaded once."""
    from lightning_jax.text import load_tokenizer

    paths = {
        "tiny": "builtin:tiny",
        "smollm2": smollm2_gguf,
        "chatml": chatml_folder,
        "llama2": llama2_folder,
        "llama3": llama3_folder,
        "mistral": mistral_folder,
    }
    return {name: load_tokenizer(path) for name, path in paths.items()}


@pytest.fixture(params=["tiny", "smollm2", "chatml", "llama2", "llama3", "mistral"])
def tokenizer(request, tokenizers):
    """One test for each."""
    return tokenizers[request.param]
