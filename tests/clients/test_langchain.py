"""LangChain's models and agents, and LangGraph, over both dialects."""

import anthropic
import openai
import pytest
from langchain.agents import create_agent
from langchain.agents.middleware import SummarizationMiddleware
from langchain_anthropic import ChatAnthropic
from langchain_core.exceptions import ContextOverflowError
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import START, MessagesState, StateGraph
from langgraph.prebuilt import ToolNode, tools_condition

from .conftest import Sum
from .tasks import CALL, RAMBLE, SAY


def openai_chat(url, **options):
    return ChatOpenAI(model="m", base_url=url, **{"api_key": "any", "max_retries": 0, "stream_usage": True} | options)


def openai_responses(url, **options):
    return openai_chat(url, use_responses_api=True, **options)


def anthropic_messages(url, **options):
    return ChatAnthropic(model="m", base_url=url, **{"api_key": "any", "max_retries": 0, "max_tokens": 200} | options)


dialects = pytest.mark.parametrize(
    "model_of", [openai_chat, openai_responses, anthropic_messages], ids=lambda function: function.__name__
)


def seen(message: AIMessage) -> tuple:
    return message.text, [(call["name"], call["args"]) for call in message.tool_calls]


@dialects
@pytest.mark.parametrize("version", ["", "/v1"])
def test_plain_and_streamed(rollout, model_of, version):
    model = model_of(rollout.url + version)
    reply = model.invoke([("system", "Be brief."), ("user", SAY)])
    pieces = list(model.stream(SAY))
    streamed = pieces[0]
    for piece in pieces[1:]:
        streamed += piece
    assert reply.usage_metadata["output_tokens"] > 0 and streamed.usage_metadata["output_tokens"] > 0
    rollout.assert_saw(seen(reply), seen(streamed))


def test_a_system_message_behind_a_users(rollout):
    """Which goes as one where the model's name is of those that it knows to read them."""
    model = ChatAnthropic(model="claude-fable-5", base_url=rollout.url, api_key="any", max_retries=0, max_tokens=200)
    reply = model.invoke([("system", "Be kind."), ("user", SAY), ("ai", "So."), ("user", SAY), ("system", "Be brief.")])
    rollout.assert_saw(seen(reply))
    assert [message["role"] for message in rollout.calls[0].messages] == "system user assistant user system".split()


@dialects
@pytest.mark.parametrize("streamed", [False, True])
def test_an_agents_conversation_is_one_row(rollout, model_of, streamed):
    """Six calls for the first question, and another question with the same memory."""
    tools = [tool(function) for function in rollout.tools(6)]
    model = model_of(rollout.url, streaming=streamed)
    agent = create_agent(model, tools, system_prompt="Use tools.", checkpointer=InMemorySaver())
    config = {"configurable": {"thread_id": "1"}}
    agent.invoke({"messages": [HumanMessage(CALL)]}, config)
    state = agent.invoke({"messages": [HumanMessage(SAY)]}, config)
    replies = [seen(message) for message in state["messages"] if isinstance(message, AIMessage)]
    assert len(replies) == 7 and len(rollout.finish()) == 1
    rollout.assert_saw(*replies)


@dialects
async def test_a_graph_of_ones_own_is_one_row(rollout, model_of):
    tools = [tool(function) for function in rollout.tools(6)]
    model = model_of(rollout.url).bind_tools(tools)

    async def answer(state):
        return {"messages": [await model.ainvoke(state["messages"])]}

    graph = StateGraph(MessagesState)
    graph.add_node("answer", answer)
    graph.add_node("tools", ToolNode(tools))
    graph.add_edge(START, "answer")
    graph.add_conditional_edges("answer", tools_condition)
    graph.add_edge("tools", "answer")
    state = await graph.compile().ainvoke({"messages": [("user", CALL)]})
    replies = [seen(message) for message in state["messages"] if isinstance(message, AIMessage)]
    assert len(replies) == 6 and len(rollout.finish()) == 1
    rollout.assert_saw(*replies)


@dialects
def test_an_agent_that_sums_up_its_past_makes_more_rows(rollout, model_of):
    model = model_of(rollout.url)
    middleware = SummarizationMiddleware(model=model, trigger=("messages", 6), keep=("messages", 2))
    agent = create_agent(model, [], middleware=[middleware], checkpointer=InMemorySaver())
    for _ in range(4):
        agent.invoke({"messages": [HumanMessage(SAY)]}, {"configurable": {"thread_id": "1"}})
    assert len(rollout.finish()) > 1


@dialects
def test_structured_output(rollout, model_of):
    model = model_of(rollout.url)
    methods = ["json_schema", "function_calling"]
    for method in methods:
        assert isinstance(model.with_structured_output(Sum, method=method).invoke(SAY), Sum)
    rollout.finish()
    assert all(call.constrained for call in rollout.calls)


@dialects
def test_forced_tools(rollout, model_of):
    tools = [tool(function) for function in rollout.tools(1)]
    for choice in ("any", "add"):
        reply = model_of(rollout.url).bind_tools(tools, tool_choice=choice).invoke(SAY)
        assert reply.tool_calls and (choice == "any" or reply.tool_calls[0]["name"] == "add")


@dialects
def test_a_call_that_was_cut_short_is_gone_on_from(rollout, model_of):
    tools = [tool(function) for function in rollout.tools(1)]
    model = model_of(rollout.url, max_tokens=40).bind_tools(tools, tool_choice="add")
    messages = [HumanMessage(CALL)]
    for _ in range(3):
        pieces = list(model.stream(messages))
        reply = sum(pieces[1:], pieces[0])
        messages += [reply, ToolMessage("5", tool_call_id=reply.tool_calls[0]["id"])]
    rollout.finish()
    assert [(call.parent, call.finish_reason) for call in rollout.calls] == [(n, "length") for n in (None, 0, 1)]


@dialects
def test_64_at_once(rollout, model_of):
    prompts = [f"{SAY} {i}" for i in range(64)]
    replies = model_of(rollout.url).batch(prompts, {"max_concurrency": 64})
    rollout.finish()
    recorded = {call.messages[-1]["content"]: call.reply["content"] for call in rollout.calls}
    assert recorded == {prompt: reply.text for prompt, reply in zip(prompts, replies, strict=True)}


@dialects
def test_errors(rollout, model_of):
    module = anthropic if model_of is anthropic_messages else openai
    with pytest.raises(module.AuthenticationError):
        model_of(rollout.url[:-4] + "none").invoke(SAY)
    with pytest.raises(ContextOverflowError):
        model_of(rollout.url).invoke("x" * 4096)
    with pytest.raises(module.BadRequestError):
        model_of(rollout.url).invoke([HumanMessage([{"type": "image", "base64": "AAAA", "mime_type": "image/png"}])])
    assert model_of(rollout.url).invoke(SAY).text


def test_too_many_are_refused(rollout):
    with rollout.running.one_waiting(), pytest.raises(openai.RateLimitError):
        openai_chat(rollout.url, n=64).invoke(RAMBLE)
    with pytest.raises(openai.BadRequestError, match="sampler.max_queue=64"):
        openai_chat(rollout.url, n=65).invoke(RAMBLE)
    assert openai_chat(rollout.url).invoke(SAY).text
