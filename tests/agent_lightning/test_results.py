"""What training and evaluation return: their numbers, how they print, and how they are drawn."""

import builtins
import html
import itertools
import math
import random
import xml.etree.ElementTree as ElementTree

import pytest

from agent_lightning import EvalResult, TrainingResult
from agent_lightning.results import eval_result, pass_at_k

RESULT = TrainingResult(
    final_reward=0.75,
    train_rewards=[0.1, 0.2, math.nan, 0.6],
    test_rewards=[0.125, 0.5, 0.75],
    checkpoints=["/run/checkpoints/step-12", "/run/checkpoints/step-14"],
    total_steps=4,
    total_time=7210.0,
    best_checkpoint="/run/checkpoints/step-14",
    test_steps=[10, 12, 14],
)


# ---- pass@k ----


def test_pass_at_k_is_the_share_of_choices_of_k_that_hold_a_success():
    """Against the definition: over all choices of k of a task's samples, how many hold one that succeeded."""
    rng = random.Random(0)
    tasks = [[rng.choice((0.0, 0.5, 1.0, 1.5)) for _ in range(6)] for _ in range(5)]

    def by_definition(k):
        shares = []
        for rewards in tasks:
            choices = [any(r >= 1.0 for r in choice) for choice in itertools.combinations(rewards, k)]
            shares.append(sum(choices) / len(choices))
        return sum(shares) / len(shares)

    found = pass_at_k(tasks)
    assert list(found) == [1, 2, 3, 4, 5, 6]
    assert found == pytest.approx({k: by_definition(k) for k in found})
    assert pass_at_k(tasks, threshold=0.5)[1] > found[1]


def test_failed_rollouts_say_nothing_about_the_answer():
    assert pass_at_k([[None, 1.0, None], [0.0, 0.0, 0.0]]) == {1: 0.5, 2: 0.0, 3: 0.0}
    assert pass_at_k([[None, None]]) == {}


def test_an_evaluation_without_samples_has_no_pass_at_k():
    result = {
        "reward": None,
        "standard_error": 0.0,
        "rewards": {"test-0": None},
        "samples": {"test-0": [None]},
        "failed": 1,
        "checkpoint": None,
        "step": 0,
        "total_time": 1.0,
    }
    evaluation = eval_result({"job_id": "j", "spec": {}, "result": result}, 1.0)
    assert math.isnan(evaluation.mean) and evaluation.pass_at_k == {} and evaluation.samples == {}


# ---- printed ----


def test_results_print_on_one_line():
    assert repr(RESULT) == (
        "TrainingResult(final_reward=0.75, train_rewards=0.100 -> 0.600 (4), test_rewards=0.125 -> 0.750 (3), "
        "total_steps=4, total_time=7210.0 s, checkpoints=[..., '/run/checkpoints/step-14'] (2), "
        "best_checkpoint='/run/checkpoints/step-14')"
    )
    pass_k = {k: k / 10 for k in range(1, 7)}
    evaluation = EvalResult(0.5, 0.125, {"test-0": 0.5}, 2, "/c/step-3", 3, 1.25, {}, pass_k)
    assert repr(evaluation) == (
        "EvalResult(0.5000 +- 0.1250, pass@1=0.100, pass@2=0.200, pass@4=0.400, pass@6=0.600, 1 tasks, 2 failed, "
        "step 3 (/c/step-3), 1.2 s)"
    )
    why = "task-1: exception: KeyError: 'x' (a.py, line 2, in f)"
    failed = EvalResult(0.5, 0.125, {"test-0": 0.5}, 2, first_failure=why)
    assert f"2 failed, the first: {why}" in repr(failed) and html.escape(why) in failed._repr_html_()
    failed = TrainingResult(0.5, failures=2, first_failure=why)
    assert f"2 rollouts failed, the first: {why})" in repr(failed) and html.escape(why) in failed._repr_html_()


@pytest.mark.parametrize(
    "result, holds",
    [
        (RESULT, ["0.75", "0.125 \u2192 0.75 (3)", "7210.0 s", "/run/checkpoints/step-14"]),
        (TrainingResult(math.nan, best_checkpoint="<b>&"), ["nan", "none", "<b>&"]),
        (EvalResult(0.5, 0.1, {"test-0": 0.5}, pass_at_k={1: 0.25, 2: 0.5, 3: 1.0}), ["pass@2", "0.5 \u00b1 0.1"]),
    ],
)
def test_a_notebook_shows_well_formed_html(result, holds):
    page = ElementTree.fromstring(result._repr_html_())
    text = "|".join(page.itertext())
    for part in holds:
        assert part in text
    lines = [line.attrib["points"].split() for line in page.iter("polyline")]
    assert [len(points) for points in lines] == ([3, 3] if result is RESULT else [])
    for x, y in (map(float, point.split(",")) for points in lines for point in points):
        assert 0 <= x <= 360 and 0 <= y <= 96


# ---- drawn ----


@pytest.fixture
def backend():
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("agg")
    return matplotlib


def test_plot_draws_both_curves_over_the_models_step(backend, tmp_path):
    figure = RESULT.plot()
    assert isinstance(figure, backend.figure.Figure)
    (axes,) = figure.axes
    curves = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    assert curves["held out"] == [[10, 0.125], [12, 0.5], [14, 0.75]]
    assert [step for step, _ in curves["training (each update)"]] == [11, 12, 13, 14]
    figure.savefig(tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 1000
    assert TrainingResult(0.0, train_rewards=[0.5]).plot().axes[0].lines[0].get_xydata().tolist() == [[1, 0.5]]
    TrainingResult(math.nan).plot()


def test_curves_of_a_later_job_without_test_tasks_begin_at_the_models_step(backend):
    result = TrainingResult(0.2, train_rewards=[0.1, 0.2], checkpoints=["/run/checkpoints/step-50"], total_steps=2)
    assert result.plot().axes[0].lines[0].get_xydata().tolist() == [[49, 0.1], [50, 0.2]]


def test_without_matplotlib_plot_says_what_to_install(monkeypatch):
    real = builtins.__import__

    def missing(name, *arguments, **options):
        if name.startswith("matplotlib"):
            raise ModuleNotFoundError(name)
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        RESULT.plot()
