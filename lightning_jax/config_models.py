"""Several models in one configuration: `models.NAME.KEY` in place of `model.KEY`.

What is said of `model.*` (types, rules) holds for each of `models`; `config.py` asks here what that comes to.
"""

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

from ml_collections import config_dict

from agent_lightning.exceptions import InvalidConfigError

IS_ONE = re.compile(r"models\.[^.]+")  # the key of one of them
_NAME = re.compile(r"[a-z][a-z0-9_]{0,39}")  # it becomes part of URLs, folders and metrics; role numbers are others


def written_names(section: Mapping) -> list[str]:
    """A section's names as they were written: the first of `models` counts, and ConfigDict itself sorts them."""
    return list(section._fields if isinstance(section, config_dict.ConfigDict) else section)


def names(config: config_dict.ConfigDict) -> list[str]:
    """The models' names, in the order in which they were given; none where there is the one `model`."""
    return written_names(config.models)


def of_each(config: config_dict.ConfigDict) -> dict[str, config_dict.ConfigDict]:
    """Model name -> the configuration as that model has it: its entry as `model`, and its own learning rate.

    Where there is the one `model` it is named after its path.
    """
    if not names(config):
        return {os.path.basename(os.path.abspath(config.model.path)): config}  # "." has a name, too
    own = {}
    for name in names(config):
        entry = config.models[name].to_dict()
        learning_rate = entry.pop("learning_rate")
        own[name] = config.copy_and_resolve_references()
        own[name].model.update(entry)
        if learning_rate is not None:
            own[name].algorithm.learning_rate = learning_rate
            own[name].algorithm.actor_lr = None  # which would count for more
    return own


def add(config: config_dict.ConfigDict, default: config_dict.ConfigDict, name: str) -> None:
    """Puts an entry with `default.model`'s values and no path there, if there is none of that name."""
    if name not in config.models:
        config.models[name] = default.model.to_dict() | {"path": ""}
        config.models[name].learning_rate = config_dict.placeholder(float)


def settings(key: str, known: Mapping[str, Any], source: str) -> dict[str, Any]:
    """What may be set of the model that a key names: every `model.*` of `known`, and a learning rate or None.

    Raises:
        InvalidConfigError: it cannot be a model's name.
    """
    name = (key.split(".") + ["NAME"])[1]
    if name != "NAME" and not _NAME.fullmatch(name):
        raise InvalidConfigError(
            f"{name!r} cannot be one of models' names, which are of lower-case letters, digits and '_' and begin with "
            f"a letter ({source})"
        )
    own = {key.partition(".")[2]: setting for key, setting in known.items() if key.startswith("model.")}
    own["learning_rate"] = known["algorithm.learning_rate"]._replace(optional=True)
    return {f"models.{name}.{key}": setting for key, setting in own.items()}


def rules(config: config_dict.ConfigDict, known: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The rules of `known` that hold for each model, by key; an empty learning rate needs none."""
    for name in names(config):
        for key, rule in known.items():
            if key.startswith("model."):
                yield f"models.{name}.{key.removeprefix('model.')}", rule
        if config.models[name].learning_rate is not None:
            yield f"models.{name}.learning_rate", known["algorithm.learning_rate"]


def contradiction(config: config_dict.ConfigDict, given: Mapping[str, Any]) -> tuple[str, str, str] | None:
    """(key, what is wrong with it, a hint) if `models` does not go together with what else was given."""
    there = names(config)
    if len(there) == 1:
        return f"models.{there[0]}.path", "is the only one of models, which are for two or more", "set model.path alone"
    if there and (single := [key for key in given if key.startswith("model.")]):
        return (
            single[0],
            f"is the setting of a single model, and models holds {', '.join(there)}",
            f"remove one of the two, or set models.{there[0]}.{single[0].removeprefix('model.')}",
        )
    return None
