"""Who may do what on S3, and how that is found out: settings, credentials, regions, read-only and anonymous access."""

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from infra.console import UserError
from infra.objects import ObjectAccessError, ObjectMissingError, open_objects
from infra.retry import Patience
from infra.s3 import S3Objects
from infra.s3_settings import (
    bucket_region,
    machine_region,
    read_settings,
    shared_environment,
    split_location,
    use_endpoint,
)
from tests.clocks import SkippingClock
from tests.s3_servers import (
    REGION,
    SECRET_KEY,
    S3Server,
    anonymous_environment,
    environment_of,
    read_only_environment,
    settings_of,
)

pytestmark = pytest.mark.s3
NOWHERE = "http://127.0.0.1:9"


@pytest.fixture
def become(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, str]], None]:
    """Makes the AWS_ variables these and no others."""

    def become(environment: dict[str, str]) -> None:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            monkeypatch.delenv(name)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)

    return become


@pytest.fixture
def bare(become, tmp_path: Path) -> Path:
    """No variables, empty configuration files and no machine role; the folder holds the files."""
    become(
        {
            "AWS_CONFIG_FILE": str(tmp_path / "config"),
            "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "credentials"),
            "AWS_EC2_METADATA_DISABLED": "true",
        }
    )
    return tmp_path


def test_reading_goes_on_with_read_only_credentials_and_writing_is_refused_at_once(s3_server: S3Server, become):
    bucket = s3_server.make_bucket()
    become(s3_server.environment)
    open_objects(f"s3://{bucket}/a").put("k/1", b"data")
    become(read_only_environment(s3_server, bucket))
    objects = open_objects(f"s3://{bucket}/a")
    assert objects.get("k/1") == b"data"
    assert [info.key for info in objects.list()] == ["k/1"]
    assert objects.list_folder().folders == ["k/"]
    for write in (
        objects.check_writable,
        lambda: objects.put("k/2", b"x"),
        lambda: objects.put_new("k/2", b"x"),
        lambda: objects.delete("k/1"),
    ):
        n_before = len(s3_server.log)
        with pytest.raises(ObjectAccessError, match=f"s3://{bucket}/a.* HTTP 403 AccessDenied"):
            write()
        assert len(s3_server.log) <= n_before + 2  # refused once, not tried for minutes
    with pytest.raises(ObjectAccessError, match=f"nothing can be written to s3://{bucket}/a"):
        objects.check_writable()
    assert objects.get("k/1") == b"data"


def test_without_credentials_a_public_bucket_is_read_and_others_say_why_not(s3_server: S3Server, become):
    bucket, private = s3_server.make_bucket(), s3_server.make_bucket()
    become(s3_server.environment)
    open_objects(f"s3://{bucket}").put("k/a key", b"0123456789")
    become(anonymous_environment(s3_server, bucket))
    objects = open_objects(f"s3://{bucket}")
    assert read_settings().anonymous
    assert objects.get("k/a key") == b"0123456789"
    part = bytearray(3)
    objects.read_into("k/a key", 4, memoryview(part))
    assert part == b"456"
    assert [info.key for info in objects.list("k")] == ["k/a key"]
    with pytest.raises(ObjectMissingError):
        objects.get("k/none")
    with pytest.raises(ObjectAccessError, match=r"403.*the request was anonymous: no AWS credentials were found"):
        objects.check_writable()
    with pytest.raises(ObjectAccessError, match="the request was anonymous"):
        open_objects(f"s3://{private}").get("k")


@pytest.mark.parametrize("name", ["AWS_SKIP_SIGNATURE", "AWS_NO_SIGN_REQUEST"])
def test_signing_can_be_switched_off(moto: S3Server, become, name: str):
    become({**environment_of(NOWHERE), name: "true"})
    assert read_settings().anonymous
    become({**environment_of(NOWHERE), name: "false"})
    assert not read_settings().anonymous


def test_wrong_keys_are_refused_at_once(rclone: S3Server):
    bucket = rclone.make_bucket()
    for keys in (("nobody", "x" * 20), ("raptor-test", "wrong-secret-key")):
        objects = S3Objects(f"s3://{bucket}", settings=settings_of(rclone.endpoint, *keys))
        with pytest.raises(ObjectAccessError, match="HTTP 403"):
            objects.get("k")
        with pytest.raises(ObjectAccessError, match="could not be listed: HTTP 403"):
            list(objects.list())


def test_a_missing_bucket_is_named_by_every_verb(s3_server: S3Server):
    objects = S3Objects("s3://no-such-bucket/p", settings=settings_of(s3_server.endpoint))
    for call in (
        lambda: objects.get("k"),
        lambda: objects.read_into("k", 0, memoryview(bytearray(1))),
        lambda: objects.put("k", b"x"),
        lambda: list(objects.list()),
        lambda: objects.list_folder(),
        lambda: objects.delete("k"),
        objects.check_writable,
    ):
        with pytest.raises(ObjectAccessError, match=f"there is no bucket no-such-bucket at {s3_server.endpoint}"):
            call()


@pytest.mark.parametrize("text", ["s3://b/../x", "s3://bucket//x", "s3://bucket/a/./b", "s3://a b/c"])
def test_places_that_are_none_are_refused(text: str):
    with pytest.raises(UserError, match=r"is no place on S3; give s3://bucket or s3://bucket/prefix"):
        open_objects(text)


def test_a_trailing_slash_means_nothing():
    assert split_location("s3://bucket/a/b/") == ("bucket", "a/b")
    assert split_location("s3://bucket/") == ("bucket", "")


def test_endpoint_region_and_keys_come_from_the_profile(bare: Path, monkeypatch: pytest.MonkeyPatch):
    (bare / "config").write_text(
        "[profile lab]\nregion = eu-north-1\nendpoint_url = http://127.0.0.1:1111\n"
        "[profile other]\nregion = ap-south-1\nservices = there\n[services there]\ns3 =\n  endpoint_url = http://127.0.0.1:2222\n"
    )
    (bare / "credentials").write_text("[lab]\naws_access_key_id = A\naws_secret_access_key = very-secret\n")
    monkeypatch.setenv("AWS_PROFILE", "lab")
    settings = read_settings()
    assert (settings.endpoint, settings.region, settings.anonymous) == ("http://127.0.0.1:1111", "eu-north-1", False)
    assert "very-secret" not in repr(settings)
    monkeypatch.setenv("AWS_PROFILE", "other")
    settings = read_settings()
    assert (settings.endpoint, settings.region, settings.anonymous) == ("http://127.0.0.1:2222", "ap-south-1", True)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:3333")
    monkeypatch.setenv("AWS_REGION", "us-west-2")
    assert (read_settings().endpoint, read_settings().region) == ("http://127.0.0.1:3333", "us-west-2")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:4444")
    assert read_settings().endpoint == "http://127.0.0.1:4444"
    monkeypatch.setenv("AWS_PROFILE", "missing")
    with pytest.raises(UserError, match=r"S3 cannot be set up .*\(missing\) could not be found"):
        read_settings()


def test_amazon_is_the_default(bare: Path, monkeypatch: pytest.MonkeyPatch):
    assert (read_settings().endpoint, read_settings().region) == (None, None)
    monkeypatch.setenv("AWS_REGION", "cn-north-1")
    assert read_settings().endpoint is None


def test_an_endpoint_that_is_given_wins_here_and_in_children(bare: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:1")
    use_endpoint(None)
    assert read_settings().endpoint == "http://127.0.0.1:1"
    monkeypatch.setenv("AWS_ENDPOINT_URL", "")  # so that monkeypatch puts it back
    use_endpoint("http://127.0.0.1:2/")
    assert read_settings().endpoint == "http://127.0.0.1:2"
    code = "from infra.s3_settings import read_settings; print(read_settings().endpoint)"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert child.stdout.strip() == "http://127.0.0.1:2"
    for text in ("127.0.0.1:9000", "ftp://x", "http://", "http://host/bucket"):
        with pytest.raises(UserError, match=r"is no S3 endpoint; give one such as http://127\.0\.0\.1:9000"):
            use_endpoint(text)


@pytest.mark.parametrize(
    "url", ["http://me:hidden@127.0.0.1:9000", "https://hidden@host/", "me:hidden@127.0.0.1", "ftp://hidden@x"]
)
def test_an_endpoint_with_a_password_is_refused_and_not_shown(bare: Path, monkeypatch: pytest.MonkeyPatch, url: str):
    with pytest.raises(UserError, match="holds a user name or password; give it without") as given:
        use_endpoint(url)
    monkeypatch.setenv("AWS_ENDPOINT_URL", url)
    with pytest.raises(UserError) as found:
        read_settings()
    assert "hidden" not in f"{given.value} {found.value}"
    assert found.value.__cause__ is None


def test_what_is_shared_with_other_machines_holds_no_key(become, bare: Path):
    become(environment_of("http://10.0.0.1:9000"))
    shared = shared_environment()
    assert shared == {"AWS_ENDPOINT_URL": "http://10.0.0.1:9000", "AWS_REGION": REGION}
    become({"AWS_EC2_METADATA_DISABLED": "true", "AWS_CONFIG_FILE": os.devnull, "HOME": str(bare)})
    assert shared_environment() == {"AWS_SKIP_SIGNATURE": "true"}


def test_secrets_are_not_printed(moto: S3Server, become, capfd: pytest.CaptureFixture[str]):
    become({**moto.environment, "AWS_SESSION_TOKEN": "token-of-mine"})
    objects = open_objects(f"s3://{moto.make_bucket()}")
    with pytest.raises(ObjectMissingError) as caught:
        objects.get("k")
    with moto.faulty() as proxy:
        proxy.inject("403")
        with pytest.raises(ObjectAccessError) as refused:
            S3Objects("s3://bucket", settings=settings_of(proxy.endpoint)).get("k")
    out, err = capfd.readouterr()
    for text in (repr(objects), str(caught.value), str(refused.value), repr(read_settings()), out, err):
        assert SECRET_KEY not in text
        assert "token-of-mine" not in text


def test_a_bucket_says_where_it_is(moto: S3Server, rclone: S3Server):
    assert bucket_region(f"s3://{moto.make_bucket()}/x", settings_of(moto.endpoint)) == REGION
    assert bucket_region(f"s3://{rclone.make_bucket()}/x", settings_of(rclone.endpoint)) is None
    assert bucket_region("s3://no-such-bucket", settings_of(moto.endpoint)) is None
    assert bucket_region("s3://bucket", settings_of(NOWHERE)) is None


def test_a_machine_that_knows_no_region_says_so(bare: Path, monkeypatch: pytest.MonkeyPatch):
    assert machine_region() is None
    (bare / "config").write_text("[default]\nregion = sa-east-1\n")
    monkeypatch.setenv("AWS_PROFILE", "default")
    assert machine_region() == "sa-east-1"
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-west-1")
    assert machine_region() == "us-west-1"


def test_a_server_that_is_not_there_is_tried_for_a_while_and_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("infra.retry.time", SkippingClock())
    with socket.socket() as bound:  # and not listening
        bound.bind(("127.0.0.1", 0))
        settings = settings_of(f"http://127.0.0.1:{bound.getsockname()[1]}")
        objects = S3Objects("s3://bucket/p", settings=settings)
        with pytest.raises(ObjectAccessError, match=r"s3://bucket/p/k .*: connection refused; tried \d+ times in .* s"):
            objects.get("k")
        with pytest.raises(ObjectAccessError, match=r"s3://bucket/p/ .*: no connection to the server; tried \d+ times"):
            list(objects.list())


def test_the_time_that_a_request_waits_for_its_turn_counts(monkeypatch: pytest.MonkeyPatch):
    """What is left for the request is what is left then; without any it is not sent."""
    clock = SkippingClock()
    monkeypatch.setattr("infra.retry.time", clock)
    monkeypatch.setattr("infra.s3_connection.time", clock)
    monkeypatch.setattr("infra.s3_connection.FIRST_CONTACT_S", 400.0)
    patience = Patience(deadline_s=400.0)
    objects = S3Objects("s3://bucket", settings=settings_of(NOWHERE), patience=patience, stall_s=0.1, concurrency=1)
    connection, given = objects._connection, []
    monkeypatch.setattr(connection, "_store", lambda wanted_s, left_s, reading: given.append(left_s))
    for held_s in (100.0, 6000.0):
        holding = threading.Event()

        def hold(_: object, held_s: float = held_s, holding: threading.Event = holding) -> None:
            holding.set()
            while not connection._slots._cond._waiters:  # type: ignore[attr-defined]
                time.sleep(0.01)
            clock.skipped_s += held_s

        other = threading.Thread(target=connection.send, args=("get", "other", hold))
        other.start()
        assert holding.wait(60)
        if held_s < 400.0:
            connection.send("get", "k", lambda _: None)
        else:
            with pytest.raises(ObjectAccessError, match="the other requests in flight left it no time"):
                connection.send("get", "k", lambda _: pytest.fail("it was sent"))
        other.join()
    assert len(given) == 3  # of two that held, and of one that waited
    assert 200 < given[1] <= 300


@pytest.mark.s3
def test_a_server_that_never_answered_is_given_up_sooner_than_one_that_did(
    moto: S3Server, monkeypatch: pytest.MonkeyPatch
):
    """A typing error in the endpoint should not cost the minutes that an outage is given."""
    clock = SkippingClock()
    monkeypatch.setattr("infra.retry.time", clock)
    bucket = moto.make_bucket()
    with moto.faulty() as proxy:
        skipped = []
        for is_known in (False, True):
            objects = S3Objects(f"s3://{bucket}", settings=settings_of(proxy.endpoint))
            if is_known:
                assert list(objects.list()) == []
            with proxy.injected("reset", times=None):
                clock.skipped_s = 0.0
                with pytest.raises(ObjectAccessError, match="tried"):
                    objects.get("k")
                skipped.append(clock.skipped_s)
    assert 10 < skipped[0] <= 60 < 150 < skipped[1] <= 300


@pytest.mark.s3
def test_a_server_that_is_gone_is_waited_for_once(moto: S3Server, monkeypatch: pytest.MonkeyPatch):
    """A job that fails of it still has a log to end and a heartbeat to take away; back again, it has its time again."""
    clock = SkippingClock()
    monkeypatch.setattr("infra.retry.time", clock)
    with moto.faulty() as proxy:
        objects = S3Objects(f"s3://{moto.make_bucket()}", settings=settings_of(proxy.endpoint))
        skipped = []
        for _ in range(2):
            objects.put("k", b"there")
            with proxy.injected("reset", times=None):
                for _ in range(2):
                    clock.skipped_s = 0.0
                    with pytest.raises(ObjectAccessError, match="tried"):
                        objects.get("k")
                    skipped.append(clock.skipped_s)
    assert [seconds > 100 for seconds in skipped] == [True, False, True, False]
