"""Errors that several parts of the trainer raise and catch."""

from __future__ import annotations


class Diverged(ValueError):  # noqa: N818 - it names what happened
    """A loss, a gradient or an embedding is no longer finite."""


class MemoryIsFull(ValueError):  # noqa: N818 - as above
    """A step of training does not fit in memory."""
