"""What a job shows while it runs: a bar in a terminal, plain lines elsewhere."""

import sys
import time

from agent_lightning.pool import PoolStatus

_QUEUED = "queued: the server has an earlier job to end first"
SAMPLE_CHARS = 300  # of a completion in the table of samples


class JobProgress:
    """Follows one job; a context manager. `on_event`, `on_status` and `on_output` may be called from any thread."""

    def __init__(self, title: str):
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        self._console = Console(file=sys.stderr)
        self._live = self._console.is_terminal or self._console.is_jupyter
        self._bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[steps]}"),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            console=self._console,
            disable=not self._live,
        )
        self._steps = self._bar.add_task(title, total=None, steps="", note="starting workers")
        self._title = title
        self._total_steps: int | None = None
        self._reward = self._speed = self._left = ""
        self._rollouts = self._ended_before = 0
        self._seen = PoolStatus("unknown", 0, 0, 0, 0, 0, 0, 0)
        self._said_queued = False
        self._first = 0  # the model's step before the job's first update
        self._first_step: tuple[int, float] | None = None

    def __enter__(self) -> "JobProgress":
        self._bar.start()
        return self

    def __exit__(self, *_) -> None:
        self._bar.stop()

    def on_event(self, event: dict, job: dict) -> None:
        """Takes one of the job's events, and the job as it is now."""
        kind, step, data = event["kind"], event["step"], event["data"]
        self._total_steps = job.get("total_steps") or self._total_steps
        if kind.endswith("_started"):
            self._rollouts, self._ended_before = data["rollouts"], _ended(self._seen)
            self._first = data.get("first_step", 0)
        elif kind == "step":
            self._on_step(step, data)
        elif kind == "samples":
            self._show_samples(step, data["samples"])
        elif kind == "warning":
            self.say(f"warning: {data['text']}")
        elif kind == "evaluation":
            line = f"held-out reward {_number(data['eval/reward'])} ({data['eval/count']:.0f} tasks) at step {step}"
            self.say(line)
        elif kind == "checkpoint" and not self._live:
            self.say(f"checkpoint {data['path']}")
        self._refresh()

    def on_status(self, status: PoolStatus) -> None:
        """Takes the pool's state."""
        if _is_queued(status) and not self._live and not self._said_queued:
            self._said_queued = True
            self.say(_QUEUED)
        self._seen = status
        self._refresh()

    def on_output(self, worker_id: int, text: str) -> None:
        """Prints what an agent printed, above the bar."""
        for line in text.splitlines():
            self.say(f"[worker {worker_id}] {line}")

    def say(self, line: str) -> None:
        """Prints a line above the bar."""
        self._console.print(line, highlight=False, markup=False, emoji=False, soft_wrap=True)

    def _on_step(self, step: int, data: dict) -> None:
        now = time.monotonic()
        self._first_step = self._first_step or (step, now)
        first, since = self._first_step
        if self._total_steps and step > first:
            self._left = f"{_duration((now - since) / (step - first) * (self._first + self._total_steps - step))} left"
        self._reward = f"reward {_number(data['reward/mean'])}"
        if "sampler/tokens_per_s" in data:
            self._speed = f"{data['sampler/tokens_per_s']:,.0f} tokens/s"
        last = self._first + self._total_steps if self._total_steps else "?"
        self._bar.update(
            self._steps, completed=step - self._first, total=self._total_steps, steps=f"step {step}/{last}"
        )
        if not self._live:
            failed = f"{data['rollout/failed']:.0f} failed" if data.get("rollout/failed") else ""
            parts = [f"step {step}/{last}", self._reward, failed, self._speed, self._left]
            self.say("  ".join(filter(None, parts)))

    def _show_samples(self, step: int, samples: list[dict]) -> None:
        from rich.table import Table
        from rich.text import Text

        table = Table("task", "reward", "last reply", title=f"samples of step {step}", title_justify="left")
        for sample in samples:
            shown = " ".join(sample["completion"].split())
            shown = shown if len(shown) <= SAMPLE_CHARS else f"{shown[:SAMPLE_CHARS]} ..."
            table.add_row(*map(Text, (sample["task_id"], _number(sample["reward"]), shown)))
        if samples:
            self._console.print(table)

    def _refresh(self) -> None:
        if not self._live:
            return
        ended = min(_ended(self._seen) - self._ended_before, self._rollouts)
        rollouts = f"rollouts {ended}/{self._rollouts}" if self._rollouts else "waiting for the server"
        if not self._seen.idle and not self._seen.busy:
            rollouts = "starting workers"
        elif _is_queued(self._seen):
            rollouts = _QUEUED
        self._bar.update(self._steps, note="  ".join(filter(None, [self._reward, rollouts, self._speed, self._left])))


def _is_queued(status: PoolStatus) -> bool:
    """Whether workers wait for a job whose turn it is not: a server that is free takes it before they have started."""
    return status.job_status == "queued" and status.idle > 0


def _ended(status: PoolStatus) -> int:
    return status.succeeded + status.failed


def _number(value: float | None) -> str:
    return "nan" if value is None else f"{value:.3f}"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
