"""Values of a record, checked with a pydantic model. Errors are one line."""

from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from robsparse.base.errors import UsageError, shortened

Model = TypeVar("Model", bound=BaseModel)


class Checked(BaseModel):
    """A part of a record. Other keys than the declared ones may be there."""

    model_config = ConfigDict(extra="allow", strict=True)


def check(model: type[Model], content: dict[str, Any], path: Path, remedy: str) -> Model:
    """Check the content of a record, and return it as the model.

    Args:
        model: the keys and the types of their values.
        content: the content of the file.
        path: the file.
        remedy: what to do if a value is wrong; the end of the message.

    Raises:
        UsageError: if a value is wrong. The message names file, key and value.
    """
    try:
        return model.model_validate(content)
    except ValidationError as error:
        wrong = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in wrong["loc"])
        if wrong["type"] in ("extra_forbidden", "missing"):
            raise UsageError(
                f"{path}: '{key}': another version of robsparse wrote these columns; {remedy}"
            ) from None
        value = shortened(repr(wrong["input"]))
        raise UsageError(f"{path}: {key} = {value}: {wrong['msg']}; {remedy}") from None
