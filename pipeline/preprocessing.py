"""How an image becomes pixels, as a value that travels in identities and files; `pipeline.preprocess` does it."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

CROP_RATIO = 0.875
INTERPOLATIONS = ("bicubic", "bilinear")

_CHANNELS = 3


def resize_size_for(image_size: int) -> int:
    """Short side in px before the centre crop, so that the crop keeps 7/8 of it: 256 for 224."""
    return round(image_size / CROP_RATIO)


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """How an image becomes pixels; part of a store's identity.

    Attributes:
        image_size: Side of the square centre crop, px.
        resize_size: The short side is resized to this first, px; not under image_size.
        mean: Of each RGB channel over [0, 1]; subtracted.
        std: Of each RGB channel over [0, 1]; divided by.
        interpolation: "bicubic" or "bilinear", both with antialiasing, as PIL resizes.
    """

    image_size: int
    resize_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str = "bicubic"

    def __post_init__(self) -> None:
        problems = []
        if self.image_size < 1:
            problems.append(f"image_size is {self.image_size}, expected at least 1 px")
        if self.resize_size < self.image_size:
            problems.append(f"resize_size {self.resize_size} is under image_size {self.image_size}: the crop would pad")
        if len(self.mean) != _CHANNELS or len(self.std) != _CHANNELS:
            problems.append(f"mean and std have {len(self.mean)} and {len(self.std)} values, expected {_CHANNELS} each")
        if not all(value > 0 for value in self.std):
            problems.append(f"std is {self.std}, expected values above 0")
        if self.interpolation not in INTERPOLATIONS:
            problems.append(f"interpolation is {self.interpolation!r}, expected one of {sorted(INTERPOLATIONS)}")
        if problems:
            raise ValueError("preprocessing cannot be used: " + "; ".join(problems))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values: ints, strings and lists of floats."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "Preprocessing":
        """The inverse of to_dict.

        Raises:
            ValueError: A field is missing, unknown or out of range.
        """
        values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in fields.items()}
        try:
            return cls(**values)
        except TypeError as error:
            raise ValueError(f"preprocessing cannot be used: {error}") from error
