"""What the S3 clients' exceptions mean: whether it may pass, and the cause in a few words."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from botocore.exceptions import BotoCoreError, ClientError
from botocore.parsers import ResponseParserError
from obstore.exceptions import BaseError

from infra.faults import Kind

_STATUS = re.compile(r"status code: (\d{3})")
_CODE = re.compile(r"<Code>\s*(\w+)\s*</Code>")
_MESSAGE = re.compile(r"<Message>\s*([^<]{1,300}?)\s*</Message>")
_PASSING_STATUS = (408, 409, 425, 429)
_FINAL_STATUS = (501, 505)  # what the server cannot do at all
_PASSING_CODES = ("RequestTimeout", "SlowDown", "Throttling", "ThrottlingException", "RequestLimitExceeded")
#: Signs of what went wrong below HTTP, in what a client prints of its inner errors; the first that is found is it.
_SIGNS = {
    "the server could not be found": ("dns error", "failed to lookup address", "Name or service not known"),
    "no connection to the server": ("Could not connect to the endpoint",),
    "connection refused": ("ConnectionRefused", "Connection refused"),
    "timed out": ("TimedOut", "timed out", "Read timeout", "Connect timeout", "deadline has elapsed"),
    "connection reset": ("ConnectionReset", "reset by peer"),
    "the reply was cut off": (
        "IncompleteMessage",
        "UnexpectedEof",
        "end of file before",
        "IncompleteRead",
        "error decoding",
    ),
    "the reply is no listing": ("ResponseParserError", "Unable to parse response"),
    "the server's certificate is not accepted": ("certificate", "CERTIFICATE_VERIFY_FAILED"),
}
_KINDS: Mapping[str, Kind] = {
    "the server could not be found": "unreachable",
    "no connection to the server": "unreachable",
    "connection refused": "refused",
    "timed out": "timeout",
    "connection reset": "reset",
    "the reply was cut off": "cut_off",
}
_THROTTLES = (429, 503)  # S3 says SlowDown by 503
_FINAL_SIGNS = ("the server's certificate is not accepted",)


@dataclass(frozen=True, kw_only=True)
class Failure:
    """One failed request: HTTP status (0 where none came), S3's code, the cause in words, and whether it may pass."""

    status: int
    code: str
    cause: str
    passes: bool

    @property
    def kind(self) -> Kind:
        """The cause in one word of a short list, to be counted by."""
        if not self.status:
            return _KINDS.get(self.cause, "other")
        if self.status in (401, 403):
            return "denied"
        if self.status in _THROTTLES or (self.code in _PASSING_CODES and self.code != "RequestTimeout"):
            return "throttled"
        return "timeout" if self.status == 408 or self.code == "RequestTimeout" else "server"


def failure_of(error: Exception) -> Failure | None:
    """What an exception of obstore or botocore means; None for any other exception."""
    if isinstance(error, ClientError):
        reply = error.response
        status = reply.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        return _answered(status, reply.get("Error", {}).get("Code", ""), reply.get("Error", {}).get("Message", ""))
    if isinstance(error, BotoCoreError | ResponseParserError):
        return _unanswered(f"{type(error).__name__}: {error}")
    if not isinstance(error, BaseError | FileNotFoundError):
        return None
    text = str(error)
    if found := _STATUS.search(text):
        code, message = _CODE.search(text), _MESSAGE.search(text)
        return _answered(int(found[1]), code[1] if code else "", message[1] if message else "")
    return _unanswered(text)


def status_of(error: Exception) -> int:
    """The HTTP status that an exception tells of; 0 for none."""
    failure = failure_of(error)
    return failure.status if failure else 0


def _answered(status: int, code: str, message: str) -> Failure:
    words = " ".join(part for part in (f"HTTP {status}", code if not code.isdigit() else "") if part)
    return Failure(
        status=status,
        code=code,
        cause=f"{words} ({message})" if message and message != code else words,
        passes=(status >= 500 and status not in _FINAL_STATUS) or status in _PASSING_STATUS or code in _PASSING_CODES,
    )


def _unanswered(text: str) -> Failure:
    for cause, signs in _SIGNS.items():
        if any(sign in text for sign in signs):
            return Failure(status=0, code="", cause=cause, passes=cause not in _FINAL_SIGNS)
    return Failure(status=0, code="", cause=text.partition("\n")[0], passes=True)
