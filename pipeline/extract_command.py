"""`python -m pipeline extract`. Nothing here loads what takes long before Ray is on its way."""

from typing import Annotated

import tyro

from infra.s3_settings import use_endpoint
from pipeline.ahead import ray_ahead
from pipeline.config import ExtractConfig
from pipeline.run_config import RunConfig

_Config = Annotated[ExtractConfig, tyro.conf.arg(name="")]
_Run = Annotated[RunConfig, tyro.conf.arg(name="")]


def run_extract(config: _Config, run: _Run, endpoint_url: str | None = None) -> int:
    """Extract hidden states of images into a store. Run it again to go on after anything.

    Args:
        config: What to extract.
        run: How.
        endpoint_url: S3 endpoint, such as http://127.0.0.1:9000; None is AWS_ENDPOINT_URL, else Amazon's.
    """
    use_endpoint(endpoint_url)
    with ray_ahead(config, run) as ahead:
        from pipeline.extract import extract_and_tell  # torch and timm: seconds, in which Ray starts

        return extract_and_tell(config, run, ahead=ahead)
