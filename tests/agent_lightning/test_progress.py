"""What a job shows where there is no terminal: plain lines."""

from agent_lightning.progress import JobProgress


def step_event(step: int, **data) -> dict:
    return {"kind": "step", "step": step, "data": {"reward/mean": 0.25, "sampler/tokens_per_s": 1234.5, **data}}


def test_plain_lines(capfd):
    with JobProgress("training") as progress:
        progress.on_event({"kind": "evaluate_started", "step": 0, "data": {"rollouts": 4}}, {"step": 0})
        evaluation = {"eval/reward": 0.5, "eval/count": 4}
        progress.on_event({"kind": "evaluation", "step": 0, "data": evaluation}, {"step": 0, "total_steps": 2})
        progress.on_output(3, "one\ntwo [bold]\n")
        progress.on_event(step_event(1), {"step": 1, "total_steps": 2})
        progress.on_event(step_event(2, **{"rollout/failed": 3, "reward/mean": None}), {"step": 2, "total_steps": 2})
    lines = capfd.readouterr().err.splitlines()
    assert lines[:3] == ["held-out reward 0.500 (4 tasks) at step 0", "[worker 3] one", "[worker 3] two [bold]"]
    assert lines[3] == "step 1/2  reward 0.250  1,234 tokens/s"
    assert lines[4] == "step 2/2  reward nan  3 failed  1,234 tokens/s  0:00 left"


def test_a_model_that_was_trained_before_counts_its_steps_from_this_job_on(capfd):
    with JobProgress("training") as progress:
        progress.on_event(step_event(11), {"step": 1, "total_steps": 3})
        progress.on_event(step_event(12), {"step": 3, "total_steps": 3})  # the job is ahead of its events
        progress.on_event(step_event(13), {"step": 3, "total_steps": 3})
    lines = capfd.readouterr().err.splitlines()
    assert [line.split("  ")[0] for line in lines] == ["step 1/3", "step 2/3", "step 3/3"]


def test_a_step_without_model_calls_is_warned_of_once(capfd):
    with JobProgress("training") as progress:
        for step, calls in (1, 4), (2, 0), (3, 0):
            data = {"rollout/count": 4, "rollout/failed": 0, "rollout/calls": calls}
            progress.on_event(step_event(step, **data), {"step": step, "total_steps": 4})
        failed = {"rollout/count": 4, "rollout/failed": 4, "rollout/calls": 0}
        progress.on_event(step_event(4, **failed), {"step": 4, "total_steps": 4})
    lines = capfd.readouterr().err.splitlines()
    assert [line.split()[0] for line in lines] == ["step", "step", "warning:", "step", "step"]
    assert "resource.model_api" in lines[2]
