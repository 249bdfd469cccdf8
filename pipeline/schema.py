"""The public name of the contract between the rooms: all of `pipeline.contract.schema`."""

from pipeline.contract.schema import *  # noqa: F403
