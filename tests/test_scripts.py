"""The set-up scripts, in a copy of the files they need, with a Python that only notes what it is asked."""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

INTERPRETER = """#!/usr/bin/env bash
# Stands in for Python where a test must not install anything: notes its arguments and makes "virtual environments".
echo "$*" >> "$CALLS"
case "$1" in
    --version) echo "Python $VERSION" ;;
    -c) [ "$VERSION" != 3.9.1 ] ;;
    -m) case "$2" in
        venv) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
        pip) [ -z "${BROKEN_PIP:-}" ] ;;
    esac ;;
esac
"""


@pytest.fixture
def clone(tmp_path):
    """Runs a script of the repository; returns (the finished process, what Python was asked to do)."""
    for name in ("setup.py", "pyproject.toml", "scripts/environment.sh", "scripts/quickstart.sh", "scripts/test.sh"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "python").write_text(INTERPRETER)
    (tmp_path / "python").chmod(0o755)
    calls = tmp_path / "calls"

    def run(script: str, *arguments: str, **environ: str):
        calls.unlink(missing_ok=True)
        environ = {"PYTHON": str(tmp_path / "python"), "CALLS": str(calls), "VERSION": "3.12.1", **environ}
        command = ["bash", str(tmp_path / script), *arguments]
        # From another folder: the scripts find their own.
        done = subprocess.run(command, cwd="/", env={**os.environ, **environ}, capture_output=True, text=True)
        return done, calls.read_text().splitlines()

    run.folder = tmp_path
    return run


def installs(calls: list[str]) -> list[str]:
    return [call for call in calls if "pip install" in call]


def test_quickstart_installs_once_and_passes_its_arguments_on(clone):
    done, calls = clone("scripts/quickstart.sh", "--config.seed=1", "--config.workdir=runs/a b")
    assert done.returncode == 0, done.stderr
    assert len(installs(calls)) == 1 and installs(calls)[0].endswith("--editable .[server]")
    start = "-m lightning_jax.main --config=configs/quickstart.py --config.seed=1 --config.workdir=runs/a b"
    assert calls[-1] == start
    done, calls = clone("scripts/quickstart.sh")
    assert done.returncode == 0 and installs(calls) == []
    with (clone.folder / "setup.py").open("a") as file:
        file.write("# changed\n")
    assert len(installs(clone("scripts/quickstart.sh")[1])) == 1


def test_an_install_that_failed_is_tried_again(clone):
    done, calls = clone("scripts/quickstart.sh", BROKEN_PIP="yes")
    assert done.returncode == 1 and "error: pip could not install .[server]" in done.stderr
    assert not any("lightning_jax.main" in call for call in calls)
    assert len(installs(clone("scripts/quickstart.sh")[1])) == 1


@pytest.mark.parametrize("python, found", [("python", "Python 3.9.1"), ("absent", "missing")])
def test_without_a_supported_python_it_says_which_are(clone, python, found):
    (clone.folder / "calls").touch()
    command = ["bash", str(clone.folder / "scripts/quickstart.sh")]
    environ = {"PYTHON": str(clone.folder / python), "CALLS": str(clone.folder / "calls"), "VERSION": "3.9.1"}
    done = subprocess.run(command, env={**os.environ, **environ}, capture_output=True, text=True)
    assert done.returncode == 1
    assert "error: Python 3.11, 3.12 or 3.13 is needed" in done.stderr and f" is {found}\n" in done.stderr
    assert not (clone.folder / ".venv").exists()


def test_the_test_script_installs_the_extras_and_runs_pytest(clone):
    done, calls = clone("scripts/test.sh", "tests/rl", "-k", "grpo")
    assert done.returncode == 0, done.stderr
    assert installs(calls)[0].endswith("--editable .[server,dev,clients,ray]")
    assert "--no-deps verl==" in installs(calls)[-1]
    has_compiler = any("--target .venv/gpu-compiler jax-cuda12-pjrt==" in call for call in calls)
    assert has_compiler is ((platform.system(), platform.machine()) == ("Linux", "x86_64"))
    flags = "--numprocesses=2 --dist=loadfile --no-loadscope-reorder --max-worker-restart=0"
    assert calls[-1] == f"-m pytest {flags} tests/rl -k grpo"
    assert installs(clone("scripts/test.sh")[1]) == []


def test_ci_runs_exactly_the_test_script():
    commands = [line for line in (ROOT / ".ci" / "run").read_text().splitlines() if line and not line.startswith("#")]
    assert commands[-1].endswith('/../scripts/test.sh"') and os.access(ROOT / ".ci" / "run", os.X_OK)


@pytest.mark.parametrize(
    "command, says",
    [
        ("bench_learner.py --model=builtin:tiny --length=64 --prompt=64", "--prompt=64 leaves nothing to sample of 64"),
        ("bench_learner.py --model=builtin:tiny --length=64 --shortest=33", "--shortest=33 is not among 1 to what is"),
        ("bench_sampler.py --model=builtin:tiny --new=64 --shortest=65", "--shortest=65 is not among 1 to --new, 64"),
        ("plot_curve.py no/such/run --output=plot.png", "error: no metrics in no/such/run"),
        ("plan.py --model llama3.1-8b --topology cpu:4 --mesh a", "--mesh is three numbers: data,fsdp,tensor"),
        ("plan.py --model llama3.1-8b --topology a100:8 --mesh 0,8,1", "--mesh is three numbers: data,fsdp,tensor"),
        ("plan.py --model llama3.1-8b --topology a100:8 --mesh 1,8,2", "--mesh has 16 chips, and --topology 8"),
        ("plan.py --model llama3.1-8b --topology a100:16 --mesh 1,1,16", "tensor_parallel 16 does not divide"),
        ("plan.py --model llama3.1-8b --topology a100:7", "model.fsdp 7 does not divide"),
        ("plan.py --model llama3.1-8b --topology h100:0", "--topology is a chip and how many there are"),
        ("plan.py --model llama3.1-8b --topology a100:8 --lora_rank -1", "argument --lora_rank: -1 is less than 0"),
    ],
)
def test_bad_arguments_are_one_clear_line(tmp_path, command, says):
    name, *arguments = command.split()
    command = [sys.executable, str(ROOT / "scripts" / name), *arguments]
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True)
    assert done.returncode != 0 and says in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())
