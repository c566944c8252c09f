"""Servers whose replies are no whole pages, as those of a process that is just ending."""

import socketserver
import threading
from collections.abc import Iterator
from contextlib import contextmanager

BROKEN = {
    "breaks off": b"HTTP/1.0 200 OK\r\nContent-Length: 1000\r\n\r\nray_a 1\n",
    "no status": b"good morning\r\n\r\n",
    "closes at once": b"",
    "no numbers": b'HTTP/1.0 200 OK\r\n\r\nray_a{b="c"} many\n',
    "no text": b"HTTP/1.0 200 OK\r\n\r\n\xff\xfe\n",
}


@contextmanager
def serving_page(reply: bytes) -> Iterator[int]:
    """Answer everything with these bytes; gives the port on loopback."""

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            while self.rfile.readline().strip():
                pass
            self.wfile.write(reply)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1]
        server.shutdown()
