"""Vision transformers of timm with few channels and blocks, known to it by name: nothing here hangs on more of them."""

from typing import Any

from timm.models import generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer, _create_vision_transformer

DIM, DEPTH = 32, 2
#: Like vit_small_patch14_reg4_dinov2: made for 37 x 37 patches, positions for CLS and patches, four registers.
REGISTERS = "nano_with_registers"
#: Like vit_tiny_patch16_224.
PLAIN = "nano_without_registers"

_NORM = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225), "interpolation": "bicubic"}
_NAMES = {"first_conv": "patch_embed.proj", "classifier": "head"}
default_cfgs = generate_default_cfgs(
    {
        REGISTERS: {"input_size": (3, 518, 518), "crop_pct": 1.0, "num_classes": 0, **_NORM, **_NAMES},
        PLAIN: {"input_size": (3, 224, 224), "crop_pct": 0.9, "num_classes": 10, **_NORM, **_NAMES},
    }
)
"""Where `register_model` looks for them."""
_SIZE = {"embed_dim": DIM, "depth": DEPTH, "num_heads": 2}


@register_model
def nano_with_registers(pretrained: bool = False, **options: Any) -> VisionTransformer:
    own = {"patch_size": 14, "init_values": 1e-5, "reg_tokens": 4, "no_embed_class": True, **_SIZE}
    return _create_vision_transformer(REGISTERS, pretrained=pretrained, **(own | options))


@register_model
def nano_without_registers(pretrained: bool = False, **options: Any) -> VisionTransformer:
    return _create_vision_transformer(PLAIN, pretrained=pretrained, **({"patch_size": 16, **_SIZE} | options))
