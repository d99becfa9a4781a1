"""What every part of an upstream answer is read as: its known fields, with numbers that JSON has."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Count = Annotated[int, Field(ge=0, lt=2**64)]  # a seed may be as large


class UpstreamPart(BaseModel):
    """Other fields are dropped. NaN and Infinity, which some servers write, are refused: our answers could not be."""

    model_config = ConfigDict(allow_inf_nan=False)
