"""The repository as a text: formatted, free of lint, and of what only one machine has."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Written so that this file does not match itself.
MACHINE_PATHS = re.compile(
    r"(?<![\w.}>*-])/(?:wor[k]|ro[o]t|hom[e]|User[s]|op[t]|tm[p]|mn[t]|dat[a])/|[A-Z]:\\User[s]\b"
)
REGISTRIES = re.compile(r"\bpyp[i]\.org|pythonhoste[d]\.org|download\.pytorc[h]\.org|--(?:extra-)?index-ur[l]")
BINARY = {".safetensors", ".gguf", ".png", ".npz", ".npy", ".model", ".woff2", ".parquet"}


def tracked_files() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


@pytest.mark.parametrize("command", (["check"], ["format", "--check"]), ids=" ".join)
def test_ruff(command):
    done = subprocess.run([sys.executable, "-m", "ruff", *command, "."], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("pattern", (MACHINE_PATHS, REGISTRIES), ids=("machine paths", "package registries"))
def test_text_holds_nothing_of_one_machine(pattern):
    found = []
    for path in tracked_files():
        if path.suffix in BINARY:
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if pattern.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:160]}")
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "text, is_found",
    [
        ("cd /wor" + "k/main", True),
        ('open("/tm' + 'p/x")', True),
        ("~/.cache and /path/to/model", False),
        ("GET /api/work/ https://example.com/data/x", False),
    ],
)
def test_machine_path_pattern(text, is_found):
    assert bool(MACHINE_PATHS.search(text)) == is_found


def test_files_stay_readable():
    """A file is one idea that fits in a head."""
    long = {
        str(path.relative_to(ROOT)): lines
        for path in tracked_files()
        if path.suffix == ".py" and path.relative_to(ROOT).parts[0] in ("agent_lightning", "lightning_jax")
        if (lines := len(path.read_text(encoding="utf-8").splitlines())) > 450
    }
    assert not long


def test_shipped_model_is_in_the_package_and_small():
    folder = ROOT / "lightning_jax" / "builtin" / "tiny"
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"} <= names
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 10e6
