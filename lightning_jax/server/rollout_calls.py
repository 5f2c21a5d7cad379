"""What a rollout's worker asks about its model calls, under the rollout's URL: how many, and which tools ran."""

from collections.abc import Sequence

from fastapi import Request, Response

from agent_lightning.runtime.recorder import MAX_TEXT_CHARS
from lightning_jax.server import wire
from lightning_jax.server.roles import Generators
from lightning_jax.store import CallRecord


async def calls(request: Request) -> Response:
    """GET .../calls: how many calls have ended, and the `index` of the one that did so last; null before the first."""
    ended = _ended_calls(request)
    return wire.json_response({"ended": len(ended), "last_call_index": ended[-1].index if ended else None})


async def tool_calls(request: Request) -> Response:
    """GET .../tool_calls: the tool calls that the model has made, and the results that came back in later requests."""
    return wire.json_response(tool_results(_ended_calls(request)))


def tool_results(ended: Sequence[CallRecord]) -> dict:
    """What calls say about tools.

    Results whose tool call the model did not make in this rollout, as in examples that a prompt holds, are left out.

    Args:
        ended: a rollout's calls, in the order in which they ended.

    Returns:
        {"tool_calls": [{"id", "name", "call_index"}], "results": [{"tool_call_id", "name", "content", "call_index"}]},
        where `call_index` is that of the call whose reply made the tool call, and each tool call has one result at
        most, the first that was seen.
    """
    made = {}
    for call in ended:
        for tool_call in call.reply.get("tool_calls", ()):
            entry = {"id": tool_call["id"], "name": tool_call["function"]["name"], "call_index": call.index}
            made.setdefault(tool_call["id"], entry)
    results = {}
    for call in ended:
        for message in call.messages:
            tool_call_id = message.get("tool_call_id")
            if message["role"] == "tool" and tool_call_id in made and tool_call_id not in results:
                results[tool_call_id] = {
                    "tool_call_id": tool_call_id,
                    "name": made[tool_call_id]["name"],
                    "content": message["content"][:MAX_TEXT_CHARS],
                    "call_index": made[tool_call_id]["call_index"],
                }
    return {"tool_calls": list(made.values()), "results": list(results.values())}


def _ended_calls(request: Request) -> Sequence[CallRecord]:
    generators: Generators = request.app.state.generators
    return generators.attempt(request.path_params["token"]).calls
