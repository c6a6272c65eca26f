"""The published implementation on the same weights, if a folder with its modelling files is given.

The files belong to their authors and are no part of this project: `TEMPOVLM_REFERENCE` names a checkout of
github.com/ChulanZhang/molmo_hf, whose `molmo/models` holds them. The implementation runs as published: weights and
residual stream in float32, under bfloat16 autocast; and in float32 throughout. Tokens are forced in one pass
without a cache. It needs transformers and einops.

Shapes: `N` compared positions, `V` vocabulary, `C` crops, `G` tokens of a crop.
"""

from __future__ import annotations

import importlib
import sys
import types
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from parity_runs import full_float32
from tempovlm.engine.runner import Prepared
from tempovlm.model.config import ModelConfig
from tempovlm.model.vlm import Molmo

NO_PLACE = -100
"""The published mark of an image feature without a place in the stream."""

CONSTANTS: dict[str, Any] = {
    "attention_dropout": 0.0,
    "embedding_dropout": 0.0,
    "residual_dropout": 0.0,
    "include_bias": False,
    "bias_for_layer_norm": False,
    "rope": True,
    "rope_impl": "llama",
    "attention_type": "sdpa",
    "float32_attention": True,
    "max_position_embeddings": 32768,
    "scale_logits": False,
    "tie_word_embeddings": False,
}
"""Fields of the published config that this project's reader does not need."""


def _fields(config: ModelConfig) -> dict[str, Any]:
    fields, vision = config.to_hub(), config.vision
    fields["vision_backbone"] |= {
        "image_num_key_value_heads": vision.num_heads,
        "image_head_dim": vision.width // vision.num_heads,
        "image_num_pos": vision.num_patches + 1,
        "image_pos_patch_size": vision.patch_size,
        "image_mlp_activations": "quick_gelu",
    }
    fields.pop("model_type")
    return {**fields, **CONSTANTS, "vocab_size": config.embedding_size}


def _import(folder: Path) -> tuple[Any, Any]:
    """Model and config class; packages are entered without running their own start-up code."""
    for name, path in (("molmo", folder / "molmo"), ("molmo.models", folder / "molmo" / "models")):
        package = types.ModuleType(name)
        package.__path__ = [str(path)]
        sys.modules[name] = package
    modeling = importlib.import_module("molmo.models.modeling_molmoe")
    config = importlib.import_module("molmo.models.config_molmoe")
    return modeling.MolmoForCausalLM, config.MolmoConfig


class Published:
    """The published model on the memory of a float32 model of this project; `remark` says how it went."""

    def __init__(self, folder: Path, exact: Molmo) -> None:
        make, make_config = _import(folder)
        views, attention = exact.hub_views(), torch.backends.cuda.mem_efficient_sdp_enabled()
        with torch.device("meta"):  # most weights are drawn nowhere; the rest is replaced
            model = make(make_config(**_fields(exact.config)))
        torch.backends.cuda.enable_mem_efficient_sdp(attention)  # the published code switches it off for all
        pads = nn.Parameter(torch.empty(2, exact.config.vision.feature_width, device="meta"))
        model.model.vision_backbone.register_parameter("pad_embed", pads)
        model.load_state_dict(views, strict=True, assign=True)
        self.model, self.device = model.eval().requires_grad_(False), exact.decoder.embedding.device
        self.remark = "compared"

    def __call__(self, ready: Prepared, forced: Tensor) -> dict[str, Tensor]:
        """Logits (N, V) under autocast and in float32; nothing once the published code has failed."""
        if self.remark != "compared":
            return {}
        try:
            return {
                "published_autocast": self.logits(ready, forced, is_autocast=True),
                "published_float32": self.logits(ready, forced, is_autocast=False),
            }
        except Exception as error:  # noqa: BLE001 - other people's code on another version of its libraries
            self.remark = f"not compared: it fails with {_one_line(error)}"
            return {}

    @torch.no_grad()
    def logits(self, ready: Prepared, forced: Tensor, *, is_autocast: bool) -> Tensor:
        """Logits (N, V), float32, after the prompt and after each token of `forced` (N - 1,)."""
        tokens = torch.cat((ready.prompt.tokens.to(self.device), forced.to(self.device)))
        inputs: dict[str, Tensor] = {"input_ids": tokens[None]}
        crops, slots = ready.crops, ready.prompt.slots
        if crops is not None and slots is not None:
            places = torch.where(slots < 0, NO_PLACE, slots).view(len(crops.index), -1)
            inputs |= {
                "images": crops.patches[crops.index][None].to(self.device),
                "image_masks": crops.masks[None].to(self.device),
                "image_input_idx": places[None].to(self.device),
            }
        kind = self.device.type
        with torch.autocast(kind, torch.bfloat16) if is_autocast else full_float32():
            out: Tensor = self.model(**inputs, use_cache=False, return_dict=True).logits
        return out[0, len(ready.prompt.tokens) - 1 :].float()


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def load(folder: str | None, exact: Molmo) -> tuple[Published | None, str]:
    """The published model, or None and the reason in one line."""
    if not folder:
        return None, "not compared: TEMPOVLM_REFERENCE names no folder"
    try:
        model = Published(Path(folder), exact)
    except Exception as error:  # noqa: BLE001 - other people's code on another version of its libraries
        return None, f"not compared: it cannot be loaded, {_one_line(error)}"
    return model, model.remark
