"""What `make plan` prints of requests, time and money."""

from infra.console import counted, human_bytes, human_duration, human_rate
from infra.s3_settings import bucket_region, machine_region
from pipeline.locations import is_remote
from pipeline.plan import StorePlan
from pipeline.plan_requests import Requests, alive_requests, epoch_requests
from pipeline.prices import Prices, human_dollars
from storage_schemas.errors import SchemaError
from storage_schemas.spec import Span, StoreSpec

_DEFAULT_SPAN_STATES = 8


def default_span(spec: StoreSpec) -> Span | None:
    """The first eight states that follow one another, or as many as there are; None if no two do."""
    for start in spec.layers:
        stop = start
        while stop + 1 in spec.layers and stop + 1 - start < _DEFAULT_SPAN_STATES:
            stop += 1
        if stop > start:
            return Span(start, stop)
    return None


def span_of(spec: StoreSpec, block: str | None) -> Span | None:
    """The span that BLOCK names, or the default one.

    Raises:
        SchemaError: The store will not have all its states.
    """
    if block is None:
        return default_span(spec)
    span = Span.parse(block)
    missing = sorted(set(span.states) - set(spec.layers))
    if missing:
        raise SchemaError(f"BLOCK={block}", [f"the store will have no layer {missing[0]}; it has {list(spec.layers)}"])
    return span


def cost_lines(plan: StorePlan, spec: StoreSpec, span: Span | None, prices: Prices, hours: float | None) -> list[str]:
    """Requests and dollars of the things that are done with a store on S3."""
    extraction = plan.extraction + alive_requests(3600 * hours if hours else 0, plan.n_shards)
    nbytes = plan.extraction.bytes_out
    lines = [
        f"  on S3: {human_bytes(nbytes)} cost {human_dollars(prices.storage(nbytes))} a month; one pass over all of it "
        f"to another region {human_dollars(prices.to_region(nbytes))}, out of Amazon "
        f"{human_dollars(prices.to_internet(nbytes))}",
        _line(f"extraction by {counted(plan.n_workers, 'worker')}", extraction, prices),
    ]
    if span is not None:
        epoch = epoch_requests(spec, span)
        moved = f", to another region {human_dollars(prices.to_region(epoch.bytes_in))} more"
        lines.append(_line(f"one epoch of BLOCK={span}", epoch, prices) + moved)
    lines.append(_line("verify", plan.verify, prices))
    if spec.codec != "none":
        lines.append(f"    bytes are those before {spec.codec}")
    return lines


def time_line(spec: StoreSpec, per_s: float) -> str:
    """How long a machine like this one takes."""
    return (
        f"  {human_duration(spec.n_samples / per_s)} on one machine like this: its teacher makes and rounds "
        f"{human_rate(per_s)} images/s, measured just now for some seconds without reading or writing images"
    )


def region_lines(plan: StorePlan, location: str, prices: Prices) -> list[str]:
    """A warning if bucket and machine are in different regions; asks the server."""
    if not is_remote(location):
        return []
    there, here = bucket_region(location), machine_region()
    if there is None or here is None or there == here:
        return []
    price = human_dollars(prices.to_region(plan.extraction.bytes_out))
    return [
        f"  warning: the bucket is in {there}, this machine in {here}: one pass over the store costs {price} "
        f"for transfer ({human_bytes(plan.extraction.bytes_out)}). Work in {there}, or keep a copy here: make copy"
    ]


def _line(what: str, requests: Requests, prices: Prices) -> str:
    counts = {"PUT": requests.put, "GET": requests.get, "LIST": requests.list}
    text = ", ".join(f"{n:,} {verb}" for verb, n in counts.items() if n)
    moved = [f"{human_bytes(requests.bytes_out)} out"] if requests.bytes_out else []
    moved += [f"{human_bytes(requests.bytes_in)} in"] if requests.bytes_in else []
    return f"    {what}: {text}; {', '.join(moved)}; requests {human_dollars(prices.requests(requests))}"
