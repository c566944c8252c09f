"""What a page shows of spectra over a training: scalars and singular values at each tap, trends, and statements."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict

import numpy as np

from analysis.page import Cell, Figure, Origin, Section, Table
from analysis.plots import depth_curves
from analysis.spectra import expected_participation_ratio
from analysis.training.records import EpochRecord, curves_of
from analysis.training.runs import Run
from analysis.training.taps import tap_title
from analysis.training.trends import STATED, Trend, lead, trends, turned_everywhere

_WAYS = {1: "rises", -1: "falls"}


def spectra_over_training(records: Sequence[EpochRecord], origin: Origin) -> Section:
    """Six scalars at each tap over the epochs, with the trends that the paper states and whether they hold.

    Args:
        records: Two epochs or more.
        origin: Of all of it.
    """
    epochs = [one.epoch for one in records]
    found = trends(records)
    parts: list[Figure | Table] = []
    for scalar, direction in STATED.items():
        title = scalar.replace("_", " ")
        lines = {tap_title(tap): values for tap, values in curves_of(records, scalar).items()}
        parts.append(
            Figure(
                title=f"{title.capitalize()} over training",
                svg=depth_curves(
                    lines, x=epochs, x_name="epoch", y_name=f"{title}, nats" if scalar == "entropy" else title,
                    log_y=scalar == "flatness",
                ),
                caption="Of the covariance of all tokens of all images at each tap; CLS final has one vector an image. "
                f"Dark: first taps. The paper says that it {_WAYS[direction]} over training.",
                origin=origin,
            )
        )  # fmt: skip
    parts += [_trend_table(found, origin), _scalar_table(records, origin)]
    return Section(title="Spectra over training", text=_trend_statements(records, found), parts=parts)


def decay_section(run: Run, origin: Origin) -> Section:
    """Singular values over the first, at a few taps, checkpoint by checkpoint."""
    taps = list(run.last.measured.singular_values)
    chosen = [taps[i] for i in sorted({0, 2, len(taps) // 2, len(taps) - 2, len(taps) - 1})]
    decays = {
        tap: {f"epoch {point.epoch}": _decay(point.measured.singular_values[tap]) for point in run.points}
        for tap in taps
    }
    parts: list[Figure | Table] = [
        Figure(
            title=f"Singular values, {tap_title(tap)}",
            svg=depth_curves(
                decays[tap],
                x=np.arange(1.0, 1 + len(run.last.measured.singular_values[tap])).tolist(),
                x_name="rank of the direction",
                y_name="singular value over the first",
                log_y=True,
            ),
            caption="Of the centred states at this tap. Dark: first epochs.",
            origin=origin,
        )
        for tap in chosen
    ]
    rows: list[Sequence[Cell]] = [
        [point.epoch, tap_title(tap), i, float(value), float(decay)]
        for point in run.points
        for tap, values in point.measured.singular_values.items()
        for i, (value, decay) in enumerate(zip(values, _decay(values), strict=True), 1)
    ]
    parts.append(
        Table(
            name="singular_values",
            title="Singular values",
            caption="Square roots of the covariance's eigenvalues, in the states' units; decay is each over the first.",
            columns=["epoch", "tap", "rank", "singular value", "decay"],
            rows=rows,
            origin=origin,
        )
    )
    steeper = [
        tap_title(tap)
        for tap, of_epochs in decays.items()
        if not list(of_epochs.values())[-1].mean() > next(iter(of_epochs.values())).mean()
    ]
    return Section(
        title="Singular values over training",
        text=[
            f"Spectra flatten over training, says the paper: the mean singular value over the first is larger at epoch "
            f"{run.last.epoch} than at epoch {run.points[0].epoch} at {len(taps) - len(steeper)} of "
            f"{len(taps)} taps{_but(steeper)}."
        ],
        parts=parts,
    )


def _decay(values: np.ndarray) -> np.ndarray:
    return values / values[0] if values[0] > 0 else np.full(len(values), np.nan)


def sample_size_section(n_vectors: Mapping[str, int], dim: int, record: EpochRecord, origin: Origin) -> Section:
    """How much of a tap's participation ratio its number of vectors allows: what taps may be compared in.

    Args:
        n_vectors: Rows of each tap's covariance.
        dim: Channels.
        record: Of one epoch.
        origin: Of all of it.
    """
    rows: list[Sequence[Cell]] = []
    for tap, n in n_vectors.items():
        limit = expected_participation_ratio(dim, n)
        ratio = record.scalars[tap].participation_ratio
        rows.append([tap_title(tap), n, limit, ratio, ratio / limit])
    low, high = min(n_vectors, key=lambda tap: n_vectors[tap]), max(n_vectors, key=lambda tap: n_vectors[tap])
    limits = [expected_participation_ratio(dim, n_vectors[tap]) for tap in (low, high)]
    return Section(
        title="Sample size",
        text=[
            f"{n_vectors[low]:,} vectors of {dim} channels, as {tap_title(low)} has, reach a participation ratio of "
            f"about {limits[0]:.1f} where all directions are equal, {n_vectors[high]:,} as {tap_title(high)} has "
            f"{limits[1]:.1f} (dim / (1 + dim / n), Marchenko and Pastur): {percent(limits[0] / limits[1])} of it. "
            "Tokens of one image are not independent, so that their number flatters."
        ],
        parts=[
            Table(
                name="sample_size",
                title="What the number of vectors allows",
                caption=f"At epoch {record.epoch}: participation ratio, and about what so many independent "
                "isotropic vectors would have.",
                columns=["tap", "n", "isotropic limit", "participation ratio", "share of the limit"],
                rows=rows,
                origin=origin,
            )
        ],
    )


def _trend_statements(records: Sequence[EpochRecord], found: dict[str, dict[str, Trend]]) -> list[str]:
    text = []
    for scalar, direction in STATED.items():
        of_taps = found[scalar]
        agree = [tap for tap, one in of_taps.items() if one.sign == direction]
        turned = [
            f"{tap_title(tap)} (epoch {one.peak_epoch}, {percent(one.retreat)} back)"
            for tap, one in of_taps.items()
            if one.turned and one.sign == direction
        ]
        dipped = [
            f"{tap_title(tap)} (epoch {one.dip_epoch})" for tap, one in of_taps.items() if one.dip_epoch is not None
        ]
        other = f" On the way it is on the other side of where it began at {', '.join(dipped)}." if dipped else ""
        against = [tap_title(tap) for tap in of_taps if tap not in agree]
        verdict = "holds" if not against and not turned else "does not hold everywhere"
        text.append(
            f"{scalar.replace('_', ' ').capitalize()} {_WAYS[direction]} over training, says the paper: {verdict}. "
            f"From epoch {records[0].epoch} to {records[-1].epoch} it {_WAYS[direction]} at {len(agree)} of "
            f"{len(of_taps)} taps{_but(against)}; it turns back at {', '.join(turned) if turned else 'none'}.{other}"
        )
    both = turned_everywhere(found)
    if both:
        text.append(
            "Ranks and anisotropy all turn back, so that the sentence is wrong in whatever is looked at, at "
            f"{', '.join(map(tap_title, both))}."
        )
    highest, lowest = lead(records, "effective_rank"), lead(records, "anisotropy", -1)
    final = list(records[0].scalars)[-1]
    is_so = "holds" if highest.tap == lowest.tap == final else "does not hold"
    text.append(
        f"CLS final ends with the highest effective rank and the lowest anisotropy, says the paper: {is_so}. The "
        f"highest rank is that of {tap_title(highest.tap)} since epoch {highest.since}, the lowest anisotropy that of "
        f"{tap_title(lowest.tap)} since epoch {lowest.since}."
    )
    return text


def _but(titles: Sequence[str]) -> str:
    return f", not at {', '.join(titles)}" if titles else ""


def _trend_table(found: dict[str, dict[str, Trend]], origin: Origin) -> Table:
    return Table(
        name="trends",
        title="Trends",
        caption="Sign of last - first; peak is the extreme in the stated direction, retreat the share of the way to it "
        "that is lost again at the end; turned where that is 5 % or more from a peak before the last tenth; dip epoch: "
        "where it is farthest on the other side of its first value, by 5 % or more, and still ends as stated.",
        columns=["scalar", "tap", "first", "last", "sign", "peak", "peak epoch", "retreat", "turned", "dip epoch"],
        rows=[
            [
                scalar,
                tap_title(tap),
                one.first,
                one.last,
                one.sign,
                one.peak,
                one.peak_epoch,
                one.retreat,
                "yes" if one.turned else "",
                one.dip_epoch,
            ]
            for scalar, of_taps in found.items()
            for tap, one in of_taps.items()
        ],
        origin=origin,
    )


def _scalar_table(records: Sequence[EpochRecord], origin: Origin) -> Table:
    names = list(STATED)
    return Table(
        name="epochs",
        title="Scalars at every epoch",
        caption="Of the covariance at each tap.",
        columns=["epoch", "tap", *(name.replace("_", " ") for name in names)],
        rows=[
            [record.epoch, tap_title(tap), *(asdict(scalars)[name] for name in names)]
            for record in records
            for tap, scalars in record.scalars.items()
        ],
        origin=origin,
    )


def percent(share: float) -> str:
    """Of 1, for people."""
    return f"{100 * share:.0f} %"
