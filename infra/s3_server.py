"""A local S3 server for a person to try things on: moto's, in this process's memory.

rclone would keep what it is given, in a folder, but answers a ranged GET with status 200, which obstore refuses.
"""

import errno
import logging
import secrets
import signal
import socket
import threading

from botocore.session import Session

from infra.console import UserError
from infra.s3_settings import DEFAULT_REGION, S3Settings

BUCKET = "demo"
_HOST = "127.0.0.1"


def serve(port: int = 9000) -> None:
    """Start an S3 server on this machine, for trying things. What it holds is gone when it stops.

    It has a bucket, and prints what to export and what to type next.

    Args:
        port: Of loopback, where it listens; 0 is any that is free.

    Raises:
        UserError: The port is taken.
    """
    _check_free(port)
    from moto.server import ThreadedMotoServer  # imported late: seconds

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # no line for each request
    stopped = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):  # a shell may have switched off Ctrl-C for what it starts with &
        signal.signal(number, lambda *_: stopped.set())
    server = ThreadedMotoServer(_HOST, port, verbose=False)
    server.start()
    try:
        endpoint = f"http://{_HOST}:{server.get_host_and_port()[1]}"
        environment = {
            "AWS_ENDPOINT_URL": endpoint,
            "AWS_REGION": DEFAULT_REGION,
            "AWS_ACCESS_KEY_ID": "demo",
            "AWS_SECRET_ACCESS_KEY": secrets.token_hex(8),
        }
        _make_bucket(environment)
        print(what_to_type(environment), flush=True)
        stopped.wait()
        print("stopped; what was in the server is gone", flush=True)
    finally:
        server.stop()


def what_to_type(environment: dict[str, str]) -> str:
    """The lines for the person's other terminal."""
    return "\n".join(
        [
            f"An S3 server runs at {environment['AWS_ENDPOINT_URL']}, with a bucket {BUCKET}, until Ctrl-C.",
            "It keeps everything in memory: use it to try things, and nothing that you want to keep.",
            "In another terminal:",
            "",
            *(f"  export {name}={value}" for name, value in environment.items()),
            f"  make extract STORE=s3://{BUCKET}/digits",
            "",
        ]
    )


def _check_free(port: int) -> None:
    with socket.socket() as tried:
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            tried.bind((_HOST, port))
        except (OSError, OverflowError) as error:
            taken = isinstance(error, OSError) and error.errno == errno.EADDRINUSE
            reason = "somebody listens there already" if taken else str(error)
            raise UserError(f"port {port} cannot be used: {reason}; give another, such as --port 9001") from error


def _make_bucket(environment: dict[str, str]) -> None:
    session = Session()
    session.set_credentials(environment["AWS_ACCESS_KEY_ID"], environment["AWS_SECRET_ACCESS_KEY"])
    settings = S3Settings(
        session=session, endpoint=environment["AWS_ENDPOINT_URL"], region=DEFAULT_REGION, anonymous=False
    )
    settings.make_client(timeout_s=30).create_bucket(Bucket=BUCKET)
