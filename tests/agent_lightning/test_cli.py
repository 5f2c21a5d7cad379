"""The command line: help, errors, completion, the doctor, and every command against one real server process."""

import contextlib
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from agent_lightning import cli
from tests.agent_lightning.conftest import SMALL

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = ["server start", "data upload", "train", "evaluate", "model download", "doctor", "completion"]

# The API reference's own lines.
REFERENCE = r"""
agent-lightning server start --model meta-llama/Llama-3.2-3B-Instruct --gpus 4 --port 8000 --algorithm grpo
agent-lightning data upload --train train.jsonl --test test.jsonl --data-id my-dataset
agent-lightning train --agent-script my_agent.py --data-id my-dataset --nworkers 8 --epochs 3
agent-lightning evaluate --agent-script my_agent.py --checkpoint checkpoints/latest --test test.jsonl
agent-lightning model download --checkpoint checkpoints/step-1000 --output trained_model/
"""

AGENT = """
from openai import OpenAI


def my_agent(resource, task):
    client = OpenAI(base_url=resource.model_api, api_key="any")
    messages = [{"role": "user", "content": task.question}]
    reply = client.chat.completions.create(model=resource.model_name, messages=messages, max_tokens=4)
    assert resource.metadata["colour"] == "red"
    return float(len(set(reply.choices[0].message.content)))
"""


def run(*arguments: str, **options) -> subprocess.CompletedProcess:
    """The command in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **options.pop("env", {})}
    command = [sys.executable, "-m", "agent_lightning.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, **options)


# Help and usage -------------------------------------------------------------------------------------------------------


def help_of(command: str, capsys) -> str:
    with pytest.raises(SystemExit) as left:
        cli.main([*command.split(), "--help"])
    assert left.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("command", ["", "server", "data", "model", *COMMANDS])
def test_every_help_has_examples_that_are_right(command, capsys):
    examples = re.findall(r"\bagent-lightning \w.*", help_of(command, capsys).partition("examples:")[2])
    examples = [line.split("`")[0].split(')"')[0].split(" > ")[0] for line in examples]
    assert examples
    for example in examples:
        if "COMMAND" not in example:
            options, rest = cli.build_parser().parse_known_args(shlex.split(example)[1:])
            assert options.run is not None and (options.takes_settings or not rest)


def test_the_reference_lines_are_right():
    for line in REFERENCE.strip().splitlines():
        options, rest = cli.build_parser().parse_known_args(shlex.split(line)[1:])
        assert options.run is not None and not rest


@pytest.mark.parametrize("command", ["server start", "data upload", "train", "evaluate", "model download"])
def test_every_option_is_explained(command):
    parser = cli.build_parser().parse_known_args([*command.split(), *required(command)])[0].parser
    for action in parser._actions:
        assert (
            action.help
            or "agent-script" in action.option_strings[0]
            or action.option_strings[0]
            in (
                "--output",
                "--host",
            )
        ), action.option_strings


def required(command: str) -> list[str]:
    return {
        "data upload": ["--train", "x"],
        "train": ["--agent-script", "x", "--data-id", "x"],
        "evaluate": ["--agent-script", "x", "--test", "x"],
        "model download": ["--output", "x"],
    }.get(command, [])


def test_settings_given_to_train_are_shown_the_way_to_the_server(capsys):
    with pytest.raises(SystemExit) as left:
        cli.main(["train", "--agent-script", "x", "--data-id", "x", "--config.algorithm.group_size=4"])
    assert left.value.code == 2
    assert "settings belong to the server: give them to `agent-lightning server start`" in capsys.readouterr().err


def test_what_the_server_says_of_flags_is_what_the_command_has(tmp_path):
    started = run("server", "start", "--algorithm", "gripo", "--workdir", str(tmp_path))
    assert started.returncode == 1 and "(flag --algorithm)" in started.stderr and "--config." not in started.stderr
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        started = run("server", "start", "--port", port, "--workdir", str(tmp_path))
    assert started.returncode == 1 and "choose another with --port;" in started.stderr


@pytest.mark.parametrize("command", ["", "server", "data", "model"])
def test_half_a_command_shows_what_there_is(command, capsys):
    assert cli.main(command.split()) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and "examples:" in captured.err


@pytest.mark.parametrize(
    "arguments, says",
    [
        ("data upload --train x --nonsense 1", "usage: agent-lightning data upload"),
        ("data upload --train x --nonsense 1", "unrecognized arguments: --nonsense 1"),
        ("train --agent-script x", "required: --data-id"),
        ("evaluate --agent-script x", "one of the arguments --test --data-id is required"),
        ("train --agent-script x --data-id d --nworkers many", "invalid int value: 'many'"),
        ("train --agent-script x --data-id d --metadata [1]", "not a JSON object"),
        ("model download --output x --format gguf", "invalid choice: 'gguf'"),
        ("serve", "invalid choice: 'serve'"),
    ],
)
def test_wrong_usage_is_status_2_and_shows_the_right_one(capsys, arguments, says):
    with pytest.raises(SystemExit) as left:
        cli.main(arguments.split())
    assert left.value.code == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, says",
    [
        ("data upload --train gone.jsonl", "no server URL"),
        ("data upload --train gone.jsonl --server-url http://127.0.0.1:9", "cannot read gone.jsonl"),
        ("data upload --train gone.jsonl --server-url localhost:9", "is not a URL"),
        ("train --agent-script gone.py --data-id d --server-url http://127.0.0.1:9", "gone.py"),
        ("train --agent-script x --data-id d --server-url http://x --nworkers 0", "nworkers=0"),
    ],
)
def test_an_error_is_one_line_and_a_hint(capsys, arguments, says):
    assert cli.main(arguments.split()) == 1
    captured = capsys.readouterr()
    assert says in captured.err
    assert "Traceback" not in captured.err and captured.out == ""


@pytest.mark.parametrize(
    "arguments, environment, says",
    [
        (["--model", "no/such/folder"], {}, ["no/such/folder", "give a local folder"]),
        (["--model", "some/model"], {}, ["some/model", "hf download some/model"]),
        (["--config.sampler.max_slot=3"], {}, ["max_slots"]),
        (["--prot", "1"], {}, ["unknown command line flag 'prot'\n  hint: did you mean --port?"]),
        (["--algorithm", "grppo"], {"LIGHTNING_RL_ALGORITHM": "grpo"}, ["did you mean 'grpo'"]),
        ([], {"LIGHTNING_DEVICE": "cuda", "JAX_PLATFORMS": ""}, ["device 'cuda'", "LIGHTNING_DEVICE", "doctor"]),
    ],
)
def test_server_start_hands_on_to_the_server(tmp_path, arguments, environment, says):
    done = run("server", "start", "--port", "0", "--workdir", str(tmp_path), *arguments, env=environment)
    assert done.returncode == 1
    assert "InvalidConfigError" in done.stderr and "hint: " in done.stderr
    for text in says:
        assert text in done.stderr
    assert "Traceback" not in done.stderr


# Completion -----------------------------------------------------------------------------------------------------------


def completions(tmp_path: Path, line: str) -> set[str]:
    """What bash offers behind a line, after the script that `completion bash` prints."""
    program = tmp_path / "agent-lightning"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m agent_lightning.cli "$@"\n')
    program.chmod(0o755)
    (tmp_path / "ask.sh").write_text(
        'eval "$(agent-lightning completion bash)"\n'
        "complete -p agent-lightning > /dev/null || exit 1\n"
        f"COMP_LINE={shlex.quote(line)} COMP_POINT={len(line)} COMP_TYPE=9\n"
        f"COMP_WORDS=({line} '') COMP_CWORD={len(line.split())}\n"
        '_python_argcomplete agent-lightning\nprintf "%s\\n" "${COMPREPLY[@]}"\n'
    )
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", str(tmp_path / "ask.sh")],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return {word.strip() for word in done.stdout.splitlines()}


def test_bash_completes_commands_options_and_choices(tmp_path):
    assert {"server", "data", "train", "evaluate", "model", "doctor"} <= completions(tmp_path, "agent-lightning ")
    assert "--agent-script" in completions(tmp_path, "agent-lightning train --")
    assert completions(tmp_path, "agent-lightning model download --format ") == {
        "huggingface",
        "onnx",
        "peft",
        "safetensors",
    }


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_each_shell_has_a_script(shell, capsys):
    assert cli.main(["completion", shell]) == 0
    assert "agent-lightning" in capsys.readouterr().out


# A real server --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """`agent-lightning server start` in a folder of its own; (its URL, the folder)."""
    folder = tmp_path_factory.mktemp("user")
    (folder / "my_agent.py").write_text(AGENT)
    tasks = [{"question": f"What is {n} + 1?", "ground_truth": str(n + 1)} for n in range(6)]
    for name, part in (("train.jsonl", tasks[:4]), ("test.jsonl", tasks[4:])):
        (folder / name).write_text("".join(json.dumps(task) + "\n" for task in part))
    flags = [f"--config.{key}={value}" for key, value in SMALL.items()]
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "agent_lightning.cli",
            "server",
            "start",
            "--model",
            "builtin:tiny",
            "--port",
            "0",
            *flags,
        ],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "LIGHTNING_BATCH_SIZE": "8"},
        stderr=subprocess.PIPE,
        text=True,
    )
    said = []
    for line in process.stderr:
        said.append(line)
        if found := re.search(r"serving .* on (http://\S+)", line):
            break
    else:
        pytest.fail("".join(said))
    yield found[1], folder, "".join(said)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 0


def test_the_server_says_what_it_needs_and_where_it_is(server):
    url, folder, said = server
    assert re.search(r"loading builtin:tiny on .*: [\d.]+ [GM]B to serve, [\d.]+ [GM]B to train, up to", said)
    config = json.loads((folder / "runs" / "default" / "config.json").read_text())
    assert config["runtime"]["batch_size"] == 8  # from the environment


def test_every_command_in_turn(server):
    """Upload, train, evaluate and download as a new user gives them, in a folder with nothing but the data."""
    url, folder, _ = server
    user = {"cwd": folder, "env": {"AGENT_LIGHTNING_SERVER_URL": url}}
    metadata = ["--metadata", '{"colour": "red"}']

    uploaded = run("data", "upload", "--train", "train.jsonl", "--test", "test.jsonl", "--data-id", "mine", **user)
    assert (uploaded.returncode, uploaded.stdout) == (0, "mine\n"), uploaded.stderr

    trained = run(
        *("train", "--agent-script", "my_agent.py", "--data-id", "mine", "--nworkers", "2", "--batch-size", "4"),
        *metadata,
        **user,
    )
    assert trained.returncode == 0, trained.stderr
    assert re.search(r"^final reward: \d\.\d{4}$", trained.stdout, re.MULTILINE)
    assert re.search(r"^steps: 1 in [\d.]+ s$", trained.stdout, re.MULTILINE)
    assert re.search(r"^last checkpoint: .*step-1$", trained.stdout, re.MULTILINE)

    evaluated = run(
        *("evaluate", "--agent-script", "my_agent.py:my_agent", "--checkpoint", "checkpoints/latest"),
        *("--test", "test.jsonl", "--nworkers", "2", *metadata),
        **user,
    )
    assert evaluated.returncode == 0, evaluated.stderr
    assert re.search(r"^reward: \d\.\d{4} \+- \d\.\d{4} \(2 tasks\)$", evaluated.stdout, re.MULTILINE)

    downloaded = run("model", "download", "--checkpoint", "checkpoints/step-1", "--output", "trained_model/", **user)
    assert (downloaded.returncode, downloaded.stdout) == (0, f"{folder / 'trained_model'}\n"), downloaded.stderr
    assert (folder / "trained_model" / "model.safetensors").exists()

    absent = run("model", "download", "--checkpoint", "step-77", "--output", "other", **user)
    assert absent.returncode == 1 and "step-77" in absent.stderr and "step-1" in absent.stderr
    assert "Traceback" not in absent.stderr
    broken = run("train", "--agent-script", "my_agent.py:other", "--data-id", "mine", **user)
    assert broken.returncode == 1 and "my_agent(resource, task)" in broken.stderr
    unknown = run("train", "--agent-script", "my_agent.py", "--data-id", "yours", **user)
    assert unknown.returncode == 1 and "yours" in unknown.stderr


def test_the_doctor_examines_packages_server_devices_and_memory(server):
    url, _, _ = server
    done = run("doctor", "--model", "builtin:tiny", "--server-url", url, "--config.runtime.max_seq_len=256")
    assert done.returncode == 0, done.stderr
    assert f"{url} answers: builtin:tiny, policy version" in done.stdout
    for text in (f"agent-lightning {cli.__version__}", "Python 3.", "httpx", "cpu", "Adam's moments", "to serve"):
        assert text in done.stdout, done.stdout
    assert "everything fits" in done.stdout or "set runtime." in done.stdout
    for agents in re.findall("^  agents .*", done.stdout, re.MULTILINE):
        for package in ("openai", "anthropic", "pydantic-ai-slim", "smolagents"):
            with contextlib.suppress(metadata.PackageNotFoundError):
                assert f"{package} {metadata.version(package)}" in agents


def test_the_doctor_finds_what_is_wrong():
    done = run(
        *("doctor", "--model", "llama3.gguf", "--server-url", "http://127.0.0.1:9"), env={"LIGHTNING_BATCH_SIZE": "8"}
    )
    assert done.returncode == 1
    assert "cannot reach the server at http://127.0.0.1:9" in done.stdout
    assert "llama3.gguf" in done.stderr and "Traceback" not in done.stderr
