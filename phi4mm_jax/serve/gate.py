"""The gate of the server: who may ask, how much at a time, and how requests end."""

import asyncio
import hashlib
import hmac
from collections import Counter
from collections.abc import Callable, Collection, Coroutine
from typing import Any

from fastapi import Request as HttpRequest
from fastapi import Response, params
from fastapi.routing import APIRoute
from starlette.datastructures import Headers

from phi4mm_jax.serve.errors import ApiError
from phi4mm_jax.serve.limits import Limits
from phi4mm_jax.serve.metrics import Metrics
from phi4mm_jax.utils.strict_json import parse_json

_OPEN = ("/", "/health", "/ready", "/openapi.json")  # without a key, and what is below /page
_LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
_PATIENCE = 60  # seconds without any of a body


class Gate:
    """Lets requests in: by key, by the host's name, by size; counts how they end."""

    def __init__(self, app: Any, metrics: Metrics, limits: Limits, api_keys: Collection[str], loopback: bool):
        self._app, self._metrics, self._limits = app, metrics, limits
        self._keys = [key.encode() for key in api_keys]
        self._loopback = loopback and not api_keys
        self._held = 0  # bytes of the bodies that are here

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        status, held = 499, [0]

        async def counted(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            headers, path = Headers(scope=scope), scope["path"]
            try:
                self._check_host(headers)
                scope.setdefault("state", {})["owner"] = self._owner(headers, path)
                limit = self._limits.file_bytes + 2**16 if path == "/v1/files" else self._limits.max_body_bytes
                if (length := headers.get("content-length", "0")).isdecimal() and int(length) > limit:
                    raise _too_large(limit)
            except ApiError as error:
                return await error.response()(scope, receive, counted)
            await self._app(scope, self._limited(receive, limit, held), counted)
        except Exception:
            status = 500
            raise
        finally:
            self._held -= held[0]
            route = scope.get("route")
            self._metrics.requests.labels(getattr(route, "path", "other"), str(status)).inc()

    def _limited(self, receive: Any, limit: int, held: list[int]) -> Any:
        """Return what receives a body, and is an error beyond the limits or where nothing comes for long.

        Args:
            held: the bytes so far are counted there.
        """
        more = True

        async def limited() -> Any:
            nonlocal more
            try:
                async with asyncio.timeout(_PATIENCE if more else None):
                    message = await receive()
            except TimeoutError:
                raise ApiError(408, f"nothing of the body came for {_PATIENCE} seconds; send it again") from None
            more, count = message.get("more_body", False), len(message.get("body", b""))
            held[0] += count
            self._held += count
            if held[0] > limit:
                raise _too_large(limit)
            if self._held > self._limits.held_bytes:
                raise ApiError(429, "the server has as many bytes of requests as it may; send it again later",
                               kind="rate_limit_error", code="server_busy", retry_after=5)  # fmt: skip
            return message

        return limited

    def _check_host(self, headers: Headers) -> None:
        name = headers.get("host", "").lower()
        name = name if name.endswith("]") else name.rsplit(":", 1)[0]
        if self._loopback and name not in _LOOPBACK:
            raise ApiError(403, f"this server is for its own host, not for {name!r:.80}; start it with --api-key for "
                           "others", kind="permission_error", code="host_not_allowed")  # fmt: skip

    def _owner(self, headers: Headers, path: str) -> str:
        """Return whose request it is, for files and turns."""
        if not self._keys or path in _OPEN or path.startswith("/page/"):
            return "everybody"
        scheme, _, key = headers.get("authorization", "").partition(" ")
        given = key.encode("latin-1").strip()  # the bytes that came
        found = [hmac.compare_digest(given, known) for known in self._keys]  # all of them, in a time that tells nothing
        if scheme.lower() != "bearer" or not given or not any(found):
            raise ApiError(401, "the request has no API key, or an unknown one; send Authorization: Bearer KEY",
                           kind="authentication_error", code="invalid_api_key")  # fmt: skip
        return hashlib.sha256(given).hexdigest()


class StrictRoute(APIRoute):
    """Route whose body is read as the rest of the project reads JSON: a key that is there twice is an error."""

    def get_route_handler(self) -> Callable[[HttpRequest], Coroutine[Any, Any, Response]]:
        """Return a handler whose request is strict."""
        handle, field = super().get_route_handler(), self.body_field
        takes_json = field is not None and not isinstance(field.field_info, params.Form)

        async def strict(http: HttpRequest) -> Response:
            request = _StrictRequest(http.scope, http.receive)
            if takes_json:
                _check_type(http.headers.get("content-type", ""))
            elif field is not None:
                _check_fields([key for key, _ in (await request.form()).multi_items()])
            return await handle(request)

        return strict


class _StrictRequest(HttpRequest):
    async def json(self) -> Any:
        body = await self.body()
        try:
            return parse_json(body.decode())
        except (ValueError, RecursionError) as error:
            raise ApiError(400, f"the body is not JSON ({error}); expected an object in UTF-8") from None


def _check_type(given: str) -> None:
    """Raise an ApiError unless a body is said to be JSON: pages of other sites may send the other types here."""
    kind = given.partition(";")[0].strip().lower()
    if not (kind == "application/json" or (kind.startswith("application/") and kind.endswith("+json"))):
        found = f"is {kind!r:.80}" if kind else "is missing"
        raise ApiError(
            415, f"the header Content-Type {found}; send Content-Type: application/json (curl -H 'Content-Type: "
            "application/json' -d ...)", code="unsupported_media_type",
        )  # fmt: skip


def _check_fields(keys: list[str]) -> None:
    """Raise an ApiError for a field of a form that is there twice and is no list."""
    for key, count in Counter(keys).items():
        if count > 1 and not key.endswith("[]"):
            raise ApiError(400, f"{key} is there {count} times in the form; give it once", param=key)


def _too_large(limit: int) -> ApiError:
    return ApiError(413, f"the body has more than {limit} bytes; send less, or smaller media", code="body_too_large")


def owner_of(http: HttpRequest) -> str:
    """Return whose request it is: a mark of its key, or "everybody"."""
    return http.state.owner


def client_of(http: HttpRequest) -> str:
    """Return whose turn a request takes: its key's, or its address's where there are no keys."""
    owner = owner_of(http)
    return owner if owner != "everybody" else getattr(http.client, "host", "")
