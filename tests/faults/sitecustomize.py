"""Python imports this first in a process whose PYTHONPATH has this folder."""

import injector

injector.arm_from_environment()
