"""Metrics of a run: one JSON object a line in `metrics.jsonl`, and the same curves in TensorBoard and W&B.

The JSONL file is the record: a resumed run cuts it back to its checkpoint, and what reads curves reads it. Names are
`group/name` (`reward/mean`, `policy/kl`), units are in names (`time/sample_s`).
"""

import importlib
import json
import math
import os
import re
import secrets
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from agent_lightning.exceptions import InvalidConfigError

FILE = "metrics.jsonl"
_NAME = re.compile(r"[a-z0-9_]+(/[a-z0-9_.\-]+)+")


def read_metrics(workdir: str | os.PathLike) -> list[dict[str, Any]]:
    """All lines of a work directory's metrics, in order; a last line that a kill cut short is left out."""
    path = Path(workdir) / FILE
    if not path.exists():
        return []
    rows = []
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except ValueError:
            if line and number < len(lines):  # a finished line ends in "\n", so something else wrote this one
                raise InvalidConfigError(f"not a JSON object ({path}, line {number})") from None
    return rows


class MetricsWriter:
    """Writes a run's metrics; use it as a context manager, or call `close`."""

    def __init__(
        self,
        workdir: str | os.PathLike,
        *,
        tensorboard: bool = False,
        wandb_project: str = "",
        config: Mapping[str, Any] | None = None,
    ):
        """
        Args:
            workdir: the folder of `metrics.jsonl`, made where missing; an existing file is continued.
            tensorboard: also write event files to its subfolder `tensorboard`.
            wandb_project: also log to this Weights & Biases project; the work directory's run is continued.
            config: the run's settings, for W&B.

        Raises:
            InvalidConfigError: the package that a writer needs is not installed.
        """
        self._workdir = Path(workdir)
        self._workdir.mkdir(parents=True, exist_ok=True)
        self._sinks: list[_TensorBoard | _WandB] = []
        if tensorboard:
            self._sinks.append(_TensorBoard(self._workdir / "tensorboard"))
        if wandb_project:
            self._sinks.append(_WandB(self._workdir, wandb_project, config))
        self._path = self._workdir / FILE
        _drop_cut_line(self._path)
        self._file = self._path.open("a", encoding="utf-8")

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Appends one line, on the disk when this returns to the caller as far as a killed process is concerned.

        Args:
            step: the update that the metrics belong to; 0 is before the first.
            metrics: `group/name` -> number (Python's, NumPy's or a JAX scalar). NaN and infinities become null.

        Raises:
            ValueError: a name without a group, or a value that is not a number.
        """
        row = _numbers(metrics)
        self._file.write(json.dumps({"step": int(step), **row}, allow_nan=False) + "\n")
        self._file.flush()
        self._log(step, row)

    def add(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Adds to the line of a step, the last one; where there is none, as `write`, also the errors.

        What the line has already is replaced there, and stays as it is in the curves: they have one value a step.
        """
        rows, more = read_metrics(self._workdir), _numbers(metrics)
        line = rows.pop() if rows and rows[-1]["step"] == step else {"step": int(step)}
        self._rewrite([*rows, line | more])
        self._log(step, {name: value for name, value in more.items() if line.get(name) is None})

    def _log(self, step: int, row: Mapping[str, int | float | None]) -> None:
        finite = {name: value for name, value in row.items() if value is not None}
        for sink in self._sinks:
            sink.write(int(step), finite)

    def write_samples(self, step: int, samples: Sequence[Mapping[str, Any]]) -> None:
        """Sample completions, as a text in TensorBoard and a table in W&B; the store has them all.

        Args:
            step: the update that they were sampled for.
            samples: rows with `task_id`, `rollout_id`, `reward` and `completion`.
        """
        for sink in self._sinks:
            if samples:
                sink.write_samples(int(step), samples)

    def truncate_after(self, step: int) -> None:
        """Drops what was written for later steps, for a run that goes on from the checkpoint of `step`."""
        rows = [row for row in read_metrics(self._workdir) if row["step"] <= step]
        self._rewrite(rows)
        for sink in self._sinks:
            sink.truncate_after(step, rows)

    def _rewrite(self, rows: Sequence[Mapping[str, Any]]) -> None:
        partial = self._path.with_name(FILE + ".partial")
        with partial.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
            file.flush()
            os.fsync(file.fileno())
        self._file.close()
        os.replace(partial, self._path)
        self._file = self._path.open("a", encoding="utf-8")

    def close(self) -> None:
        self._file.close()
        for sink in self._sinks:
            sink.close()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def _numbers(metrics: Mapping[str, Any]) -> dict[str, int | float | None]:
    return {name: _number(name, value) for name, value in metrics.items()}


def _number(name: str, value: Any) -> int | float | None:
    if not _NAME.fullmatch(name):
        raise ValueError(f"metric names are group/name in lower case, not {name!r}")
    value = value.item() if hasattr(value, "item") else value
    if not isinstance(value, int | float):
        raise ValueError(f"metric {name} must be a number, not {value!r}")
    return value if math.isfinite(value) else None


def _drop_cut_line(path: Path) -> None:
    """Removes a last line that a kill cut short, which the next line would otherwise be glued to."""
    if path.exists():
        content = path.read_bytes()
        if not content.endswith(b"\n"):
            with path.open("r+b") as file:
                file.truncate(content.rfind(b"\n") + 1)


def _package(name: str, setting: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        hint = f"pip install {name.split('.')[0]}, or leave {setting} off"
        raise InvalidConfigError(f"{setting} is set, and the package {name} is missing", hint=hint) from error


class _TensorBoard:
    """Event files, written with the tensorboard package alone."""

    def __init__(self, folder: Path):
        writer = _package("tensorboard.summary.writer.event_file_writer", "logging.tensorboard")
        self._event = _package("tensorboard.compat.proto.event_pb2", "logging.tensorboard")
        self._summary = _package("tensorboard.compat.proto.summary_pb2", "logging.tensorboard")
        self._tensor = _package("tensorboard.compat.proto.tensor_pb2", "logging.tensorboard")
        self._writer = writer.EventFileWriter(str(folder))

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        values = [self._summary.Summary.Value(tag=name, simple_value=value) for name, value in metrics.items()]
        self._add(step, summary=self._summary.Summary(value=values))

    def write_samples(self, step: int, samples: Sequence[Mapping[str, Any]]) -> None:
        text = "\n\n".join(
            f"**{sample['task_id']}**, reward {sample['reward']:.4g}\n\n"
            + "\n".join(f"    {line}" for line in sample["completion"].splitlines())  # verbatim in Markdown
            for sample in samples
        )
        summary = self._summary
        tensor = self._tensor.TensorProto(dtype="DT_STRING", string_val=[text.encode()])
        metadata = summary.SummaryMetadata(plugin_data=summary.SummaryMetadata.PluginData(plugin_name="text"))
        value = summary.Summary.Value(tag="samples", tensor=tensor, metadata=metadata)
        self._add(step, summary=summary.Summary(value=[value]))

    def truncate_after(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        # A session start tells readers to forget what an earlier event file holds from this step on.
        self._add(step + 1, session_log=self._event.SessionLog(status=self._event.SessionLog.START))

    def _add(self, step: int, **what) -> None:
        self._writer.add_event(self._event.Event(wall_time=time.time(), step=step, **what))
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _WandB:
    """A Weights & Biases run, the same one each time the work directory is continued."""

    def __init__(self, workdir: Path, project: str, config: Mapping[str, Any] | None):
        self._wandb = wandb = _package("wandb", "logging.wandb_project")
        id_file = workdir / "wandb_run_id"
        if not id_file.exists():
            id_file.write_text(secrets.token_hex(8), encoding="utf-8")
        self._run = wandb.init(
            project=project,
            id=id_file.read_text(encoding="utf-8"),
            resume="allow",
            dir=str(workdir),
            config=dict(config or {}),
        )
        # The step is a metric rather than W&B's own counter, which refuses to go back after a resume.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        self._unfinished = workdir / "wandb_unfinished"  # there while this run is, and once it was killed
        self._was_killed = self._unfinished.exists()
        self._unfinished.touch()

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log({"step": step, **metrics})

    def write_samples(self, step: int, samples: Sequence[Mapping[str, Any]]) -> None:
        columns = ["task_id", "rollout_id", "reward", "completion"]
        table = self._wandb.Table(columns=columns, data=[[sample[name] for name in columns] for sample in samples])
        self._run.log({"step": step, "samples": table})

    def truncate_after(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """W&B keeps what it has but for what it had buffered in a kill; curves that are written again lie over it."""
        for row in rows if self._was_killed else ():
            self._run.log({name: value for name, value in row.items() if value is not None})

    def close(self) -> None:
        self._run.finish()
        self._unfinished.unlink()
