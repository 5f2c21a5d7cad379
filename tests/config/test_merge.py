"""One configuration of flags, environment, YAML and config file: who wins, and what each mistake says."""

import json
import re
from pathlib import Path

import jax.numpy as jnp
import pytest

from agent_lightning.exceptions import InvalidConfigError
from lightning_jax import config as config_lib
from lightning_jax import config_algorithm
from lightning_jax.rl.settings import learner_settings

REFERENCE_YAML = """\
# server_config.yaml
model:
  path: "meta-llama/Llama-3.2-3B-Instruct"
  dtype: "bfloat16"
  tensor_parallel: 4

algorithm:
  name: "grpo"
  learning_rate: 5e-7
  kl_coef: 0.001
  clip_range: 0.2
  entropy_coef: 0.01
  group_size: 8

runtime:
  max_seq_len: 4096
  batch_size: 256
  gradient_accumulation: 4
  checkpoint_interval: 100
"""


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def error_of(**sources) -> str:
    with pytest.raises(InvalidConfigError) as caught:
        config_lib.merge(**{"environ": {}, **sources})
    return str(caught.value)


def test_the_references_yaml_is_read_as_printed(tmp_path):
    config = config_lib.merge(yaml_path=write(tmp_path / "server_config.yaml", REFERENCE_YAML), environ={})
    assert config.model.to_dict() == config_lib.default_config().model.to_dict() | {
        "path": "meta-llama/Llama-3.2-3B-Instruct",
        "dtype": "bfloat16",
        "tensor_parallel": 4,
        "fsdp": -1,
    }
    assert config.algorithm.learning_rate == 5e-7  # YAML 1.1 calls a number without a point a string
    assert isinstance(config.algorithm.learning_rate, float)
    assert (config.algorithm.kl_coef, config.algorithm.clip_range, config.algorithm.entropy_coef) == (0.001, 0.2, 0.01)
    assert (config.runtime.max_seq_len, config.runtime.batch_size) == (4096, 256)
    assert (config.runtime.gradient_accumulation, config.runtime.checkpoint_interval) == (4, 100)


def test_the_references_variables_are_read_as_printed():
    config = config_lib.merge(
        environ={
            "AGENT_LIGHTNING_SERVER_URL": "http://localhost:8000",
            "AGENT_LIGHTNING_API_KEY": "optional-api-key",
            "LIGHTNING_MODEL_PATH": "meta-llama/Llama-3.2-3B-Instruct",
            "LIGHTNING_DEVICE": "cuda",
            "LIGHTNING_RL_ALGORITHM": "grpo",
            "LIGHTNING_BATCH_SIZE": "128",
            "LIGHTNING_LEARNING_RATE": "6e-7",
            "LIGHTNING_ENABLE_AIR": "true",
            "LIGHTNING_MAX_RETRIES": "3",
            "LIGHTNING_CLOUD_URL": "another product's",
            "PATH": "/bin",
        }
    )
    assert (config.server.api_key, config.model.path) == ("optional-api-key", "meta-llama/Llama-3.2-3B-Instruct")
    assert (config.device, config.algorithm.name) == ("cuda", "grpo")
    assert (config.runtime.batch_size, config.algorithm.learning_rate) == (128, 6e-7)


def test_flag_beats_environment_beats_yaml_beats_file_beats_default(tmp_path):
    default = config_lib.default_config().runtime.batch_size
    base = {"runtime": {"batch_size": default + 8}}
    yaml_path = write(tmp_path / "c.yaml", f"runtime:\n  batch_size: {default + 16}\n")
    environ = {"LIGHTNING_BATCH_SIZE": str(default + 24)}
    flags = {"runtime.batch_size": str(default + 32)}
    sources = {"base": base, "yaml_path": yaml_path, "environ": environ, "flag_overrides": flags}
    expected = default + 32
    for name in ("flag_overrides", "environ", "yaml_path", "base"):
        assert config_lib.merge(**sources).runtime.batch_size == expected
        sources[name] = {} if name != "yaml_path" else None
        expected -= 8
    assert config_lib.merge(**sources).runtime.batch_size == default


def test_a_learning_rate_counts_for_more_than_a_lower_sources_actor_lr():
    base = {"algorithm": {"name": "ppo", "learning_rate": 1e-4, "actor_lr": 2e-4}}

    def rate(environ=(), **flags):
        flags = {f"algorithm.{name}": value for name, value in flags.items()}
        config = config_lib.merge(base, environ=dict(environ), flag_overrides=flags)
        return learner_settings(config, jnp.dtype("float32")).learning_rate

    assert rate() == 2e-4
    assert rate(learning_rate=5e-5) == rate({"LIGHTNING_LEARNING_RATE": "5e-5"}) == 5e-5
    assert rate({"LIGHTNING_LEARNING_RATE": "5e-5"}, actor_lr=3e-5) == rate(learning_rate=5e-5, actor_lr=3e-5) == 3e-5


@pytest.mark.parametrize(
    "name, key, values",
    [
        ("LIGHTNING_MODEL_PATH", "model.path", ("a", "b", "c")),
        ("LIGHTNING_DEVICE", "device", ("cpu", "cuda", "tpu")),
        ("LIGHTNING_BATCH_SIZE", "runtime.batch_size", (8, 16, 24)),
        ("LIGHTNING_LEARNING_RATE", "algorithm.learning_rate", (1e-7, 2e-7, 3e-7)),
        ("AGENT_LIGHTNING_API_KEY", "server.api_key", ("x", "y", "z")),
    ],
)
def test_every_variable_stands_between_flag_and_yaml(tmp_path, name, key, values):
    in_yaml, in_environment, in_flag = values
    *section, leaf = key.split(".")
    text = f"{section[0]}:\n  {leaf}: {in_yaml}\n" if section else f"{leaf}: {in_yaml}\n"
    sources = {"yaml_path": write(tmp_path / "c.yaml", text), "environ": {name: str(in_environment)}}
    flags = {"flag_overrides": {key: str(in_flag)}}
    assert dict(config_lib.flatten(config_lib.merge(**sources, **flags)))[key] == in_flag
    assert dict(config_lib.flatten(config_lib.merge(**sources)))[key] == in_environment
    sources["environ"] = {name: ""}  # set to nothing is not set
    assert dict(config_lib.flatten(config_lib.merge(**sources)))[key] == in_yaml


def test_a_later_source_mends_an_earlier_ones_bad_combination():
    """Values are held against each other once, after the merge."""
    base = {"algorithm": {"group_size": 3}}
    assert config_lib.merge(base, environ={}, flag_overrides={"runtime.batch_size": 9}).runtime.batch_size == 9


@pytest.mark.parametrize(
    "text, line, says",
    [
        ("algorithm:\n  lerning_rate: 1\n", 2, "did you mean 'algorithm.learning_rate'"),
        ("algoritm:\n  learning_rate: 1\n", 1, "did you mean 'algorithm"),
        ("batch_size: 8\n", 1, "did you mean 'runtime.batch_size'"),
        ("runtime:\n  epochs: 2\n  batch_size: many\n", 3, "runtime.batch_size must be a whole number, not 'many'"),
        ("runtime:\n  batch_size: 8.5\n", 2, "runtime.batch_size must be a whole number, not '8.5'"),
        ("runtime:\n  batch_size: [1, 2]\n", 2, "runtime.batch_size must be a whole number"),
        ("runtime:\n  batch_size:\n", 2, "runtime.batch_size must be a whole number"),
        ("runtime: 4\n", 1, "runtime is a section"),
        ("algorithm:\n  kl_coef: .nan\n", 2, "algorithm.kl_coef must be a number"),
        ("algorithm:\n  kl_coef: -1\n", 2, "algorithm.kl_coef must be at least 0, not -1.0"),
        ("algorithm:\n  name: grppo\n", 2, "algorithm.name must be one of 'grpo', 'ppo', "),
        ("algorithm:\n  critic_lr: 1e-5\n", 2, "algorithm.critic_lr is PPO's"),
        ("sampler:\n  honor_agent_sampling: maybe\n", 2, "sampler.honor_agent_sampling must be true or false"),
        ("seed: 1\nseed: 2\n", None, "seed is given twice"),
        ("model:\n  path: 'x\n", None, "not YAML"),
        ("- a\n- b\n", 1, "must hold names and values"),
    ],
)
def test_yaml_mistakes_name_key_file_and_line(tmp_path, text, line, says):
    path = write(tmp_path / "server_config.yaml", text)
    error = error_of(yaml_path=path)
    assert says in error
    assert path in error
    assert line is None or f"line {line})" in error


def test_a_missing_or_binary_yaml_file_is_named(tmp_path):
    assert "absent.yaml" in error_of(yaml_path=str(tmp_path / "absent.yaml"))
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    assert "binary.yaml" in error_of(yaml_path=str(binary))


def test_an_empty_yaml_file_changes_nothing(tmp_path):
    path = write(tmp_path / "empty.yaml", "# nothing\nmodel:\n")
    assert config_lib.merge(yaml_path=path, environ={}).to_dict() == config_lib.merge(environ={}).to_dict()


@pytest.mark.parametrize(
    "environ, says",
    [
        ({"LIGHTNING_BATCH_SIZE": "many"}, "(environment variable LIGHTNING_BATCH_SIZE)"),
        ({"LIGHTNING_BATCHSIZE": "8"}, "did you mean LIGHTNING_BATCH_SIZE?"),
        ({"LIGHTNING_DEVICE": "cdua"}, "did you mean 'cuda'?"),
        ({"LIGHTNING_LEARNING_RATE": "-1"}, "(environment variable LIGHTNING_LEARNING_RATE)"),
        ({"LIGHTNING_LEARNING_RATE": "inf"}, "algorithm.learning_rate must be a number"),
    ],
)
def test_environment_mistakes_name_the_variable(environ, says):
    assert says in error_of(environ=environ)


@pytest.mark.parametrize(
    "key, value, says",
    [
        ("runtime.batch_sise", "8", "did you mean 'runtime.batch_size'?"),
        ("model", "x", "model is a section"),
        ("seed", "-1", "(flag --config.seed)"),
        ("seed", True, "seed must be a whole number, not True"),
        ("model.path", "", "model.path must be a Hugging Face folder"),
        ("model.lora_targets", "q_proj,wte", "model.lora_targets must be 'all-linear' or some of q_proj, k_proj"),
        ("model.lora_alpha", 0.0, "model.lora_alpha must be greater than 0"),
        ("model.frozen", "layers[", "model.frozen must be a regular expression, not 'layers['"),
        ("algorithm.clip_range", 1.5, "algorithm.clip_range must be between 0 and 1, not 1.5"),
        ("sampler.page_size", 24, "sampler.page_size must be a power of two"),
        ("agent.nworkers", 0, "agent.nworkers must be at least 1, or -1"),
        ("server.port", 70000, "server.port must be between 0 and 65535"),
        ("runtime.batch_size", 9, "must be a multiple of algorithm.group_size (8)"),
        ("sampler.kv_cache_tokens", 16, "at least one conversation of runtime.max_seq_len (4096)"),
    ],
)
def test_flag_mistakes_name_the_flag(key, value, says):
    error = error_of(flag_overrides={key: value})
    assert says in error
    assert f"(flag --config.{key})" in error


@pytest.mark.parametrize("mode, key", [("train", "agent.script"), ("evaluate", "agent.script")])
def test_a_mode_without_what_it_needs_says_so(mode, key):
    assert f"{key} is empty, and mode '{mode}' needs it" in error_of(flag_overrides={"mode": mode})
    error = error_of(flag_overrides={"mode": mode, "agent.script": "agent.py"})
    assert {"train": "data.train_file", "evaluate": "data.test_file"}[mode] in error


@pytest.mark.parametrize("text, value", [("true", True), ("False", False), ("1", True), ("no", False), ("on", True)])
def test_booleans_as_people_write_them(text, value):
    config = config_lib.merge(environ={}, flag_overrides={"sampler.honor_agent_sampling": text})
    assert config.sampler.honor_agent_sampling is value


def test_the_result_is_complete_and_locked():
    config = config_lib.merge({"seed": 3}, environ={})
    assert config.seed == 3
    assert set(config) == set(config_lib.default_config())
    with pytest.raises(AttributeError):
        config.algorithm.lerning_rate = 1.0
    with pytest.raises(TypeError):
        config.runtime.batch_size = "many"


def test_the_default_configuration_is_valid():
    config_lib.validate(config_lib.default_config())


@pytest.mark.parametrize("key", [k for k, t in config_lib.setting_types().items() if t.type in (int, float)])
def test_every_number_has_a_range(key):
    error = error_of(flag_overrides={key: "-7"})
    assert re.search(rf"{key} (must be .*, not -7(\.0)?|is PPO's.*) \(flag", error)


def test_every_default_has_a_comment_or_speaks_for_itself():
    """A newcomer learns the settings from `default_config`; these few are said by their name or a neighbour."""
    plain = {"algorithm.name", "algorithm.weight_decay", "algorithm.adam_b1", "algorithm.adam_b2", "sampler.top_p"}
    plain |= {"algorithm.critic_lr", "algorithm.gae_lambda", "algorithm.value_clip"}  # under algorithm.actor_lr's
    plain |= {"algorithm.clip_high", "algorithm.importance_correction"}  # as the line before says
    files = (config_lib, config_algorithm)
    source = "\n".join(Path(file.__file__).read_text(encoding="utf-8") for file in files)
    commented = set(re.findall(r"^    (?:c\.)?([\w.]+) = .*  # .+", source, re.MULTILINE))
    assert set(config_lib.setting_types()) == commented | plain


def test_the_work_directory_may_hold_the_seed():
    config = config_lib.merge({"workdir": "runs/mine-{seed}", "seed": 1}, environ={}, flag_overrides={"seed": "2"})
    assert config.workdir == "runs/mine-2"


def test_saved_json_holds_all_but_the_api_key(tmp_path):
    config = config_lib.merge(environ={"AGENT_LIGHTNING_API_KEY": "sesame"}, flag_overrides={"seed": 5})
    config_lib.save_json(config, tmp_path / "config.json")
    text = (tmp_path / "config.json").read_text(encoding="utf-8")
    assert "sesame" not in text
    saved = json.loads(text)
    assert saved["seed"] == 5
    assert saved["runtime"] == config.runtime.to_dict()
    assert saved["algorithm"]["critic_lr"] is None
    assert list(tmp_path.iterdir()) == [tmp_path / "config.json"]
