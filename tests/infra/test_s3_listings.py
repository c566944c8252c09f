"""Listings as no sound server gives them: refused, and never without end."""

from collections.abc import Callable

import pytest

from infra.objects import ObjectAccessError
from infra.s3 import S3Objects
from tests.s3_servers import settings_of

pytestmark = pytest.mark.s3


@pytest.fixture
def listing(monkeypatch: pytest.MonkeyPatch) -> Callable[..., S3Objects]:
    """Makes objects whose server gives these pages, one after another and then again."""

    def listing(*pages: dict) -> S3Objects:
        objects, n_asked = S3Objects("s3://bucket", settings=settings_of("http://127.0.0.1:9")), 0

        def give(**_: str) -> dict:
            nonlocal n_asked
            n_asked += 1
            assert n_asked < 10, "without end"
            return pages[(n_asked - 1) % len(pages)]

        monkeypatch.setattr(objects._connection.client, "list_objects_v2", give)
        return objects

    return listing


def page(*keys: str, **more: object) -> dict:
    return {"Contents": [{"Key": key, "Size": 1} for key in keys], **more}


@pytest.mark.parametrize(
    ("pages", "message"),
    [
        ([page("b", "a")], "lists a after b; key order was expected"),
        ([page("b", IsTruncated=True, NextContinuationToken="t"), page("a")], "lists a after b; key order was"),
        ([page("a", IsTruncated=True)], "more follows; expected a new token to go on with, and got none"),
        ([page("a", IsTruncated=True, NextContinuationToken="t")], "and got one that it gave before"),
    ],
)
def test_strange_listings_are_refused(listing, pages: list[dict], message: str):
    with pytest.raises(ObjectAccessError, match=message):
        list(listing(*pages).list())


def test_a_folder_that_is_listed_in_circles_is_refused(listing):
    pages = [page(IsTruncated=True, NextContinuationToken=token) for token in ("t", "u")]
    with pytest.raises(ObjectAccessError, match="and got one that it gave before"):
        listing(*pages).list_folder()
