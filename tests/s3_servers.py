"""Two unrelated S3 servers on loopback, each a process of its own: moto's, and `rclone serve s3`.

Both are reached through a `FaultProxy`, which counts requests and mends rclone's replies to ranged GETs.
"""

import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials
from botocore.session import Session

from infra.s3_settings import S3Settings
from tests.fault_proxy import Access, Entry, FaultProxy

ACCESS_KEY, SECRET_KEY = "raptor-test", "raptor-test-secret"
READER_KEY, READER_SECRET = "raptor-reader", "raptor-reader-secret"
REGION = "eu-central-1"
_START_S = 240


@dataclass(frozen=True)
class S3Server:
    """A running server.

    Attributes:
        name: moto or rclone.
        direct: The server's own URL; its `endpoint` goes through the proxy.
        proxy: Before it, for the whole session: tests that inject faults use one of their own, as `faulty` gives.
    """

    name: str
    direct: str
    proxy: FaultProxy = field(repr=False)

    @property
    def endpoint(self) -> str:
        return self.proxy.endpoint

    @property
    def environment(self) -> dict[str, str]:
        """AWS_ variables that send any client here."""
        return environment_of(self.endpoint)

    @property
    def log(self) -> list[Entry]:
        """The requests so far."""
        return self.proxy.entries()

    def make_bucket(self, name: str | None = None) -> str:
        """Make an empty bucket and return its name, a new one where none is given."""
        name = name or f"bucket-{secrets.token_hex(6)}"
        client = settings_of(self.direct).make_client(timeout_s=30)
        client.create_bucket(Bucket=name, CreateBucketConfiguration={"LocationConstraint": REGION})
        return name

    @contextmanager
    def faulty(self) -> Iterator[FaultProxy]:
        """A proxy of the caller's own before the server, for injecting faults that nobody else meets."""
        with FaultProxy(self.direct, self.proxy.access) as proxy:
            yield proxy


def read_only_environment(server: S3Server, bucket: str) -> dict[str, str]:
    """AWS_ variables of an account that may read this bucket and write nowhere."""
    server.proxy.access.readers.setdefault(READER_KEY, set()).add(bucket)
    return environment_of(server.endpoint, READER_KEY, READER_SECRET)


def anonymous_environment(server: S3Server, bucket: str) -> dict[str, str]:
    """AWS_ variables of somebody without credentials; the bucket is made public, for reading."""
    server.proxy.access.public.add(bucket)
    environment = environment_of(server.endpoint)
    del environment["AWS_ACCESS_KEY_ID"], environment["AWS_SECRET_ACCESS_KEY"]
    return environment


def _sign(method: str, url: str, headers: dict[str, str]) -> dict[str, str]:
    """The servers want every request signed; those to a public bucket are signed when the proxy has allowed them."""
    request = AWSRequest(method=method, url=url, headers=headers)
    request.context["payload_signing_enabled"] = False
    S3SigV4Auth(Credentials(ACCESS_KEY, SECRET_KEY), "s3", REGION).add_auth(request)
    return dict(request.headers.items())


def environment_of(endpoint: str, access_key: str = ACCESS_KEY, secret_key: str = SECRET_KEY) -> dict[str, str]:
    """AWS_ variables for an endpoint, with no configuration file or machine role in the way."""
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_REGION": REGION,
        "AWS_DEFAULT_REGION": REGION,
        "AWS_ACCESS_KEY_ID": access_key,
        "AWS_SECRET_ACCESS_KEY": secret_key,
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
        "AWS_RESPONSE_CHECKSUM_VALIDATION": "when_required",
    }


@cache
def settings_of(endpoint: str, access_key: str = ACCESS_KEY, secret_key: str = SECRET_KEY) -> S3Settings:
    """The same as settings, for objects made in this process without touching its environment; once, for it is slow."""
    session = Session()
    session.set_credentials(access_key, secret_key)
    return S3Settings(session=session, endpoint=endpoint, region=REGION, anonymous=not access_key)


@contextmanager
def moto_server() -> Iterator[S3Server]:
    """moto's server, in memory."""
    with ExitStack() as stack:
        port = free_port()
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
        direct = stack.enter_context(_running("moto", lambda folder: command, port))
        yield S3Server("moto", direct, stack.enter_context(FaultProxy(direct, Access(sign=_sign))))


@contextmanager
def rclone_server() -> Iterator[S3Server]:
    """rclone, which serves a folder."""
    with ExitStack() as stack:
        port = free_port()
        keys = ["--auth-key", f"{ACCESS_KEY},{SECRET_KEY}", "--auth-key", f"{READER_KEY},{READER_SECRET}"]

        def command(folder: Path) -> list[str]:
            (folder / "served").mkdir()
            options = ["--vfs-cache-mode", "off", "--config", str(folder / "rclone.conf")]
            program = str(Path(sys.executable).with_name("rclone"))
            return [program, "serve", "s3", "--addr", f"127.0.0.1:{port}", *keys, *options, str(folder / "served")]

        direct = stack.enter_context(_running("rclone", command, port))
        yield S3Server("rclone", direct, stack.enter_context(FaultProxy(direct, Access(sign=_sign))))


SERVERS = {"moto": moto_server, "rclone": rclone_server}
_started: dict[str, S3Server] = {}
_until_the_end = ExitStack()


def shared_server(name: str) -> S3Server:
    """One server of this kind for the whole session, started when first asked for."""
    if name not in _started:
        _started[name] = _until_the_end.enter_context(SERVERS[name]())
    return _started[name]


def stop_shared_servers() -> None:
    """At the end of the session."""
    _started.clear()
    _until_the_end.close()


def free_port() -> int:
    """A port of loopback that nobody listens on now, and that no connection is given before it is listened on."""
    given = Path("/proc/sys/net/ipv4/ip_local_port_range")
    first_given = int(given.read_text().split()[0]) if given.exists() else 32768
    while True:
        port = 10_000 + secrets.randbelow(max(first_given, 12_000) - 10_000)
        with socket.socket() as found, suppress(OSError):
            found.bind(("127.0.0.1", port))
            return port


@contextmanager
def _running(name: str, command: Callable[[Path], list[str]], port: int) -> Iterator[str]:
    """A server's process, up; its URL. It is stopped at the end, whatever happens."""
    with tempfile.TemporaryDirectory(prefix=f"{name}-") as folder:
        said = Path(folder, "said.log")
        with open(said, "wb") as out:
            process = subprocess.Popen(command(Path(folder)), stdout=out, stderr=subprocess.STDOUT, cwd=folder)
        try:
            _wait(name, process, port, said)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait(name: str, process: subprocess.Popen[bytes], port: int, said: Path) -> None:
    end = time.monotonic() + _START_S
    while time.monotonic() < end:
        if process.poll() is not None:
            raise RuntimeError(f"{name} ended with {process.returncode}: {said.read_text()[-2000:]}")
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            time.sleep(0.05)
    raise RuntimeError(f"{name} did not listen within {_START_S} s: {said.read_text()[-2000:]}")
