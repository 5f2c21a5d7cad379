"""An agent with a tool: the model says where to look, the tool looks there, and the model makes sense of what it found.

The book has something in one place alone, which a wrong first answer misses: then the tool fails, and the rollout
ends with reward 0. With LIGHTNING_ENABLE_AIR=true success and failure of the tool are rewards as well. The tasks are
those of `lookup.py`.
"""

from lookup import ask, written_at

from agent_lightning import runtime


@runtime.tool
def look_up(place: str, book: dict[str, str]) -> str:
    """What is written in a place; KeyError where nothing is."""
    return book[place]


def agent(resource, task) -> float:
    """Reward 1 for the right answer, 0 for any other."""
    a, b = task.question.removesuffix("=?").split("+")
    right = str(int(a) + int(b))
    try:
        found = look_up(ask(resource.model_api, task.question), {right: written_at(right)})
    except KeyError:
        return 0.0
    return float(ask(resource.model_api, found) == task.ground_truth)
