"""Types of the values of a config, with the messages for wrong values."""

import inspect
import math
import re
from collections.abc import Collection
from dataclasses import dataclass
from fractions import Fraction
from typing import Annotated, Any, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PositiveFloat,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import PydanticCustomError

from robsparse.base.errors import nearest_match
from robsparse.base.names import LONGEST_NAME, is_name

LARGEST = 2**31  # of any number in a configuration
SPARSITY_DECIMALS = 4


def _describe_keys(schema: dict[str, Any], model: type[BaseModel]) -> None:
    """Complete a JSON schema: a docstring with `key: text` describes keys without a description.

    The docstrings of the bases are read too. The descriptions leave the text of the model.
    """
    properties = schema.get("properties", {})
    for base in model.__mro__:
        own = vars(base).get("__doc__") if issubclass(base, BaseModel) else None
        text, found = key_descriptions(inspect.cleandoc(own or ""), properties)
        for key, description in found.items():
            properties[key].setdefault("description", description)
        if base is model and own:
            schema["description"] = text


def key_descriptions(text: str, keys: Collection[str]) -> tuple[str, dict[str, str]]:
    """Split a docstring into the text on the whole and the descriptions of keys.

    A description is `key: text` or `key, key: text` at the start of a line or of a sentence; its
    further lines are indented.
    """
    rest: list[str] = []
    found: dict[str, str] = {}
    for line in re.sub(r"\n {4,}", " ", text).splitlines():
        parts = re.split(r"(?:^|(?<=\. ))([a-z_]+(?:, [a-z_]+)*): ", line)
        named = [part.split(", ") for part in parts[1::2]]
        if parts[0] or not named or not all(set(own) <= set(keys) for own in named):
            rest.append(line)
            continue
        for own, description in zip(named, parts[2::2], strict=True):
            found |= dict.fromkeys(own, description.strip().rstrip("."))
    return re.sub(r"\n{3,}", "\n\n", "\n".join(rest)).strip(), found


class Strict(BaseModel):
    """Base of every section of a config: unknown keys are errors, values never change.

    Numbers are at most 2**31. No setting needs a larger one.
    """

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        validate_default=True,
        allow_inf_nan=False,
        json_schema_extra=_describe_keys,
    )

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown_keys_and_stray_booleans(cls, data: Any) -> Any:
        for key in data if isinstance(data, dict) else ():
            if key not in cls.model_fields:
                known = ", ".join(cls.model_fields)
                raise PydanticCustomError(
                    "unknown_key",
                    "unknown key, expected one of: {known}{nearest}",
                    {"key": key, "known": known, "nearest": nearest_match(key, cls.model_fields)},
                )
            if isinstance(data[key], bool) and cls.model_fields[key].annotation is not bool:
                # pydantic would read `epochs: true` as one epoch
                raise PydanticCustomError(
                    "stray_boolean", "expected a value, not true or false", {"key": key}
                )
        return data

    @model_validator(mode="after")
    def _refuse_huge_numbers(self) -> Self:
        for key, value in self:
            numbers = value if isinstance(value, tuple | list) else (value,)
            if any(isinstance(n, int | float) and abs(n) > LARGEST for n in numbers):
                raise PydanticCustomError(
                    "size", "expected a number of at most {most}", {"key": key, "most": LARGEST}
                )
        return self


class Normalised(Strict):
    """Parameters of a network that may normalise its images itself; attacks still work in [0,1].

    mean, std: one value for each channel; the first layer is then (x - mean) / std for images x in
        [0,1].
    """

    mean: tuple[float, ...] | None = None
    std: tuple[PositiveFloat, ...] | None = None

    @model_validator(mode="after")
    def _both_or_none(self) -> "Normalised":
        for key, other in (("mean", "std"), ("std", "mean")):
            if getattr(self, key) is not None and getattr(self, other) is None:
                raise PydanticCustomError(
                    "normalised", "expected {other} too", {"key": key, "other": other}
                )
        return self


# A ratio of two decimal numbers of at most 40 digits, so that exact arithmetic is fast.
_RATIO = re.compile(r"\s*(\d{1,20}(?:\.\d{1,20})?)\s*/\s*(\d{1,20}(?:\.\d{1,20})?)\s*")


def _ratio(value: Any) -> Any:
    """Read "8/255" and "0.5/255" exactly; leave everything else to pydantic."""
    found = _RATIO.fullmatch(value) if isinstance(value, str) else None
    if found is None:
        return value
    above, below = map(Fraction, found.groups())
    return float(above / below) if below else value


def _number(value: Any) -> float:
    """The value as a float; nan if it is not a number. True and False are not numbers here."""
    try:
        return float("nan") if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        return float("nan")


def radius(value: Any) -> float:
    """A radius or a step size as a float. It is written as a number above 0 or as a ratio.

    The largest allowed value depends on the norm: see `radius_error`.

    Raises:
        PydanticCustomError: if the value is not a number above 0.
    """
    number = _number(_ratio(value))
    if not 0 < number < math.inf:
        raise PydanticCustomError(
            "radius", "expected a number above 0 in pixel units, like 0.15 or '8/255'", {}
        )
    return number


def radius_error(norm: str, value: float) -> str:
    """An error message for a radius or a step size in pixel units; "" if the value is valid.

    In Linf no pixel can change by more than 1. In L2 the length of a perturbation may be above 1.
    """
    if norm != "Linf" or value <= 1:
        return ""
    hint = f"; nearest match: '{value:g}/255'" if value <= 255 else ""
    return f"expected a number in (0, 1] pixel units for Linf, like 0.15 or '8/255'{hint}"


def rounded_sparsity(sparsity: float) -> float:
    """The sparsity with four decimals. Cells and published numbers are compared in this form."""
    return round(sparsity, SPARSITY_DECIMALS)


def _sparsity(value: Any) -> Any:
    number = _number(value)
    if not 0 < number < 1:
        hint = f"; nearest match: {number / 100:g}" if 1 < number < 100 else ""
        raise PydanticCustomError(
            "sparsity",
            "expected a share of zero weights in (0, 1), like 0.95 (0 is the method 'dense'){hint}",
            {"hint": hint},
        )
    if rounded_sparsity(number) != number:
        hint = f"; nearest match: {min(rounded_sparsity(number), 0.9999):g}"
        raise PydanticCustomError(
            "sparsity", "expected at most four decimals, like 0.9950{hint}", {"hint": hint}
        )
    return number


@dataclass(frozen=True)
class Decides:
    """Marks a setting that is the path of a file or folder.

    content: whether the content of the file or folder decides a result. The path never does.
    """

    content: bool


CONTENT = Decides(content=True)
PLACE = Decides(content=False)


def _name(value: str) -> str:
    if not is_name(value):
        raise PydanticCustomError(
            "name",
            "expected a name of at most {most} letters, digits, - and _ that starts with a letter "
            "or digit",
            {"most": LONGEST_NAME},
        )
    return value


def _claimed(value: Any) -> Any:
    return 0.0 if _number(value) == 0 else _sparsity(value)


_PATTERN = re.compile(r"[1-9][0-9]{0,2}:[1-9][0-9]{0,2}")


def _pattern(value: Any) -> str:
    if not isinstance(value, str) or not _PATTERN.fullmatch(value) or least_sparsity(value) <= 0:
        raise PydanticCustomError(
            "pattern",
            "expected 'N:M' with 0 < N < M < 1000, like '2:4', in quotation marks, because YAML "
            "reads 2:4 as the number 124",
            {},
        )
    return value


def pattern_numbers(pattern: str) -> tuple[int, int]:
    """Return N and M of a pattern "N:M"."""
    most, size = pattern.split(":")
    return int(most), int(size)


def least_sparsity(pattern: str) -> Fraction:
    """Return 1 - N/M, the least sparsity of a network with at most N of M weights."""
    return 1 - Fraction(*pattern_numbers(pattern))


# The JSON schemas of these types describe what a file may have, before it is read.
_RADIUS = {
    "anyOf": [
        {"type": "number", "exclusiveMinimum": 0},
        {"type": "string", "pattern": f"^{_RATIO.pattern}$", "examples": ["8/255"]},
    ]
}
_BELOW_1 = {"type": "number", "exclusiveMaximum": 1}

Name = Annotated[str, AfterValidator(_name)]  # name of a part, a file or a folder
Radius = Annotated[float, BeforeValidator(radius), WithJsonSchema(_RADIUS)]
Sparsity = Annotated[
    float, BeforeValidator(_sparsity), WithJsonSchema({**_BELOW_1, "exclusiveMinimum": 0})
]
Claimed = Annotated[float, BeforeValidator(_claimed), WithJsonSchema({**_BELOW_1, "minimum": 0})]
Share = Annotated[float, Field(ge=0, lt=1)]
# "N:M": at most N of M weights are nonzero
Pattern = Annotated[
    str,
    BeforeValidator(_pattern),
    WithJsonSchema({"type": "string", "pattern": f"^{_PATTERN.pattern}$", "examples": ['"2:4"']}),
]
Seed = Annotated[int, Field(strict=True, ge=0, lt=2**31)]


def each_once(values: list[Any]) -> list[Any]:
    """Return the list unchanged. A repeated entry is an error of the config."""
    if len(set(values)) != len(values):
        raise PydanticCustomError("repeat", "expected each entry once", {})
    return values
