"""Errors as HTTP answers them: OpenAI's shape, one line for people, and a code for programs."""

from __future__ import annotations

import math
from typing import Any

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from blip3o_rt.errors import Blip3oError
from blip3o_rt.serve.client import EXPIRED, Refused, RequestError

CLIENT_GONE = 499  # what servers log for a client that closed the connection

# kind of error -> status, type, code
KINDS: dict[str, tuple[int, str, str]] = {
    "PromptError": (400, "invalid_request_error", "invalid_prompt"),
    "ImageError": (400, "invalid_request_error", "invalid_image"),
    "ParameterError": (400, "invalid_request_error", "invalid_value"),
    "CheckpointError": (400, "invalid_request_error", "invalid_weights"),
    "InsufficientMemoryError": (503, "server_error", "insufficient_memory"),
    "QueueFull": (429, "rate_limit_error", "queue_full"),
    "ClientQueueFull": (429, "rate_limit_error", "client_queue_full"),
    "Unavailable": (503, "server_error", "engine_unavailable"),
    "EngineLost": (503, "server_error", "engine_lost"),
    "DeadlineExceeded": (504, "server_error", "deadline_exceeded"),
    "Cancelled": (CLIENT_GONE, "cancelled", "cancelled"),
    "StorageError": (503, "server_error", "storage_full"),
}
PARAMS = {"PromptError": "prompt", "ImageError": "image"}


class ApiError(HTTPException):
    """An error that is answered as it is.

    Args:
        status: The HTTP status.
        message: One line.
        type: OpenAI's kind of error.
        param: The field that is wrong.
        code: The error for programs.
        retry_after: Seconds after which trying again may do.
    """

    def __init__(
        self,
        status: int,
        message: str,
        type: str = "invalid_request_error",
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        headers = dict(headers or {})
        if retry_after is not None:
            headers["Retry-After"] = str(math.ceil(retry_after))
        super().__init__(status, message, headers)
        self.body: dict[str, Any] = {"message": message, "type": type, "param": param, "code": code}

    @property
    def response(self) -> JSONResponse:
        """The answer."""
        return JSONResponse({"error": self.body}, self.status_code, dict(self.headers or {}))


def api_error(error: Blip3oError) -> ApiError:
    """What an error of the engine or of a parameter is answered with."""
    kind = error.kind if isinstance(error, RequestError) else type(error).__name__
    status, type_, code = KINDS.get(kind, (500, "server_error", "generation_failed"))
    if isinstance(error, RequestError) and error.state == EXPIRED:
        status, type_, code = KINDS["DeadlineExceeded"]
    retry = error.retry_after if isinstance(error, Refused) else 5.0 if status == 503 else None
    param = getattr(error, "param", None) or PARAMS.get(kind)
    return ApiError(status, str(error), type_, param=param, code=code, retry_after=retry)
