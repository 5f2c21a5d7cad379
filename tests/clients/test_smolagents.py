"""Smolagents. Its agents tell the model's past as text of their own, so that each step is a row."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import smolagents
from smolagents.models import ChatMessage
from smolagents.utils import AgentGenerationError

from .tasks import CALL, SAY, user

# In place of the templates of ten thousand characters, which are ten thousand tokens to this model.
PROMPTS = {
    "system_prompt": "Use tools.",
    "planning": {"initial_plan": "", "update_plan_pre_messages": "", "update_plan_post_messages": ""},
    "managed_agent": {"task": "", "report": ""},
    "final_answer": {"pre_messages": "", "post_messages": ""},
}


def model_of(rollout, **options) -> smolagents.OpenAIModel:
    return smolagents.OpenAIModel("m", api_base=rollout.url, api_key="any", client_kwargs={"max_retries": 0}, **options)


def tools_of(rollout, num_calls: int) -> list:
    class Add(smolagents.Tool):
        name = "add"
        description = "Adds two numbers."
        inputs = {"a": {"type": "integer", "description": "one"}, "b": {"type": "integer", "description": "other"}}
        output_type = "string"

        def forward(self, a, b):
            return rollout.tools(num_calls)[0](a, b)

    class LookUp(smolagents.Tool):
        name = "look_up"
        description = "Finds what is kept under a key."
        inputs = {"key": {"type": "string", "description": "the key"}}
        output_type = "string"

        def forward(self, key):
            return rollout.tools(num_calls)[1](key)

    return [Add(), LookUp()]


def test_plain_and_streamed(rollout):
    model = model_of(rollout)
    messages = [ChatMessage.from_dict({"role": "user", "content": [{"type": "text", "text": SAY}]})]
    reply = model.generate(messages)
    streamed = "".join(delta.content or "" for delta in model.generate_stream(messages))
    assert reply.token_usage.output_tokens > 0
    rollout.assert_saw((reply.content, []), (streamed, []))


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("choice", ["auto", "required"])
def test_a_tool_calling_agent(rollout, streamed, choice):
    """Three steps, and the answer that it asks for when these are used up; a forced call may be the last one."""
    agent = smolagents.ToolCallingAgent(
        tools_of(rollout, 99),
        model_of(rollout, tool_choice=choice),
        prompt_templates=PROMPTS,
        stream_outputs=streamed,
        verbosity_level=0,
    )
    agent.run(CALL, max_steps=3)
    rows = rollout.finish()
    assert len(rows) == len(rollout.calls) and {call.parent for call in rollout.calls} == {None}
    assert len(rollout.calls) == 4 or choice == "required"


def test_a_code_agent_with_tool_less_prompts(rollout):
    agent = smolagents.CodeAgent([], model_of(rollout), verbosity_level=0, prompt_templates=PROMPTS)
    agent.run(SAY, max_steps=2)
    rollout.finish()
    assert len(rollout.calls) == 3  # the steps, and the answer it asks for when these are used up


def test_64_at_once(rollout):
    model, prompts = model_of(rollout), [f"{SAY} {i}" for i in range(64)]
    with ThreadPoolExecutor(64) as threads:
        replies = list(threads.map(lambda prompt: model.generate([ChatMessage.from_dict(user(prompt)[0])]), prompts))
    rollout.finish()
    recorded = {call.messages[-1]["content"]: call.reply["content"] for call in rollout.calls}
    assert recorded == {prompt: reply.content for prompt, reply in zip(prompts, replies, strict=True)}


def test_errors(rollout):
    agent = smolagents.ToolCallingAgent(
        tools_of(rollout, 1), model_of(rollout), prompt_templates=PROMPTS, verbosity_level=0
    )
    with pytest.raises(AgentGenerationError, match="prompt is too long"):
        agent.run("x" * 4096)
    model_of(rollout).generate([ChatMessage.from_dict(user(SAY)[0])])
