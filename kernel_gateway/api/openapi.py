"""The OpenAPI 3.1 document. It is made from the route table, so it says what the server does."""

import inspect
import re
from typing import Any

import msgspec

from kernel_gateway import __version__
from kernel_gateway.api.base import Call, ErrorBody, Route, phrase

REF = "#/components/schemas/{name}"


async def serve_document(call: Call) -> dict[str, Any]:
    """This document."""
    document: dict[str, Any] = call.http.application.settings["openapi"]
    return document


def document(routes: list[Route]) -> dict[str, Any]:
    """Describe every route."""
    kinds = [
        kind
        for route in routes
        for kind in (route.body, route.query, route.answer, route.refusal)
        if kind not in (None, dict)
    ]
    schemas, components = msgspec.json.schema_components([*kinds, ErrorBody], ref_template=REF)
    schema_of = {repr(kind): schema for kind, schema in zip([*kinds, ErrorBody], schemas, strict=True)}
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route, schema_of, components)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "CellVM",
            "version": __version__,
            "description": "Sandboxes that are microVMs, each with a live IPython kernel.",
        },
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "key": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
            },
        },
        "security": [{"bearer": []}, {"key": []}],
    }


def _operation(route: Route, schema_of: dict[str, Any], components: dict[str, Any]) -> dict[str, Any]:
    text = inspect.getdoc(route.operation) or ""
    described: dict[str, Any] = {
        "operationId": "_".join([route.method.lower(), *re.findall(r"\w+", route.path)]),
        "summary": text.split("\n")[0],
        "description": text,
        "parameters": [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
            for name in route.names
        ],
        "responses": {str(code): _answer(route, schema_of) for code in (route.status, route.also) if code},
    }
    if route.query is not None:
        fields = components[route.query.__name__]
        described["parameters"] += [
            {"name": name, "in": "query", "required": name in fields.get("required", []), "schema": schema}
            for name, schema in fields["properties"].items()
        ]
    if route.upload:
        part = {"type": "string", "contentMediaType": "application/octet-stream"}
        form = {"type": "object", "properties": {"path": {"type": "string"}, "file": part}, "required": ["file"]}
        described["requestBody"] = {"required": True, "content": {"multipart/form-data": {"schema": form}}}
    elif route.body is not None:
        schema = schema_of[repr(route.body)]
        described["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    if route.public:
        described["security"] = []
    errors = set(route.errors) | {400}
    if not route.public:
        errors |= {401, 429, 503}  # a key has quotas, and the server a bound for all keys
        if route.method != "GET":
            errors.add(403)
    if not {"id", "kernel", "session"}.isdisjoint(route.names):
        errors |= {404, 409, 502}
    if route.body is not None or route.upload:
        errors.add(413)
    told = [schema_of[repr(kind)] for kind in (ErrorBody, route.refusal) if kind is not None]
    error = {"application/json": {"schema": told[0] if len(told) == 1 else {"anyOf": told}}}
    described["responses"] |= {str(code): {"description": phrase(code), "content": error} for code in sorted(errors)}
    if 206 not in errors and route.produces == "application/octet-stream":
        described["responses"]["206"] = {"description": phrase(206)}
    return described


def _answer(route: Route, schema_of: dict[str, Any]) -> dict[str, Any]:
    described: dict[str, Any] = {"description": phrase(route.status)}
    if route.answer is dict:
        described["content"] = {"application/json": {"schema": {"type": "object"}}}
    elif route.answer is not None:
        described["content"] = {"application/json": {"schema": schema_of[repr(route.answer)]}}
        if route.produces == "application/json":
            described["content"]["application/x-ndjson"] = {"schema": {"type": "string"}}
            described["content"]["text/event-stream"] = {"schema": {"type": "string"}}
    elif route.produces is not None:
        text = {"type": "string", "contentMediaType": route.produces}
        described["content"] = {route.produces: {"schema": {"type": "object"} if "json" in route.produces else text}}
    return described
