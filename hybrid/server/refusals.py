"""What a client is told when it gets no answer: the errors of OpenAI's API."""

from __future__ import annotations

from typing import Any

from fastapi.responses import JSONResponse

from hybrid.errors import RequestError

KINDS = {401: "authentication_error", 403: "permission_error", 500: "server_error", 503: "overloaded_error"}
INTERNAL = "the server failed on this request; its log has more, by the request id"
RETRY_SECONDS = 1


class Refusal(Exception):
    """An answer that is an error. Its message is for the client, so it never holds the text of another exception that
    was not written for people.
    """

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
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

    def response(self) -> JSONResponse:
        headers = {"retry-after": str(RETRY_SECONDS)} if self.status == 503 else {}
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        return JSONResponse(self.body, self.status, headers)


def internal() -> Refusal:
    return Refusal(500, INTERNAL, code="internal_error")
