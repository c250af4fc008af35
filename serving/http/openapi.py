"""The OpenAPI description of a server: routes as FastAPI knows them, with the id types, columns and limits of the bundle in use."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from serving.http.access import HEALTH_ROUTES, Access
from serving.http.answers import Limits
from serving.http.api_schema import AS_TEXT
from serving.retriever import Retriever
from serving.scorer import Scorer

Schema = dict[str, Any]

_INT64: Schema = {"type": "integer", "format": "int64", "minimum": -(2**63), "maximum": 2**63 - 1}
# 19 digits are taken as well, where they are in int64; a pattern cannot say so.
_INT64_TEXT: Schema = {"type": "string", "pattern": "^-?(0|[1-9][0-9]{0,17})$"}
_AS_TEXT: Schema = {"type": "boolean", "default": False, "description": AS_TEXT}


def retrieval_openapi(app: FastAPI, retriever: Retriever, limits: Limits, access: Access) -> Schema:
    """The description of a retrieval bundle's server."""
    types = retriever.manifest["id_types"]
    user, item = _id_schema(types["user_id"]), _id_schema(types["item_id"])
    shown_user, shown_item = _shown_schema(types["user_id"]), _shown_schema(types["item_id"])
    k: Schema = {
        "type": "integer",
        "minimum": 1,
        "default": 20,
        "description": "Items per user; more than there are gives all.",
    }
    if retriever.n_items > limits.max_k:
        k["maximum"] = limits.max_k
    items = {"type": "array", "items": item, "maxItems": limits.max_items}
    recommend = _object(
        {
            "user_ids": {"type": "array", "items": user, "maxItems": limits.max_users, "description": "Raw user ids."},
            "k": k,
            "exclude": {
                "anyOf": [{"type": "array", "items": items, "maxItems": limits.max_users}, {"type": "null"}],
                "description": "One list of raw item ids per user, not to be recommended to that user. "
                f"Users times (k + the longest list) is at most {limits.max_cells}.",
            },
            "ids_as_text": _AS_TEXT,
        },
        required=("user_ids",),
    )
    score = _object(
        {
            "user_id": user | {"description": "A raw user id."},
            "item_ids": items | {"description": "Raw item ids."},
            "ids_as_text": _AS_TEXT,
        },
        required=("user_id", "item_ids"),
    )
    openapi = _described(app, access, {"/v1/recommend": recommend, "/v1/score": score}, limits)
    schemas = openapi["components"]["schemas"]
    for name, field, schema in (
        ("ScoredItem", "item_id", shown_item),
        ("UserItems", "user_id", shown_user),
        ("ScoreResponse", "user_id", shown_user),
    ):
        schemas[name]["properties"][field] = schema
    schemas["ScoreResponse"]["properties"]["item_ids"] = {"type": "array", "items": shown_item}
    for path in ("/v1/recommend", "/v1/explain"):
        for parameter in openapi["paths"].get(path, {}).get("get", {}).get("parameters", ()):
            if parameter["name"] == "k":
                parameter["schema"] = {key: value for key, value in k.items() if key != "description"} | {"default": 10}
            if parameter["name"] == "user_id" and types["user_id"] == "int64":
                parameter["schema"] = {"type": "string", "pattern": "^-?[0-9]{1,18}$"}
    return openapi


def ctr_openapi(app: FastAPI, scorer: Scorer, limits: Limits, access: Access) -> Schema:
    """The description of a CTR bundle's server."""
    columns = {column["name"]: _value_schema(column) for column in scorer.manifest["columns"]}
    for column in scorer.manifest["columns"]:
        if "time" in column and column["time"]["column"] not in columns:
            form = column["time"]["format"]
            columns.pop(column["name"])
            columns[column["time"]["column"]] = {
                "type": ["string", "integer", "null"],
                "description": f"A time of the form {form}.",
            }
        if "bucket" in column and column["bucket"] not in columns:
            columns.pop(column["name"])
            columns[column["bucket"]] = {"type": ["number", "string", "null"], "description": "A number."}
    rows = {
        "type": "array",
        "maxItems": limits.max_users,
        "items": {"type": "object", "properties": columns, "required": list(scorer.columns)},
    }
    by_column = {
        "type": "object",
        "properties": {
            name: {"type": "array", "items": schema, "maxItems": limits.max_users} for name, schema in columns.items()
        },
        "required": list(scorer.columns),
    }
    predict = _object(
        {
            "rows": {
                "anyOf": [rows, {"type": "null"}],
                "description": "One object per row: column name to raw value; null is a missing one.",
            },
            "columns": {
                "anyOf": [by_column, {"type": "null"}],
                "description": "Column name to the raw values of all rows; instead of rows.",
            },
        },
        required=(),
    )
    return _described(app, access, {"/v1/predict": predict}, limits)


def _id_schema(kind: str) -> Schema:
    """An id of a request."""
    return {"anyOf": [_INT64, _INT64_TEXT]} if kind == "int64" else {"type": "string"}


def _shown_schema(kind: str) -> Schema:
    """An id of an answer, which is text where the request asks for that."""
    return {"anyOf": [_INT64, {"type": "string"}]} if kind == "int64" else {"type": "string"}


def _value_schema(column: Mapping[str, Any]) -> Schema:
    if column["role"] == "dense":
        return {"type": ["number", "null"]}
    plain = _id_schema(column["dtype"])
    if column["role"] == "multi_valued":
        return {
            "anyOf": [{"type": "array", "items": plain}, {"type": "null"}],
            "description": f"The first {column['width']} values count.",
        }
    return {"anyOf": [plain, {"type": "null"}]}


def _object(properties: Schema, required: tuple[str, ...]) -> Schema:
    schema: Schema = {"type": "object", "properties": properties, "additionalProperties": False}
    return schema | {"required": list(required)} if required else schema


def _described(app: FastAPI, access: Access, bodies: Mapping[str, Schema], limits: Limits) -> Schema:
    """FastAPI's description, with these bodies, and without the answers that this server never gives."""
    openapi = get_openapi(title=app.title, version="1", description=app.description, routes=app.routes)
    for name in ("HTTPValidationError", "ValidationError"):
        openapi["components"]["schemas"].pop(name, None)
    bearer: list[dict[str, list[str]]] = [{"bearer": []}]
    if access.tokens:
        openapi["components"]["securitySchemes"] = {"bearer": {"type": "http", "scheme": "bearer"}}
    error = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    for path, methods in openapi["paths"].items():
        for method, operation in methods.items():
            operation["responses"].pop("422", None)
            operation["responses"].setdefault("400", {"description": "Not a request for this server", "content": error})
            if access.tokens and path not in HEALTH_ROUTES:
                operation["security"] = bearer
                operation["responses"]["401"] = {"description": "No valid token", "content": error}
            if method == "post":
                operation["requestBody"] = {
                    "required": True,
                    "description": f"At most {limits.max_body_bytes} bytes, within {limits.timeout_s:g} s.",
                    "content": {"application/json": {"schema": bodies[path]}},
                }
    return openapi
