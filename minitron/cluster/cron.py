"""Schedules as Kubeflow takes them: cron with six fields, the first being seconds, in UTC."""

import re
from datetime import UTC, datetime

from cronsim import CronSim, CronSimError

from minitron.errors import ConfigError

FIELDS = ("second", "minute", "hour", "day-of-month", "month", "day-of-week")
_EXAMPLE = "for instance '0 0 2 * * *', every night at two"


def first_time(expression: str) -> datetime:
    """Check a schedule; return the first time, in UTC, at which it runs.

    Raises:
        ConfigError: it has not six fields, or one of them is wrong; the message names it.
    """
    fields = [field.replace("?", "*").upper() for field in expression.split()]
    if len(fields) != len(FIELDS):
        raise ConfigError(
            f"cron '{expression}': {len(fields)} fields, Kubeflow takes six ({' '.join(FIELDS)}); {_EXAMPLE}"
        )
    for name, field in zip(FIELDS, fields, strict=True):
        if not _is_valid(name, field):
            raise ConfigError(f"cron '{expression}': {name} cannot be '{field}'; {_EXAMPLE}")
    try:
        return next(CronSim(" ".join(fields), datetime.now(UTC)))
    except (CronSimError, StopIteration):
        raise ConfigError(f"cron '{expression}': there is no such day; {_EXAMPLE}") from None


def _is_valid(name: str, field: str) -> bool:
    """Check one field alone; of what CronSim knows, Kubeflow's parser knows neither '#', 'L' nor a Sunday that is 7."""
    if re.search(r"#|^L|\dL", field) or (name == "day-of-week" and "7" in field):
        return False
    try:
        CronSim(" ".join(field if other == name else "*" for other in FIELDS), datetime.now(UTC))
    except CronSimError:
        return False
    return True
