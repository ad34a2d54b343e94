"""What a client is told when it gets no answer: errors as the API has them that was asked."""

from __future__ import annotations

from typing import Any

from fastapi.responses import JSONResponse

from hybrid.errors import RequestError

ANTHROPIC, OLLAMA = "/v1/messages", "/api/"  # how paths begin whose errors have another shape
RESPONSES = "/v1/responses"  # whose errors have it in streams alone
INPUT_TOKENS = f"{RESPONSES}/input_tokens"
_ANTHROPIC_KINDS = {404: "not_found_error", 413: "request_too_large", 500: "api_error"}
KINDS = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "overloaded_error",
}
INTERNAL = "the server failed on this request; its log has more, by the request id"
RETRY_SECONDS = 1


class Refusal(Exception):
    """An answer that is an error. Its message is for the client, so it never holds the text of another exception that
    was not written for people.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        retry: int = RETRY_SECONDS,
    ) -> None:
        """retry: seconds after which the client may try again, told with 429 and 503."""
        super().__init__(message)
        self.retry = retry
        self.status, self.message, self.param, self.code = status, message, param, code

    @classmethod
    def of(cls, error: RequestError) -> Refusal:
        """What the library refuses; its messages are written for people."""
        text = " ".join(str(error).split())[:500]
        long = "a sequence may have" in text
        return cls(400, text, code="context_length_exceeded" if long else None)

    @property
    def body(self) -> dict[str, Any]:
        kind = KINDS.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def body_for(self, path: str) -> dict[str, Any]:
        """As the API wants it that the path is of."""
        if path.startswith(OLLAMA):
            return {"error": self.message}
        if not path.startswith(ANTHROPIC):
            return self.body
        kind = _ANTHROPIC_KINDS.get(self.status) or KINDS.get(self.status, "invalid_request_error")
        details = {} if self.code is None else {"details": {"error_code": self.code}}
        return {"type": "error", "error": {"type": kind, "message": self.message, **details}}

    def response(self, path: str = "") -> JSONResponse:
        headers = {"retry-after": str(self.retry)} if self.status in (429, 503) else {}
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        return JSONResponse(self.body_for(path), self.status, headers)


def internal() -> Refusal:
    return Refusal(500, INTERNAL, code="internal_error")
