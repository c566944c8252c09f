"""What a report shows of a teacher's position embeddings: maps of their similarity, how local it is, and controls."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass

import numpy as np
from jaxtyping import Float, Float64

from analysis.page import Cell, Figure, Origin, Section, Table
from analysis.plots import Curve, curves, pictures
from analysis.positions.maps import THRESHOLD, Locality, encoding_similarity, locality, mosaic

_AS_THEY_ARE, _CENTRED, _RANDOM = "as they are", "about their mean", "random, as before training"


@dataclass(frozen=True, kw_only=True)
class PositionMaps:
    """Similarities of one teacher's position embeddings.

    Attributes:
        grid: Rows and columns of patches.
        similarity: PᵀP normalised, of the embeddings as they are, about their mean, and of Gaussian ones of their size.
        locality: Of each.
    """

    grid: tuple[int, int]
    similarity: Mapping[str, Float64[np.ndarray, "patch patch"]]
    locality: Mapping[str, Locality]


def position_maps(encodings: Float[np.ndarray, "row column dim"], *, seed: int) -> PositionMaps:
    """Similarity and locality of position embeddings, beside those of random ones.

    Memory: 8 patch² bytes for each of three maps, and several times that while they are measured; 15 MB each for
    DINOv2's 37 x 37.

    Args:
        encodings: Of patches, on their grid.
        seed: Of the random ones.

    Raises:
        ValueError: As `encoding_similarity`: embeddings that are all zero, or a grid of fewer than three patches.
    """
    rows, columns, dim = encodings.shape
    flat = np.asarray(encodings, dtype=np.float64).reshape(-1, dim)
    drawn = np.random.default_rng(seed).standard_normal(flat.shape)
    similarity = {
        _AS_THEY_ARE: encoding_similarity(flat),
        _CENTRED: encoding_similarity(flat, centred=True),
        _RANDOM: encoding_similarity(drawn),
    }
    grid = (rows, columns)
    return PositionMaps(
        grid=grid,
        similarity=similarity,
        locality={name: locality(values, grid) for name, values in similarity.items()},
    )


def similarity_by_distance(
    similarity: Float[np.ndarray, "patch patch"], grid: tuple[int, int]
) -> tuple[Float64[np.ndarray, " distance"], Float64[np.ndarray, " distance"], Float64[np.ndarray, " distance"]]:
    """Distances rounded to whole patches, and mean and standard deviation of the similarity of pairs so far apart."""
    places = np.indices(grid).reshape(2, -1)
    apart = places[:, :, None] - places[:, None, :]
    steps = np.hypot(apart[0], apart[1]).round().astype(int).ravel()
    values = np.asarray(similarity, dtype=np.float64).ravel()
    counts = np.bincount(steps)
    mean = np.bincount(steps, values) / counts
    spread = np.sqrt(np.bincount(steps, (values - mean[steps]) ** 2) / counts)
    return np.arange(len(counts), dtype=np.float64), mean, spread


def map_section(found: PositionMaps, origin: Origin) -> Section:
    """Maps, similarity by distance, and whether what the paper says of a trained ViT holds here."""
    rows, columns = found.grid
    maps = {}
    for name, values in found.similarity.items():
        shown = mosaic(values, found.grid)
        maps[name] = shown
        maps[f"{name}, above {THRESHOLD:g}"] = np.where(np.isnan(shown), np.nan, np.where(shown > THRESHOLD, 1, -1))
    lines: dict[str, Curve] = {}
    for name, values in found.similarity.items():
        x, mean, spread = similarity_by_distance(values, found.grid)
        lines[name] = (x[1:], mean[1:], spread[1:])
    table_rows: list[list[Cell]] = [[name, *asdict(one).values()] for name, one in found.locality.items()]
    return Section(
        title="Positions of patches",
        text=[_statement(found)],
        parts=[
            Figure(
                title="Similarity of position embeddings",
                svg=pictures(maps, unit="<p_i, p_j> / (|p_i| |p_j|)", limits=(-1, 1)),
                caption=f"Each small map is one patch's similarity to all {rows} x {columns} patches and stands where "
                f"that patch does; right, what is above {THRESHOLD:g}, as in figure 1a of Jelassi et al. No unit.",
                origin=origin,
            ),
            Figure(
                title="Similarity by distance",
                svg=curves(lines, x_name="distance between two patches, patches", y_name="mean similarity"),
                caption="Mean over pairs of different patches, by their distance rounded to whole patches. Bands: one "
                "standard deviation over pairs.",
                origin=origin,
            ),
            Table(
                name="positions",
                title="How local the similarity is",
                caption="neighbours: share of a patch's up to 8 neighbours among as many most similar patches, and "
                "what chance would find; correlation: of similarity with distance; above: share of pairs above "
                f"{THRESHOLD:g}; discs: 1 where those are the nearest there could be, 0 where they are as far as any.",
                columns=["embeddings", *asdict(next(iter(found.locality.values())))],
                rows=table_rows,
                origin=origin,
            ),
        ],
    )


def _statement(found: PositionMaps) -> str:
    """About their mean, as the paper's maps are spread over -1..1: a part common to all would make all pairs alike."""
    own, random = found.locality[_CENTRED], found.locality[_RANDOM]
    holds = own.neighbours > 2 * own.chance and own.discs > 0.5
    as_sets = "no pair is, or each" if np.isnan(own.discs) else f"as sets they are discs to {own.discs:.2f}"
    return (
        "Jelassi et al.: before training the similarity of position embeddings has no structure, after it similar ones "
        f"are those of near patches. Here {'that holds' if holds else 'that does not hold'}: {own.neighbours:.0%} of a "
        f"patch's neighbours are among its most similar patches, {random.neighbours:.0%} with random embeddings, "
        f"{own.chance:.0%} by chance; {own.above:.1%} of pairs are above {THRESHOLD:g} ({random.above:.1%} with random "
        f"ones), {as_sets}, where 1 is the nearest patches there are and 0 any. (Embeddings about their mean. Holding "
        "means: more than twice chance, and discs above 0.5.)"
    )
