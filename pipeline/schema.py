"""The public name of the contract between the rooms: all that `pipeline.contract` holds."""

from pipeline.contract.files import *  # noqa: F403
from pipeline.contract.hashing import *  # noqa: F403
from pipeline.contract.schema import *  # noqa: F403
