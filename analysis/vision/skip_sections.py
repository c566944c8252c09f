"""What is shown of ViTs that were trained without the skips of one block."""

from collections.abc import Sequence

from analysis.page import Cell, Figure, Origin, Section, Table
from analysis.plots import model_maps
from analysis.verdicts import verdict
from analysis.vision.skip_training import WHOLE, SkipModel

_COLLAPSES = 0.5  # of a CKA, as of the accuracy after layer swaps
_POINTS = (2, 8)  # half and twice the published fall of accuracy


def trained_section(found: Sequence[SkipModel], origin: Origin) -> Section:
    """CKA between the layers of each model, and its accuracy beside the whole one's.

    Args:
        found: The whole model among them.
        origin: Of all of them.
    """
    whole = next(one for one in found if one.block == WHOLE)
    others = [one for one in found if one.block != WHOLE]
    names = {one.block: "whole" if one.block == WHOLE else f"without skips in block {one.block}" for one in found}
    n_states = len(whole.cka)
    rows: list[list[Cell]] = [["whole", None, None, whole.accuracy, whole.loss]]
    text = [f"The whole model names {whole.accuracy:.1%} of the held-out digits rightly."]
    for one in others:
        own, usual = one.crossing(one.block), whole.crossing(one.block)
        rows.append([names[one.block], own, usual, one.accuracy, one.loss])
        text.append(
            f"Without skips in block {one.block}: accuracy {one.accuracy:.1%}, "
            f"{100 * (whole.accuracy - one.accuracy):.1f} points less; mean CKA across the block {own:.3f}, in the "
            f"whole model {usual:.3f}."
        )
    if others:
        shares = [one.crossing(one.block) / whole.crossing(one.block) for one in others]
        listed = ", ".join(f"{share:.0%}" for share in shares)
        text.append(
            f"CKA across the block is {listed} of that in the whole model. Raghu et al. report that it collapses; "
            f"counted as such where each is {_COLLAPSES:.0%} or less. "
            + verdict(all(share <= _COLLAPSES for share in shares), n_images=origin.n_images, values=shares)
        )
        middle = [one for one in others if n_states // 4 < one.block <= 3 * n_states // 4]
        if middle:
            drops = ", ".join(f"{100 * (whole.accuracy - one.accuracy):.1f}" for one in middle)
            least, most = _POINTS
            held = all(least <= 100 * (whole.accuracy - one.accuracy) <= most for one in middle)
            text.append(
                f"For blocks in the middle accuracy falls by {drops} points. Raghu et al. report about 4; counted as "
                f"such from {least} to {most}. " + verdict(held, n_images=origin.n_images)
            )
    maps = {names[one.block]: one.cka for one in found}
    matrices: list[Figure | Table] = [
        Table(
            name=f"skips_cka_{one.block:02d}",
            title=f"CKA, {names[one.block]}",
            caption="Rows and columns are states.",
            columns=["state", *map(str, range(n_states))],
            rows=[[state, *map(float, row)] for state, row in enumerate(one.cka)],
            origin=origin,
        )
        for one in found
    ]
    return Section(
        title="Trained without skip connections",
        text=text,
        parts=[
            Figure(
                title="Linear CKA between layers",
                svg=model_maps(
                    maps,
                    layers={name: range(n_states) for name in maps},
                    cuts={names[one.block]: [] if one.block == WHOLE else [one.block - 0.5] for one in found},
                    unit="linear CKA, unbiased",
                    limits=(0, 1),
                ),
                caption="Of CLS and patch means joined, all held-out digits as one batch. Line: the block without "
                "skips.",
                origin=origin,
            ),
            Table(
                name="skips",
                title="Models",
                caption="CKA across the block without skips in this model, and in the whole one; accuracy, and loss "
                "in nats.",
                columns=["model", "CKA across", "CKA across, whole", "accuracy", "loss"],
                rows=rows,
                origin=origin,
            ),
            *matrices,
        ],
    )
