"""The command line's own part: help, and errors with an exit status and no traceback."""

import subprocess
import sys

import pytest

from agent_lightning import cli


def test_help_has_examples(capsys):
    with pytest.raises(SystemExit) as left:
        cli.main(["--help"])
    assert left.value.code == 0
    out = capsys.readouterr().out
    for example in ["agent-lightning server start", "agent-lightning data upload", "agent-lightning train"]:
        assert example in out


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["data", "upload", "--train", "gone.jsonl"], "no server URL"),
        (["data", "upload", "--train", "gone.jsonl", "--server-url", "http://127.0.0.1:9"], "cannot read gone.jsonl"),
        (["train", "--agent-script", "gone.py", "--data-id", "d", "--server-url", "http://127.0.0.1:9"], "gone.py"),
        (
            ["train", "--agent-script", "x", "--data-id", "d", "--server-url", "http://x", "--nworkers", "0"],
            "nworkers=0",
        ),
    ],
)
def test_an_error_is_one_line_and_a_hint(capsys, arguments, says):
    assert cli.main(arguments) == 1
    captured = capsys.readouterr()
    assert says in captured.err
    assert "Traceback" not in captured.err and captured.out == ""


def test_an_unknown_argument_is_refused(capsys):
    with pytest.raises(SystemExit) as left:
        cli.main(["data", "upload", "--train", "x", "--nonsense", "1"])
    assert left.value.code == 2
    assert "--nonsense" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--model", "no/such/folder"], "no/such/folder"),
        (["--model", "builtin:tiny", "--config.sampler.max_slot=3"], "max_slots"),
        (["--algorithm", "magic"], "algorithm.name"),
    ],
)
def test_server_start_hands_on_to_the_server(tmp_path, arguments, says):
    command = [sys.executable, "-m", "agent_lightning.cli", "server", "start", "--port", "0"]
    done = subprocess.run(
        [*command, "--workdir", str(tmp_path), *arguments], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1
    assert "InvalidConfigError" in done.stderr and says in done.stderr
    assert "Traceback" not in done.stderr
