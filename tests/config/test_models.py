"""`models`: several models by name, from every source, under the rules of `model`."""

import pytest

from agent_lightning.exceptions import InvalidConfigError
from lightning_jax import config as config_lib
from lightning_jax import config_models

TWO = {"query": {"path": "llama"}, "answer": {"path": "qwen"}}


def merged(**sources):
    return config_lib.merge(**({"environ": {}} | sources))


def error_of(**sources) -> str:
    with pytest.raises(InvalidConfigError) as caught:
        merged(**sources)
    return str(caught.value)


def in_file():
    config = config_lib.default_config()
    config.models.query = {"path": "llama", "learning_rate": 1e-5}
    config.models.answer = {"path": "qwen"}
    return config


def assigned():
    config = config_lib.default_config()
    config.models = {"query": {"path": "llama", "learning_rate": 1e-5}, "answer": {"path": "qwen"}}
    return config


@pytest.mark.parametrize("source", ["file", "assigned", "dict", "yaml", "flags"])
def test_models_from_every_source_in_the_order_they_are_written(tmp_path, source):
    """Not in the order of the alphabet: the first is the agents' default."""
    yaml = tmp_path / "server.yaml"
    yaml.write_text("models:\n  query:\n    path: llama\n    learning_rate: 1e-5\n  answer: {path: qwen}\n")
    config = {
        "file": lambda: merged(base=in_file()),
        "assigned": lambda: merged(base=assigned()),
        "dict": lambda: merged(base={"models": TWO | {"query": {"path": "llama", "learning_rate": 1e-5}}}),
        "yaml": lambda: merged(yaml_path=str(yaml)),
        "flags": lambda: merged(base={"models": TWO}, flag_overrides={"models.query.learning_rate": "1e-5"}),
    }[source]()
    assert config_models.names(config) == ["query", "answer"]
    own = config_models.of_each(config)
    assert list(own) == ["query", "answer"]
    assert own["query"].model.to_dict() == config_lib.default_config().model.to_dict() | {"path": "llama"}
    assert own["query"].algorithm.learning_rate == 1e-5
    assert own["answer"].model.path == "qwen"
    assert own["answer"].algorithm.learning_rate == config.algorithm.learning_rate == 5e-7
    with pytest.raises(AttributeError):
        config.models.third = {"path": "mistral"}


def test_one_model_is_named_after_its_path(tmp_path, monkeypatch):
    config = merged(flag_overrides={"model.path": "models/llama-3.2"})
    assert config_models.names(config) == []
    assert config_models.of_each(config) == {"llama-3.2": config}
    monkeypatch.chdir(tmp_path)
    assert list(config_models.of_each(merged(flag_overrides={"model.path": "."}))) == [tmp_path.name]


@pytest.mark.parametrize(
    "models, flags, says",
    [
        ({"query": {"path": "llama"}}, {}, "models.query.path is the only one of models, which are for two or more"),
        (TWO | {"query": {}}, {}, "models.query.path must be a Hugging Face folder"),
        (TWO | {"query": {"pth": "x"}}, {}, "did you mean 'models.query.path'?"),
        (TWO | {"query": "llama"}, {}, "models.query is a section, not a value (config file)"),
        (TWO | {"Judge": {"path": "x"}}, {}, "'Judge' cannot be one of models' names"),
        (TWO | {"2": {"path": "x"}}, {}, "'2' cannot be one of models' names"),
        (["llama"], {}, "models is a section, not a value (config file)"),
        (TWO, {"models.query": "x"}, "models.query is a section, not a value (flag --config.models.query)"),
        (
            TWO,
            {"models.query.dtype": "fp32"},
            "must be one of 'auto', 'float32', 'bfloat16', not 'fp32' (flag",
        ),
        (TWO, {"models.query.tensor_parallel": "0"}, "models.query.tensor_parallel must be at least 1, not 0 (flag"),
        (
            TWO,
            {"models.query.lora_targets": "q"},
            "models.query.lora_targets must be 'all-linear' or some of q_proj, k_",
        ),
        (
            TWO,
            {"models.query.lora_rank": "8", "models.query.frozen": "norm"},
            "models.query.frozen says which of the model's parameters stay, and with lora_rank they all do (flag",
        ),
        (TWO, {"models.query.learning_rate": "-1"}, "models.query.learning_rate must be at least 0, not -1.0 (flag"),
        (TWO, {"model.path": "x"}, "model.path is the setting of a single model, and models holds query, answer (flag"),
    ],
)
def test_mistakes_name_the_key_and_its_source(models, flags, says):
    assert says in error_of(base={"models": models}, flag_overrides=flags)


def test_a_variable_for_a_single_model_is_named():
    error = error_of(base={"models": TWO}, environ={"LIGHTNING_MODEL_PATH": "x"})
    assert "(environment variable LIGHTNING_MODEL_PATH)" in error and "set models.query.path" in error


@pytest.mark.parametrize(
    "text, line, says",
    [
        ("models:\n  query:\n  answer: {path: b}\n", 2, "models.query.path must be a Hugging Face folder"),
        ("models:\n  query: llama\n  answer: qwen\n", 2, "models.query is a section, not a value"),
        ("models: [llama, qwen]\n", 1, "models is a section, not a value"),
        ("models:\n  q: {path: a}\n  b: {path: c}\nmodel:\n  path: x\n", 5, "model.path is the setting of a single"),
        ("models:\n  q: {path: a}\n  q: {path: c}\n", None, "models.q is given twice"),
    ],
)
def test_yaml_mistakes_name_the_line(tmp_path, text, line, says):
    path = tmp_path / "server.yaml"
    path.write_text(text)
    error = error_of(yaml_path=str(path))
    assert says in error and str(path) in error
    assert line is None or f"line {line})" in error
