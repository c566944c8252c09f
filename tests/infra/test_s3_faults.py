"""Every fault of a server or network, on every verb: it passes, or stops with the object named within its deadline."""

import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import pytest
from crc32c import crc32c

from infra.objects import ObjectAccessError, ObjectTooLargeError
from infra.retry import Patience
from infra.s3 import S3Objects
from tests.clocks import SkippingClock
from tests.fault_proxy import FaultProxy
from tests.s3_servers import S3Server, settings_of

pytestmark = pytest.mark.s3

DATA = np.random.default_rng(0).integers(0, 256, 300_000, dtype=np.uint8).tobytes()
STALL_S = 0.3  # where nothing comes for ever; elsewhere it is long, so that a busy machine's pauses are no faults
CAUSES = {
    "500": r"HTTP 500 InternalError",
    "503": r"HTTP 503 SlowDown",
    "reset": r"connection reset|cut off|error sending request|ConnectionClosedError",
    "stall": r"timed out",
    "stall_body": r"timed out|cut off",
    "truncate": r"the reply was cut off|connection reset|HTTP 500",  # the last is what botocore makes of half a listing
}
METHODS = {
    "get": "GET",
    "range": "GET",
    "rows": "GET",
    "put": "PUT",
    "put_new": "PUT",
    "list": "LIST",
    "delete": "DELETE",
}


def read_range(objects: S3Objects, key: str) -> bytes:
    part = bytearray(200_000)
    objects.read_into(key, 50_000, memoryview(part))
    return bytes(part)


def read_rows(objects: S3Objects, key: str) -> bytes:
    out = np.zeros((4, 50_000), np.uint8)
    assert objects.read_rows(key, 50_000, out, np.array([3, 2, 1, 0])) == crc32c(DATA[50_000:250_000])
    return out[::-1].tobytes()


#: What each verb does, and what it must give.
VERBS: dict[str, tuple[Callable[[S3Objects], object], object]] = {
    "get": (lambda objects: objects.get("there/k"), DATA),
    "range": (lambda objects: read_range(objects, "there/k"), DATA[50_000:250_000]),
    "rows": (lambda objects: read_rows(objects, "there/k"), DATA[50_000:250_000]),
    "put": (lambda objects: objects.put("put/k", DATA), None),
    "put_new": (lambda objects: objects.put_new("new/k", DATA), True),
    "list": (lambda objects: [(info.key, info.nbytes) for info in objects.list("there/")], [("there/k", len(DATA))]),
    "delete": (lambda objects: objects.delete("gone/k"), None),
}


Faulty = tuple[S3Server, FaultProxy, S3Objects]


@contextmanager
def behind_a_proxy(server: S3Server) -> Iterator[Faulty]:
    """A server behind a proxy that nobody else uses, and objects there."""
    with server.faulty() as proxy:
        patience = Patience(first_wait_s=0.02, longest_wait_s=0.1)
        location = f"s3://{server.make_bucket()}/p"
        objects = S3Objects(location, settings=settings_of(proxy.endpoint), patience=patience)
        objects.put("there/k", DATA)
        objects.put_new("first/k", b"so that conditional writes have been tried out")
        yield server, proxy, objects


@pytest.fixture(scope="module")
def on_moto(moto: S3Server) -> Iterator[Faulty]:
    with behind_a_proxy(moto) as made:
        yield made


@pytest.fixture(scope="module")
def on_rclone(rclone: S3Server) -> Iterator[Faulty]:
    with behind_a_proxy(rclone) as made:
        yield made


@pytest.fixture
def conditional(on_moto: Faulty) -> Faulty:
    """Where conditional writes are honoured."""
    return cleaned(on_moto)


@pytest.fixture
def one(on_rclone: Faulty) -> Faulty:
    """Where it does not depend on the server."""
    return cleaned(on_rclone)


@pytest.fixture(params=["moto", "rclone"])
def faulty(request: pytest.FixtureRequest) -> Faulty:
    return cleaned(request.getfixturevalue(f"on_{request.param}"))


def cleaned(made: Faulty) -> Faulty:
    _, proxy, objects = made
    proxy.clear()
    for key in ("put/k", "new/k"):
        objects.delete(key)
    objects.put("gone/k", b"x")
    proxy.clear()
    return made


def faults_of(verb: str) -> list[str]:
    """Those that a request of this verb can meet: only replies with a body are cut or stop half way."""
    return [fault for fault in CAUSES if METHODS[verb] in ("GET", "LIST") or fault not in ("truncate", "stall_body")]


CASES = [(verb, fault) for verb in VERBS for fault in faults_of(verb)]


#: Those that end in the proxy, or in a time-out.
OF_NO_SERVER = ("500", "stall", "stall_body")


@pytest.mark.parametrize(("verb", "fault"), [(verb, fault) for verb, fault in CASES if fault not in OF_NO_SERVER])
def test_a_fault_that_passes_is_told_and_forgotten(faulty: Faulty, capfd, verb: str, fault: str):
    check_passes(faulty, capfd, verb, fault)


@pytest.mark.parametrize(("verb", "fault"), [(verb, fault) for verb, fault in CASES if fault in OF_NO_SERVER])
def test_a_fault_of_no_server_too(one: Faulty, capfd, verb: str, fault: str):
    check_passes(one, capfd, verb, fault)


def check_passes(faulty: Faulty, capfd: pytest.CaptureFixture[str], verb: str, fault: str) -> None:
    server, proxy, objects = faulty
    if fault.startswith("stall"):
        patience = Patience(deadline_s=59, first_wait_s=0.02, longest_wait_s=0.1)
        settings = settings_of(proxy.endpoint)
        objects = S3Objects(objects.location, settings=settings, patience=patience, stall_s=STALL_S)
        objects.put_new("first/k", b"conditional writes have been tried out")
        proxy.clear()
    rule = proxy.inject(fault, METHODS[verb], times=1)
    call, expected = VERBS[verb]
    assert call(objects) == expected
    assert rule.n_hit >= 1
    said = capfd.readouterr().err
    assert re.search(rf"s3://.*/p/.*: ({CAUSES[fault]}).*; again in .* s, for .* more", said), said
    check_state(server, objects, verb)


def check_state(server: S3Server, objects: S3Objects, verb: str) -> None:
    direct = S3Objects(objects.location, settings=settings_of(server.direct))
    assert direct.get("there/k") == DATA
    keys = {info.key for info in direct.list()}
    for written, key in (("put", "put/k"), ("put_new", "new/k")):
        assert (key in keys) == (verb == written)
        assert verb != written or direct.get(key) == DATA
    assert ("gone/k" in keys) == (verb != "delete")


@pytest.mark.parametrize(("verb", "fault"), [(v, f) for v, f in CASES if f in ("503", "stall", "truncate")])
def test_a_fault_that_stays_ends_within_the_deadline_with_the_object_named(
    one, monkeypatch: pytest.MonkeyPatch, verb: str, fault: str
):
    _, proxy, objects = one
    clock = SkippingClock()
    monkeypatch.setattr("infra.retry.time", clock)
    patience = Patience(deadline_s=100.0, first_wait_s=2.0, longest_wait_s=40.0)
    stall_s = STALL_S if fault == "stall" else 20.0
    settings = settings_of(proxy.endpoint)
    objects = S3Objects(objects.location, settings=settings, patience=patience, stall_s=stall_s)
    objects.put_new("first/k", b"conditional writes have been tried out")
    with proxy.injected(fault, METHODS[verb], times=None), pytest.raises(ObjectAccessError) as caught:
        VERBS[verb][0](objects)
    assert 20 < clock.skipped_s <= 100
    key = {"put": "put/k", "put_new": "new/k", "delete": "gone/k", "list": "there/"}.get(verb, "there/k")
    assert caught.value.key == key
    assert re.search(
        rf"{objects.location}/{key} could not be .*: ({CAUSES[fault]}).*; tried \d+ times in .* s", str(caught.value)
    )


def test_writes_that_are_refused_are_not_tried_again(faulty):
    _, proxy, objects = faulty
    for verb, method in (("put", "PUT"), ("put_new", "PUT"), ("delete", "DELETE")):
        with proxy.injected("403", method, times=None) as rule:
            with pytest.raises(ObjectAccessError, match=r"could not be .*: HTTP 403 AccessDenied \(Access Denied\)"):
                VERBS[verb][0](objects)
            assert rule.n_hit == 1


def test_wrong_bytes_change_the_checksum(faulty):
    """They cannot be told from right ones here: the caller compares with the commit."""
    _, proxy, objects = faulty
    out = np.zeros((2, 1000), np.uint8)
    with proxy.injected("wrong_bytes", "GET"):
        assert objects.read_rows("there/k", 0, out, np.array([0, 1])) != crc32c(DATA[:2000])
    assert objects.read_rows("there/k", 0, out, np.array([0, 1])) == crc32c(DATA[:2000])


def test_a_lost_reply_to_a_write_is_no_failure(faulty):
    server, proxy, objects = faulty
    for verb in ("put", "put_new", "delete"):
        with proxy.injected("lost_reply", METHODS[verb]):
            assert VERBS[verb][0](objects) == VERBS[verb][1], verb
    faults = [(e.method, e.fault) for e in proxy.entries() if e.method in ("PUT", "DELETE")]
    assert faults == 2 * [("PUT", "lost_reply"), ("PUT", None)] + [("DELETE", "lost_reply"), ("DELETE", None)]
    direct = S3Objects(objects.location, settings=settings_of(server.direct))
    assert direct.get("put/k") == direct.get("new/k") == DATA


def test_a_lost_reply_does_not_make_the_object_of_another_ours(conditional):
    """The first try meets another's object and its reply is lost: what is there is not ours, so it was not written."""
    _, proxy, objects = conditional
    objects.put("new/k", b"of another")
    with proxy.injected("reset", "PUT"):
        assert objects.put_new("new/k", DATA) is False
    assert objects.get("new/k") == b"of another"


def test_put_new_is_conditional_where_that_works(faulty, moto):
    server, proxy, objects = faulty
    assert objects.put_new("new/k", b"first") is True
    assert objects.put_new("new/k", b"second") is False
    n_looks = len(proxy.entries("HEAD", "new/k"))
    assert n_looks == (0 if server is moto else 2)
    assert objects.get("new/k") == b"first"


@pytest.mark.parametrize("fault", ["400", "501"])
def test_a_server_that_refuses_conditions_is_looked_at_first(conditional, fault: str):
    _, proxy, objects = conditional
    fresh = S3Objects(objects.location, settings=settings_of(proxy.endpoint))
    with proxy.injected(fault, "PUT", times=None, conditional=True) as rule:
        assert fresh.put_new("new/k", b"first") is True
        assert fresh.put_new("new/k", b"second") is False
    assert rule.n_hit == 1  # tried out once, and not again
    assert fresh.get("new/k") == b"first"
    assert not list(fresh.list("log/"))


def test_a_refusal_that_is_not_of_the_condition_is_raised(conditional):
    _, proxy, objects = conditional
    fresh = S3Objects(objects.location, settings=settings_of(proxy.endpoint))
    with proxy.injected("403", "PUT", times=1, conditional=True), pytest.raises(ObjectAccessError, match="HTTP 403"):
        fresh.put_new("new/k", b"x")
    assert fresh.put_new("new/k", b"x") is True  # nothing was concluded from it
    assert not proxy.entries("HEAD", "new/k")


def test_what_a_server_cannot_do_is_not_asked_again(faulty):
    _, proxy, objects = faulty
    with proxy.injected("501", "PUT", times=None) as rule:
        with pytest.raises(ObjectAccessError, match="HTTP 501 NotImplemented"):
            objects.put("put/k", DATA)
        assert rule.n_hit == 1


def test_only_the_bytes_asked_for_are_fetched_and_all_is_counted(faulty):
    _, proxy, objects = faulty
    objects.requests.clear()
    objects.put("put/k", [DATA, b"and more"])
    read_range(objects, "put/k")
    objects.get("put/k", at_most=10**6)
    list(objects.list())
    objects.delete("put/k")
    log = proxy.entries()
    assert [(e.method, e.range) for e in log if "put/k" in e.key] == [
        ("PUT", None),
        ("GET", "bytes=50000-249999"),
        ("GET", None),
        ("DELETE", None),
    ]
    assert dict(objects.requests) == {
        "put": 1,
        "get": 2,
        "list": 1,
        "delete": 1,
        "bytes_out": len(DATA) + 8,
        "bytes_in": 200_000 + len(DATA) + 8,
    }
    gets = [e for e in log if e.method == "GET"]
    assert [e.nbytes_out for e in gets] == [200_000, len(DATA) + 8]
    assert [e.nbytes_in for e in log if e.method == "PUT"] == [len(DATA) + 8]


def test_an_object_too_large_is_not_fetched(faulty):
    _, proxy, objects = faulty
    objects.put("put/k", [bytes(1_000_000)] * 30)
    with pytest.raises(ObjectTooLargeError, match="has 30,000,000 bytes; at most 10 are read"):
        objects.get("put/k", at_most=10)
    assert proxy.entries("GET", "put/k")[0].nbytes_out < 20_000_000


def test_a_slow_request_is_said_while_it_lasts(faulty, capfd, monkeypatch):
    _, proxy, objects = faulty
    monkeypatch.setattr("infra.retry.SILENT_S", 0.5)
    patient = S3Objects(
        objects.location, settings=settings_of(proxy.endpoint), stall_s=2, patience=Patience(deadline_s=200)
    )
    with proxy.injected("stall", "GET", times=2), ThreadPoolExecutor(2) as pool:
        assert list(pool.map(patient.get, ["there/k", "there/k"])) == [DATA, DATA]
    said = capfd.readouterr().err
    assert re.search(r"reading s3://.*/p/there/k: no end after .* s; given up after .* more", said), said


def test_many_keys_are_listed_page_by_page(conditional):
    _, proxy, objects = conditional
    for i in range(22):
        objects.put(f"many/{i:04d}", b"")
    objects = S3Objects(objects.location, settings=settings_of(proxy.endpoint))
    events = objects._connection.client.meta.events  # pages of ten, where a thousand would take long to make
    events.register("provide-client-params.s3.ListObjectsV2", lambda params, **_: {**params, "MaxKeys": 10})
    with proxy.injected("503", "LIST", after=1):
        listed = objects.list("many/")
        assert next(listed).key == "many/0000"
        assert len(proxy.entries("LIST")) == 1
        assert [info.key for info in listed] == [f"many/{i:04d}" for i in range(1, 22)]
    assert len(proxy.entries("LIST")) == 4
    assert [info.key for info in objects.list("many/002")] == ["many/0020", "many/0021"]
    assert objects.list_folder().folders == ["first/", "gone/", "many/", "there/"]


def test_requests_in_flight_are_bounded(faulty):
    server, _, objects = faulty
    few = S3Objects(objects.location, settings=settings_of(server.direct), concurrency=2)
    in_flight, most = 0, 0
    lock, both = threading.Lock(), threading.Barrier(2, timeout=60)

    def call(_: object) -> None:
        nonlocal in_flight, most
        with lock:
            in_flight += 1
            most = max(most, in_flight)
        both.wait()
        time.sleep(0.05)
        with lock:
            in_flight -= 1

    threads = [threading.Thread(target=few._connection.send, args=("get", "k", call)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 2


def test_a_slow_upload_is_given_the_time_that_it_needs():
    """Four megabytes in two seconds, where a reply may stall for one; for eight, by the size of what is sent."""
    received = 0

    def serve(listening: socket.socket) -> None:
        nonlocal received
        connection, _ = listening.accept()
        with connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
            head = b""
            while b"\r\n\r\n" not in head:
                head += connection.recv(1)
            began = time.monotonic()
            while received < 4_000_000:
                received += len(connection.recv(50_000))
                time.sleep(max(0.0, began + received / 2e6 - time.monotonic()))
            connection.sendall(b'HTTP/1.1 200 OK\r\nETag: "x"\r\nContent-Length: 0\r\n\r\n')

    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = threading.Thread(target=serve, args=(listening,))
        server.start()
        settings = settings_of(f"http://127.0.0.1:{listening.getsockname()[1]}")
        began = time.monotonic()
        S3Objects("s3://bucket", settings=settings, stall_s=1.0).put("k", bytes(4_000_000))
        assert time.monotonic() - began > 1.5
        server.join()
    assert received == 4_000_000


def test_odd_keys_of_others_do_not_stop_a_listing(moto: S3Server):
    bucket, settings = moto.make_bucket(), settings_of(moto.direct)
    client = settings.make_client(timeout_s=30)
    for key in ("a//b", "photos/", "photos/x", "commits/1"):
        client.put_object(Bucket=bucket, Key=key, Body=b"x")
    objects = S3Objects(f"s3://{bucket}", settings=settings)
    assert [info.key for info in objects.list()] == ["a//b", "commits/1", "photos/x"]
    assert [info.key for info in objects.list("comm")] == ["commits/1"]
    assert [info.key for info in objects.list_folder("photos/").objects] == ["photos/x"]
