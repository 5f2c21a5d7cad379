"""The `agent-lightning` command."""

import argparse
import importlib.util
import json
import os
import sys
import warnings
from collections.abc import Sequence

from agent_lightning import __version__
from agent_lightning.exceptions import AgentLightningError, InvalidConfigError

PROGRAM = "agent-lightning"
START_FLAGS = {  # of `server start`, by the setting that each stands for
    "model.path": "model",
    "model.tensor_parallel": "gpus",
    "algorithm.name": "algorithm",
    "server.host": "host",
    "server.port": "port",
    "workdir": "workdir",
}
STARTED_HERE = "AGENT_LIGHTNING_STARTED_BY_CLI"  # tells the server to name these flags in what it says


def flag_of(key: str) -> str:
    """The server's flag for a setting, as the command that this process was started with has it."""
    short = START_FLAGS.get(key) if STARTED_HERE in os.environ else None
    return f"--{short}" if short else f"--config.{key}"


EXAMPLES = f"""examples:
  {PROGRAM} server start --model builtin:tiny --port 8000
  {PROGRAM} data upload --train train.jsonl --test test.jsonl --data-id my-dataset
  {PROGRAM} train --agent-script my_agent.py --data-id my-dataset --nworkers 8 --epochs 3
  {PROGRAM} evaluate --agent-script my_agent.py --checkpoint best --test test.jsonl
  {PROGRAM} model download --checkpoint latest --output trained_model/
  {PROGRAM} doctor --model builtin:tiny

The server's URL and key also come from AGENT_LIGHTNING_SERVER_URL and AGENT_LIGHTNING_API_KEY.
`{PROGRAM} COMMAND --help` shows a command's own examples.
"""

START_EXAMPLES = f"""further arguments go to the server: --server_config=FILE.yaml, --config=FILE.py, --config.KEY=VALUE
(every setting, with its default, is in lightning_jax/config.py)

examples:
  {PROGRAM} server start --model builtin:tiny
  {PROGRAM} server start --model models/Llama-3.2-3B-Instruct --gpus 4 --port 8000 --algorithm grpo
  {PROGRAM} server start --server_config=server_config.yaml --config.sampler.max_slots=32
"""

UPLOAD_EXAMPLES = f"""examples:
  {PROGRAM} data upload --train train.jsonl
  {PROGRAM} data upload --train train.jsonl --test test.jsonl --data-id my-dataset
"""

TRAIN_EXAMPLES = f"""without :FUNCTION the agent is what agent_func, my_agent or agent names in the script, else the
only function with two parameters

examples:
  {PROGRAM} train --agent-script my_agent.py --data-id my-dataset --nworkers 8 --epochs 3
  {PROGRAM} train --agent-script my_agent.py:solve --data-id my-dataset --metadata '{{"use_cot": true}}'
"""

EVALUATE_EXAMPLES = f"""examples:
  {PROGRAM} evaluate --agent-script my_agent.py --test test.jsonl
  {PROGRAM} evaluate --agent-script my_agent.py --checkpoint checkpoints/latest --test test.jsonl
  {PROGRAM} evaluate --agent-script my_agent.py --checkpoint step-100 --data-id my-dataset --num-samples 8
"""

DOWNLOAD_EXAMPLES = f"""examples:
  {PROGRAM} model download --output trained_model/
  {PROGRAM} model download --checkpoint checkpoints/step-1000 --output trained_model/
  {PROGRAM} model download --checkpoint best --format onnx --output trained_onnx/
"""

DOCTOR_EXAMPLES = f"""further arguments are those of `server start`: --server_config=FILE.yaml, --config.KEY=VALUE

examples:
  {PROGRAM} doctor
  {PROGRAM} doctor --model models/Llama-3.2-3B-Instruct --server_config=server_config.yaml
  {PROGRAM} doctor --model builtin:tiny --config.runtime.max_seq_len=512
"""

COMPLETION_EXAMPLES = f"""examples:
  echo 'eval "$({PROGRAM} completion bash)"' >> ~/.bashrc
  echo 'eval "$({PROGRAM} completion zsh)"' >> ~/.zshrc
  {PROGRAM} completion fish > ~/.config/fish/completions/{PROGRAM}.fish
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Returns:
        The exit status: 0; 1 for an error, which is printed to stderr with a hint; 2 for wrong usage; 130 after Ctrl-C.
    """
    parser = build_parser()
    if "_ARGCOMPLETE" in os.environ:  # the shell asks what may come next
        import argcomplete

        argcomplete.autocomplete(parser)
    options, rest = parser.parse_known_args(argv)
    if options.run is None:
        options.parser.print_help(sys.stderr)
        return 2
    if rest and not options.takes_settings:
        message = f"unrecognized arguments: {' '.join(rest)}"
        if any(argument.startswith(("--config", "--server_config")) for argument in rest):
            message += f"\n  hint: settings belong to the server: give them to `{PROGRAM} server start`"
        options.parser.error(message)
    options.rest = rest
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"  # not the line of this package's source
    try:
        return options.run(options) or 0
    except AgentLightningError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


# ---------------------------------------------------------------------------------------------------------------------
# Commands
# ---------------------------------------------------------------------------------------------------------------------


def start_server(options: argparse.Namespace) -> None:
    """Becomes `python -m lightning_jax.main` in mode "serve"; arguments it does not know itself are passed on."""
    missing = [name for name in ("lightning_jax", "jax", "fastapi") if importlib.util.find_spec(name) is None]
    if missing:
        raise InvalidConfigError(
            f"the server needs packages that are not installed: {', '.join(missing)}",
            hint="in the source folder: pip install '.[server]' (CPU), '.[cuda12]', '.[cuda13]' or '.[tpu]'",
        )
    settings = {"mode": "serve"} | {key: getattr(options, flag) for key, flag in START_FLAGS.items()}
    flags = [f"--config.{key}={value}" for key, value in settings.items() if value is not None]
    sys.stdout.flush()
    command = [sys.executable, "-m", "lightning_jax.main", *flags, *options.rest]
    os.execve(sys.executable, command, os.environ | {STARTED_HERE: "1"})


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
            checkpoint_dir=options.checkpoint_dir,
            eval_interval=options.eval_interval,
            metadata=options.metadata,
            rollout_timeout=options.rollout_timeout,
        )
    print(f"final reward: {result.final_reward:.4f}")
    if len(result.test_rewards) > 1:
        print(f"held-out reward: {result.test_rewards[0]:.4f} before, {result.test_rewards[-1]:.4f} after")
    _print_failures(result)
    print(f"steps: {result.total_steps} in {result.total_time:.1f} s")
    for name, path in (("best", result.best_checkpoint), ("last", (result.checkpoints or [None])[-1])):
        if path:
            print(f"{name} checkpoint: {path}")


def evaluate(options: argparse.Namespace) -> None:
    """Evaluates a checkpoint with an agent script and prints the result."""
    with _client(options) as client:
        result = client.evaluate(
            options.agent_script,
            options.test,
            options.checkpoint,
            nworkers=options.nworkers,
            num_samples=options.num_samples,
            data_id=options.data_id,
            metadata=options.metadata,
            rollout_timeout=options.rollout_timeout,
        )
    print(f"reward: {result.mean:.4f} +- {result.standard_error:.4f} ({len(result.rewards)} tasks)")
    _print_failures(result)
    for k, rate in result.pass_at_k.items():
        if k.bit_count() == 1 or k == len(result.pass_at_k):
            print(f"pass@{k}: {rate:.4f}")
    print(f"step: {result.step} in {result.total_time:.1f} s")


def _print_failures(result) -> None:
    if result.failures:
        print(f"failed rollouts: {result.failures}; the first: {result.first_failure}")


def download_model(options: argparse.Namespace) -> None:
    """Downloads a checkpoint's weights and prints the folder."""
    with _client(options) as client:
        print(client.download_model(options.output, options.checkpoint, options.format, model=options.model))


def run_doctor(options: argparse.Namespace) -> int:
    """Says what is installed, which devices there are, and whether the model fits; 1 where something must be mended."""
    from agent_lightning import doctor

    settings = [f"--config.model.path={options.model}"] if options.model else []
    return doctor.examine(options.server_url, options.api_key, [*settings, *options.rest])


def print_completion(options: argparse.Namespace) -> None:
    """Prints the script that makes a shell complete this command."""
    import argcomplete

    print(argcomplete.shellcode([PROGRAM], shell=options.shell))


def _client(options: argparse.Namespace):
    from agent_lightning.client import Client

    return Client(options.server_url, api_key=options.api_key, ray_address=getattr(options, "ray_address", None))


# ---------------------------------------------------------------------------------------------------------------------
# Arguments
# ---------------------------------------------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    """The parser; of what it returns, `run` is the command's function, or None where only a group was named."""
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Train LLM agents with reinforcement learning.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    parser.set_defaults(run=None, parser=parser, takes_settings=False)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    _add_start(_group(commands, "server", "the server", START_EXAMPLES))
    _add_upload(_group(commands, "data", "datasets on a server", UPLOAD_EXAMPLES))
    _add_train(commands)
    _add_evaluate(commands)
    _add_download(_group(commands, "model", "trained models", DOWNLOAD_EXAMPLES))
    _add_doctor(commands)
    completion = _command(
        commands, "completion", print_completion, "print a shell's completion script", COMPLETION_EXAMPLES
    )
    completion.add_argument("shell", choices=["bash", "zsh", "fish"])
    return parser


def _group(commands, name: str, text: str, examples: str):
    group = commands.add_parser(
        name, help=text, description=text, epilog=examples, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    group.set_defaults(parser=group)
    return group.add_subparsers(title="actions", metavar="ACTION")


def _command(commands, name: str, run, text: str, examples: str, **settings) -> argparse.ArgumentParser:
    command = commands.add_parser(
        name,
        help=text,
        description=f"{text[0].upper()}{text[1:]}.",
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        **settings,
    )
    command.set_defaults(run=run, parser=command)
    return command


def _add_start(actions) -> None:
    # Nothing may be taken for an abbreviation of what is passed on.
    start = _command(actions, "start", start_server, "serve a model and train it", START_EXAMPLES, allow_abbrev=False)
    start.set_defaults(takes_settings=True)
    start.add_argument("--model", metavar="PATH", help="a Hugging Face folder, a .gguf file or builtin:tiny")
    start.add_argument("--gpus", type=int, metavar="N", help="devices that share each weight matrix (default: 1)")
    start.add_argument("--host", help="address to listen on (default: 127.0.0.1)")
    start.add_argument("--port", type=int, help="default: 8000; 0 takes any free one")
    start.add_argument("--algorithm", metavar="NAME", help="default: grpo")
    start.add_argument("--workdir", metavar="FOLDER", help="where checkpoints, metrics and the store go")


def _add_upload(actions) -> None:
    upload = _command(actions, "upload", upload_data, "upload JSONL files and print the dataset's id", UPLOAD_EXAMPLES)
    upload.add_argument("--train", required=True, metavar="FILE", help="JSONL: one object with a `question` a line")
    upload.add_argument("--test", metavar="FILE", help="held-out tasks")
    upload.add_argument("--data-id", metavar="NAME", help="default: derived from the contents")
    _add_connection(upload)


def _add_train(commands) -> None:
    training = _command(commands, "train", train, "train with an agent script", TRAIN_EXAMPLES)
    training.add_argument("--agent-script", required=True, metavar="FILE.py[:FUNCTION]")
    training.add_argument("--data-id", required=True, metavar="NAME", help="what `data upload` printed")
    training.add_argument("--nworkers", type=int, default=-1, help="worker processes; -1 (the default) chooses")
    training.add_argument("--epochs", type=int, default=1, help="passes over the tasks (default: %(default)s)")
    training.add_argument("--batch-size", type=int, default=32, help="tasks per update (default: %(default)s)")
    training.add_argument(
        "--eval-interval", type=int, default=50, help="updates between evaluations (default: %(default)s)"
    )
    training.add_argument("--checkpoint-dir", metavar="FOLDER", help="copy the checkpoints' weights here too")
    _add_agent(training)
    _add_connection(training)


def _add_evaluate(commands) -> None:
    evaluation = _command(commands, "evaluate", evaluate, "evaluate with an agent script", EVALUATE_EXAMPLES)
    evaluation.add_argument("--agent-script", required=True, metavar="FILE.py[:FUNCTION]")
    evaluation.add_argument(
        "--checkpoint", metavar="NAME", help="latest, best, step-N or its path (default: the server's current weights)"
    )
    tasks = evaluation.add_mutually_exclusive_group(required=True)
    tasks.add_argument("--test", metavar="FILE", help="JSONL tasks to evaluate on")
    tasks.add_argument("--data-id", metavar="NAME", help="or the test tasks of an uploaded dataset")
    evaluation.add_argument("--nworkers", type=int, default=4, help="worker processes (default: %(default)s)")
    evaluation.add_argument("--num-samples", type=int, metavar="N", help="rollouts of each task, for pass@k")
    _add_agent(evaluation)
    _add_connection(evaluation)


def _add_download(actions) -> None:
    download = _command(actions, "download", download_model, "download a checkpoint's weights", DOWNLOAD_EXAMPLES)
    download.add_argument(
        "--checkpoint",
        default="latest",
        metavar="NAME",
        help="latest (the default), best, step-N, its path, or initial",
    )
    download.add_argument("--output", required=True, metavar="FOLDER")
    download.add_argument("--model", metavar="NAME", help="which one, where the server trains several (default: first)")
    download.add_argument(
        "--format",
        default="huggingface",
        choices=["huggingface", "safetensors", "onnx", "peft"],
        help="default: %(default)s",
    )
    _add_connection(download)


def _add_doctor(commands) -> None:
    text = "say what is installed, which devices there are and what a model needs in memory"
    command = _command(commands, "doctor", run_doctor, text, DOCTOR_EXAMPLES, allow_abbrev=False)
    command.set_defaults(takes_settings=True)
    command.add_argument("--model", metavar="PATH", help="default: $LIGHTNING_MODEL_PATH, else builtin:tiny")
    _add_connection(command)


def _add_agent(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--metadata", type=_json_object, metavar="JSON", help="an object that the agent finds in resource.metadata"
    )
    command.add_argument(
        "--rollout-timeout", type=float, metavar="SECONDS", help="of one call of the agent (default: the server's)"
    )
    command.add_argument(
        "--ray-address", metavar="ADDRESS", help="run the workers on this Ray cluster, `auto` for this machine's"
    )


def _add_connection(command: argparse.ArgumentParser) -> None:
    command.add_argument("--server-url", metavar="URL", help="default: $AGENT_LIGHTNING_SERVER_URL")
    command.add_argument("--api-key", metavar="KEY", help="default: $AGENT_LIGHTNING_API_KEY")


def _json_object(text: str) -> dict:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"not JSON: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError('not a JSON object such as {"use_cot": true}')
    return value


if __name__ == "__main__":
    sys.exit(main())
