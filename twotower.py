"""The front door: `twotower COMMAND [flags]`.

It parses, looks up what a room says of the command, and calls. Exit status 0: done; 2: a mistake
of the user, told in one line; 1: a failure of ours, with its stack trace, or, where a Beam runner
lost rows, one line.
"""

from __future__ import annotations

import logging
import os
import sys

import twotower_run
from pipeline import commands as pipeline_commands
from pipeline.contract.flags import (
    as_flags,
    help_text,
    on_this_machine,
    parse,
    resolve,
    take_config_file,
)
from pipeline.contract.settings import did_you_mean
from serving import commands as serving_commands
from towers import commands as towers_commands

COMMANDS = {
    **pipeline_commands.COMMANDS,
    **towers_commands.COMMANDS,
    **twotower_run.COMMANDS,
    **serving_commands.COMMANDS,
}


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; the exit status."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ["TF_USE_LEGACY_KERAS"] = "1"  # of TFRS; nothing else in this process needs tf.keras
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_usage())
        return 0 if arguments else 2
    name, rest = arguments[0], arguments[1:]
    _set_up_logs()
    try:
        if name not in COMMANDS:
            hint = did_you_mean(name, COMMANDS, f"choose one of {', '.join(COMMANDS)}.")
            raise ValueError(f"there is no command {name!r}; {hint}")
        return _dispatch(name, rest)
    except (ValueError, LookupError) as error:
        if os.environ.get("TWOTOWER_DEBUG"):
            raise
        text = str(error.args[0] if isinstance(error, KeyError) and error.args else error)
        print(f"twotower {name}: {text}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        from pipeline.beam.accounting import AccountingError

        if not isinstance(error, AccountingError) or os.environ.get("TWOTOWER_DEBUG"):
            raise
        print(f"twotower {name}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"twotower {name}: interrupted.", file=sys.stderr)
        return 130


def _usage() -> str:
    lines = ["usage: twotower COMMAND [flags]", ""]
    lines += [f"  {name:11} {command.help}" for name, command in COMMANDS.items()]
    lines += ["", "twotower COMMAND --help shows the flags that matter, --help all every flag."]
    return "\n".join(lines)


def _set_up_logs() -> None:
    """Our own words at INFO, one a line; of the libraries, warnings alone."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout)
    # Beam warns of clients for a cloud that nobody asked for, and of a directory of its workers.
    idle = ("apitools", "semi_persistent_directory")
    for handler in logging.getLogger().handlers:
        handler.addFilter(lambda record: not any(word in record.getMessage() for word in idle))
    for room in ("pipeline", "towers", "serving", "twotower"):
        logging.getLogger(room).setLevel(logging.INFO)


def _dispatch(name: str, arguments: list[str]) -> int:
    command = COMMANDS[name]
    ours = arguments[: arguments.index("--")] if "--" in arguments else arguments
    if {"-h", "--help"} & set(ours):
        print(help_text(name, command, everything="all" in ours))
        return 0
    if command.positional and arguments and not arguments[0].startswith("-"):
        arguments = [f"--{command.positional}", *arguments]
    arguments, sections = take_config_file(arguments)
    if name == "run":  # its file has a section for each stage, and flags of the run beside them
        own = {key: value for key, value in sections.items() if not isinstance(value, dict)}
        sections = {key: value for key, value in sections.items() if key not in own}
        config, _ = parse(name, command, as_flags(own) + arguments)
        twotower_run.run(config, sections, COMMANDS)
        return 0
    config, rest = parse(name, command, as_flags(sections.get(name, sections) or {}) + arguments)
    with on_this_machine(command, config) as local:
        call = resolve(command.call)
        result = call(local, rest) if command.on_beam else call(local)
    return result if isinstance(result, int) else 0


if __name__ == "__main__":
    sys.exit(main())
