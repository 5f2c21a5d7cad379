#!/usr/bin/env bash
# Makes .venv, installs Lightning JAX for the CPU and trains the model that ships with it.
#
#   bash scripts/quickstart.sh [--config.seed=1 --config.workdir=runs/one --config.runtime.total_steps=8 ...]
#
# A second run installs nothing, unless setup.py has changed. PYTHON names another interpreter than python3.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

source scripts/environment.sh
make_environment
install_packages server --editable ".[server]"  # the packages are always the ones in this folder
exec "$VENV_PYTHON" -m lightning_jax.main --config=configs/quickstart.py "$@"
