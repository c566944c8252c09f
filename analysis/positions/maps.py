"""Similarity of positional encodings: whether patches that belong together have encodings that do.

Source: Jelassi, Sander, Li 2022, arXiv 2210.09221: Definition 2.2 (patch association) and figure 1a (a map of PᵀP,
normalised to -1..1 and cut at 0.55: random before training, local after it).
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Float64, Int64

#: Of figure 1a: encodings whose similarity is above are drawn as alike.
THRESHOLD = 0.55

# Values that differ by less, as a share of the largest, are tied: float32 encodings know no better.
_TIE = 1e-6


def encoding_similarity(
    encodings: Float[np.ndarray, "patch dim"], *, centred: bool = False
) -> Float64[np.ndarray, "patch patch"]:
    """<p_i, p_j> / (|p_i| |p_j|): PᵀP normalised to -1..1 by the encodings' own lengths.

    Args:
        encodings: P, one row for each patch.
        centred: About their mean, which attention's softmax does not see where it is the same for all keys. It is most
            of the length in some ViTs, and would hide the rest.

    Raises:
        ValueError: Not finite, fewer than two, or an encoding of no length, such as all of them where all are the same.
    """
    values = np.asarray(encodings, dtype=np.float64)
    if values.ndim != 2 or len(values) < 2:
        raise ValueError(f"encodings have shape {values.shape}, expected 2 or more rows (patch, dim)")
    if not np.isfinite(values).all():
        raise ValueError(f"{np.flatnonzero(~np.isfinite(values).all(axis=1)).size} encodings are not finite")
    longest = np.linalg.norm(values, axis=1).max()
    if centred:
        values = values - values.mean(axis=0)
    lengths = np.linalg.norm(values, axis=1)
    if (lengths <= _TIE * longest).any():
        about = ", about their mean" if centred else ""
        raise ValueError(f"{int((lengths <= _TIE * longest).sum())} of {len(values)} encodings have no length{about}")
    unit = values / lengths[:, None]
    return np.clip(unit @ unit.T, -1, 1)


@dataclass(frozen=True, kw_only=True)
class Association:
    """How far a matrix of similarities knows a partition of the patches.

    Attributes:
        rows: Share of patches i whose C largest similarities, i's own among them, are those to their own set: what
            Definition 2.2 asks of every patch. A tie across the edge of the C largest counts as no.
        overlap: Share of a patch's C - 1 companions among its C - 1 most similar other patches, mean over patches;
            ties are broken evenly.
        chance: Of `overlap` where similarities know nothing.
    """

    rows: float
    overlap: float
    chance: float


def association(similarity: Float[np.ndarray, "patch patch"], sets: Int64[np.ndarray, " patch"]) -> Association:
    """The association score of Definition 2.2, Top_C{<p_i, p_j>}_j = S of i, and a softer one.

    Args:
        similarity: Row i belongs to query patch i; an attention matrix will do as well.
        sets: Number of the set that each patch belongs to.

    Raises:
        ValueError: Shapes that do not fit, or a set of one patch.
    """
    values = _square(similarity)
    same = np.asarray(sets)[:, None] == np.asarray(sets)[None, :]
    if same.shape != values.shape:
        raise ValueError(f"sets name {len(sets)} patches, similarity has {len(values)}")
    sizes = same.sum(axis=1)
    if (sizes < 2).any() or (sizes == len(values)).any():
        raise ValueError("expected two or more sets, of two or more patches each")
    edge = _TIE * np.abs(values).max()
    inside = np.where(same, values, np.inf).min(axis=1)
    outside = np.where(same, -np.inf, values).max(axis=1)
    others = ~np.eye(len(values), dtype=bool)
    hits = _top_hits(values, same & others, others)
    chance = ((sizes - 1) / (len(values) - 1)).mean()
    return Association(rows=float((inside > outside + edge).mean()), overlap=float(hits.mean()), chance=float(chance))


@dataclass(frozen=True, kw_only=True)
class Locality:
    """How far similar encodings are those of near patches.

    Attributes:
        neighbours: Share of a patch's up to 8 neighbours on the grid among as many of its most similar patches, mean
            over patches, ties broken evenly.
        chance: Of `neighbours` where encodings know nothing of the grid.
        correlation: Of similarity with distance, over pairs of different patches; negative where near ones are alike.
        above: Share of pairs of different patches whose similarity is above the threshold.
        discs: 1 where the patches above the threshold are the nearest there could be, 0 where they are as far as any;
            (mean distance of all pairs - found) / (mean of all - least possible). NaN where no pair, or each, is above.
    """

    neighbours: float
    chance: float
    correlation: float
    above: float
    discs: float


def locality(
    similarity: Float[np.ndarray, "patch patch"], grid: tuple[int, int], threshold: float = THRESHOLD
) -> Locality:
    """Compare similarities with the distances of a grid of patches, row by row.

    Args:
        similarity: Between patches, in row order.
        grid: Rows and columns.
        threshold: Above it two encodings are drawn as alike.

    Raises:
        ValueError: Another number of patches than the grid has, or fewer than three.
    """
    values = _square(similarity)
    n = len(values)
    if n != grid[0] * grid[1] or n < 3:
        raise ValueError(f"similarity of {n} patches for a grid of {grid[0]} x {grid[1]}, expected 3 or more that fit")
    places = np.indices(grid).reshape(2, -1).T
    apart = np.abs(places[:, None] - places[None, :])
    distance = np.hypot(apart[..., 0], apart[..., 1])
    others = ~np.eye(n, dtype=bool)
    near = (apart.max(axis=-1) == 1) & others
    chance = (near.sum(axis=1) / (n - 1)).mean()
    of_pairs, far = values[others], distance[others]
    constant = np.ptp(of_pairs) <= _TIE * np.abs(of_pairs).max() or np.ptp(far) == 0
    above = (values > threshold) & others
    return Locality(
        neighbours=float(_top_hits(values, near, others).mean()),
        chance=float(chance),
        correlation=float("nan") if constant else float(np.corrcoef(of_pairs, far)[0, 1]),
        above=float(above.sum() / others.sum()),
        discs=_disc_score(above, distance),
    )


def mosaic(
    similarity: Float[np.ndarray, "patch patch"], grid: tuple[int, int], most: int = 8
) -> Float64[np.ndarray, "height width"]:
    """Maps of single patches over the grid, side by side, each at its patch's own place; NaN between them.

    Args:
        similarity: Between patches, in row order.
        grid: Rows and columns.
        most: Maps along each side; of more patches, evenly spread ones are taken.
    """
    rows, columns = (np.unique(np.linspace(0, n - 1, min(n, most)).round().astype(int)) for n in grid)
    height, width = grid[0] + 1, grid[1] + 1
    picture = np.full((len(rows) * height - 1, len(columns) * width - 1), np.nan)
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            one = np.asarray(similarity)[row * grid[1] + column].reshape(grid)
            picture[i * height : i * height + grid[0], j * width : j * width + grid[1]] = one
    return picture


def _square(similarity: np.ndarray) -> Float64[np.ndarray, "patch patch"]:
    values = np.asarray(similarity, dtype=np.float64)
    if values.ndim != 2 or values.shape[0] != values.shape[1] or not np.isfinite(values).all():
        raise ValueError(f"similarity has shape {values.shape}, expected finite values (patch, patch)")
    return values


def _top_hits(
    values: Float64[np.ndarray, "query patch"],
    wanted: Bool[np.ndarray, "query patch"],
    among: Bool[np.ndarray, "query patch"],
) -> Float64[np.ndarray, " query"]:
    """Share of the n wanted in each row that are among its n largest values, ties broken evenly."""
    edge = _TIE * np.abs(values).max()
    found = np.empty(len(values))
    for i, (row, mask, allowed) in enumerate(zip(values, wanted, among)):
        row, mask = row[allowed], mask[allowed]
        n = int(mask.sum())
        last = np.sort(row)[-n]
        larger, tied = row > last + edge, np.abs(row - last) <= edge
        places = (n - larger.sum()) / tied.sum()
        found[i] = ((mask & larger).sum() + places * (mask & tied).sum()) / n
    return found


def _disc_score(above: Bool[np.ndarray, "patch patch"], distance: Float64[np.ndarray, "patch patch"]) -> float:
    counts = above.sum(axis=1)
    n = len(distance)
    least = np.sort(distance, axis=1)[:, 1:].cumsum(axis=1)  # the first is to itself
    best = sum(least[i, count - 1] for i, count in enumerate(counts) if count)
    expected = (counts * distance.sum(axis=1) / (n - 1)).sum()
    found = distance[above].sum()
    return float((expected - found) / (expected - best)) if expected > best + 1e-9 else float("nan")
