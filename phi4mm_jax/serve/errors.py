"""Errors in the form of OpenAI's API."""

import re
from typing import Any

from starlette.exceptions import HTTPException
from starlette.responses import Response

from phi4mm_jax.engine import Completion
from phi4mm_jax.errors import ContextLengthError, InputError, MediaError
from phi4mm_jax.utils.strict_json import strict_json

_CODES = {ContextLengthError.__name__: "context_length_exceeded", MediaError.__name__: "invalid_media"}
_INPUT = {InputError.__name__, *_CODES}
_NAMES = {"max_new_tokens": "max_tokens", "stop_tokens": "stop_token_ids"}  # ours, and the API's
# As JSON, which a model would not be where an answer without fault is of another type.
_ERROR_BODY = {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorBody"}}}
ERRORS: dict[int | str, dict[str, Any]] = {  # by status, as the OpenAPI document has them
    status: {"content": _ERROR_BODY, "description": what}
    for status, what in {
        400: "A key of the request is not supported, out of range or beyond a limit",
        401: "No key, or an unknown one", 403: "Asked by another name than this host's", 404: "No such model or object",
        408: "The body did not come in time", 413: "The body is too large",
        415: "Content-Type is not application/json", 429: "Too many requests wait",
        500: "The answer failed", 503: "The model is not ready", 504: "Not answered in time",
    }.items()
}  # fmt: skip
_PARAM = re.compile(r"(?:body\.)?([A-Za-z_]\w*(?:\[\d+\]|\.\w+)*)(?: is |: | has )")


class ApiError(HTTPException):
    """Error that a client gets.

    Args:
        status: of HTTP.
        message: the input, the cause and the remedy.
        kind: the "type" of OpenAI's errors.
        param: the key of the request that is at fault.
        code: a name for programs.
        retry_after: seconds after which the request may be sent again.
    """

    def __init__(
        self, status: int, message: str, *, kind: str = "invalid_request_error", param: str | None = None,
        code: str | None = None, retry_after: int | None = None,
    ):  # fmt: skip
        headers = {} if retry_after is None else {"Retry-After": str(retry_after)}
        headers |= {"WWW-Authenticate": "Bearer"} if status == 401 else {}
        super().__init__(status, message, headers)
        self.kind, self.param, self.code = kind, param, code

    @property
    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.detail, "type": self.kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        return Response(strict_json(self.body), self.status_code, self.headers, "application/json")


def bad_input(error: InputError) -> ApiError:
    """Return the error of input that cannot be used."""
    return _bad_input(str(error), type(error).__name__)


def _bad_input(message: str, kind: str) -> ApiError:
    found = _PARAM.match(message)
    param = found[1] if found else None
    return ApiError(400, message, param=_NAMES.get(param or "", param), code=_CODES.get(kind))


def server_failed() -> ApiError:
    """Return the error in place of an unexpected one, which the log has."""
    return ApiError(500, "the server failed; its log has the cause", kind="server_error")


def failed(completion: Completion) -> ApiError:
    """Return the error of an answer that ended with one."""
    message = completion.error or ""
    if completion.error_type in _INPUT:
        return _bad_input(message, completion.error_type or "")
    if completion.error_type == "EngineStopped":
        return ApiError(503, message, kind="server_error", code="engine_stopped", retry_after=5)
    return ApiError(500, message, kind="server_error", code="generation_failed")
