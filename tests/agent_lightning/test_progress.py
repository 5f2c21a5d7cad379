"""What a job shows where there is no terminal: plain lines."""

from agent_lightning.pool import PoolStatus
from agent_lightning.progress import JobProgress


def step_event(step: int, **data) -> dict:
    return {"kind": "step", "step": step, "data": {"reward/mean": 0.25, "sampler/tokens_per_s": 1234.5, **data}}


def test_plain_lines(capfd):
    with JobProgress("training") as progress:
        progress.on_event({"kind": "evaluate_started", "step": 0, "data": {"rollouts": 4}}, {"step": 0})
        evaluation = {"eval/reward": 0.5, "eval/count": 4}
        progress.on_event({"kind": "evaluation", "step": 0, "data": evaluation}, {"step": 0, "total_steps": 2})
        progress.on_output(3, "one\ntwo [bold] a:key:b\n")
        progress.on_event(step_event(1), {"step": 1, "total_steps": 2})
        progress.on_event(step_event(2, **{"rollout/failed": 3, "reward/mean": None}), {"step": 2, "total_steps": 2})
    lines = capfd.readouterr().err.splitlines()
    assert lines[:3] == ["held-out reward 0.500 (4 tasks) at step 0", "[worker 3] one", "[worker 3] two [bold] a:key:b"]
    assert lines[3] == "step 1/2  reward 0.250  1,234 tokens/s"
    assert lines[4] == "step 2/2  reward nan  3 failed  1,234 tokens/s  0:00 left"


def test_a_second_job_counts_the_models_steps_as_its_evaluations_and_checkpoints_do(capfd):
    with JobProgress("training") as progress:
        started = {"kind": "train_started", "step": 11, "data": {"rollouts": 4, "first_step": 10}}
        progress.on_event(started, {"step": 0, "total_steps": 3})
        progress.on_event(step_event(11), {"step": 1, "total_steps": 3})
        progress.on_event(step_event(12), {"step": 3, "total_steps": 3})  # the job is ahead of its events
        progress.on_event(step_event(13), {"step": 3, "total_steps": 3})
        evaluation = {"eval/reward": 0.5, "eval/count": 4}
        progress.on_event({"kind": "evaluation", "step": 13, "data": evaluation}, {"step": 3, "total_steps": 3})
    lines = capfd.readouterr().err.splitlines()
    assert [line.split("  ")[0] for line in lines[:3]] == ["step 11/13", "step 12/13", "step 13/13"]
    assert lines[3].endswith("at step 13")


def test_the_servers_warnings_are_printed(capfd):
    with JobProgress("evaluation") as progress:
        progress.on_event({"kind": "warning", "step": 3, "data": {"text": "1 of [4] failed"}}, {"step": 3})
    assert capfd.readouterr().err.splitlines() == ["warning: 1 of [4] failed"]


def test_sample_completions_are_a_table(capfd):
    samples = [{"task_id": "train-1", "rollout_id": 7, "reward": 0.25, "completion": "so\n[b]4[/b]"}]
    with JobProgress("training") as progress:
        progress.on_event({"kind": "samples", "step": 3, "data": {"samples": samples}}, {"step": 3})
    text = capfd.readouterr().err
    assert "samples of step 3" in text and "train-1" in text and "0.250" in text and "so [b]4[/b]" in text


def test_a_job_behind_another_says_so_once(capfd):
    with JobProgress("training") as progress:
        for job_status, idle in [("unknown", 1), ("queued", 0), ("queued", 1), ("queued", 2), ("running", 2)]:
            status = PoolStatus(job_status, 2 - idle, idle, busy=0, succeeded=0, failed=0, crashed=0, timed_out=0)
            progress.on_status(status)
    assert capfd.readouterr().err.splitlines() == ["queued: the server has an earlier job to end first"]
