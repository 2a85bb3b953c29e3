"""How every command meets its Ray cluster; Ray itself is imported by the callers."""

import logging
import os
from typing import Any


def ray_options() -> dict[str, Any]:
    """Arguments of `ray.init`: the cluster that RAY_ADDRESS names, or else a new one on this machine.

    Without an address Ray would join whatever cluster it finds on the machine; a command that was not told of a
    cluster must not take part in somebody else's.
    """
    address = os.environ.get("RAY_ADDRESS")
    if address:
        return {"address": address, "logging_level": logging.WARNING}
    return {"address": "local", "include_dashboard": False, "logging_level": logging.WARNING}
