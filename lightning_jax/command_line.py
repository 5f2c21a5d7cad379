"""The command line of `main.py`: `--config=FILE.py[:VARIANT]`, `--config.KEY=VALUE`, `--server_config=FILE.yaml`.

ml_collections reads the config file. What is added: a setting's flag takes what a YAML file takes; every mistake is an
`InvalidConfigError` that names the flag, or the config file and its line; the order of flags does not matter; and the
last `--config` counts, so that a script that names one can still pass on another.

    command_line.define_flags()

    def main(argv):
        config = command_line.merged_config()

    app.run(main, flags_parser=command_line.parse_flags)
"""

import difflib
import os
import re
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import config_dict, config_flags

from agent_lightning import cli
from agent_lightning.exceptions import InvalidConfigError
from lightning_jax import config as config_lib

flags.disclaim_key_flags()  # they are the caller's: its --help shows them

# config_flags reads its flag's file when the flag is defined, unless the command line that it is given names a file.
# It is given this one, which `parse_flags` fills with all but the flags of single settings.
_argv = ["", "--config"]
_overrides: dict[str, Any] = {}  # key -> value of --config.KEY=VALUE


def get_config() -> config_dict.ConfigDict:
    """This module is the config file of a command line that names no other."""
    return config_lib.default_config()


def define_flags(flag_values: flags.FlagValues = flags.FLAGS) -> None:
    """Defines the flags; `parse_flags` parses them."""
    config_flags.DEFINE_config_file(
        "config",
        help_string="A file whose get_config() returns the settings; --config.KEY=VALUE sets one of them.",
        flag_values=flag_values,
        sys_argv=_argv,
    )
    flags.DEFINE_string("server_config", None, "A YAML file of settings.", flag_values=flag_values)


def parse_flags(argv: list[str], flag_values: flags.FlagValues = flags.FLAGS) -> list[str]:
    """Parses the command line, the program's name first.

    Returns:
        The arguments that are not flags, the program's name first.

    Raises:
        InvalidConfigError: an unknown flag or key, a bad value, or a config file that is missing or does not run.
    """
    path, rest = _split_config(_without_overrides(argv))
    file = path.split(":")[0]
    if file.endswith((".yaml", ".yml")):
        raise InvalidConfigError(f"--config takes a Python file, not {file}", hint=f"give --server_config={file}")
    if not Path(file).is_file():
        raise InvalidConfigError(f"the config file {file} does not exist (flag --config)")
    _argv[:] = [rest[0], f"--config={path}", *rest[1:]]
    try:
        return flag_values(_argv)
    except Exception as error:  # a config file may raise anything
        raise _explained(error, file) from error


def merged_config(
    flag_values: flags.FlagValues = flags.FLAGS, environ: Mapping[str, str] | None = None
) -> config_dict.ConfigDict:
    """The configuration of the parsed flags, the environment and the files they name; errors as `config.merge`."""
    flag = flag_values["config"]
    overrides = config_flags.get_override_values(flag) | _overrides  # the first are those of a --flagfile
    base = config_dict.ConfigDict(flag.value)
    present = {key for key, _ in config_lib.flatten(base)}
    with base.ignore_type():  # what the file makes of another setting (`get_ref`) follows its flag
        base.update_from_flattened_dict({key: value for key, value in overrides.items() if key in present})
    file = config_flags.get_config_filename(flag).split(":")[0]
    return config_lib.merge(base, flag_values.server_config, environ, overrides, base_path=file)


def _without_overrides(argv: list[str]) -> list[str]:
    """The arguments without the flags of single settings, whose values are checked and kept in `_overrides`."""
    _overrides.clear()
    settings = config_lib.setting_types()
    rest = []
    arguments = iter(argv)
    for argument in arguments:
        match = re.match(r"--?(no)?config\.([^=]+)(?:=(.*))?$", argument, re.DOTALL)
        if argument == "--":
            rest += [argument, *arguments]
        elif not match:
            rest.append(argument)
        else:
            negated, key, value = match.groups()
            source = f"flag {cli.flag_of(key)}"
            setting = config_lib.find_setting(key, settings, source)
            if negated and setting.type is not bool:
                raise InvalidConfigError(f"{key} is not true or false, so --noconfig.{key} says nothing")
            if negated and value is not None:
                raise InvalidConfigError(f"{argument} does not take an argument")
            if value is None:
                value = not negated if setting.type is bool else next(arguments, None)
            if value is None:
                raise InvalidConfigError(f"{key} is given no value ({source})")
            _overrides[key] = config_lib.typed(key, setting, value, source)
    return rest


def _split_config(argv: list[str]) -> tuple[str, list[str]]:
    """The last config file named (this module where none is), and the arguments without any."""
    path, rest = __file__, []
    arguments = iter(argv)
    for argument in arguments:
        match = re.match(r"--?config(?:=(.*))?$", argument)
        if argument == "--":
            rest += [argument, *arguments]
        elif not match:
            rest.append(argument)
        else:
            path = next(arguments, "") if match[1] is None else match[1]
    return path, rest


def _explained(error: BaseException, file: str) -> InvalidConfigError:
    """The error in this project's words, with the line of the config file that raised it where one did."""
    cause: BaseException | None = error if file != __file__ else None
    while cause is not None:
        for frame in reversed(traceback.extract_tb(cause.__traceback__)):
            if os.path.abspath(frame.filename) == os.path.abspath(file):
                return _in_config_file(cause, f"{file}, line {frame.lineno}")
        cause = cause.__cause__ or cause.__context__
    if isinstance(error, flags.UnrecognizedFlagError):
        return _unknown_flag(error.flagname)
    return InvalidConfigError(str(error))


def _unknown_flag(name: str) -> InvalidConfigError:
    """With the closest of this program's flags, if any is close; absl would suggest its own too."""
    settings = config_lib.setting_types()
    hint = f"write --config.{name}" if name in settings else None
    ours = ["--config", "--server_config", *map(cli.flag_of, settings)]
    if hint is None and (close := difflib.get_close_matches(name, [flag.removeprefix("--") for flag in ours], n=1)):
        hint = f"did you mean --{close[0]}?"
    return InvalidConfigError(f"unknown command line flag {name!r}", hint=hint)


def _in_config_file(error: BaseException, source: str) -> InvalidConfigError:
    text = str(error.args[0]) if error.args else type(error).__name__
    settings = config_lib.setting_types()
    if match := re.search(r'Key "(\w+)" does not exist', text):
        try:
            config_lib.find_setting(match[1], {key.rpartition(".")[2]: t for key, t in settings.items()}, source)
        except InvalidConfigError as unknown:
            return unknown
    if match := re.search(r"Could not override field '(\w+)'.*?\. (.*) is of original type .* cannot be casted", text):
        for key, setting in settings.items():
            if key.rpartition(".")[2] == match[1]:
                return InvalidConfigError(
                    f"{key} must be {config_lib.TYPE_TEXT[setting.type]}, not {match[2]!r} ({source})"
                )
    return InvalidConfigError(f"{type(error).__name__}: {text} ({source})")
