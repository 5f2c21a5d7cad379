"""The `agent-lightning` command."""

import argparse
import importlib.util
import os
import sys
from collections.abc import Sequence

from agent_lightning import __version__
from agent_lightning.exceptions import AgentLightningError, InvalidConfigError

EXAMPLES = """examples:
  agent-lightning server start --model builtin:tiny --port 8000
  agent-lightning data upload --train train.jsonl --test test.jsonl --data-id my-dataset
  agent-lightning train --agent-script my_agent.py --data-id my-dataset --nworkers 8 --epochs 3

The server's URL and key also come from AGENT_LIGHTNING_SERVER_URL and AGENT_LIGHTNING_API_KEY.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status: 0, 1 for an error that is printed, 130 after Ctrl-C."""
    options, rest = _parser().parse_known_args(argv)
    if rest and options.run is not start_server:
        _parser().error(f"unrecognized arguments: {' '.join(rest)}")
    options.rest = rest
    try:
        return options.run(options) or 0
    except AgentLightningError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def start_server(options: argparse.Namespace) -> None:
    """Becomes `python -m lightning_jax.main` in mode "serve"; arguments it does not know itself are passed on."""
    missing = [name for name in ("lightning_jax", "jax", "fastapi") if importlib.util.find_spec(name) is None]
    if missing:
        raise InvalidConfigError(
            f"the server needs packages that are not installed: {', '.join(missing)}",
            hint="pip install 'lightning-jax[server]' (CPU), [cuda12], [cuda13] or [tpu]",
        )
    settings = {
        "mode": "serve",
        "model.path": options.model,
        "model.tensor_parallel": options.gpus,
        "algorithm.name": options.algorithm,
        "server.host": options.host,
        "server.port": options.port,
        "workdir": options.workdir,
    }
    flags = [f"--config.{key}={value}" for key, value in settings.items() if value is not None]
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-m", "lightning_jax.main", *flags, *options.rest])


def upload_data(options: argparse.Namespace) -> None:
    """Uploads JSONL files and prints the dataset's id."""
    with _client(options) as client:
        print(client.upload_data(options.train, options.test, options.data_id))


def train(options: argparse.Namespace) -> None:
    """Trains with an agent script and prints the result."""
    with _client(options) as client:
        result = client.train(
            options.agent_script,
            nworkers=options.nworkers,
            epochs=options.epochs,
            batch_size=options.batch_size,
            data_id=options.data_id,
            eval_interval=options.eval_interval,
            rollout_timeout=options.rollout_timeout,
        )
    print(f"final reward: {result.final_reward:.4f}")
    if len(result.test_rewards) > 1:
        print(f"held-out reward: {result.test_rewards[0]:.4f} before, {result.test_rewards[-1]:.4f} after")
    print(f"steps: {result.total_steps} in {result.total_time:.1f} s")
    if result.checkpoints:
        print(f"checkpoint: {result.checkpoints[-1]}")


def _client(options: argparse.Namespace):
    from agent_lightning.client import Client

    return Client(options.server_url, api_key=options.api_key)


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="agent-lightning", description="Train LLM agents.", epilog=EXAMPLES, formatter_class=raw
    )
    parser.add_argument("--version", action="version", version=f"agent-lightning {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_server(commands)

    connection = argparse.ArgumentParser(add_help=False)
    connection.add_argument("--server-url", help="default: $AGENT_LIGHTNING_SERVER_URL")
    connection.add_argument("--api-key", help="default: $AGENT_LIGHTNING_API_KEY")

    data = commands.add_parser("data", help="datasets on a server").add_subparsers(required=True, metavar="ACTION")
    upload = data.add_parser("upload", help="upload JSONL files", parents=[connection])
    upload.add_argument("--train", required=True, metavar="FILE", help="JSONL: one object with a `question` a line")
    upload.add_argument("--test", metavar="FILE", help="held-out tasks")
    upload.add_argument("--data-id", metavar="NAME", help="default: derived from the contents")
    upload.set_defaults(run=upload_data)

    training = commands.add_parser("train", help="train with an agent script", parents=[connection])
    training.add_argument("--agent-script", required=True, metavar="FILE.py[:FUNCTION]")
    training.add_argument("--data-id", required=True, metavar="NAME")
    training.add_argument("--nworkers", type=int, default=-1, help="worker processes; -1 (the default) chooses")
    training.add_argument("--epochs", type=int, default=1, help="passes over the tasks (default: %(default)s)")
    training.add_argument("--batch-size", type=int, default=32, help="tasks per update (default: %(default)s)")
    training.add_argument(
        "--eval-interval", type=int, default=50, help="updates between evaluations (default: %(default)s)"
    )
    training.add_argument("--rollout-timeout", type=float, metavar="SECONDS", help="default: the server's")
    training.set_defaults(run=train)
    return parser


def _add_server(commands) -> None:
    server = commands.add_parser("server", help="the server").add_subparsers(required=True, metavar="ACTION")
    start = server.add_parser(
        "start",
        help="serve a model and train it",
        allow_abbrev=False,
        epilog="Further arguments go to lightning_jax.main: --server_config=FILE.yaml, --config.KEY=VALUE.",
    )
    start.add_argument("--model", help="a Hugging Face folder, a .gguf file or builtin:tiny")
    start.add_argument("--gpus", type=int, metavar="N", help="devices that share each weight matrix")
    start.add_argument("--host", help="address to listen on")
    start.add_argument("--port", type=int)
    start.add_argument("--algorithm", help="grpo")
    start.add_argument("--workdir", metavar="FOLDER", help="where checkpoints, metrics and the store go")
    start.set_defaults(run=start_server)


if __name__ == "__main__":
    sys.exit(main())
