"""What S3 costs: a table with its source and date, and sums over it. Opens nothing."""

from dataclasses import dataclass

from pipeline.plan_requests import Requests

GB_NBYTES = 2**30  # what Amazon bills as a GB


@dataclass(frozen=True, kw_only=True)
class Prices:
    """US dollars: list prices of S3 Standard in us-east-1, first tier, as known in November 2026; not looked up since.

    Other regions and other servers differ: each price can be given.

    Attributes:
        price_storage: Of a GB for a month.
        price_put: Of 1,000 PUT or LIST requests. DELETE is free.
        price_get: Of 1,000 GET requests.
        price_region: Of a GB that goes to another region.
        price_internet: Of a GB that leaves Amazon.
    """

    price_storage: float = 0.023
    price_put: float = 0.005
    price_get: float = 0.0004
    price_region: float = 0.02
    price_internet: float = 0.09

    def storage(self, nbytes: int | float) -> float:
        """Dollars for a month."""
        return self.price_storage * nbytes / GB_NBYTES

    def requests(self, requests: Requests) -> float:
        """Dollars for requests alone."""
        return (self.price_put * (requests.put + requests.list) + self.price_get * requests.get) / 1000

    def to_region(self, nbytes: int | float) -> float:
        """Dollars for moving bytes out of the bucket's region into another."""
        return self.price_region * nbytes / GB_NBYTES

    def to_internet(self, nbytes: int | float) -> float:
        """Dollars for moving bytes out of Amazon."""
        return self.price_internet * nbytes / GB_NBYTES


def human_dollars(dollars: int | float) -> str:
    """$0.0004, $1.27, $307, $1,540."""
    if dollars >= 100:
        return f"${dollars:,.0f}"
    return f"${dollars:.2f}" if dollars >= 0.1 or dollars == 0 else f"${dollars:.2g}"
