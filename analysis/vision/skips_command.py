"""`make skips`: ViTs trained without the skip connections of one block, side by side on one HTML page."""

from analysis.page import PAGE, Origin, save_page
from analysis.places import DEFAULT_STORE, make_command, open_out
from infra.console import UserError, say
from infra.s3_settings import use_endpoint

DEFAULT_OUT = "data/skips"
BLOCKS = "1,7,10"
EPOCHS = 30
_N_BLOCKS = 12


def skips_command(
    *,
    blocks: str = BLOCKS,
    out: str = DEFAULT_OUT,
    epochs: int = EPOCHS,
    seed: int = 0,
    threads: int = 1,
    endpoint_url: str | None = None,
) -> int:
    """Train digits_vit whole, and without both skips of each of some blocks; CKA of their layers, and accuracy.

    Some 8 minutes a model on an idle core. Interrupt it whenever you like: models that are trained are kept in OUT,
    and the same command trains the others.

    Args:
        blocks: From 1, with commas between; Raghu et al. show 1, 7 and 10.
        out: Folder or s3://bucket/prefix for report.html, tables/*.csv and models/*.safetensors.
        epochs: Of each model.
        seed: Of initial weights, order and augmentation.
        threads: Of torch; the model is so small that more than one seldom helps.
        endpoint_url: S3 endpoint, such as http://127.0.0.1:9000; None is AWS_ENDPOINT_URL, else Amazon's.
    """
    import torch  # seconds of import

    from analysis.vision.skip_sections import trained_section
    from analysis.vision.skip_training import WHOLE, measure_skip_models, skip_recipe
    from trainer.digits_teacher import load_split

    use_endpoint(endpoint_url)
    problems = [
        f"{name}={value}: expected 1 or more" for name, value in (("EPOCHS", epochs), ("THREADS", threads)) if value < 1
    ]
    numbers = _numbers(blocks, problems)
    saved = open_out(out, DEFAULT_STORE, problems)
    if problems or saved is None:
        raise UserError("\n  ".join(["make skips cannot start:", *problems]))
    typed = {
        "BLOCKS": blocks if blocks != BLOCKS else None,
        "OUT": out if out != DEFAULT_OUT else None,
        "EPOCHS": epochs if epochs != EPOCHS else None,
        "SEED": seed if seed else None,
    }
    command = make_command("skips", typed)
    torch.set_num_threads(threads)
    n_models = len(numbers) + 1
    say(f"make skips: {n_models} models of {epochs} epochs; interrupt it whenever you like, and repeat it to go on")
    found = measure_skip_models(saved, [WHOLE, *numbers], skip_recipe(epochs, seed), say)
    data = f"the held-out digits, digits_vit trained for {epochs} epochs"
    origin = Origin(data=data, n_images=len(load_split("val")[0]), seed=seed, command=command)
    section = trained_section(found, origin)
    said = save_page(saved, "ViTs without the skip connections of one block", {"command": command}, [section])
    for line in section.text:
        print(line)
    print(f"saved  {out}/{PAGE}: {said}, also as {out}/tables/*.csv")
    print("next   make report: the same ablation of a trained teacher, without training it again")
    return 0


def _numbers(blocks: str, problems: list[str]) -> list[int]:
    parts = [part.strip() for part in blocks.split(",")]
    if not all(part.isdecimal() and 1 <= int(part) <= _N_BLOCKS for part in parts):
        problems.append(f"BLOCKS={blocks}: expected numbers of blocks, 1 to {_N_BLOCKS}, with commas between: {BLOCKS}")
        return []
    return sorted({int(part) for part in parts})
