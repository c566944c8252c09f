"""An S3 server that obeys an IAM policy: a proxy before one that obeys everybody.

It decides as Amazon does: nothing is allowed that no statement allows; a listing is judged by its prefix; and a key
that is not there is answered 404 only to those who may list it, 403 to others.
"""

import http.client
import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

_ACTIONS = {"GET": "s3:GetObject", "HEAD": "s3:GetObject", "PUT": "s3:PutObject", "DELETE": "s3:DeleteObject"}
_DENIED = b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"


@dataclass(frozen=True)
class Request:
    """What a policy is asked about."""

    action: str
    resource: str
    context: Mapping[str, str] = field(default_factory=dict)


def allows(policy: Mapping[str, Any], request: Request) -> bool:
    """Whether an identity policy of Allow statements allows a request.

    Raises:
        ValueError: The policy has what is not understood here: then nothing could be said of it.
    """
    return any(_applies(statement, request) for statement in policy["Statement"])


def _applies(statement: Mapping[str, Any], request: Request) -> bool:
    if unknown := set(statement) - {"Sid", "Effect", "Action", "Resource", "Condition"}:
        raise ValueError(f"elements {unknown} of a statement are not understood here")
    if statement["Effect"] != "Allow":
        raise ValueError("only Allow is understood here")
    actions, resources = _list(statement["Action"]), _list(statement["Resource"])
    return (
        any(_matches(one.lower(), request.action.lower()) for one in actions)
        and any(_matches(one, request.resource) for one in resources)
        and all(_holds(*condition, request.context) for condition in statement.get("Condition", {}).items())
    )


def _holds(operator: str, wanted: Mapping[str, Any], context: Mapping[str, str]) -> bool:
    if operator != "StringLike":
        raise ValueError(f"the condition {operator} is not understood here")
    return all(
        key in context and any(_matches(value, context[key]) for value in _list(values))
        for key, values in wanted.items()
    )


def _matches(pattern: str, text: str) -> bool:
    parts = (".*" if c == "*" else "." if c == "?" else re.escape(c) for c in pattern)
    return re.fullmatch("".join(parts), text, re.DOTALL) is not None


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


@dataclass
class PolicyServer:
    """The proxy; see `policy_server`.

    Attributes:
        policy: Obeyed from now on; may be replaced.
        endpoint: Where it listens.
        allowed: Requests that were allowed.
        denied: And those that were not.
    """

    policy: Mapping[str, Any]
    endpoint: str = ""
    allowed: list[Request] = field(default_factory=list)
    denied: list[Request] = field(default_factory=list)

    def judge(self, request: Request) -> bool:
        good = allows(self.policy, request)
        (self.allowed if good else self.denied).append(request)
        return good


@contextmanager
def policy_server(upstream: str, policy: Mapping[str, Any]) -> Iterator[PolicyServer]:
    """A server that answers what the policy allows, from the one at `upstream`."""
    state = PolicyServer(policy)
    server = ThreadingHTTPServer(("127.0.0.1", 0), _make_handler(upstream, state))
    server.daemon_threads = True
    state.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def asked(method: str, path: str) -> Request:
    """What a request to S3, in path style, asks for."""
    url = urlsplit(path)
    bucket, _, key = unquote(url.path).lstrip("/").partition("/")
    if not key:
        if method not in ("GET", "HEAD"):
            raise ValueError(f"{method} {path} is no request that is known here")
        query = parse_qs(url.query, keep_blank_values=True)
        context = {"s3:prefix": query["prefix"][0]} if "prefix" in query else {}
        return Request("s3:ListBucket", f"arn:aws:s3:::{bucket}", context)
    return Request(_ACTIONS[method], f"arn:aws:s3:::{bucket}/{key}")


def _make_handler(upstream: str, state: PolicyServer) -> type[BaseHTTPRequestHandler]:
    host = urlsplit(upstream).netloc

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            request = asked(self.command, self.path)
            if not state.judge(request):
                self._send(403, _DENIED, {"Content-Type": "application/xml"})
                return
            connection = http.client.HTTPConnection(host, timeout=60)
            try:
                connection.request(self.command, self.path, body, dict(self.headers.items()))
                reply = connection.getresponse()
                data, headers = reply.read(), dict(reply.getheaders())
            finally:
                connection.close()
            if reply.status == 404 and request.action == "s3:GetObject":
                bucket, _, key = request.resource.partition("/")
                if not allows(state.policy, Request("s3:ListBucket", bucket, {"s3:prefix": key})):
                    self._send(403, _DENIED, {"Content-Type": "application/xml"})
                    return
            self._send(reply.status, data, headers)

        do_GET = do_HEAD = do_PUT = do_DELETE = _answer

        def _send(self, status: int, data: bytes, headers: Mapping[str, str]) -> None:
            self.send_response_only(status)
            kept = {name: value for name, value in headers.items() if name.lower() not in _OF_THE_HOP}
            length = headers.get("Content-Length", "0") if self.command == "HEAD" and status < 400 else str(len(data))
            for name, value in {**kept, "Content-Length": length}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        def log_message(self, format: str, *args: object) -> None:
            pass

    return Handler


_OF_THE_HOP = {"connection", "content-length", "transfer-encoding", "keep-alive"}


def without(policy: Mapping[str, Any], action: str) -> dict[str, Any]:
    """The same policy less one action."""
    changed = json.loads(json.dumps(policy))
    for statement in changed["Statement"]:
        statement["Action"] = [one for one in _list(statement["Action"]) if one != action]
    return changed
