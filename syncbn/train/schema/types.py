"""The types of values that have a range or a form."""

from typing import Annotated

from pydantic import Field

BelowOne = Annotated[float, Field(ge=0, lt=1)]
Share = Annotated[float, Field(gt=0, le=1)]
Scale = Annotated[float, Field(ge=0.01, le=100)]
Factory = Annotated[str, Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")]
