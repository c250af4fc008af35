"""What the HTTP app takes and gives, as pydantic models: for checking requests and for the OpenAPI description.

Lists of ids are checked against the bundle's types by serving/answers.py, where a bad value is named in one line;
here they are any JSON, because pydantic would report each of a hundred thousand wrong ids.
"""

from __future__ import annotations

import reprlib
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, Strict, ValidationError
from starlette.requests import Request

from serving.errors import InputError

AS_TEXT = "Ids of the answer are text, for clients that round whole numbers beyond 2^53. Ids of a request may be text in any case."
AsText = Annotated[bool, Strict(), Field(description=AS_TEXT)]
RawId = Annotated[Any, Field(json_schema_extra={"anyOf": [{"type": "integer"}, {"type": "string"}]})]
_ID_LIST = {"items": {"anyOf": [{"type": "integer"}, {"type": "string"}]}}

M = TypeVar("M", bound=BaseModel)


class RequestError(InputError):
    """A request that is refused; the message goes to the client with status 400."""


class ApiRequest(BaseModel):
    """A request; fields that are not there are refused."""

    model_config = ConfigDict(extra="forbid")


class RecommendRequest(ApiRequest):
    """Users to recommend items to."""

    user_ids: Annotated[
        list[Any], Field(description="Raw user ids, all of the bundle's type.", json_schema_extra=_ID_LIST)
    ]
    k: Annotated[int, Strict(), Field(description="Items per user, from 1.")] = 20
    exclude: Annotated[
        list[Any] | None,
        Field(
            description="One list of raw item ids per user, not to be recommended to that user.",
            json_schema_extra={"items": {"type": "array", **_ID_LIST}},
        ),
    ] = None
    ids_as_text: AsText = False


class ScoreRequest(ApiRequest):
    """One user, and items to score."""

    user_id: Annotated[RawId, Field(description="A raw user id.")]
    item_ids: Annotated[list[Any], Field(description="Raw item ids.", json_schema_extra=_ID_LIST)]
    ids_as_text: AsText = False


class ScoredItem(BaseModel):
    item_id: RawId
    score: float


class UserItems(BaseModel):
    user_id: RawId
    known: Annotated[bool, Field(description="False: the user is out of vocabulary, and answered from the OOV row.")]
    items: Annotated[list[ScoredItem], Field(description="Best first.")]


class RecommendResponse(BaseModel):
    bundle: Annotated[str, Field(description="First digits of the hash of the bundle that answered.")]
    results: list[UserItems]


class TextItem(BaseModel):
    item_id: str
    score: float
    title: Annotated[str | None, Field(description="Null without one.")]


class TextItems(BaseModel):
    """A user's items for browsers, which round whole numbers beyond 2^53."""

    bundle: str
    user_id: str
    known: bool
    items: list[TextItem]


class ScoreResponse(BaseModel):
    bundle: str
    user_id: RawId
    known: bool
    item_ids: list[RawId]
    scores: Annotated[list[float], Field(description="One per item, in the order of the request.")]
    known_items: list[bool]


class PredictResponse(BaseModel):
    bundle: str
    probabilities: Annotated[
        list[float], Field(description="Click probabilities, one per row, in the order of the request.")
    ]
    oov: Annotated[list[list[str]], Field(description="Per row, the columns with an out-of-vocabulary value.")]


class Error(BaseModel):
    error: Annotated[str, Field(description="One line: what is wrong, with the value, and what to do.")]


ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"model": Error, "description": "A bad value, or a host that is not this server"},
    408: {"model": Error, "description": "The body came too slowly"},
    413: {"model": Error, "description": "The body is too large"},
    415: {"model": Error, "description": "The body is not JSON, or encoded"},
    503: {"model": Error, "description": "Overloaded, or no answer in time; again after Retry-After seconds"},
}


# Of a request without a body.
GET_ERRORS: dict[int | str, dict[str, Any]] = {status: ERRORS[status] for status in (400, 503)}


class MediaTypeError(RequestError):
    """The body is of another media type; the message goes to the client with status 415."""


def parse(model: type[M], request: Request, body: bytes) -> M:
    """A request's body as a checked value.

    Raises:
        RequestError: it is no JSON, or not of this shape; one line, with the place and the value.
    """
    # A page of another origin can make a browser send anything but this.
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise MediaTypeError(f"content-type is {kind!r:.60}; send application/json")
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"]).lstrip(".")
        if first["type"] == "extra_forbidden":
            raise RequestError(f"{place}: no such field; there are {', '.join(model.model_fields)}") from None
        given = "" if first["type"] in ("json_invalid", "missing") else f", not {reprlib.repr(first['input'])}"
        raise RequestError(f"{place or 'body'}: {first['msg']}{given}") from None
