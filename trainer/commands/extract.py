"""`make extract TEACHER=run:<RUN>`: a Raptor's own states into a store, by the job that extracts a teacher's."""

from typing import Annotated

import tyro

from infra.console import UserError
from infra.s3_settings import use_endpoint
from pipeline.extract import ExtractConfig, RunConfig, extract_and_tell
from trainer.raptor_teacher import PREFIX

_Config = Annotated[ExtractConfig, tyro.conf.arg(name="")]
_Run = Annotated[RunConfig, tyro.conf.arg(name="")]


def extract_command(config: _Config, run: _Run, endpoint_url: str | None = None) -> int:
    """Extract the states of a Raptor into a store: state 0 is its teacher's, the others are rolled out from it.

    All of `python -m pipeline extract` with another teacher: --teacher run:<RUN>, a finished run over the whole depth.
    Run it again to go on after anything.

    Args:
        config: What to extract.
        run: How.
        endpoint_url: S3 endpoint, such as http://127.0.0.1:9000; None is AWS_ENDPOINT_URL, else Amazon's.
    """
    use_endpoint(endpoint_url)
    if not (config.teacher or "").startswith(PREFIX):
        raise UserError(
            f"TEACHER={config.teacher or ''} is no run: this command extracts Raptors. Give TEACHER=run:<RUN>, such as "
            "TEACHER=run:data/runs/digits/raptor-0-7-12-seed0; python -m pipeline extract takes other teachers"
        )
    return extract_and_tell(config, run)
