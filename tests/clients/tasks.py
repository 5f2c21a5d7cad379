"""What the packages are asked, and the tools they have."""

import json

CALL, SAY, RAMBLE = "(call) 2+3?", "(say) it", "(ramble)"
THINK = {"guided_regex": r"<think>\nso [0-9]\n</think>\n\n[a-f]{4}"}  # a reply in Qwen3's form, as a field of vLLM's


def user(text: str) -> list[dict]:
    """The messages of a conversation that begins, in both dialects."""
    return [{"role": "user", "content": text}]


def _schema(**properties: str) -> dict:
    types = {name: {"type": kind} for name, kind in properties.items()}
    return {"type": "object", "properties": types, "required": list(types), "additionalProperties": False}


_SCHEMAS = {"add": _schema(a="integer", b="integer"), "look_up": _schema(key="string")}
OPENAI_TOOLS = [
    {"type": "function", "function": {"name": name, "description": "A tool.", "parameters": schema}}
    for name, schema in _SCHEMAS.items()
]
ANTHROPIC_TOOLS = [
    {"name": name, "description": "A tool.", "input_schema": schema} for name, schema in _SCHEMAS.items()
]


def seen_openai(message) -> tuple:
    """A chat completion's message as an agent reads it."""
    calls = [(call.function.name, json.loads(call.function.arguments)) for call in message.tool_calls or ()]
    return message.content or "", calls


def seen_anthropic(message) -> tuple:
    """An Anthropic message as an agent reads it."""
    calls = [(block.name, block.input) for block in message.content if block.type == "tool_use"]
    return "".join(block.text for block in message.content if block.type == "text"), calls
