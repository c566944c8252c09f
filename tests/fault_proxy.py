"""A small HTTP proxy before an S3 server: it counts what passes, and fails on request as networks and servers do.

It also turns rclone's answer to a ranged GET (200 with Content-Range and the right body) into the 206 that clients
expect.
"""

import http.client
import itertools
import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from operator import itemgetter
from typing import Literal
from urllib.parse import unquote, urlsplit

Fault = Literal[
    "500",  # InternalError, not passed on
    "503",  # SlowDown, not passed on
    "403",  # AccessDenied, not passed on
    "400",  # InvalidArgument, not passed on
    "501",  # NotImplemented, not passed on
    "reset",  # the connection is reset, not passed on
    "stall",  # nothing comes until the client gives up
    "stall_body",  # half of the reply, then nothing
    "truncate",  # half of the reply, then the end of the connection
    "wrong_bytes",  # one bit of the reply is flipped
    "lost_reply",  # passed on and done, then the connection is reset
]

_PIECE_NBYTES = 2**20
_ERRORS = {
    "500": (500, "InternalError", "We encountered an internal error. Please try again."),
    "503": (503, "SlowDown", "Please reduce your request rate."),
    "403": (403, "AccessDenied", "Access Denied"),
    "400": (400, "InvalidArgument", "Unsupported header"),
    "501": (501, "NotImplemented", "A header you provided implies functionality that is not implemented"),
}


@dataclass(kw_only=True)
class Rule:
    """Requests that fail.

    Attributes:
        fault: How.
        method: GET, PUT, HEAD, DELETE, POST, or LIST for a GET of the bucket; None is any.
        key: A regular expression, searched for in the key (in the listed prefix for LIST).
        times: How often; then the rule is used up. None is for ever.
        after: Matching requests that pass before.
        access_key: Only requests signed by this key; "" is unsigned ones; None is any.
        conditional: Only requests with an If-None-Match.
    """

    fault: Fault
    method: str | None = None
    key: str = ""
    times: int | None = 1
    after: int = 0
    access_key: str | None = None
    conditional: bool = False
    n_hit: int = 0


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One request that has passed, or was failed.

    `range` is the header's value, such as "bytes=0-99"; nbytes_in came from the client, nbytes_out went to it, both
    without headers; `fault` is that of the rule that applied.
    """

    method: str
    bucket: str
    key: str
    range: str | None
    status: int
    nbytes_in: int
    nbytes_out: int
    fault: str | None


@dataclass
class Access:
    """Who may do what, where the server behind cannot be told so.

    Attributes:
        readers: Access keys that may only read, each with the buckets that it may read.
        public: Buckets that may be read without a signature. Nothing else is answered without one.
        sign: Makes the headers of a signed request from method, URL and headers, for servers that want them all signed.
    """

    readers: dict[str, set[str]] = field(default_factory=dict)
    public: set[str] = field(default_factory=set)
    sign: Callable[[str, str, dict[str, str]], dict[str, str]] | None = None

    def refuses(self, method: str, bucket: str, access_key: str) -> bool:
        if access_key and access_key not in self.readers:
            return False
        allowed = self.readers[access_key] if access_key else self.public
        return method not in ("GET", "HEAD", "LIST") or bucket not in allowed


@dataclass
class FaultProxy:
    """The proxy; `with FaultProxy("http://127.0.0.1:5000") as proxy` runs it at `proxy.endpoint`."""

    upstream: str
    access: "Access" = field(default_factory=lambda: Access())
    rules: list[Rule] = field(default_factory=list)
    _log: list[tuple[int, Entry]] = field(default_factory=list, init=False)

    def __enter__(self) -> "FaultProxy":
        self._arrivals = itertools.count()
        self._lock = threading.Lock()
        self._idle = threading.Condition(self._lock)
        self._n_serving = self._n_stalled = 0
        self._closing = threading.Event()
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.proxy = self
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._closing.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def inject(self, fault: Fault, method: str | None = None, key: str = "", **options: object) -> Rule:
        """Make requests fail from now on; see `Rule`."""
        rule = Rule(fault=fault, method=method, key=key, **options)  # type: ignore[arg-type]
        with self._lock:
            self.rules.append(rule)
        return rule

    @contextmanager
    def injected(self, fault: Fault, method: str | None = None, key: str = "", **options: object) -> Iterator[Rule]:
        """As `inject`, for as long as this lasts."""
        rule = self.inject(fault, method, key, **options)
        try:
            yield rule
        finally:
            with self._lock:
                self.rules.remove(rule)

    def clear(self) -> None:
        """Forget the rules, and the log of all requests that have begun."""
        with self._idle:
            self._wait()
            self.rules.clear()
            self._log.clear()

    @property
    def log(self) -> list[Entry]:
        """All requests in the order in which they came; those that are being answered are waited for."""
        with self._idle:
            self._wait()
            return [entry for _, entry in sorted(self._log, key=itemgetter(0))]

    def entries(self, method: str | None = None, key: str = "") -> list[Entry]:
        """What the log has of these requests."""
        return [e for e in self.log if method in (None, e.method) and re.search(key, e.key)]

    def _applying(self, method: str, key: str, access_key: str, *, conditional: bool) -> Rule | None:
        with self._lock:
            for rule in self.rules:
                if (
                    rule.method in (None, method)
                    and re.search(rule.key, key)
                    and rule.access_key in (None, access_key)
                    and (conditional or not rule.conditional)
                    and (rule.times is None or rule.n_hit < rule.times + rule.after)
                ):
                    rule.n_hit += 1
                    if rule.n_hit > rule.after:
                        return rule
        return None

    def _wait(self) -> None:
        """For all requests to be in the log; a second for those without an answer, whose clients may wait long yet."""
        self._idle.wait_for(lambda: self._n_serving == self._n_stalled, timeout=60)
        self._idle.wait_for(lambda: not self._n_serving, timeout=1)

    @contextmanager
    def _stalling(self) -> Iterator[None]:
        with self._idle:
            self._n_stalled += 1
            self._idle.notify_all()
        try:
            yield
        finally:
            with self._lock:
                self._n_stalled -= 1

    @contextmanager
    def _serving(self) -> Iterator[None]:
        with self._lock:
            self._n_serving += 1
        try:
            yield
        finally:
            with self._idle:
                self._n_serving -= 1
                self._idle.notify_all()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 256
    proxy: FaultProxy

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that has gone away, or a server that ended: nothing to print."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def setup(self) -> None:
        super().setup()
        where = urlsplit(self.server.proxy.upstream)
        self._upstream = http.client.HTTPConnection(where.hostname or "", where.port, timeout=120)

    def finish(self) -> None:
        self._upstream.close()
        super().finish()

    def log_message(self, *arguments: object) -> None:
        pass

    def _serve(self) -> None:
        with self.server.proxy._serving():
            self._serve_one()

    do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = _serve

    def _serve_one(self) -> None:
        proxy = self.server.proxy
        arrival = next(proxy._arrivals)
        self._nbytes_out = 0
        path, _, query = self.path.partition("?")
        bucket, _, key = unquote(path.lstrip("/")).partition("/")
        method = self.command
        if method == "GET" and not key:
            method, key = "LIST", unquote((re.search(r"(?:^|&)prefix=([^&]*)", query) or ["", ""])[1])
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        signer = re.search(r"Credential=([^/]+)/", self.headers.get("Authorization", ""))
        self._access_key = signer[1] if signer else ""
        rule = proxy._applying(method, key, self._access_key, conditional="If-None-Match" in self.headers)
        fault = "403" if proxy.access.refuses(method, bucket, self._access_key) else rule.fault if rule else None
        status = 0
        try:
            status = self._answer(fault, body)
        finally:
            entry = Entry(
                method=method,
                bucket=bucket,
                key=key,
                range=self.headers.get("Range"),
                status=status,
                nbytes_in=len(body),
                nbytes_out=self._nbytes_out,
                fault=fault,
            )
            proxy._log.append((arrival, entry))

    def _answer(self, fault: str | None, body: bytes) -> int:
        if fault in _ERRORS:
            return self._fail(*_ERRORS[fault])
        if fault == "reset":
            return self._reset()
        if fault == "stall":
            return self._stall()
        reply = self._forward(body)
        if fault == "lost_reply":
            reply.read()
            return self._reset()
        return self._pass_on(reply, fault)

    def _forward(self, body: bytes) -> http.client.HTTPResponse:
        headers = {k: v for k, v in self.headers.items() if k.lower() not in ("connection", "expect", "keep-alive")}
        access = self.server.proxy.access
        if not self._access_key and access.sign:
            headers = access.sign(self.command, f"http://{self.headers['Host']}{self.path}", headers)
        for last in (False, True):
            try:
                self._upstream.request(self.command, self.path, body=body or None, headers=headers)
                return self._upstream.getresponse()
            except (http.client.RemoteDisconnected, ConnectionError):  # an idle connection that the server has closed
                self._upstream.close()
                if last:
                    raise
        raise AssertionError("unreachable")

    def _pass_on(self, reply: http.client.HTTPResponse, fault: str | None) -> int:
        status = 206 if reply.status == 200 and reply.headers.get("Content-Range") else reply.status
        nbytes = int(reply.headers.get("Content-Length") or 0)
        whole = reply.read() if "Content-Length" not in reply.headers and self.command != "HEAD" else None
        self.send_response_only(status)
        for name, value in reply.headers.items():
            if name.lower() not in ("connection", "transfer-encoding", "content-length", "keep-alive"):
                self.send_header(name, value)
        nbytes = len(whole) if whole is not None else nbytes
        if status not in (204, 304):
            self.send_header("Content-Length", str(nbytes))
        self.end_headers()
        if self.command == "HEAD":
            reply.read()
            return status
        allowed = nbytes // 2 if fault in ("truncate", "stall_body") else nbytes
        if whole is not None:
            self._send(whole[:allowed], fault, first=True)
        else:
            self._copy(reply, allowed, fault)
        if fault == "truncate":
            self._upstream.close()
            self.close_connection = True
        if fault == "stall_body":
            self._upstream.close()
            self._stall()
        return status

    def _copy(self, reply: http.client.HTTPResponse, nbytes: int, fault: str | None) -> None:
        buffer = memoryview(bytearray(min(_PIECE_NBYTES, max(nbytes, 1))))
        left, first = nbytes, True
        while left:
            n = reply.readinto(buffer[: min(left, len(buffer))])
            if not n:
                raise ConnectionError("the server's reply is short")
            self._send(buffer[:n], fault, first=first)
            left, first = left - n, False
        if not reply.isclosed() and nbytes == int(reply.headers.get("Content-Length") or 0):
            reply.read()

    def _send(self, data: bytes | memoryview, fault: str | None, *, first: bool) -> None:
        if fault == "wrong_bytes" and first and data:
            data = bytes([data[0] ^ 1]) + bytes(data[1:])
        self.wfile.write(data)
        self._nbytes_out += len(data)

    def _fail(self, status: int, code: str, message: str) -> int:
        text = f'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>{code}</Code><Message>{message}</Message></Error>'
        body = b"" if self.command == "HEAD" else text.encode()
        self.send_response_only(status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(body)
        self._nbytes_out += len(body)
        return status

    def _reset(self) -> int:
        # lingering for no time turns the close into a reset
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.wfile.flush()
        self.connection.close()
        return 0

    def _stall(self) -> int:
        self.close_connection = True
        self.connection.settimeout(0.05)
        with self.server.proxy._stalling():
            while not self.server.proxy._closing.is_set():
                try:
                    if not self.connection.recv(1):
                        break
                except TimeoutError:
                    time.sleep(0.02)
                except OSError:
                    break
        return 0
