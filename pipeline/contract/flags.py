"""Commands: what a room says of each, and flags and sections of a YAML file → its settings."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import shutil
import textwrap
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from pipeline.contract.files import check_no_credentials, is_remote
from pipeline.contract.settings import did_you_mean

# Settings of all commands that name files or directories: local ones, or `Command.stores`.
_PATHS = "output data run runs models previous bundle frequency init_from refit teacher queries"
_PATHS += " add remove workdir config_file state_dir tls_certificate tls_key"
_PATHS += " token_file admin_token_file"

NO_FLAG = {"cmd": False}  # metadata of a field that the command line does not take


class Command(NamedTuple):
    """A command: its settings and what it calls, both as module:name, and a line of help.

    Example:
      >>> Command("serving.settings:ServeConfig", "serving.workers:serve", "serve models").help
      'serve models'
    """

    config: str
    call: str
    help: str
    on_beam: bool = False  # what its flags leave over goes to Beam
    flags: str = ""  # those that matter most, which --help shows; none: all
    groups: Mapping[str, str] = MappingProxyType({})  # heading → flags, for --help all
    positional: str = ""  # the flag that arguments before all flags are for
    stores: str = ""  # flags whose paths may be those of an object store, which the call knows
    reads: str = ""  # flags of directories that may lie there, and are read by a local copy
    changes: str = ""  # flags of directories that may lie there, and are uploaded at the end
    makes: str = ""  # as `changes`, but nothing need be there
    presets: str = ""  # module:name of what --preset takes: name → flags by name


def resolve(reference: str) -> Any:
    """What `module:name` names."""
    module, _, name = reference.partition(":")
    return getattr(importlib.import_module(module), name)


def help_text(name: str, command: Command, *, everything: bool) -> str:
    """The help of a command: the flags that matter, or all of them in groups."""
    fields = {field.name: field for field in _flags_of(resolve(command.config))}
    main = command.flags.split() or list(fields)
    first = f"{command.positional.upper()} ... " if command.positional else ""
    lines = [f"usage: twotower {name} {first}[flags]", "", command.help, ""]
    lines += _flag_lines(command, main, fields)
    groups = {heading: names.split() for heading, names in command.groups.items()}
    named = {flag for names in (main, *groups.values()) for flag in names}
    groups["more"] = [flag for flag in fields if flag not in named]
    for heading, names in groups.items() if everything else ():
        if rest := [flag for flag in names if flag not in main]:
            lines += ["", f"{heading}:", *_flag_lines(command, rest, fields)]
    lines.append("")
    if not everything and len(fields) > len(main):
        others = len(fields) - len(main)
        lines.append(f"{others} more flags: twotower {name} --help all")
    lines.append("--config FILE reads flags from a YAML file; flags beside it come first.")
    if command.on_beam:
        lines.append("Flags of Beam and its runner go on the same command line.")
    return "\n".join(lines)


def _flags_of(settings: type[Any]) -> list[dataclasses.Field[Any]]:
    return [field for field in dataclasses.fields(settings) if field.metadata.get("cmd", True)]


def comment_of(settings: type[Any], name: str) -> str:
    """The comment of a field of a dataclass, in one line: its help."""
    from simple_parsing.docstring import get_attribute_docstring

    said = get_attribute_docstring(settings, name)
    return " ".join((said.comment_above or said.comment_inline).split())


def value_text(value: Any) -> str:
    """A default as people type it."""
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def terminal_width() -> int:
    """Columns of the terminal, within what reads well."""
    return max(60, min(100, shutil.get_terminal_size().columns))


def _flag_lines(command: Command, names: list[str], fields: Mapping[str, Any]) -> list[str]:
    """A flag, what it takes and does, and its default, as wide as the terminal."""
    lines = []
    kinds = {"int": " N", "float": " X", "bool": " true|false"}
    for name in names:
        default, kind = fields[name].default, str(fields[name].type)
        value = kinds.get(kind.split(" |")[0], " N" if "[int" in kind else " TEXT")
        value = "" if default is False else value
        several = " ..." if kind.startswith(("tuple", "list")) else ""
        text = comment_of(resolve(command.config), name)
        if default is not dataclasses.MISSING and default not in (None, "", ()) and value:
            text += f" (default: {'true' if default is True else value_text(default)})"
        flag = f"  --{name}{value}{several}"
        if len(flag) > 26:
            lines.append(flag)
            flag = ""
        first, *rest = textwrap.wrap(text, terminal_width() - 30, break_on_hyphens=False)
        lines += [f"{flag:28}{first}", *(" " * 28 + line for line in rest)]
    return lines


def parse(name: str, command: Command, arguments: list[str]) -> tuple[Any, list[str]]:
    """Flags → settings, and what is left for Beam; ValueError: a flag is unknown, a value wrong."""
    from simple_parsing import ArgumentParser
    from simple_parsing.wrappers.field_wrapper import DashVariant

    class Parser(ArgumentParser):
        def error(self, message: str) -> Any:
            raise ValueError(f"{message}; see twotower {name} --help.")

    if command.presets:
        arguments = _without_preset(arguments, resolve(command.presets))
    config_class = resolve(command.config)
    beam_only = arguments.index("--") if "--" in arguments else len(arguments)
    parser = Parser(
        prog=f"twotower {name}",
        description=command.help,
        allow_abbrev=False,
        add_option_string_dash_variants=DashVariant.UNDERSCORE_AND_DASH,
    )
    parser.add_arguments(config_class, dest="config")
    fields = [f"--{field.name}" for field in _flags_of(config_class)]
    try:
        parsed, rest = parser.parse_known_args(arguments[:beam_only])
    except ValueError:  # a misspelt flag is the better reason
        _check_flags(name, arguments[:beam_only], fields, command.on_beam)
        raise
    if not command.on_beam and rest:
        _check_flags(name, rest, fields, False)
        raise ValueError(f"unexpected argument {rest[0]!r}; see twotower {name} --help.")
    known = f"{command.stores} {command.reads} {command.changes} {command.makes}"
    _check_paths(parsed.config, known.split())
    return parsed.config, rest + arguments[beam_only:]


def _without_preset(arguments: list[str], presets: Mapping[str, dict[str, Any]]) -> list[str]:
    """The flags of the last `--preset` in its place, before all others, which come first.

    >>> _without_preset(["--dim", "8", "--preset", "small"], {"small": {"dim": 4}})
    ['--dim', '4', '--dim', '8']
    """
    given, rest = None, []
    values = iter(arguments)
    for argument in values:
        flag, equals, value = argument.partition("=")
        if flag == "--preset":
            given = value if equals else next(values, "")
        else:
            rest.append(argument)
    if given is None:
        return rest
    if given not in presets:
        hint = did_you_mean(given, presets, f"choose one of {', '.join(presets)}.")
        raise ValueError(f"there is no preset {given!r}; {hint}")
    return as_flags(presets[given]) + rest


def _check_paths(config: Any, stores: list[str]) -> None:
    """Raises ValueError for a path in a store where a setting takes local ones."""
    for name in _PATHS.split():
        value = getattr(config, name, "")
        for path in (value,) if isinstance(value, str) else value:
            check_no_credentials(path)
            if is_remote(path) and name not in stores:
                raise ValueError(
                    f"{name} must be a local path, got {path}: copy what is in the store to this "
                    f"machine, or into the store when it is finished; change {name}."
                )


def _check_flags(name: str, arguments: list[str], fields: list[str], on_beam: bool) -> None:
    """Raises ValueError for a flag without a field; Beam may know one that resembles none."""
    for argument in arguments:
        flag = argument.split("=")[0].replace("-", "_").replace("__", "--", 1)
        if not argument.startswith("--") or flag in fields or f"--{flag[4:]}" in fields:
            continue
        hint = did_you_mean(flag, fields, "" if on_beam else f"see twotower {name} --help.")
        if hint:
            raise ValueError(f"unknown argument {argument.split('=')[0]}; {hint}")


def take_config_file(arguments: list[str]) -> tuple[list[str], dict[str, Any]]:
    """The arguments without `--config FILE`, and the pairs in it; ValueError: it cannot be read."""
    import yaml

    if "--config" not in arguments:
        return arguments, {}
    place = arguments.index("--config")
    if place + 1 == len(arguments):
        raise ValueError("--config needs the path of a YAML file.")
    path = arguments[place + 1]
    try:
        with open(path, encoding="utf-8") as file:
            content = yaml.safe_load(file) or {}
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"--config {path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"--config {path} must hold name: value pairs.")
    return arguments[:place] + arguments[place + 2 :], content


@contextlib.contextmanager
def on_this_machine(command: Command, config: Any) -> Iterator[Any]:
    """The settings with local directories in place of those in stores that a command copies.

    Raises:
      ValueError: there is nothing finished, or the store fails.
    """
    from pipeline.contract import stores

    with contextlib.ExitStack() as stack:
        copied: dict[str, Any] = {}
        for name in f"{command.reads} {command.changes} {command.makes}".split():
            path = getattr(config, name)
            if not is_remote(path):
                continue
            if name in command.reads.split():
                copied[name] = str(stores.local_copy(stores.newest(path)))
            else:
                may_be_new = name in command.makes.split()
                work = stores.working_copy(path, may_be_new=may_be_new)
                copied[name] = str(stack.enter_context(work))
        yield dataclasses.replace(config, **copied) if copied else config


def as_flags(settings: dict[str, Any]) -> list[str]:
    """A section of a file as flags, so that one parser checks both (YAML reads 1e-5 as text)."""
    flags = []
    for name, value in settings.items():
        if value is None:
            continue
        if isinstance(value, dict):
            value = [f"{key}={item}" for key, item in value.items()]
        flags += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return flags
