"""`make positions`: what attention learns of the places of patches, on planted data and with small ViTs; one page."""

from analysis.page import PAGE, save_page
from analysis.places import DEFAULT_STORE, make_command, open_out
from infra.console import UserError, say
from infra.s3_settings import use_endpoint

DEFAULT_OUT = "data/positions"
SEEDS, EPOCHS, STEPS, SAMPLES = 3, 30, 1_000, 4_000


def positions_command(
    *,
    images: str = "digits",
    out: str = DEFAULT_OUT,
    seeds: int = SEEDS,
    epochs: int = EPOCHS,
    steps: int = STEPS,
    samples: int = SAMPLES,
    threads: int = 1,
    endpoint_url: str | None = None,
) -> int:
    """Experiments of Jelassi et al. 2022: planted sets, their control, transfer, permuted images, positional attention.

    Interrupt it whenever you like: experiments that are done are kept in OUT, and the same command does the others.

    Args:
        images: digits, or a folder with the binary version of CIFAR-10 or CIFAR-100, unpacked.
        out: Folder or s3://bucket/prefix for report.html, tables/*.csv and experiments/*.json.
        seeds: Trainings of each kind, with seeds 0, 1, ...
        epochs: Of each small ViT.
        steps: Of gradient descent on planted data.
        samples: Of planted data.
        threads: Of torch; the models are so small that more than one seldom helps.
        endpoint_url: S3 endpoint, such as http://127.0.0.1:9000; None is AWS_ENDPOINT_URL, else Amazon's.
    """
    import torch  # seconds of import

    from analysis.positions.experiments import run_experiments
    from analysis.positions.images import load_images
    from analysis.positions.study import study_experiments, study_sections

    use_endpoint(endpoint_url)
    problems = [
        f"{name}={value}: expected {least} or more"
        for name, value, least in (
            ("SEEDS", seeds, 1),
            ("EPOCHS", epochs, 1),
            ("STEPS", steps, 1),
            ("--samples", samples, 64),
            ("THREADS", threads, 1),
        )
        if value < least
    ]
    saved = open_out(out, DEFAULT_STORE, problems)
    try:
        data = load_images(images)
    except UserError as error:
        problems.append(str(error))
    if problems or saved is None:
        raise UserError("\n  ".join(["make positions cannot start:", *problems]))
    typed = {
        "IMAGES": images if images != "digits" else None,
        "OUT": out if out != DEFAULT_OUT else None,
        "SEEDS": seeds if seeds != SEEDS else None,
        "EPOCHS": epochs if epochs != EPOCHS else None,
        "STEPS": steps if steps != STEPS else None,
        "ARGS": f"--samples {samples}" if samples != SAMPLES else None,
    }
    command = make_command("positions", typed)
    torch.set_num_threads(threads)
    wanted = study_experiments(data, seeds=seeds, epochs=epochs, steps=steps, samples=samples)
    say(f"make positions: {len(wanted)} experiments; interrupt it whenever you like, and repeat it to go on")
    sections = study_sections(data, run_experiments(wanted, saved), seeds=seeds, samples=samples, command=command)
    facts = {
        "images": f"{data.name}: {len(data.train):,} to train on, {len(data.test):,} others",
        "patches": f"{data.grid[0]} x {data.grid[1]} of {data.patch_side} px",
        "seeds": ", ".join(map(str, range(seeds))),
        "command": command,
    }
    said = save_page(saved, "What attention learns of the places of patches", facts, sections)
    for line in (line for section in sections for line in section.text):
        print(line)
    print(f"saved  {out}/{PAGE}: {said}, also as {out}/tables/*.csv")
    print("next   make report: the same map of a store's teacher, beside what its layers do")
    return 0
