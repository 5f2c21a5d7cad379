#!/usr/bin/env bash
# Installs the test extras into .venv and runs the tests; arguments go to pytest.
#
#   bash scripts/test.sh [tests/rl -k grpo ...]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

source scripts/environment.sh
make_environment
install_packages tests --editable ".[server,dev,clients,ray]"

# The compiler for NVIDIA's GPUs, which needs none. In a folder of its own: only the test that compiles with it sees it,
# and JAX looks for no GPU in the others.
if [ "$(uname -sm)" = "Linux x86_64" ]; then
    JAX=$("$VENV_PYTHON" -c 'import jax; print(jax.__version__)')
    install_packages gpu-compiler --no-deps --upgrade --target "$VENV/gpu-compiler" \
        "jax-cuda12-pjrt==$JAX" "jax-cuda12-plugin==$JAX" "nvidia-cuda-nvcc-cu12==12.9.86"
fi

# PyTorch is what transformers, the reference of many tests, computes with. The product never imports it. These tests
# are skipped where it is missing, so on Python 3.11, which it is known to install on, its absence is an error. The CPU
# build is enough; where pip finds only a CUDA build, that works too and is larger.
TORCH=2.13.0
if ! "$VENV_PYTHON" -c "import sys, torch; sys.exit(torch.__version__.split('+')[0] != '$TORCH')" 2>/dev/null; then
    echo "installing torch $TORCH"
    if ! "$VENV_PYTHON" -m pip install --quiet --disable-pip-version-check "torch==$TORCH"; then
        if "$VENV_PYTHON" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))'; then
            echo "error: torch $TORCH could not be installed; the live comparisons with transformers need it" >&2
            exit 1
        fi
        echo "warning: torch $TORCH could not be installed on $("$VENV_PYTHON" --version): the live comparisons with" \
            "transformers are skipped, and the committed reference values stand in for them" >&2
    fi
fi

# Oracles that are compared with live, as they are and without what they ask for: verl's `core_algos` runs with stand-ins
# for its imports, and peft loads adapters with torch and transformers alone.
if "$VENV_PYTHON" -c "import torch" 2>/dev/null; then
    install_packages oracles --no-deps verl==0.9.1 peft==0.21.2 accelerate==1.15.0
fi

# Two processes, each with whole files, so that a file's tests share what they compiled; in the order in which they are
# found, since files of few tests are the slowest ones. A process that crashes is an error and ends the run: the tests
# that it had left would never be run by another. -n 0 runs all in one process.
exec "$VENV_PYTHON" -m pytest --numprocesses=2 --dist=loadfile --no-loadscope-reorder --max-worker-restart=0 "$@"
