"""OpenAI's Agents SDK."""

import asyncio
import json

import agents
import openai
import pytest
from agents.extensions.models.litellm_model import LitellmModel
from agents.models.openai_chatcompletions import OpenAIChatCompletionsModel
from openai.types.responses import ResponseTextDeltaEvent

from .conftest import Sum
from .tasks import CALL, SAY

agents.set_tracing_disabled(True)  # not by the environment, which the workers of other tests would get
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture
async def client_of():
    """client_of(url) -> AsyncOpenAI; closed at the end."""
    made = []

    def new(url: str) -> openai.AsyncOpenAI:
        made.append(openai.AsyncOpenAI(base_url=url, api_key="any", max_retries=0))
        return made[-1]

    yield new
    for client in made:
        await client.close()


def chat_completions(client) -> agents.Model:
    return OpenAIChatCompletionsModel("m", client)


def responses(client) -> agents.Model:
    return agents.OpenAIResponsesModel("m", client)


both = pytest.mark.parametrize("model_of", [chat_completions, responses], ids=lambda function: function.__name__)


def seen(result) -> list[tuple]:
    """The model's replies of a run, one by one."""
    replies = []
    for response in result.raw_responses:
        texts = [part.text for item in response.output if item.type == "message" for part in item.content]
        calls = [(item.name, json.loads(item.arguments)) for item in response.output if item.type == "function_call"]
        replies.append(("".join(texts), calls))
    return replies


@both
@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("version", ["", "/v1"])
async def test_plain(rollout, client_of, model_of, streamed, version):
    agent = agents.Agent("plain", instructions="Be brief.", model=model_of(client_of(rollout.url + version)))
    if streamed:
        result = agents.Runner.run_streamed(agent, SAY)
        events = [event.data async for event in result.stream_events() if event.type == "raw_response_event"]
        pieces = [event.delta for event in events if isinstance(event, ResponseTextDeltaEvent)]
        assert "".join(pieces) == result.final_output
    else:
        result = await agents.Runner.run(agent, SAY)
    rollout.assert_saw((result.final_output, []))


@both
@pytest.mark.parametrize("streamed, strict", [(False, False), (True, False), (True, True)])
async def test_an_agents_conversation_is_one_row(rollout, client_of, model_of, streamed, strict):
    """Six calls for the first question, and another question behind them. Tools are strict unless asked otherwise."""
    tools = [agents.function_tool(function, strict_mode=strict) for function in rollout.tools(6)]
    agent = agents.Agent("caller", instructions="Use tools.", tools=tools, model=model_of(client_of(rollout.url)))

    async def run(asked):
        if not streamed:
            return await agents.Runner.run(agent, asked)
        result = agents.Runner.run_streamed(agent, asked)
        async for _ in result.stream_events():
            pass
        return result

    first = await run(CALL)
    second = await run([*first.to_input_list(), {"role": "user", "content": SAY}])
    replies = seen(first) + seen(second)
    assert len(replies) == 7 and len(rollout.finish()) == 1
    rollout.assert_saw(*replies)
    assert {call.constrained for call in rollout.calls} == {strict}


async def test_calls_of_one_reply_that_come_back_one_by_one(rollout):
    """As it sends them through LiteLLM to a model with this name."""
    call = r'<tool_call>\{"name": "add", "arguments": \{"a": [0-9], "b": [0-9]\}\}</tool_call>'
    agent = agents.Agent(
        "caller",
        tools=[agents.function_tool(rollout.tools(1)[0], strict_mode=False)],
        tool_use_behavior="stop_on_first_tool",
        model=LitellmModel("openai/claude", rollout.url, "any"),
        model_settings=agents.ModelSettings(extra_body={"guided_regex": f"[a-f]{{4}}{call}{call}"}),
    )
    asked = []
    for _ in range(3):
        result = await agents.Runner.run(agent, [*asked, {"role": "user", "content": SAY}])
        asked = result.to_input_list()
    rollout.finish()
    assert {len(call.reply["tool_calls"]) for call in rollout.calls} == {2}
    roles = [message["role"] for message in rollout.calls[1].messages]
    assert roles == "user assistant tool assistant tool user".split()
    assert [call.parent for call in rollout.calls] == [None, 0, 1]


@both
async def test_a_session_remembers_and_a_handoff_starts_anew(rollout, client_of, model_of):
    model = model_of(client_of(rollout.url))
    second = agents.Agent("second", instructions="Something else.", model=model)
    first = agents.Agent("first", instructions="Be brief.", model=model)
    session = agents.SQLiteSession("1")
    for agent in (first, first, second):
        await agents.Runner.run(agent, SAY, session=session)
    assert len(rollout.finish()) == 2
    assert [call.parent for call in rollout.calls] == [None, 0, None]


@both
async def test_structured_output(rollout, client_of, model_of):
    agent = agents.Agent("typed", output_type=Sum, model=model_of(client_of(rollout.url)))
    result = await agents.Runner.run(agent, SAY)
    assert isinstance(result.final_output, Sum)
    rollout.finish()
    assert all(call.constrained for call in rollout.calls)


@both
async def test_64_at_once(rollout, client_of, model_of):
    agent = agents.Agent("plain", model=model_of(client_of(rollout.url)))
    prompts = [f"{SAY} {i}" for i in range(64)]
    results = await asyncio.gather(*(agents.Runner.run(agent, prompt) for prompt in prompts))
    rollout.finish()
    recorded = {call.messages[-1]["content"]: call.reply["content"] for call in rollout.calls}
    assert recorded == {prompt: result.final_output for prompt, result in zip(prompts, results, strict=True)}


@both
async def test_errors(rollout, client_of, model_of):
    with pytest.raises(openai.AuthenticationError):
        await agents.Runner.run(agents.Agent("x", model=model_of(client_of(rollout.url[:-4] + "none"))), SAY)
    agent = agents.Agent("x", model=model_of(client_of(rollout.url)))
    with pytest.raises(openai.BadRequestError, match="prompt is too long"):
        await agents.Runner.run(agent, "x" * 4096)
    assert (await agents.Runner.run(agent, SAY)).final_output
