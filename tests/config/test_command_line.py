"""The command line in a process of its own, as `main.py` uses it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import json, sys
from absl import app
from lightning_jax import command_line
from agent_lightning.exceptions import InvalidConfigError

command_line.define_flags()

def main(argv):
    print(json.dumps({"argv": argv[1:], "config": command_line.merged_config().to_dict()}))

try:
    app.run(main, flags_parser=command_line.parse_flags)
except InvalidConfigError as error:
    sys.exit(f"error: {error}")
"""
CONFIG = """\
from lightning_jax.config import default_config


def get_config(variant="16"):
    config = default_config()
    config.runtime.batch_size = int(variant)
    config.runtime.epochs = 3
    return config
"""


@pytest.fixture
def program(tmp_path):
    """Runs a program with the project's flags in an empty folder."""
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "mine.py").write_text(CONFIG)

    def run(*arguments: str, environ: dict | None = None) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, "program.py", *arguments],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT), **(environ or {})},
            capture_output=True,
            text=True,
        )

    return run


def settings(done: subprocess.CompletedProcess) -> dict:
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["config"]


def error(done: subprocess.CompletedProcess) -> str:
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    return done.stderr


def test_config_file_variant_and_overrides_in_any_order(program):
    done = program(
        "--config.seed=4", "--config=mine.py:24", "--noconfig.logging.tensorboard", "--config.model.path", "x"
    )
    found = settings(done)
    assert (found["runtime"]["batch_size"], found["runtime"]["epochs"]) == (24, 3)
    assert (found["seed"], found["logging"]["tensorboard"], found["model"]["path"]) == (4, False, "x")


def test_without_a_config_file_the_defaults_hold_and_the_rest_is_passed_on(program):
    done = program("--config.algorithm.learning_rate=1e-6", "one", "--", "--config.seed=x")
    assert settings(done)["algorithm"]["learning_rate"] == 1e-6
    assert json.loads(done.stdout)["argv"] == ["one", "--config.seed=x"]


def test_all_sources_together(program, tmp_path):
    (tmp_path / "server.yaml").write_text("runtime:\n  batch_size: 32\n  epochs: 7\n  eval_interval: 9\n")
    environ = {"LIGHTNING_BATCH_SIZE": "40", "LIGHTNING_LEARNING_RATE": "1e-5"}
    flags = (
        "--config=absent.py",
        "--config=mine.py",
        "--server_config=server.yaml",
        "--config.runtime.eval_interval=2",
    )
    found = settings(program(*flags, environ=environ))  # the last --config counts
    assert found["runtime"]["batch_size"] == 40
    assert found["runtime"]["epochs"] == 7
    assert found["runtime"]["eval_interval"] == 2
    assert found["algorithm"]["learning_rate"] == 1e-5


@pytest.mark.parametrize(
    "arguments, says",
    [
        (("--config.runtime.batch_sise=8",), "did you mean 'runtime.batch_size'?"),
        (
            ("--config.runtime.batch_size=many",),
            "must be a whole number, not 'many' (flag --config.runtime.batch_size)",
        ),
        (("--config.runtime.batch_size",), "runtime.batch_size is given no value"),
        (("--noconfig.seed",), "--noconfig.seed says nothing"),
        (("--noconfig.logging.tensorboard=1",), "--noconfig.logging.tensorboard=1 does not take an argument"),
        (("--config=absent.py",), "the config file absent.py does not exist (flag --config)"),
        (("--server_confg=x.yaml",), "server_config"),
        (("--server_confg=x.yaml",), "unknown command line flag 'server_confg'\n  hint: did you mean --server_config?"),
        (("--prot=1",), "error: unknown command line flag 'prot'\n"),
        (("--confg.seed=1",), "hint: did you mean --config.seed?"),
        (("--config=server.yaml",), "give --server_config=server.yaml"),
        (("--config=mine.py:9",), "must be a multiple of algorithm.group_size (8), not 9 (mine.py, line 6)"),
        (("--config=mine.py:x",), "ValueError: invalid literal for int() with base 10: 'x' (mine.py, line 6)"),
        (("--sampler.max_slots=8",), "write --config.sampler.max_slots"),
    ],
)
def test_mistakes_are_one_clear_line(program, arguments, says):
    assert says in error(program(*arguments))


@pytest.mark.parametrize(
    "line, says",
    [
        ("config.algorithm.lerning_rate = 1.0", "unknown setting 'lerning_rate' (own.py, line 5)"),
        (
            "config.algorithm.learning_rate = 'fast'",
            "algorithm.learning_rate must be a number, not 'fast' (own.py, line 5)",
        ),
        ("config.algorithm.learning_rate = -1.0", "must be at least 0, not -1.0 (own.py, line 5)"),
        ("config.model = None", "(own.py"),
        ("1 / 0", "ZeroDivisionError: division by zero (own.py, line 5)"),
        ("return {'modle': {'path': 'x'}}", "did you mean 'model.path'?"),
    ],
)
def test_mistakes_in_a_config_file_name_its_line(program, tmp_path, line, says):
    (tmp_path / "own.py").write_text(
        "from lightning_jax.config import default_config\n\n\ndef get_config(config=default_config()):\n"
        f"    {line}\n    return config\n"
    )
    assert says in error(program("--config=own.py"))


def test_a_config_file_may_return_a_plain_partial_dict(program, tmp_path):
    (tmp_path / "own.py").write_text("def get_config():\n    return {'seed': 9, 'model': {'path': 'x'}}\n")
    found = settings(program("--config=own.py"))
    assert (found["seed"], found["model"]["path"], found["model"]["dtype"]) == (9, "x", "auto")


def test_models_are_named_by_flags_alone_or_changed_by_them(program, tmp_path):
    (tmp_path / "two.py").write_text(
        "def get_config():\n    return {'models': {'query': {'path': 'a'}, 'answer': {'path': 'b'}}}\n"
    )
    changed = settings(program("--config.models.query.path=c", "--config=two.py"))["models"]
    assert {name: entry["path"] for name, entry in changed.items()} == {"query": "c", "answer": "b"}
    flags = ("--config.models.query.path", "a", "--config.models.answer.path=b", "--config.models.answer.dtype=float32")
    named = settings(program(*flags))["models"]
    assert {name: (entry["path"], entry["dtype"]) for name, entry in named.items()} == {
        "query": ("a", "auto"),
        "answer": ("b", "float32"),
    }
    says = error(program("--config.models.query.paht=a"))
    assert "did you mean 'models.query.path'?" in says and "flag --config.models.query.paht" in says


@pytest.mark.parametrize("none", ["None", "null", ""])
def test_a_flag_sets_back_to_none_what_a_file_has_set(program, tmp_path, none):
    (tmp_path / "ppo.yaml").write_text(
        "algorithm:\n  name: ppo\n  kl_in_reward: true\n"
        + "".join(f"  {name}: 1\n" for name in ("actor_lr", "critic_warmup"))
    )
    names = ("actor_lr", "critic_warmup", "kl_in_reward")
    found = settings(program("--server_config=ppo.yaml", *(f"--config.algorithm.{name}={none}" for name in names)))
    assert [found["algorithm"][name] for name in names] == [None, None, None]


@pytest.mark.parametrize("written, value", [("yes", True), ("on", True), ("no", False), ("OFF", False), ("0", False)])
def test_a_flag_takes_true_and_false_as_a_yaml_file_does(program, written, value):
    assert settings(program(f"--config.logging.tensorboard={written}"))["logging"]["tensorboard"] is value


def test_what_a_file_makes_of_a_setting_follows_its_flag(program, tmp_path):
    (tmp_path / "follows.py").write_text(
        CONFIG.replace(
            "return", "config.algorithm.warmup_steps = config.runtime.get_ref('total_steps') // 10\n    return"
        )
    )
    done = settings(program("--config=follows.py", "--config.runtime.total_steps=1000"))
    assert (done["runtime"]["total_steps"], done["algorithm"]["warmup_steps"]) == (1000, 100)
    (tmp_path / "required.py").write_text(
        "from ml_collections import config_dict\n\n\ndef get_config():\n"
        "    return config_dict.ConfigDict({'seed': config_dict.placeholder(int), 'runtime': {'epochs': 2}})\n"
    )
    done = settings(program("--config=required.py", "--config.seed=3", "--config.runtime.epochs=4"))
    assert (done["seed"], done["runtime"]["epochs"]) == (3, 4)


def test_a_flagfiles_flags_count_as_flags(program, tmp_path):
    (tmp_path / "flags.txt").write_text("--config.seed=9\n--config.algorithm.learning_rate=1e-3\n")
    (tmp_path / "s.yaml").write_text("seed: 11\n")
    given = ("--flagfile=flags.txt", "--server_config=s.yaml")
    done = settings(program(*given, environ={"LIGHTNING_LEARNING_RATE": "2e-3"}))
    assert (done["seed"], done["algorithm"]["learning_rate"]) == (9, 1e-3)


def test_flags_without_a_value_and_repeated_ones(program):
    flags = ("--config.algorithm.filter_groups", "rest", "--config.seed=1", "-config.seed", "2")
    done = program(*flags, "--config.logging.tensorboard", "--noconfig.logging.tensorboard")
    found = settings(done)
    assert (found["algorithm"]["filter_groups"], found["seed"], found["logging"]["tensorboard"]) == (True, 2, False)
    assert json.loads(done.stdout)["argv"] == ["rest"]


def test_help_lists_the_flags(program):
    assert "--server_config: A YAML file of settings." in program("--help").stdout
