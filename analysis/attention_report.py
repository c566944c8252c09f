"""What a report shows of where heads look, and of what skip connections carry against what branches add."""

import numpy as np

from analysis.attention import Looks
from analysis.page import Cell, Figure, Origin, Section, Table
from analysis.plots import Curve, curves
from analysis.verdicts import MARGIN, no_verdict, verdict


def attention_section(found: Looks, origin: Origin) -> Section:
    """How far heads look, and what skip connections carry against what branches add."""
    n_blocks, n_heads = found.distance.mean.shape
    blocks = np.arange(1.0, n_blocks + 1)
    ordered = np.sort(found.distance.mean, axis=1)
    shown = sorted({0, 1, n_blocks - 2, n_blocks - 1} & set(range(n_blocks)))
    heads = np.arange(1.0, n_heads + 1)
    by_head: dict[str, Curve] = {f"block {i + 1}": (heads, ordered[i], None) for i in shown}
    by_block: dict[str, Curve] = {
        "most local head": (blocks, ordered[:, 0], None),
        "mean over heads": (blocks, ordered.mean(axis=1), None),
        "most global head": (blocks, ordered[:, -1], None),
    }
    elsewhere: dict[str, Curve] = {"mean over heads": (blocks, found.elsewhere.mean.mean(axis=1), None)}
    parts: list[Figure | Table] = [
        Figure(
            title="Mean attention distance, heads sorted",
            svg=curves(by_head, x_name="head, from the most local", y_name="distance, px"),
            caption="The two lowest and the two highest blocks. Attention among patches, rows scaled to sum to 1.",
            origin=origin,
        ),
        Figure(
            title="Mean attention distance by block",
            svg=curves(by_block, x_name="block", y_name="distance, px"),
            caption="As above.",
            origin=origin,
        ),
        Figure(
            title="Attention of patches on CLS and registers",
            svg=curves(elsewhere, x_name="block", y_name="share of attention"),
            caption="What the distances leave out.",
            origin=origin,
        ),
    ]
    rows: list[list[Cell]] = [
        [block + 1, head, float(found.distance.mean[block, head]), float(found.elsewhere.mean[block, head])]
        for block in range(n_blocks)
        for head in range(n_heads)
    ]
    parts.append(
        Table(
            name="attention_distance",
            title="Attention distance",
            caption="px, and the share on other tokens.",
            columns=["block", "head", "distance", "elsewhere"],
            rows=rows,
            origin=origin,
        )
    )
    ratio_rows: list[list[Cell]] = []
    text = [_reach_statement(ordered, origin.n_images)]
    for name, ratios in (("attention", found.attention_ratio), ("mlp", found.mlp_ratio)):
        lines: dict[str, Curve] = {kind: (blocks, one.mean, one.std) for kind, one in ratios.items()}
        parts.append(
            Figure(
                title=f"Skip connection over {name} branch",
                svg=curves(lines, x_name="block", y_name="|z| / |f(z)|", log_y=True),
                caption="Length of what the skip carries over that of what the branch adds, mean of tokens. "
                "Bands: one standard deviation over images.",
                origin=origin,
            )
        )
        ratio_rows += [[name, kind, i + 1, float(one.mean[i])] for kind, one in ratios.items() for i in range(n_blocks)]
        if "cls" in ratios:
            half = n_blocks // 2
            listed = "; ".join(
                f"{kind} {ratios[kind].mean[:half].mean():.3g} in the first half of the blocks, "
                f"{ratios[kind].mean[half:].mean():.3g} in the second"
                for kind in ("cls", "patches")
            )
            text.append(
                f"{name} branch, |z| / |f(z)|: {listed}. Raghu et al. report CLS above patches first, and below "
                f"after; counted as such where each is so by {MARGIN:.0%}. "
                + verdict(_crosses(ratios["cls"].mean, ratios["patches"].mean), n_images=origin.n_images)
            )
    parts.append(
        Table(
            name="skip_ratios",
            title="Skip over branch",
            caption="Mean over images and tokens of |z| / |f(z)|.",
            columns=["branch", "kind", "block", "ratio"],
            rows=ratio_rows,
            origin=origin,
        )
    )
    return Section(title="Attention and branches", text=text, parts=parts)


def _crosses(cls: np.ndarray, patches: np.ndarray) -> bool:
    """Whether CLS is above patches in the first half of the blocks and below them in the second."""
    half = len(cls) // 2
    (first, after), (first_patches, after_patches) = ((one[:half].mean(), one[half:].mean()) for one in (cls, patches))
    return bool(first > (1 + MARGIN) * first_patches and after_patches > (1 + MARGIN) * after)


def _reach_statement(ordered: np.ndarray, n_images: int) -> str:
    low, high = ordered[:2], ordered[-2:]
    local = ordered.max() / 2
    if len(ordered) < 4:
        judged = no_verdict(f"{len(ordered)} blocks have no two lowest beside two highest")
    else:
        judged = verdict(low.min() < local <= low.max() and high.min() >= local, n_images=n_images)
    return (
        f"Heads of the two lowest blocks reach {low.min():.3g} to {low.max():.3g} px, of the two highest "
        f"{high.min():.3g} to {high.max():.3g} px. Raghu et al. report local and global heads in the lowest blocks, "
        f"global ones in the highest; counted as local below {local:.3g} px, half of the farthest of all. {judged}"
    )
