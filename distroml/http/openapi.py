"""OpenAPI 3.1, made from the route table and the Structs that handlers really use.

Nothing is written twice: parameters come from query Structs, bodies and answers from msgspec's JSON schemas, error
responses from the exceptions that a route names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from http import HTTPStatus
from typing import Any

import msgspec

from distroml.errors import DistroMLError, InvalidRequest, TooManyRequests
from distroml.http.limits import JOB_ID_PATTERN, JSON_TYPE, KEY_HEADER
from distroml.http.messages import MESSAGES
from distroml.http.problems import PROBLEM_TYPE, Problem
from distroml.http.table import Answer, Route

_REF = "#/components/schemas/{name}"
_ANY_ROUTE: tuple[type[DistroMLError], ...] = (InvalidRequest, TooManyRequests, DistroMLError)
_DESCRIPTION = """\
Every node answers alike; a write sent to any of them goes through the replicated log.

- Errors are RFC 9457 problem documents; `field` names the offending place.
- Writes take `Idempotency-Key`: a retry with the same key has the effect of one request, and its answer carries
  `Idempotent-Replayed: true`.
- Times are RFC 3339 strings in UTC with milliseconds.
- Each response carries `X-DistroML-Node` (who answered), `X-DistroML-Index` (log index applied there) and
  `X-Request-Id`.
- Streams end with a message of type `end`. Each message that could be missed has a `cursor`, with which the stream
  can be resumed at any node. A reader that does not keep up is closed with code 1013 and may resume.
"""
_PATH_PARAMETERS = {
    "job_id": {"type": "string", "pattern": JOB_ID_PATTERN.replace(r"\Z", "$")},
    "slug": {"type": "string"},
    "name": {"type": "string"},
    "step": {"type": "integer", "minimum": 0},
}


def document(routes: Iterable[Route], version: str) -> bytes:
    """The whole description as JSON."""
    routes = tuple(routes)
    bodies = _bodies(routes)
    schemas, components = msgspec.json.schema_components(bodies, ref_template=_REF)
    schema_of = dict(zip(map(_key, bodies), schemas, strict=True))
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route, schema_of)
    components["StreamMessage"] = {
        "description": "One text frame of a stream, or the data of one Server-Sent Event",
        "anyOf": [schema_of[_key(kind)] for kind in MESSAGES],
    }
    components["MetricMessage"]["additionalProperties"] = {"type": ["number", "null"]}
    components["Problem"]["additionalProperties"] = True
    described = msgspec.json.encode(
        {
            "openapi": "3.1.0",
            "info": {"title": "DistroML", "version": version, "description": _DESCRIPTION},
            "paths": paths,
            "components": {"schemas": components},
        }
    )
    # JSON Schema has the regular expressions of ECMAScript, which know no \\Z.
    return described.replace(rb'\\Z"', b'$"')


def _bodies(routes: Sequence[Route]) -> list[Any]:
    kinds: list[Any] = [Problem, *MESSAGES]
    for route in routes:
        kinds += [route.body, *(answer.body for answer in route.answers)]
    return list({_key(kind): kind for kind in kinds if kind is not None}.values())


def _key(kind: Any) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _operation(route: Route, schema_of: dict[str, Any]) -> dict[str, Any]:
    operation: dict[str, Any] = {
        "operationId": route.name,
        "summary": route.summary,
        "description": (route.handler.__doc__ or "").strip(),
        "tags": [route.tag],
        "parameters": _parameters(route),
        "responses": _responses(route, schema_of),
    }
    if route.body is not None:
        operation["requestBody"] = {
            "required": True,
            "content": {JSON_TYPE: {"schema": schema_of[_key(route.body)]}},
        }
    return operation


def _parameters(route: Route) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [
        {"name": name, "in": "path", "required": True, "schema": _PATH_PARAMETERS[name]}
        for name in re.findall(r"{(\w+)}", route.path)
    ]
    for field in msgspec.structs.fields(route.query):
        schema = _without_null(msgspec.json.schema(field.type))
        if field.default not in (None, (), msgspec.NODEFAULT):
            schema["default"] = field.default
        parameter = {"name": field.encode_name, "in": "query", "required": False}
        description = schema.pop("description", None)
        if description:
            parameter["description"] = description
        found.append(parameter | {"schema": schema})
    if route.write:
        schema = {"type": "string", "minLength": 1, "maxLength": 255, "pattern": "^[!-~]+$"}
        found.append({"name": KEY_HEADER, "in": "header", "required": False, "schema": schema})
    return found


def _without_null(schema: dict[str, Any]) -> dict[str, Any]:
    kinds = [one for one in schema.get("anyOf", ()) if one.get("type") != "null"]
    return dict(kinds[0]) if len(kinds) == 1 else dict(schema)


def _responses(route: Route, schema_of: dict[str, Any]) -> dict[str, Any]:
    found = {str(answer.status): _answer(answer, schema_of) for answer in route.answers}
    by_status: dict[int, list[type[DistroMLError]]] = {}
    for kind in (*_ANY_ROUTE, *route.errors):
        by_status.setdefault(kind.status, []).append(kind)
    for status, kinds in sorted(by_status.items()):
        meaning = "; ".join(
            dict.fromkeys(f"{kind.title} (/problems/{kind.slug})" for kind in kinds)
        )
        content = {PROBLEM_TYPE: {"schema": schema_of[_key(Problem)]}}
        found.setdefault(str(status), {"description": meaning, "content": content})
    return found


def _answer(answer: Answer, schema_of: dict[str, Any]) -> dict[str, Any]:
    shown: dict[str, Any] = {"description": answer.meaning or HTTPStatus(answer.status).phrase}
    if answer.body is not None:
        shown["content"] = {answer.content_type: {"schema": schema_of[_key(answer.body)]}}
    elif answer.content_type == "text/event-stream":
        schema = {"$ref": _REF.format(name="StreamMessage")}
        shown["content"] = {answer.content_type: {"schema": schema}}
    elif answer.content_type == "application/octet-stream":
        schema = {"type": "string", "format": "binary"}
        shown["content"] = {answer.content_type: {"schema": schema}}
    elif answer.content_type != JSON_TYPE:
        shown["content"] = {answer.content_type: {"schema": {"type": "string"}}}
    if answer.headers:
        shown["headers"] = {name: {"schema": {"type": "string"}} for name in answer.headers}
    return shown
