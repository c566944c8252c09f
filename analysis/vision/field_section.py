"""What a report shows of effective receptive fields, with the statements of Raghu et al. 2021."""

from collections.abc import Mapping

import numpy as np

from analysis.page import Figure, Origin, Section, Table
from analysis.plots import Curve, curves, pictures
from analysis.verdicts import MARGIN, verdict
from analysis.vision.receptive_field import ReceptiveField, TeacherFields
from analysis.vision.sections import some_of


def field_section(found: TeacherFields, origin: Origin) -> Section:
    """Effective receptive fields of the patch at the centre."""
    n_blocks = len(found.sums)
    blocks = np.arange(1.0, n_blocks + 1)
    both: Mapping[str, list[ReceptiveField]] = {
        "after the sum": list(found.sums),
        "attention before it is added": list(found.branches),
    }
    own = {name: np.array([one.own_share for one in fields]) for name, fields in both.items()}
    reach = {name: np.array([one.reach for one in fields]) for name, fields in both.items()}
    flat = found.sums[0].flat_reach
    area = float(np.prod(found.sums[0].cell) / found.sums[0].field.size)
    after, before = own["after the sum"], own["attention before it is added"]
    middle = n_blocks // 2
    maps = {
        f"{name}, block {i + 1}": np.log10(fields[i].field / fields[i].field.max() + 1e-4)
        for name, fields in (("sum", found.sums), ("attention", found.branches))
        for i in some_of(n_blocks, 4)
    }
    share_lines: dict[str, Curve] = {name: (blocks, values, None) for name, values in own.items()}
    share_lines["its share of the image"] = (blocks, np.full(n_blocks, area), None)
    reach_lines: dict[str, Curve] = {name: (blocks, values, None) for name, values in reach.items()}
    reach_lines["all pixels alike"] = (blocks, np.full(n_blocks, flat), None)
    wide = reach["after the sum"][middle] / flat
    return Section(
        title="Effective receptive field",
        text=[
            f"In the middle (block {middle + 1}) the centre's field reaches {wide:.0%} as far as one that sees all "
            "pixels alike. Raghu et al. report that it turns global in the middle of the network; counted as such "
            "above a half. " + verdict(bool(wide > 0.5), n_images=found.n_images),
            f"Its own patch still has {after[-1]:.1%} of the last block's field, {after[-1] / area:.1f} times its "
            "share of the image. Raghu et al. report that it stays peaked there; counted as such above twice. "
            + verdict(bool(after[-1] > 2 * area), n_images=found.n_images),
            f"Before the sum the own patch has less of the field in {int((before < after).sum())} of {n_blocks} "
            f"blocks. Raghu et al. report far less peaked fields there; counted as such where it has less by "
            f"{MARGIN:.0%} in all of them. "
            + verdict(bool((before < (1 - MARGIN) * after).all()), n_images=found.n_images),
        ],
        parts=[
            Figure(
                title="Fields of the centre",
                svg=pictures(maps, unit="log10 of |gradient| over its largest", limits=(-3, 0), columns=4),
                caption="Each picture is the image: how much a pixel moves the token at the centre, after the sum, and "
                f"what attention adds to it. Mean over {found.n_images} images with {found.n_draws} channel of each, "
                "drawn at random; summed over colours.",
                origin=origin,
            ),
            Figure(
                title="Share of the own patch",
                svg=curves(share_lines, x_name="block", y_name="share of the field", log_y=True),
                caption="Share of the field that lies on the token's own patch.",
                origin=origin,
            ),
            Figure(
                title="Reach of the field",
                svg=curves(reach_lines, x_name="block", y_name="mean distance, px"),
                caption="Distance to the token's centre, weighted by the field.",
                origin=origin,
            ),
            Table(
                name="receptive_fields",
                title="Receptive fields",
                caption="By block: share of the own patch and reach (px).",
                columns=["block", "where", "own share", "reach"],
                rows=[
                    [i + 1, name, float(own[name][i]), float(reach[name][i])] for name in both for i in range(n_blocks)
                ],
                origin=origin,
            ),
        ],
    )
