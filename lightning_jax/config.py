"""Every setting, its default, and the one merge of flags, environment, YAML and config files.

A setting has a dotted key (`algorithm.learning_rate`). Its value comes from the first of these that names it:

    1. a flag                 --config.algorithm.learning_rate=1e-6
    2. an environment variable  LIGHTNING_LEARNING_RATE=1e-6
    3. a YAML file            --server_config=server_config.yaml, else the config file  --config=configs/quickstart.py
    4. `default_config()`

Wherever a value comes from, it is held against the default's type and `config_rules.RULES`; what does not fit is an
`InvalidConfigError` that names the key, the source and what would be right.
"""

import difflib
import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from ml_collections import config_dict

from agent_lightning import cli
from agent_lightning.exceptions import InvalidConfigError
from lightning_jax import config_algorithm, config_models
from lightning_jax.config_rules import RULES

# The reference's variable names. Those that only an agent's side reads are listed so that they are not taken for typos.
ENVIRONMENT = {
    "AGENT_LIGHTNING_API_KEY": "server.api_key",
    "LIGHTNING_MODEL_PATH": "model.path",
    "LIGHTNING_DEVICE": "device",
    "LIGHTNING_RL_ALGORITHM": "algorithm.name",
    "LIGHTNING_BATCH_SIZE": "runtime.batch_size",
    "LIGHTNING_LEARNING_RATE": "algorithm.learning_rate",
    "JAX_COORDINATOR_ADDRESS": "distributed.coordinator",
    "JAX_NUM_PROCESSES": "distributed.num_processes",
    "JAX_PROCESS_ID": "distributed.process_id",
}
AGENT_ENVIRONMENT = ("AGENT_LIGHTNING_SERVER_URL", "LIGHTNING_ENABLE_AIR", "LIGHTNING_MAX_RETRIES")


def default_config() -> config_dict.ConfigDict:
    """All settings with their defaults; locked, so that a misspelt key in a config file is an error there."""
    c = config_dict.ConfigDict()
    c.mode = "serve"  # wait for clients; "train", "evaluate": run agent.script on data; "plan": tell the memory needed
    c.workdir = "runs/default"  # metrics, checkpoints, store; the same command continues the run; "{seed}" is filled in
    c.seed = 0  # of initial weights, task order and sampling noise
    c.device = "auto"  # "auto" (the best there is), "cpu", "gpu" or "cuda", "tpu"

    c.model = model = config_dict.ConfigDict()
    model.path = "builtin:tiny"  # a Hugging Face folder, a .gguf file, or "builtin:tiny"
    model.dtype = "auto"  # of compute: "float32", "bfloat16"; "auto" is float32 on CPU and bfloat16 elsewhere
    model.tensor_parallel = 1  # devices that share each weight matrix; with model.fsdp it divides all that JAX sees
    model.fsdp = -1  # such groups that divide batch and weights; what is left holds copies; -1: all that divide evenly
    model.lora_rank = 0  # of adapters that learn in the model's place; 0: none, the model itself learns
    model.lora_alpha = 32.0  # the adapters' products count alpha / rank times
    model.lora_targets = "all-linear"  # what has adapters: "q_proj,v_proj" and the like, or all seven projections
    model.frozen = ""  # regular expression over Hugging Face names of parameters that do not learn: "embed_tokens|norm"

    # Two or more models that are trained together, in place of the one above: name -> the settings above, and
    # learning_rate (None: algorithm.learning_rate). The first is the one that agents get by default.
    c.models = config_dict.ConfigDict()

    c.algorithm = config_algorithm.default()

    c.runtime = runtime = config_dict.ConfigDict()
    runtime.max_seq_len = 4096  # tokens of a conversation, prompt and replies together
    runtime.batch_size = 256  # trajectories per update: tasks per step x group_size
    runtime.gradient_accumulation = 4  # micro-batches of an update; up to twice as many for less padding
    runtime.epochs = 1  # passes over the training tasks
    runtime.total_steps = 0  # updates after which to end; 0: when the epochs are over
    runtime.eval_interval = 50  # updates between evaluations; 0: only before the first and after the last
    runtime.checkpoint_interval = 100  # updates between checkpoints; 0: only after the last
    runtime.max_to_keep = 5  # checkpoints kept, the newest; 0: all
    runtime.max_staleness = 0  # updates that sampling may be behind learning; 0: they take turns
    runtime.remat = "full"  # what the backward pass recomputes: "none", "dots" (all but matmuls), "full" (each layer)
    runtime.offload = "none"  # what waits in the host's memory between uses: "reference", "optimizer", "both"

    c.sampler = sampler = config_dict.ConfigDict()
    sampler.max_slots = 64  # requests decoded together
    sampler.kv_cache_tokens = 65536  # tokens the KV pages hold, over all requests and the prefix cache
    sampler.page_size = 16  # tokens per KV page
    sampler.decode_steps = 8  # tokens decoded per dispatch
    sampler.prefill_chunk = 256  # prompt tokens per prefill dispatch
    sampler.max_queue = 4096  # requests that may wait for a slot; more get a 429
    sampler.temperature = 1.0  # in training these four hold, whatever the agent asks for ...
    sampler.top_p = 1.0
    sampler.top_k = 0  # 0: off
    sampler.max_tokens = 1024  # ... except a smaller max_tokens of the agent's
    sampler.honor_agent_sampling = False  # let the agent choose; the learner then applies the recorded temperature

    c.agent = agent = config_dict.ConfigDict()
    agent.script = ""  # file.py[:function], run in worker subprocesses
    agent.nworkers = -1  # worker processes; -1 chooses from cores and slots
    agent.rollout_timeout_s = 600.0  # a rollout that runs longer is killed and tried again
    agent.max_attempts = 3  # attempts at a rollout whose worker died or ran out of time

    c.data = data = config_dict.ConfigDict()
    data.train_file = ""  # JSONL, one task an object
    data.test_file = ""  # JSONL, held-out tasks for evaluations

    c.server = server = config_dict.ConfigDict()
    server.host = "127.0.0.1"  # the address to listen on; "0.0.0.0" is every one of this machine
    server.port = 8000  # 0: any free one
    server.api_key = ""  # asked of clients where it is not empty; rollout URLs carry their own

    # Several processes with one mesh: the same command for each, and a work directory that all of them see.
    c.distributed = distributed = config_dict.ConfigDict()
    distributed.coordinator = ""  # HOST:PORT that process 0 is to listen on; "auto" asks the cluster (Slurm, TPU, ...)
    distributed.num_processes = 0  # 0: as the cluster says
    distributed.process_id = -1  # of this one, from 0 on; -1: as the cluster says

    c.logging = logging = config_dict.ConfigDict()
    logging.tensorboard = True  # event files beside metrics.jsonl
    logging.wandb_project = ""  # also log to this Weights & Biases project
    logging.samples_every = 10  # updates between tables of sample completions with their rewards; 0: none
    c.lock()
    c.models.unlock()  # the names in it are the user's
    return c


def validate(config: config_dict.ConfigDict, sources: Mapping[str, str] | None = None) -> None:
    """Holds every value, and the values that must fit together, against the rules.

    Args:
        config: a complete configuration.
        sources: where a key's value was set, for the error's text.

    Raises:
        InvalidConfigError: names the key, its value, its source and what it must be.
    """
    sources = sources or {}

    def fail(key: str, problem: str, hint: str | None = None):
        raise InvalidConfigError(f"{key} {problem} ({sources.get(key, 'default')})", hint=hint)

    value_of = dict(flatten(config))
    for key, rule in [*RULES.items(), *config_models.rules(config, RULES)]:
        value = value_of[key]
        if value is not None and not rule.holds(value):
            fail(key, f"must be {rule.text}, not {value!r}", _did_you_mean(str(value), rule.choices))
    contradictions = (
        config_models.contradiction(config, sources),
        config_algorithm.contradiction(config),
    )
    for wrong in filter(None, contradictions):
        fail(*wrong)
    for key, value in value_of.items():
        if key.endswith(".frozen") and value and value_of[f"{key.removesuffix('frozen')}lora_rank"]:
            fail(key, "says which of the model's parameters stay, and with lora_rank they all do", "remove one of them")
    if config.runtime.batch_size % config.algorithm.group_size:
        fail(
            "runtime.batch_size",
            f"counts trajectories and must be a multiple of algorithm.group_size ({config.algorithm.group_size}), "
            f"not {config.runtime.batch_size}",
        )
    if config.runtime.max_staleness and config.algorithm.importance_correction == "none":
        fail(
            "runtime.max_staleness",
            "has the policy learn from what older weights sampled, and needs algorithm.importance_correction",
            "set that to 'token_truncate'",
        )
    if config.sampler.kv_cache_tokens < config.runtime.max_seq_len:
        fail(
            "sampler.kv_cache_tokens",
            f"must hold at least one conversation of runtime.max_seq_len ({config.runtime.max_seq_len}) tokens, "
            f"not {config.sampler.kv_cache_tokens}",
        )
    needs = {"train": ("agent.script", "data.train_file"), "evaluate": ("agent.script", "data.test_file")}
    for key in needs.get(config.mode, ()):
        if not value_of[key]:
            fail(key, f"is empty, and mode {config.mode!r} needs it", f"{cli.flag_of(key)}=FILE")


# Merge ----------------------------------------------------------------------------------------------------------------


class Setting(NamedTuple):
    type: type
    optional: bool


def flatten(config: Mapping, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name in config_models.written_names(config):
        value, key = config[name], f"{prefix}{name}"
        if config_models.IS_ONE.fullmatch(key) and not value:
            yield f"{key}.path", ""  # a model of which nothing is said is one all the same
        elif isinstance(value, Mapping | config_dict.ConfigDict):
            yield from flatten(value, f"{key}.")
        else:
            yield key, value


def setting_types() -> dict[str, Setting]:
    """Every setting's type, from the defaults; a setting whose default is None may be None."""
    default = default_config()
    settings = {}
    for key, value in flatten(default):
        section, _, name = key.rpartition(".")
        holder = default[section] if section else default
        settings[key] = Setting(holder.get_type(name), value is None)
    return settings


def _did_you_mean(name: str, names) -> str | None:
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else None


def find_setting(key: str, settings: Mapping[str, Setting], source: str) -> Setting:
    if key.split(".")[0] == "models":
        settings = config_models.settings(key, settings, source)
    if key in settings:
        return settings[key]
    inside = [name for name in settings if name.startswith(key + ".")]
    if inside:
        raise InvalidConfigError(f"{key} is a section, not a value ({source})", hint=f"set one of {', '.join(inside)}")
    same_name = [name for name in settings if name.rpartition(".")[2] == key.rpartition(".")[2]]
    hint = f"did you mean {same_name[0]!r}?" if same_name else _did_you_mean(key, settings)
    raise InvalidConfigError(f"unknown setting {key!r} ({source})", hint=hint)


TYPE_TEXT = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
_BOOLS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}


def typed(key: str, setting: Setting, value: Any, source: str) -> Any:
    """`value`, given as itself or as text, in the setting's type."""
    if value is None or (setting.optional and str(value).lower() in ("none", "null", "")):
        if setting.optional:
            return None
    elif isinstance(value, str):
        try:
            if setting.type is bool:
                return _BOOLS[value.strip().lower()]
            typed = setting.type(value)
            if setting.type is not float or math.isfinite(typed):
                return typed
        except (ValueError, KeyError):
            pass
    elif setting.type is float and type(value) in (int, float) and math.isfinite(value):
        return float(value)
    elif type(value) is setting.type:
        return value
    raise InvalidConfigError(f"{key} must be {TYPE_TEXT[setting.type]}, not {value!r} ({source})")


def _yaml_settings(path: str, settings: Mapping[str, Setting]) -> Iterator[tuple[str, Any, str]]:
    """(key, value as text or None, source) of each scalar in a YAML file."""
    try:
        root = yaml.compose(Path(path).read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidConfigError(f"cannot read the YAML configuration {path}: {error}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}, line {mark.line + 1}" if mark else path
        raise InvalidConfigError(f"not YAML: {getattr(error, 'problem', error)} ({where})") from error

    def walk(node: yaml.Node, prefix: str) -> Iterator[tuple[str, Any, str]]:
        if not isinstance(node, yaml.MappingNode):
            source = f"{path}, line {node.start_mark.line + 1}"
            if prefix:
                find_setting(prefix[:-1], settings, source)
            raise InvalidConfigError(f"{prefix[:-1] or 'the file'} must hold names and values ({source})")
        seen = {}
        for name_node, value_node in node.value:
            key = f"{prefix}{name_node.value}"
            line = name_node.start_mark.line + 1
            source = f"{path}, line {line}"
            if key in seen:
                raise InvalidConfigError(f"{key} is given twice ({path}, lines {seen[key]} and {line})")
            seen[key] = line
            is_null = value_node.tag == "tag:yaml.org,2002:null"
            is_one = config_models.IS_ONE.fullmatch(key)
            if is_one and (is_null or not value_node.value):
                yield f"{key}.path", "", source
                continue
            if is_one or key == "models" or any(name.startswith(key + ".") for name in settings):
                if not is_null:
                    yield from walk(value_node, key + ".")
                continue
            setting = find_setting(key, settings, source)
            if not isinstance(value_node, yaml.ScalarNode):
                raise InvalidConfigError(f"{key} must be {TYPE_TEXT[setting.type]}, not a list or section ({source})")
            yield key, None if is_null else value_node.value, source

    if root is not None:
        yield from walk(root, "")


def _environment_settings(environ: Mapping[str, str]) -> Iterator[tuple[str, str, str]]:
    known = (*ENVIRONMENT, *AGENT_ENVIRONMENT)
    for name, value in environ.items():
        if name in ENVIRONMENT:
            if value:  # set but empty is how shells unset a variable for one command
                yield ENVIRONMENT[name], value, f"environment variable {name}"
        elif name not in known and "LIGHTNING_" in name:
            # Other products' variables begin with LIGHTNING_ too: only what looks like a slip is an error.
            if close := difflib.get_close_matches(name, known, n=1, cutoff=0.9):
                raise InvalidConfigError(f"unknown environment variable {name}", hint=f"did you mean {close[0]}?")


def _python_source(path: str, key: str) -> str:
    """The config file and, where it can be seen, the line that sets `key`."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return path
    name = re.escape(key.rpartition(".")[2])
    numbers = [i for i, line in enumerate(lines, 1) if re.search(rf"[.\"']{name}[\"'\]]*\s*[:=](?!=)", line)]
    return f"{path}, line {numbers[0]}" if len(numbers) == 1 else path


def merge(
    base: config_dict.ConfigDict | Mapping | None = None,
    yaml_path: str | None = None,
    environ: Mapping[str, str] | None = None,
    flag_overrides: Mapping[str, Any] | None = None,
    *,
    base_path: str | None = None,
) -> config_dict.ConfigDict:
    """One configuration of all sources: flags over environment over YAML over `base` over the defaults.

    Args:
        base: what a config file's `get_config()` returned; keys that it lacks keep their defaults.
        yaml_path: the reference's `server_config.yaml`.
        environ: the environment; `os.environ` where None.
        flag_overrides: dotted key -> value or text, as given on the command line.
        base_path: the config file, for errors.

    Returns:
        A complete, validated, locked configuration.

    Raises:
        InvalidConfigError: a bad value or an unknown key; names key, source and the nearest valid name.
    """
    settings = setting_types()
    config = default_config()
    sources = {}

    def from_file() -> Iterator[tuple[str, Any, str]]:
        default = dict(flatten(config))
        for key, value in flatten(base or {}):
            if key not in default or value != default[key]:
                yield key, value, _python_source(base_path, key) if base_path else "config file"

    given = (
        list(from_file()),
        list(_yaml_settings(yaml_path, settings)) if yaml_path else [],
        list(_environment_settings(os.environ if environ is None else environ)),
        [(key, value, f"flag {cli.flag_of(key)}") for key, value in (flag_overrides or {}).items()],
    )
    for of_source in given:
        for key, value, source in of_source:
            value = typed(key, find_setting(key, settings, source), value, source)
            if key.startswith("models."):
                config_models.add(config, default_config(), key.split(".")[1])
            config.update_from_flattened_dict({key: value})
            sources[key] = source
        keys = {key for key, _, _ in of_source}
        if "algorithm.learning_rate" in keys and "algorithm.actor_lr" not in keys:
            config.algorithm.actor_lr = None  # a lower source's, which would count for more
    config.models.lock()
    config.workdir = config.workdir.replace("{seed}", str(config.seed))
    validate(config, sources)
    return config


def save_json(config: config_dict.ConfigDict, path: str | os.PathLike) -> None:
    """Writes the configuration for people and tools to read, without the API key; never leaves half a file."""
    content = config.to_dict()
    if content["server"]["api_key"]:
        content["server"]["api_key"] = "(not saved)"
    partial = Path(f"{os.fspath(path)}.partial")
    partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, path)
