"""What is wrong with a request in; a status and OpenAI's shape of an error out."""

from __future__ import annotations

from typing import Any

from fromzero.errors import UserError

_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class Refused(UserError):
    """A request that is not answered.  param: the field of the body at fault; name: OpenAI's code for it"""

    def __init__(self, status: int, what: str, *, why: str = "", mend: str = "", param: str = "", name: str = "") -> None:
        super().__init__(what, why=why, mend=mend, key=param)
        self.status, self.name = status, name


def said_of(param: str, error: UserError) -> Refused:
    """What was found deeper inside, of the field that it came from"""
    first = error.faults[0]
    return Refused(400, first.what, why=first.why, mend=first.mend, param=param)


def status_of(error: Exception) -> int:
    return error.status if isinstance(error, Refused) else 400 if isinstance(error, UserError) else 500


def as_json(error: Exception) -> dict[str, Any]:
    """Of our own mistakes nothing is told but that there was one."""
    status = status_of(error)
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    message, param, name = "the server made a mistake; its log says which", "", ""
    if isinstance(error, UserError):
        message, param = "\n".join(str(fault) for fault in error.faults), error.faults[0].key
        name = error.name if isinstance(error, Refused) else ""
    return {"error": {"message": message, "type": kind, "param": param or None, "code": name or None}}
