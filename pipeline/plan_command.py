"""`python -m pipeline plan`: what an extraction would take."""

from typing import Annotated

import tyro

from infra.console import ExitCode, say
from infra.s3_settings import use_endpoint
from pipeline.config import ExtractConfig, check_inputs
from pipeline.job import plan_of
from pipeline.measure import images_per_s
from pipeline.plan import describe
from pipeline.plan_text import cost_lines, region_lines, span_of, time_line
from pipeline.prices import Prices
from pipeline.run_config import RunConfig
from pipeline.settings import PlannedStore, make_teacher, plan_stores
from pipeline.teacher import Teacher
from pipeline.workers import n_threads

MEASURE_S = 6  # of the teacher

_Config = Annotated[ExtractConfig, tyro.conf.arg(name="")]
_Run = Annotated[RunConfig, tyro.conf.arg(name="")]
_Prices = Annotated[Prices, tyro.conf.arg(name="")]


def run_plan(
    config: _Config,
    run: _Run,
    prices: _Prices,
    block: str | None = None,
    measure: bool = True,
    endpoint_url: str | None = None,
) -> int:
    """Say what an extraction would take, and write nothing.

    Args:
        config: What to extract.
        run: How.
        prices: Of S3; other regions and servers have others.
        block: Span a-b whose training epoch is priced; None is the first eight states.
        measure: Run the teacher for some seconds, to tell how long it would take.
        endpoint_url: S3 endpoint, such as http://127.0.0.1:9000; None is AWS_ENDPOINT_URL, else Amazon's.
    """
    use_endpoint(endpoint_url)
    check_inputs(config)
    teacher = make_teacher(config)
    for planned in plan_stores(config, teacher, say):
        plan, spec = plan_of(planned, run), planned.spec
        span = span_of(spec, block)
        lines = [*describe(plan, spec, planned.location), *(f"  note: {note}" for note in planned.notes)]
        per_s = _rate(planned, teacher, run) if measure else None
        lines += [time_line(spec, per_s)] if per_s else []
        lines += cost_lines(plan, spec, span, prices, spec.n_samples / per_s / 3600 if per_s else None)
        print("\n".join([*lines, *region_lines(plan, planned.location, prices)]))
    return ExitCode.OK


def _rate(planned: PlannedStore, teacher: Teacher, run: RunConfig) -> float:
    files = planned.teacher_files
    return images_per_s(planned.spec, teacher, files, device=run.device, n_threads=n_threads(run), seconds=MEASURE_S)
