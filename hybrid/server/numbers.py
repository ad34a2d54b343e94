"""Numbers as JSON has them: of one kind, finite; and the bounds that several fields share."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

LARGEST = 2**31 - 1
ALL = -1  # as many as there are
SEEDS = 9_223_372_036_854_776_000  # either side of 0; 2**63 as OpenAI's own description writes it


def _as_whole(value: Any) -> Any:
    """3.0 is 3: so it is written where a language has no other numbers."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _not_zero(value: int) -> int:
    if not value:
        raise ValueError("Input should be 1 or more, or -1 for no limit")
    return value


def _as_boolean(value: Any) -> Any:
    """Python takes 0 for False, and so would `Literal`."""
    if not isinstance(value, bool):
        raise ValueError("Input should be a valid boolean")
    return value


WHOLE = BeforeValidator(_as_whole)  # behind the bounds of an int
Finite = Annotated[float, Field(allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0, le=LARGEST), WHOLE]
Positive = Annotated[int, Field(ge=1, le=LARGEST), WHOLE]
CountOrAll = Annotated[int, Field(ge=ALL, le=LARGEST), WHOLE]
Limit = Annotated[
    int, Field(ge=ALL, le=LARGEST, json_schema_extra={"not": {"const": 0}}), AfterValidator(_not_zero), WHOLE
]
NoneOfThem = Annotated[int, Field(ge=0, le=0), WHOLE]  # the one number that is taken, and the one truth value
No = Annotated[Literal[False], BeforeValidator(_as_boolean)]
Yes = Annotated[Literal[True], BeforeValidator(_as_boolean)]
Seed = Annotated[int, Field(ge=-SEEDS, le=SEEDS), WHOLE]
