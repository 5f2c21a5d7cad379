"""Environment Variables: each reaches the setting that it names."""

import pytest

from agent_lightning import Client, settings
from agent_lightning.runtime import config as runtime_config
from lightning_jax import config

PRINTED = """
# Server configuration
export AGENT_LIGHTNING_SERVER_URL="http://localhost:8000"
export AGENT_LIGHTNING_API_KEY="optional-api-key"

# Model configuration
export LIGHTNING_MODEL_PATH="meta-llama/Llama-3.2-3B-Instruct"
export LIGHTNING_DEVICE="cuda"

# Training configuration
export LIGHTNING_RL_ALGORITHM="grpo"
export LIGHTNING_BATCH_SIZE="256"
export LIGHTNING_LEARNING_RATE="5e-7"

# Runtime configuration
export LIGHTNING_ENABLE_AIR="true"
export LIGHTNING_MAX_RETRIES="3"
"""


@pytest.fixture
def environment(monkeypatch):
    for line in PRINTED.splitlines():
        if line.startswith("export "):
            name, _, value = line.removeprefix("export ").partition("=")
            monkeypatch.setenv(name, value.strip('"'))


def test_servers_settings(environment):
    merged = config.merge()
    assert merged.server.api_key == "optional-api-key"
    assert (merged.model.path, merged.device) == ("meta-llama/Llama-3.2-3B-Instruct", "cuda")
    assert (merged.algorithm.name, merged.runtime.batch_size, merged.algorithm.learning_rate) == ("grpo", 256, 5e-7)


def test_clients_and_workers_settings(environment):
    assert Client().server_url == "http://localhost:8000"
    assert settings.api_key() == "optional-api-key" and settings.max_retries() == 3
    assert runtime_config.air_enabled() is True and runtime_config.max_retries() == 3
