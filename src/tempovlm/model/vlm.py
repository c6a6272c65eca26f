"""The whole model: crops and tokens in, logits out, under a plan that is an argument.

It holds only weights: no knob is stored here, no clock runs here.
Shapes: `C` crops, `P` patches, `G` tokens of a crop, `B` batch, `T` tokens, `D` width, `V` vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tempovlm.model.attention import Span
from tempovlm.model.cache import FullCache, KVCache
from tempovlm.model.config import ModelConfig
from tempovlm.model.decoder import Decoder
from tempovlm.model.family import VisionLanguageModel
from tempovlm.model.prompt import Tokenizer, glance_places, glance_tokens
from tempovlm.model.vision.encoder import Projector, VisionTransformer


class Molmo(VisionLanguageModel):
    """A Molmo-style vision-language model of any size."""

    config_class = ModelConfig
    tokenizer_class = Tokenizer
    vision: VisionTransformer
    projector: Projector
    decoder: Decoder

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.vision = VisionTransformer(config.vision)
        self.projector = Projector(config)
        self.decoder = Decoder(config)

    def fill_tables(self) -> None:
        """Fill the rotary tables in float32."""
        self.decoder.rotary.reset()

    def hub_views(self) -> dict[str, Tensor]:
        """Published name of every tensor → its place in the model."""
        config = self.config
        own = {name: parameter.detach() for name, parameter in self.named_parameters()}
        table = own["decoder.embedding"]
        views = {"model.transformer.wte.embedding": table[: config.embedding_size]}
        if config.additional_vocab_size:
            views["model.transformer.wte.new_embedding"] = table[config.embedding_size :]
        views["model.transformer.ln_f.weight"] = own["decoder.norm.weight"]
        views["lm_head.weight"] = own["decoder.head.weight"]
        for i in range(config.num_blocks):
            views |= _block_views(own, f"decoder.blocks.{i}", f"model.transformer.blocks.{i}")
        for i in range(config.vision.num_blocks):
            hub = f"model.vision_backbone.image_vit.transformer.resblocks.{i}"
            views |= _vision_block_views(own, f"vision.blocks.{i}", hub)
        return views | _vision_views(own, "model.vision_backbone")

    def glance_tokens(self, question: str, style: str, tokenizer: Tokenizer) -> Tensor:
        """The stream (T,) of the global crop's places and a question, with room for one more token."""
        return glance_tokens(question, style, self.config, tokenizer)

    @torch.no_grad()
    def read_glances(self, glance: Tensor | None, tokens: Tensor, num_blocks: int) -> tuple[Tensor, Tensor]:
        """Read global crops and questions with the first blocks; keys and values (S, B, H, T, W).

        Args:
            glance: (B, G, D) projected tokens of the global crops; None without pictures.
            tokens: (B, T) streams of `glance_tokens`, padded on the right.
            num_blocks: that read, `S`.
        """
        x = self.decoder.embed(tokens)
        if glance is not None:
            x = x.index_add(1, glance_places(self.config).to(x.device), glance.to(x.dtype))
        B, T, _ = x.shape
        cache = KVCache.allocate(self.config, num_blocks, B, T, x)
        cos, sin = self.decoder.rotary(torch.arange(T, device=x.device).expand(B, T))
        for i, block in enumerate(self.decoder.first(num_blocks)):
            x = block(x, Span(0, cos, sin, None), cache, i, self.config.top_k)
        return cache.keys, cache.values

    def read_after(self, x: Tensor, keys: Tensor, values: Tensor, lengths: Tensor) -> Tensor:
        """Run the blocks of `read_glances` over one more embedding a row; its states (B, D), with gradients.

        Args:
            x: (B, D) embeddings, in the type of the keys.
            keys: (S, B, H, T, W) of what was read.
            values: (S, B, H, T, W), as `keys`.
            lengths: (B,) real tokens of each row.
        """
        T, row = keys.shape[3], lengths.unsqueeze(1)
        place = torch.arange(T + 1, device=x.device)
        seen = (place < row) | (place == T)
        cos, sin = self.decoder.rotary(row)
        span = Span(T, cos, sin, seen[:, None, None, :])
        cache, x = FullCache(keys, values), x.unsqueeze(1)
        for i, block in enumerate(self.decoder.first(len(keys))):
            x = block.differentiable(x, span, cache, i, self.config.top_k)
        return x[:, 0]


def _block_views(own: dict[str, Tensor], ours: str, hub: str) -> dict[str, Tensor]:
    """One decoder block; an expert's three matrices are parts of two stacked ones."""
    views = {
        f"{hub}.attn.att_proj.weight": own[f"{ours}.attention.qkv.weight"],
        f"{hub}.attn.attn_out.weight": own[f"{ours}.attention.out.weight"],
        f"{hub}.attn.attn_norm.weight": own[f"{ours}.attention.norm.weight"],
        f"{hub}.attn.q_norm.weight": own[f"{ours}.attention.q_norm.weight"],
        f"{hub}.attn.k_norm.weight": own[f"{ours}.attention.k_norm.weight"],
        f"{hub}.mlp.ff_norm.weight": own[f"{ours}.moe.norm.weight"],
        f"{hub}.mlp.gate.weight": own[f"{ours}.moe.router.weight"],
    }
    stacks = zip(own[f"{ours}.moe.gate_up"], own[f"{ours}.moe.down"], strict=True)
    for e, (gate_up, down) in enumerate(stacks):
        expert = f"{hub}.mlp.experts.{e}"
        views[f"{expert}.gate_proj.weight"], views[f"{expert}.up_proj.weight"] = gate_up.chunk(2)
        views[f"{expert}.down_proj.weight"] = down
    return views


def _vision_block_views(own: dict[str, Tensor], ours: str, hub: str) -> dict[str, Tensor]:
    return {
        **_parts(own, f"{ours}.qkv", f"{hub}.attention", ("wq", "wk", "wv")),
        **_parts(own, f"{ours}.out", f"{hub}.attention", ("wo",)),
        **_parts(own, f"{ours}.attention_norm", hub, ("attention_norm",)),
        **_parts(own, f"{ours}.mlp_norm", hub, ("ffn_norm",)),
        **_parts(own, f"{ours}.up", f"{hub}.feed_forward", ("w1",)),
        **_parts(own, f"{ours}.down", f"{hub}.feed_forward", ("w2",)),
    }


def _vision_views(own: dict[str, Tensor], hub: str) -> dict[str, Tensor]:
    gate, up = own["projector.gate_up.weight"].chunk(2)
    return {
        f"{hub}.pad_embed": own["projector.pad_embedding"],
        f"{hub}.image_vit.class_embedding": own["vision.class_embedding"],
        f"{hub}.image_vit.positional_embedding": own["vision.positions"],
        f"{hub}.image_vit.patch_embedding.weight": own["vision.patch_embedding.weight"],
        **_parts(own, "vision.pre_norm", f"{hub}.image_vit", ("pre_ln",)),
        **_parts(own, "projector.query", f"{hub}.image_pooling_2d", ("wq",)),
        **_parts(own, "projector.key_value", f"{hub}.image_pooling_2d", ("wk", "wv")),
        **_parts(own, "projector.out", f"{hub}.image_pooling_2d", ("wo",)),
        f"{hub}.image_projector.w1.weight": gate,
        f"{hub}.image_projector.w3.weight": up,
        f"{hub}.image_projector.w2.weight": own["projector.down.weight"],
    }


def _parts(own: dict[str, Tensor], ours: str, hub: str, names: tuple[str, ...]) -> dict[str, Tensor]:
    """Views of a layer with a bias that holds one or several published layers, one above the other."""
    views = {}
    for suffix in ("weight", "bias"):
        for name, part in zip(names, own[f"{ours}.{suffix}"].chunk(len(names)), strict=True):
            views[f"{hub}.{name}.{suffix}"] = part
    return views
