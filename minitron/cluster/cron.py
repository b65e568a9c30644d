"""Kubeflow's schedules: cron expressions with six fields, seconds first, in UTC."""

import re
from datetime import UTC, datetime

from cronsim import CronSim, CronSimError

from minitron.errors import ConfigError

FIELDS = ("second", "minute", "hour", "day-of-month", "month", "day-of-week")
_EXAMPLE = "give, for example, '0 0 2 * * *' for every night at two"


def first_run_time(expression: str) -> datetime:
    """Check a schedule, and return the UTC time of its first run.

    Raises:
        ConfigError: the expression does not have six fields, or a field is wrong; the message names the field.
    """
    fields = [field.replace("?", "*").upper() for field in expression.split()]
    if len(fields) != len(FIELDS):
        raise ConfigError(
            f"cron '{expression}': {len(fields)} fields, but Kubeflow needs six ({' '.join(FIELDS)}); {_EXAMPLE}"
        )
    for name, field in zip(FIELDS, fields, strict=True):
        if not _is_valid_field(name, field):
            raise ConfigError(f"cron '{expression}': {name} cannot be '{field}'; {_EXAMPLE}")
    try:
        return next(CronSim(" ".join(fields), datetime.now(UTC)))
    except (CronSimError, StopIteration):
        raise ConfigError(f"cron '{expression}': no such day exists; {_EXAMPLE}") from None


def _is_valid_field(name: str, field: str) -> bool:
    """Check one field; unlike CronSim, Kubeflow's parser knows neither '#' nor 'L' nor 7 for Sunday."""
    if re.search(r"#|^L|\dL", field) or (name == "day-of-week" and "7" in field):
        return False
    try:
        CronSim(" ".join(field if other == name else "*" for other in FIELDS), datetime.now(UTC))
    except CronSimError:
        return False
    return True
