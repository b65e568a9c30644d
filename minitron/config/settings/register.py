"""The settings of register."""

import re

from pydantic import Field, model_validator

from minitron.config.fields import RegisteredName
from minitron.config.settings.base import StageSettings


class RegisterSettings(StageSettings):
    """Student → version in the MLflow registry."""

    name: RegisteredName = Field("minitron", description="Registered model.")
    alias: str = Field("challenger", pattern=r"^[\w-]+$", description="Alias that the new version gets.")

    @model_validator(mode="after")
    def _check_alias(self) -> "RegisterSettings":
        if re.fullmatch(r"latest|v\d+", self.alias, re.IGNORECASE):
            raise ValueError(f"alias {self.alias} is reserved by MLflow; choose another")
        if self.alias.lower() in ("champion", "previous"):
            raise ValueError(f"alias {self.alias} is reserved for promote, which judges the gates; choose another")
        return self
