"""A teacher small enough to reason about: block i adds i to everything.

So state l of any image is state 0 plus l (l + 1) / 2, exactly. With it the whole road from images to a store runs in
seconds, with no download and no GPU. It is a real class with timm's attributes, loaded as "fake_vit".
"""

import torch
from jaxtyping import Float
from torch import nn

from pipeline.preprocessing import Preprocessing, resize_size_for

IMAGE_SIZE = 16
PATCH_SIZE = 4
DIM = 8
N_BLOCKS = 3
N_REGISTERS = 2

FAKE_PREPROCESSING = Preprocessing(
    image_size=IMAGE_SIZE, resize_size=resize_size_for(IMAGE_SIZE), mean=(0.5,) * 3, std=(0.25,) * 3
)


class AddingBlock(nn.Module):
    """Adds its number to every value."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number: torch.Tensor
        self.register_buffer("number", torch.tensor(float(number)))
        self.attn = nn.Identity()
        self.attn.num_heads = 2  # type: ignore[assignment]

    def forward(self, x: Float[torch.Tensor, "batch token dim"]) -> Float[torch.Tensor, "batch token dim"]:
        """x plus the block's number."""
        return x + self.number


class PatchEmbed(nn.Module):
    """Non-overlapping patches, each seen through one linear map."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_size = (PATCH_SIZE, PATCH_SIZE)
        self.grid_size = (IMAGE_SIZE // PATCH_SIZE, IMAGE_SIZE // PATCH_SIZE)
        self.proj = nn.Conv2d(3, DIM, PATCH_SIZE, stride=PATCH_SIZE)

    def set_input_size(self, img_size: tuple[int, int]) -> None:
        """Expect images of another height and width, px."""
        self.grid_size = (img_size[0] // PATCH_SIZE, img_size[1] // PATCH_SIZE)

    def forward(self, pixels: Float[torch.Tensor, "batch 3 height width"]) -> Float[torch.Tensor, "batch patch dim"]:
        """Patch tokens in row order."""
        return self.proj(pixels).flatten(2).transpose(1, 2)


class FakeViT(nn.Module):
    """CLS, two registers, 16 patches of 8 channels, three adding blocks; only the embedding has random weights."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_dim = DIM
        self.num_prefix_tokens = 1 + N_REGISTERS
        self.patch_embed = PatchEmbed()
        self.cls_token = nn.Parameter(torch.randn(1, 1, DIM))
        self.reg_token = nn.Parameter(torch.randn(1, N_REGISTERS, DIM))
        self.blocks = nn.ModuleList(AddingBlock(number) for number in range(1, N_BLOCKS + 1))
        self.norm = nn.LayerNorm(DIM)

    def set_input_size(self, img_size: tuple[int, int]) -> None:
        """Expect images of another height and width, px; there are no positions to resample."""
        self.patch_embed.set_input_size(img_size)

    def forward_features(
        self, pixels: Float[torch.Tensor, "batch 3 height width"]
    ) -> Float[torch.Tensor, "batch token dim"]:
        """Normed tokens after the last block."""
        prefix = torch.cat([self.cls_token, self.reg_token], dim=1).expand(len(pixels), -1, -1)
        x = torch.cat([prefix, self.patch_embed(pixels)], dim=1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


def make_fake_vit() -> FakeViT:
    """A FakeViT with weights from torch's global generator."""
    return FakeViT()
