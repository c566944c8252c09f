"""Where S3 is and who we are there, from the AWS variables and configuration files that other tools read too.

Endpoint: AWS_ENDPOINT_URL_S3, AWS_ENDPOINT_URL, or `endpoint_url` of the profile; Amazon's own otherwise. Region:
AWS_REGION, AWS_DEFAULT_REGION or the profile's; at Amazon each bucket is asked for its own. Credentials: variables,
profile, single sign-on, container or machine role, refreshed before they run out; none at all, or AWS_SKIP_SIGNATURE or
AWS_NO_SIGN_REQUEST, is anonymous access.
"""

import os
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import cache, lru_cache
from typing import Any

from botocore import UNSIGNED
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError
from botocore.session import Session
from botocore.utils import InstanceMetadataRegionFetcher

from infra.console import UserError

DEFAULT_REGION = "us-east-1"
_ASKING_S = 3  # for a region: a convenience, not worth a wait
_METADATA_S = 1
_CREDENTIALS_LAST = timedelta(minutes=5)  # then botocore is asked again, which refreshes what has run out
_AMAZON = re.compile(r"https?://s3[.-]([a-z0-9-]+\.)*amazonaws\.com(\.cn)?")
_lock = threading.Lock()  # botocore's sessions are not made for threads


@dataclass(frozen=True, kw_only=True)
class S3Settings:
    """How to reach S3. Printing it shows no secret.

    Attributes:
        session: botocore's, which holds the credentials.
        endpoint: As configured, such as http://127.0.0.1:9000; None is Amazon's.
        region: As configured; None where it is not.
        anonymous: Nothing is signed.
    """

    session: Session = field(repr=False)
    endpoint: str | None
    region: str | None
    anonymous: bool

    def make_client(self, *, region: str | None = None, timeout_s: float) -> Any:
        """A botocore client for S3 that tries each request once. Threads may share it; making one takes 0.1 s."""
        return _make_client(self, region or self.region or DEFAULT_REGION, timeout_s)

    def store_options(self, client: Any) -> dict[str, Any]:
        """What obstore's S3Store needs to reach the same place as this botocore client."""
        options: dict[str, Any] = {"aws_endpoint_url_s3": client.meta.endpoint_url, "region": client.meta.region_name}
        if self.anonymous:
            return {**options, "skip_signature": True}
        return {**options, "credential_provider": self._credentials}

    def _credentials(self) -> dict[str, Any]:
        keys = self.session.get_credentials().get_frozen_credentials()
        return {
            "access_key_id": keys.access_key,
            "secret_access_key": keys.secret_key,
            "token": keys.token,
            "expires_at": datetime.now(UTC) + _CREDENTIALS_LAST,
        }


@lru_cache(maxsize=64)
def _make_client(settings: S3Settings, region: str, timeout_s: float) -> Any:
    config = Config(
        signature_version=UNSIGNED if settings.anonymous else None,
        connect_timeout=timeout_s,
        read_timeout=timeout_s,
        retries={"total_max_attempts": 1},
        max_pool_connections=32,
        request_checksum_calculation="when_required",  # what is new there is unknown to other servers than Amazon's
        response_checksum_validation="when_required",
        s3={"addressing_style": "path"},
    )
    with _lock:
        parsers = settings.session.get_component("response_parser_factory")
        parsers.set_parser_defaults(timestamp_parser=str)  # reading the dates of a listing would be 3/4 of its time
        return settings.session.create_client("s3", region_name=region, endpoint_url=settings.endpoint, config=config)


def read_settings() -> S3Settings:
    """The settings of this process's environment.

    Raises:
        UserError: They contradict each other, name a profile that does not exist, or an endpoint with a password.
    """
    names = ("HOME", *sorted(name for name in os.environ if name.startswith("AWS_")))
    return _settings_of(tuple((name, os.environ.get(name, "")) for name in names))


@cache
def _settings_of(environment: tuple[tuple[str, str], ...]) -> S3Settings:
    """As `read_settings`; once for each environment, for asking a machine for its role may take seconds."""
    variables = dict(environment)
    session = Session()
    try:
        unsigned = _is_set(variables, "AWS_SKIP_SIGNATURE") or _is_set(variables, "AWS_NO_SIGN_REQUEST")
        anonymous = unsigned or session.get_credentials() is None
        region = variables.get("AWS_REGION") or session.get_config_variable("region")
        client = S3Settings(session=session, endpoint=None, region=region, anonymous=True).make_client(timeout_s=1)
    except (BotoCoreError, ValueError) as error:
        said = re.sub(r"\S*@", "...@", str(error))  # an endpoint may hold a password
        raise UserError(f"S3 cannot be set up from the AWS_ variables and configuration files: {said}") from None
    found = client.meta.endpoint_url
    _check_no_password(found, "the S3 endpoint in AWS_ENDPOINT_URL or the profile")
    return S3Settings(
        session=session, endpoint=None if _AMAZON.fullmatch(found) else found, region=region, anonymous=anonymous
    )


def _check_no_password(url: str, what: str) -> None:
    """Such a URL would be printed, and passed on to other machines."""
    if "@" in url:
        raise UserError(
            f"{what} holds a user name or password; give it without, such as https://host:9000, and the keys as "
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )


def _is_set(variables: Mapping[str, str], name: str) -> bool:
    return variables.get(name, "").lower() not in ("", "0", "false", "no", "off")


def use_endpoint(url: str | None) -> None:
    """Send this process and its children to another server than the environment says; None changes nothing.

    Raises:
        UserError: It is no http or https URL, or holds a password.
    """
    if url is None:
        return
    _check_no_password(url, "the S3 endpoint")
    if not re.fullmatch(r"https?://[^\s/]+/?", url):
        raise UserError(f"{url!r} is no S3 endpoint; give one such as http://127.0.0.1:9000")
    os.environ["AWS_ENDPOINT_URL"] = url.rstrip("/")
    os.environ.pop("AWS_ENDPOINT_URL_S3", None)  # it would win
    os.environ.pop("AWS_IGNORE_CONFIGURED_ENDPOINT_URLS", None)


def shared_environment() -> dict[str, str]:
    """What worker processes on other machines need to find the same S3; never a key."""
    settings = read_settings()
    found = {
        "AWS_ENDPOINT_URL": settings.endpoint,
        "AWS_REGION": settings.region,
        "AWS_SKIP_SIGNATURE": "true" if settings.anonymous else None,
    }
    return {name: value for name, value in found.items() if value}


def split_location(location: str) -> tuple[str, str]:
    """Bucket and prefix of s3://bucket/prefix; the prefix has no slash at its ends.

    Raises:
        UserError: There is no bucket, or the prefix is no plain path.
    """
    bucket, _, prefix = location.removeprefix("s3://").partition("/")
    prefix = prefix.rstrip("/")
    plain = prefix.isprintable() and not any(part in ("", ".", "..") for part in prefix.split("/")) if prefix else True
    if not location.startswith("s3://") or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{1,254}", bucket) or not plain:
        raise UserError(f"{location!r} is no place on S3; give s3://bucket or s3://bucket/prefix")
    return bucket, prefix


def bucket_region(location: str, settings: S3Settings | None = None) -> str | None:
    """The region that a bucket is in, asked of the server within seconds; None where it does not say."""
    settings = settings or read_settings()
    bucket, _ = split_location(location)
    try:
        client = settings.make_client(timeout_s=_ASKING_S)
        reply = client.head_bucket(Bucket=bucket)
    except ClientError as error:  # a server may refuse us and still say where the bucket is
        reply = error.response
    except BotoCoreError:
        return None
    headers: Mapping[str, str] = reply.get("ResponseMetadata", {}).get("HTTPHeaders", {})
    return headers.get("x-amz-bucket-region")


def machine_region() -> str | None:
    """The region of this machine: as configured, or as Amazon's machines know of themselves; None elsewhere."""
    configured = read_settings().region
    if configured:
        return configured
    fetcher: Callable[[], str | None] = InstanceMetadataRegionFetcher(
        timeout=_METADATA_S, num_attempts=1, env=dict(os.environ)
    ).retrieve_region
    return fetcher()
