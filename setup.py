"""Packages: `agent_lightning`, the light SDK, is the base; `lightning_jax`, server and trainer, needs an extra."""

from pathlib import Path

from setuptools import find_packages, setup

BASE = ["argcomplete>=3.3", "cloudpickle>=3.0", "httpx>=0.27", "rich>=13.7"]

# Everything of the server but JAX itself, which the accelerator extras ask for with their plugins.
COMMON = [
    "absl-py>=2.1",
    "fastapi>=0.115",
    "flax>=0.12",
    "gguf>=0.17",
    "grain>=0.2.12",
    "jinja2>=3.1.6",  # chat templates; transformers wants no older one
    "llguidance>=1.3",
    "ml_collections>=1.0",
    "numpy>=2.0",
    "optax>=0.2.5",
    "orbax-checkpoint>=0.11.25",
    "orjson>=3.10",
    "pyyaml>=6.0",
    "safetensors>=0.5",
    "sentencepiece>=0.2",
    "tensorboard>=2.18",
    "tokenizers>=0.22",
    "transformers>=5.0",
    "uvicorn>=0.32",
    "httptools>=0.6; platform_system != 'Windows'",  # uvicorn's fast parser and event loop
    "uvloop>=0.21; platform_system != 'Windows'",
]

# What `agent_lightning.runtime.auto_instrument` needs beside the instrumentor of the agent's framework.
TRACING = ["opentelemetry-sdk>=1.30", "opentelemetry-exporter-otlp-proto-http>=1.30"]

EXTRAS = {
    "server": ["jax>=0.10,<0.13", *COMMON],
    "cuda12": ["jax[cuda12]>=0.10,<0.13", *COMMON],
    "cuda13": ["jax[cuda13]>=0.10,<0.13", *COMMON],
    "tpu": ["jax[tpu]>=0.10,<0.13", *COMMON],
    "ray": ["ray>=2.40"],
    "onnx": ["onnx>=1.17"],  # download_model(format="onnx")
    "parquet": ["pyarrow>=17"],  # trajectories as Parquet
    "tracing": TRACING,
    # What agents are written with; tests/clients drives the server with each of these. Later releases of litellm want
    # an openai before 3.
    "clients": [
        "anthropic>=2.12",
        "langchain>=1.0",
        "langchain-anthropic>=1.7",
        "langchain-openai>=1.7",
        "langgraph>=1.0",
        "litellm>=1.83,<1.84",
        "openai>=3.54",
        "openai-agents>=0.24",
        "pydantic-ai-slim[anthropic,openai]>=2.68",
        "schemathesis>=4.0",
        "smolagents>=1.20",
    ],
    "dev": [
        *TRACING,
        "anthropic>=0.40",
        "hypothesis>=6.100",
        "ipykernel>=6.29",
        # The TPU's compiler: tests compile for described TPUs. It changes nothing where there are none.
        "jax[tpu]>=0.10,<0.13; platform_system == 'Linux' and platform_machine == 'x86_64'",
        "jsonschema>=4.20",
        "langchain>=1.0",
        "langchain-anthropic>=1.0",
        "langchain-openai>=1.0",
        "matplotlib>=3.9",
        "nbclient>=0.10",
        "onnx>=1.17",
        "onnxruntime>=1.20",
        "openai>=1.60",
        "openai-agents>=0.6",
        "openinference-instrumentation-langchain>=0.1.50",
        "openinference-instrumentation-openai>=0.1.30",
        "openinference-instrumentation-openai-agents>=1.2",
        "pyarrow>=17",
        "pytest>=8.0",
        "pytest-asyncio>=1.0",
        "pytest-timeout>=2.3",
        "pytest-xdist>=3.6",
        "reasoning-gym>=0.1.19",
        "ruff>=0.9",
        "wandb>=0.19",
    ],
}

README = Path(__file__).with_name("README.md")

setup(
    name="lightning-jax",
    version="0.1.0",
    description="Reinforcement learning for LLM agents written with any framework, in one JAX process",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    python_requires=">=3.11,<3.14",
    packages=find_packages(include=["agent_lightning", "agent_lightning.*", "lightning_jax", "lightning_jax.*"]),
    package_data={"lightning_jax": ["builtin/tiny/*"]},
    install_requires=BASE,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["agent-lightning = agent_lightning.cli:main"]},
)
