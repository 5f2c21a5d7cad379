"""Pydantic AI."""

import asyncio

import pytest
from pydantic_ai import Agent, NativeOutput, ToolOutput, exceptions
from pydantic_ai.direct import model_request_stream
from pydantic_ai.messages import (
    ModelRequest,
    ModelResponse,
    SystemPromptPart,
    TextPart,
    ThinkingPart,
    ToolCallPart,
    ToolReturnPart,
    UserPromptPart,
)
from pydantic_ai.models import ModelRequestParameters
from pydantic_ai.models.anthropic import AnthropicModel
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.anthropic import AnthropicProvider
from pydantic_ai.providers.openai import OpenAIProvider
from pydantic_ai.tools import ToolDefinition

from .conftest import Sum
from .tasks import CALL, OPENAI_TOOLS, SAY, THINK


def openai_chat(url):
    return OpenAIChatModel("m", provider=OpenAIProvider(base_url=url, api_key="any"))


def openai_responses(url):
    return OpenAIResponsesModel("m", provider=OpenAIProvider(base_url=url, api_key="any"))


def anthropic_messages(url):
    # It asks for structured output of those models alone whose names it knows to have it.
    return AnthropicModel("claude-sonnet-4-5", provider=AnthropicProvider(base_url=url, api_key="any"))


dialects = pytest.mark.parametrize(
    "model_of", [openai_chat, openai_responses, anthropic_messages], ids=lambda function: function.__name__
)


def seen(messages) -> list[tuple]:
    """The model's replies of a run, one by one."""
    return [
        (
            "".join(part.content for part in message.parts if isinstance(part, TextPart)),
            [(part.tool_name, part.args_as_dict()) for part in message.parts if isinstance(part, ToolCallPart)],
        )
        for message in messages
        if isinstance(message, ModelResponse)
    ]


@dialects
@pytest.mark.parametrize("version", ["", "/v1"])
async def test_plain_and_streamed(rollout, model_of, version):
    agent = Agent(model_of(rollout.url + version), instructions="Be brief.")
    plain = await agent.run(SAY)
    async with agent.run_stream(SAY) as stream:
        streamed = await stream.get_output()
    assert plain.usage.output_tokens > 0
    rollout.assert_saw((plain.output, []), (streamed, []))


@dialects
@pytest.mark.parametrize("streamed", [False, True])
async def test_an_agents_conversation_is_one_row(rollout, model_of, streamed):
    """Six calls for the first question, and another question behind them."""
    agent = Agent(model_of(rollout.url), instructions="Use tools.", tools=rollout.tools(6))

    async def run(prompt, history=()):
        if not streamed:
            return await agent.run(prompt, message_history=history)
        async with agent.iter(prompt, message_history=history) as run:
            async for node in run:
                if Agent.is_model_request_node(node):
                    async with node.stream(run.ctx) as stream:
                        async for _ in stream:
                            pass
        return run.result

    first = await run(CALL)
    second = await run(SAY, first.all_messages())
    replies = seen(second.all_messages())
    assert len(replies) == 7 and len(rollout.finish()) == 1
    rollout.assert_saw(*replies)


async def test_a_thought_that_comes_back_in_other_spacing_is_the_replys(rollout):
    agent, history = Agent(openai_chat(rollout.url)), []
    for _ in range(3):
        result = await agent.run(SAY, message_history=history, model_settings={"extra_body": THINK})
        history = result.all_messages()
    assert sum(isinstance(part, ThinkingPart) for message in history for part in message.parts) == 3
    rollout.finish()
    assert [call.parent for call in rollout.calls] == [None, 0, 1]


@dialects
async def test_a_call_that_was_cut_short_is_gone_on_from(rollout, model_of):
    add = ToolDefinition(name="add", parameters_json_schema=OPENAI_TOOLS[0]["function"]["parameters"])
    asked = ModelRequestParameters(function_tools=[add], allow_text_output=False)
    history = [ModelRequest([UserPromptPart(CALL)])]
    for _ in range(3):
        settings = {"max_tokens": 40}
        async with model_request_stream(
            model_of(rollout.url), history, model_settings=settings, model_request_parameters=asked
        ) as stream:
            async for _ in stream:
                pass
        (call,) = [part for part in stream.get().parts if isinstance(part, ToolCallPart)]
        history += [stream.get(), ModelRequest([ToolReturnPart("add", "5", call.tool_call_id)])]
    rollout.finish()
    assert [(call.parent, call.finish_reason) for call in rollout.calls] == [(n, "length") for n in (None, 0, 1)]


async def test_a_system_message_behind_a_users(rollout):
    """Which goes as one where the model's name is of those that it knows to read them."""
    model = AnthropicModel("claude-fable-5", provider=AnthropicProvider(base_url=rollout.url, api_key="any"))
    history = [
        ModelRequest([SystemPromptPart("Be kind."), UserPromptPart(SAY)]),
        ModelResponse([TextPart("So.")]),
        ModelRequest([UserPromptPart(SAY), SystemPromptPart("Be brief.")]),
        ModelResponse([TextPart("So.")]),
    ]
    result = await Agent(model).run(SAY, message_history=history)
    rollout.assert_saw((result.output, []))
    roles = [message["role"] for message in rollout.calls[0].messages]
    assert roles == "system user assistant user system assistant user".split()


@dialects
@pytest.mark.parametrize("output", [NativeOutput, ToolOutput])
async def test_structured_output(rollout, model_of, output):
    result = await Agent(model_of(rollout.url), output_type=output(Sum)).run(SAY)
    assert isinstance(result.output, Sum)
    rollout.finish()
    assert all(call.constrained for call in rollout.calls)


@dialects
async def test_64_at_once(rollout, model_of):
    agent = Agent(model_of(rollout.url))
    prompts = [f"{SAY} {i}" for i in range(64)]
    results = await asyncio.gather(*(agent.run(prompt) for prompt in prompts))
    rollout.finish()
    recorded = {call.messages[-1]["content"]: call.reply["content"] for call in rollout.calls}
    assert recorded == {prompt: result.output for prompt, result in zip(prompts, results, strict=True)}


@dialects
async def test_errors(rollout, model_of):
    with pytest.raises(exceptions.ModelAuthenticationError):
        await Agent(model_of(rollout.url[:-4] + "none")).run(SAY)
    agent = Agent(model_of(rollout.url))
    with pytest.raises(exceptions.ModelContextWindowExceededError):
        await agent.run("x" * 4096)
    assert (await agent.run(SAY)).output
