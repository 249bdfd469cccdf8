"""Disks on which there is no room, for a test."""

import contextlib
import resource


@contextlib.contextmanager
def largest_file(size):
    """No file may grow beyond so many bytes: real errors of real writers."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
