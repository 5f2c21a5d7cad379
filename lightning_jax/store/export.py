"""Writes a run's trajectories to a file: `python -m lightning_jax.store.export runs/quickstart-seed0 rollouts.parquet`.

It reads the work directory alone, so that the run may be over or still going on.
"""

import argparse
import json
import os
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from agent_lightning.exceptions import AgentLightningError, InvalidConfigError
from lightning_jax.store.trajectories import Filter, ReadOnly, ended_rollouts, trajectory
from lightning_jax.text.tokenizer import load_tokenizer

_BATCH = 64  # trajectories that are held at a time


def export_trajectories(workdir: str | os.PathLike, output: str | os.PathLike, which: Filter | None = None) -> int:
    """Writes trajectories to a file, which is whole or not there; memory is bounded whatever their number.

    Args:
        workdir: a run's work directory.
        output: ends in `.jsonl` (one trajectory a line, as the API reference prints it) or `.parquet` (the same fields,
            nested, in the same order).
        which: of which rollouts; by default of all.

    Returns:
        How many were written.

    Raises:
        InvalidConfigError: another ending, `workdir` holds no run, or pyarrow is needed and not installed.
        StoreError: the run's store cannot be read.
    """
    output = pathlib.Path(output)
    writers = {".jsonl": _write_jsonl, ".parquet": _write_parquet}
    if output.suffix not in writers:
        raise InvalidConfigError(f"{output} ends neither in .jsonl nor in .parquet")
    partial = output.with_name(f".{output.name}.partial")
    try:
        count = writers[output.suffix](partial, _trajectories(pathlib.Path(workdir), which or Filter()))
        os.replace(partial, output)
    except OSError as error:
        raise InvalidConfigError(f"cannot write {output}: {error.strerror or error}") from error
    finally:
        partial.unlink(missing_ok=True)
    return count


def _trajectories(workdir: pathlib.Path, which: Filter) -> Iterator[dict[str, Any]]:
    try:
        config = json.loads((workdir / "config.json").read_text())
        single = config["model"]["path"]
        paths = {name: entry["path"] for name, entry in config.get("models", {}).items()}
    except (OSError, ValueError, KeyError) as error:
        raise InvalidConfigError(f"{workdir} holds no run: its config.json cannot be read ({error})") from error
    paths = paths or {pathlib.Path(single).name: single}
    tokenizers = {name: load_tokenizer(path) for name, path in paths.items()}
    reader = ReadOnly(workdir / "store.sqlite3")
    try:
        for job_id, record in ended_rollouts(reader, which):
            yield trajectory(job_id, record, tokenizers)
    finally:
        reader.close()


def _write_jsonl(path: pathlib.Path, trajectories: Iterator[dict[str, Any]]) -> int:
    count = 0
    with open(path, "w", encoding="utf-8") as file:
        for item in trajectories:
            file.write(json.dumps(item) + "\n")
            count += 1
    return count


def _write_parquet(path: pathlib.Path, trajectories: Iterator[dict[str, Any]]) -> int:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise InvalidConfigError(
            "Parquet needs the package pyarrow, which is not installed",
            hint="pip install 'lightning-jax[parquet]', or write .jsonl",
        ) from error
    schema, count, batch = _schema(pyarrow), 0, []
    with pyarrow.parquet.ParquetWriter(path, schema, compression="zstd") as writer:
        for item in trajectories:
            batch.append(item)
            count += 1
            if len(batch) == _BATCH:
                writer.write_table(pyarrow.Table.from_pylist(batch, schema))
                batch = []
        writer.write_table(pyarrow.Table.from_pylist(batch, schema))
    return count


def _schema(pa: Any) -> Any:
    """The columns; the keys are those of `trajectories.trajectory`."""
    function = pa.struct({"name": pa.string(), "arguments": pa.string()})
    tool_call = pa.struct({"id": pa.string(), "type": pa.string(), "function": function})
    transition = {
        "input": pa.string(),
        "output": pa.string(),
        "reward": pa.float64(),
        "metadata": pa.struct(
            {
                "model": pa.string(),
                "temperature": pa.float64(),
                "tool_calls": pa.list_(tool_call),
                "top_p": pa.float64(),
                "top_k": pa.int32(),
                "role": pa.string(),
                "constrained": pa.bool_(),
                "last_policy_version": pa.int64(),
            }
        ),
        "prompt_ids": pa.list_(pa.int32()),
        "sampled_ids": pa.list_(pa.int32()),
        "logprobs": pa.list_(pa.float32()),
        "policy_version": pa.int64(),
        "attempt": pa.int32(),
        "finish_reason": pa.string(),
    }
    metadata = {
        "num_steps": pa.int32(),
        "status": pa.string(),
        "job_id": pa.string(),
        "rollout_id": pa.int64(),
        "step": pa.int64(),
        "mode": pa.string(),
        "group": pa.int32(),
        "sample": pa.int32(),
        "attempt": pa.int32(),
        "agent_reward": pa.float64(),
        "cause": pa.string(),
        "error": pa.string(),
        "duration_s": pa.float64(),
    }
    return pa.schema(
        {
            "task_id": pa.string(),
            "transitions": pa.list_(pa.struct(transition)),
            "total_reward": pa.float64(),
            "metadata": pa.struct(metadata),
        }
    )


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m lightning_jax.store.export", description="Write a run's trajectories to a file."
    )
    parser.add_argument("workdir", help="the run's work directory")
    parser.add_argument("output", help="a .jsonl or .parquet file")
    parser.add_argument("--job", metavar="ID", help="of this job only")
    parser.add_argument("--step", type=int, help="of this step only")
    parser.add_argument("--mode", choices=("train", "evaluate"), help="of this mode only")
    options = parser.parse_args(argv)
    if options.step is not None and not 0 <= options.step < 2**63:
        parser.error(f"argument --step: {options.step} is no number of a step")
    try:
        count = export_trajectories(options.workdir, options.output, Filter(options.job, options.step, options.mode))
    except AgentLightningError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    print(f"{count} trajectories in {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
