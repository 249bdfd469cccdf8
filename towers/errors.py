"""Errors that several parts of the trainer raise and catch."""

from __future__ import annotations


class Diverged(ValueError):  # noqa: N818 - it names what happened
    """A loss, a gradient or an embedding is no longer finite."""
