"""What a room says of each of its commands, for the front door `twotower`."""

from __future__ import annotations

from typing import NamedTuple


class Command(NamedTuple):
    """A command: its settings and what it calls, both as module:name, and a line of help.

    Example:
      Command("serving.settings:ServeConfig", "serving.server:serve", "serve the newest versions")
    """

    config: str
    call: str
    help: str
    on_beam: bool = False  # what its flags leave over goes to Beam
