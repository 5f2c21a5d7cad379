"""What SDKs assume in a worker where the agent says nothing.

Base URL and key come from the environment, which the worker sets for each rollout. This fills in the rest, when an SDK
is imported: the model's name where a client demands one, and `set_config`'s `max_retries` and `timeout`.
"""

import os
import sys
from types import ModuleType
from typing import Any

from agent_lightning.runtime import config
from agent_lightning.runtime.import_hook import after_import

_model_name = "default"
_own_defaults: dict[tuple[type | ModuleType, str], Any] = {}


def install() -> None:
    """Has SDKs adjusted as they are imported, and again whenever `set_config` is called."""
    for name, adjust in _ADJUST.items():
        after_import(name, adjust)
    config.listen(_adjust_imported)


def enter_rollout(model_api: str, token: str, model_name: str) -> None:
    """Leads clients that are made from now on, without arguments of their own, to a rollout's model."""
    global _model_name
    _model_name = model_name
    os.environ.update(environment(model_api, token))
    # openai's client-less calls keep the client of the first one
    getattr(sys.modules.get("openai"), "_reset_client", lambda: None)()


def environment(model_api: str, token: str) -> dict[str, str]:
    """The variables from which SDKs take base URL and key."""
    return {
        "OPENAI_BASE_URL": f"{model_api}/v1",
        "OPENAI_API_BASE": f"{model_api}/v1",  # LangChain's and LiteLLM's
        "OPENAI_API_KEY": token,
        "ANTHROPIC_BASE_URL": model_api,
        "ANTHROPIC_API_URL": model_api,  # LangChain's
        "ANTHROPIC_API_BASE": model_api,  # LiteLLM's
        "ANTHROPIC_API_KEY": token,
    }


def _adjust_imported() -> None:
    for name, adjust in _ADJUST.items():
        if name in sys.modules:
            adjust(sys.modules[name])


def _sdk(*client_names: str):
    """Adjusts the clients of OpenAI's or Anthropic's SDK, whose constructors are made alike."""

    def adjust(module: ModuleType) -> None:
        for name, value in (("max_retries", config.max_retries()), ("timeout", config.timeout_s())):
            for client_name in client_names:
                client = getattr(module, client_name)
                defaults = client.__init__.__kwdefaults__
                if name in defaults:
                    defaults[name] = _default(client, name, defaults[name], value)
            if hasattr(module, name):  # openai's client-less calls read these
                setattr(module, name, _default(module, name, getattr(module, name), value))

    return adjust


def _chat_anthropic(module: ModuleType) -> None:
    fields = {"max_retries": config.max_retries(), "default_request_timeout": config.timeout_s()}
    _set_field_defaults(module.ChatAnthropic, fields, needs_model="model")


def _chat_openai(module: ModuleType) -> None:
    fields = {"max_retries": config.max_retries(), "request_timeout": config.timeout_s()}
    _set_field_defaults(module.ChatOpenAI, fields)


def _default(owner: type | ModuleType, name: str, current: Any, value: Any) -> Any:
    """`value`, or where it is None what the SDK had before anything was set."""
    own = _own_defaults.setdefault((owner, name), current)
    return own if value is None else value


def _set_field_defaults(model: type, values: dict, needs_model: str | None = None) -> None:
    """Gives fields of a pydantic model new defaults; those whose value is None have their own."""
    fields = model.model_fields
    new = {name: _default(model, name, fields[name].default, values[name]) for name in values.keys() & fields.keys()}
    changed = {name: value for name, value in new.items() if fields[name].default != value}
    for name, value in changed.items():
        fields[name].default = value
    if needs_model in fields and fields[needs_model].is_required():
        fields[needs_model].default_factory = lambda: _model_name
        changed[needs_model] = ""
    if changed:
        model.model_rebuild(force=True)


_ADJUST = {
    "openai": _sdk("OpenAI", "AsyncOpenAI"),
    "anthropic": _sdk("Anthropic", "AsyncAnthropic"),
    "langchain_anthropic.chat_models": _chat_anthropic,
    "langchain_openai.chat_models.base": _chat_openai,
}
