"""ViTs trained without the skip connections of one block: what their layers have in common, and what they still learn.

Raghu et al. 2021, figure 8 and appendix E: each model lacks both skips of one block from its first step on. Here it is
digits_vit on the digits, trained by its own recipe but in float32, which any processor is quick at, and in batches of
32: four times the steps for the same time, so that half the epochs do.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float64, UInt8
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from analysis.similarity import minibatch_cka
from analysis.vision.skips import WithoutSkips, crossing_cka
from infra.console import UserError
from infra.objects import ObjectMissingError, Objects
from pipeline.digits import DIGITS_PREPROCESSING, N_CLASSES, make_digits_vit
from pipeline.preprocess import normalise
from trainer.digits_teacher import DigitsTeacherConfig, evaluate, load_split, train_digits_teacher

#: Of the model without any such block.
WHOLE = 0


@dataclass(frozen=True, kw_only=True)
class SkipModel:
    """A trained model.

    Attributes:
        block: Whose skips it lacks, from 1; WHOLE for none.
        cka: Between its states, of held-out digits; CLS and patch means joined.
        accuracy: On the held-out digits.
        loss: Cross-entropy there, nats.
    """

    block: int
    cka: Float64[np.ndarray, "state state"]
    accuracy: float
    loss: float

    def crossing(self, block: int) -> float:
        """Mean CKA across a block, from 1."""
        return crossing_cka(self.cka, block - 1)


def skip_recipe(n_epochs: int, seed: int = 0) -> DigitsTeacherConfig:
    """How each of the models is trained."""
    return DigitsTeacherConfig(n_epochs=n_epochs, seed=seed, batch_size=32, bfloat16=False)


def remove_skips(model: Any, block: int) -> None:
    """Take the skips from a block, from 1; none for WHOLE."""
    if block != WHOLE:
        model.blocks[block - 1] = WithoutSkips(model.blocks[block - 1])


def model_key(block: int, config: DigitsTeacherConfig) -> str:
    """models/<block>-epochs<n>-seed<s>-<digest of the whole recipe>.safetensors: one of another recipe is another."""
    digest = hashlib.sha256(json.dumps(asdict(config), sort_keys=True).encode()).hexdigest()[:12]
    return f"models/{block:02d}-epochs{config.n_epochs}-seed{config.seed}-{digest}.safetensors"


def trained_model(
    saved: Objects, block: int, config: DigitsTeacherConfig, report: Callable[[str], None]
) -> tuple[nn.Module, nn.Linear]:
    """The model without the skips of a block, from where it was saved, or trained now and saved.

    Args:
        saved: Where `model_key` lies.
        block: From 1; WHOLE for none.
        config: The recipe.
        report: Told how far a training is.
    """
    key = model_key(block, config)
    model = make_digits_vit()
    head = nn.Linear(2 * model.embed_dim, N_CLASSES)
    remove_skips(model, block)
    try:
        nn.ModuleDict({"model": model, "head": head}).load_state_dict(load(saved.get(key)))
    except (SafetensorError, RuntimeError) as error:
        raise UserError(f"{key} cannot be used: {error}. Delete it, and it is trained again") from error
    except ObjectMissingError:
        result = train_digits_teacher(config, report=report, change=lambda new: remove_skips(new, block))
        trained = nn.ModuleDict({"model": result.model, "head": result.head})
        saved.put(key, save({name: tensor.contiguous() for name, tensor in trained.state_dict().items()}))
        return result.model, result.head
    return model.eval(), head.eval()


@torch.no_grad()
def states_of(model: Any, images: UInt8[Tensor, "image 3 height width"]) -> Float[np.ndarray, "image state feature"]:
    """CLS and patch mean, joined, of what enters the first block and of what leaves each."""
    found: list[Tensor] = []

    def keep(state: Tensor) -> None:
        found.append(torch.cat([state[:, 0], state[:, model.num_prefix_tokens :].mean(dim=1)], dim=-1))

    hooks = [model.blocks[0].register_forward_pre_hook(lambda module, args: keep(args[0]))]
    hooks += [block.register_forward_hook(lambda module, args, out: keep(out)) for block in model.blocks]
    try:
        model.forward_features(normalise(images, DIGITS_PREPROCESSING))
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(found, dim=1).numpy()


def measure_skip_models(
    saved: Objects, blocks: Sequence[int], config: DigitsTeacherConfig, report: Callable[[str], None]
) -> list[SkipModel]:
    """Train what is not there yet, and measure each model on the held-out digits."""
    images, labels = load_split("val")
    found = []
    for block in blocks:
        model, head = trained_model(saved, block, config, report)
        judged = evaluate(model, head, images, labels)
        cka = minibatch_cka(states_of(model, images), batch_rows=len(images)).values
        found.append(SkipModel(block=block, cka=cka, accuracy=judged.accuracy, loss=judged.loss))
    return found
