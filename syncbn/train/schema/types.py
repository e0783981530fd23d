"""The types of values that have a range or a form."""

from typing import Annotated

from pydantic import Field

BelowOne = Annotated[float, Field(ge=0, lt=1)]
# Up to a week, which the clocks of torch and of the system can count in any of their units.
Seconds = Annotated[float, Field(gt=0, le=604_800)]
# Or threads, of one machine.
Processes = Annotated[int, Field(gt=0, le=4096)]
Share = Annotated[float, Field(gt=0, le=1)]
Scale = Annotated[float, Field(ge=0.01, le=100)]
Factory = Annotated[str, Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")]
