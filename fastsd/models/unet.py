"""The latent-diffusion UNet with cross-attention: SD1.x, SD2.x, SDXL, its refiner, inpainting, LCM.

A step costs `forward` alone. What does not depend on x is computed outside it: `time_rows` once a
schedule, `context` once a prompt. `standard` composes the three under the interface that other
tools expect. Parameter names are the diffusers layout's. Knows no sampler, prompt or file.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastsd.config import UNetConfig
from fastsd.errors import UsageError
from fastsd.models.layers import (
    KV,
    Attention,
    Downsample,
    GroupNorm,
    Level,
    Resnet,
    Transformer,
    TransformerBlock,
    Upsample,
    sinusoid,
    widen,
)


@final
class EmbeddingMLP(nn.Module):
    """Linear, SiLU, linear; before them an embedded guidance weight is added (Meng et al. 2023)."""

    def __init__(self, in_width: int, width: int, guidance_width: int = 0) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_width, width)
        self.cond_proj = nn.Linear(guidance_width, in_width, bias=False) if guidance_width else None
        self.linear_2 = nn.Linear(width, width)

    def forward(self, x: Tensor, guidance: Tensor | None = None) -> Tensor:
        """(…, in_width) -> (…, width)."""
        if self.cond_proj is not None and guidance is not None:
            x = x + self.cond_proj(guidance)
        out: Tensor = self.linear_2(F.silu(self.linear_1(x)))
        return out


@final
class UNet(nn.Module):
    """eps, v or x0 = unet(x, t, text) over latents (Rombach et al. 2022; Podell et al. 2023).

    to_rows: makes what all `time_projections` do, side by side, where those are one product.
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        first, last = config.widths[0], config.widths[-1]
        levels = range(len(config.widths))

        self.conv_in = nn.Conv2d(config.in_channels, first, 3, padding=1)
        self.time_embedding = EmbeddingMLP(first, config.time_width, config.guidance_width)
        self.add_embedding = (
            EmbeddingMLP(
                config.pooled_width + config.size_ids * config.size_width, config.time_width
            )
            if config.pooled_width
            else None
        )

        skips = [first]  # widths of what the down path saves, in order
        width = first
        down = []
        for i in levels:
            resnets = []
            for _ in range(config.layers_per_level):
                resnets.append(self._resnet(width, config.widths[i]))
                width = config.widths[i]
                skips.append(width)
            sampler = Downsample(width) if i < levels[-1] else None
            if sampler is not None:
                skips.append(width)
            down.append(Level(resnets, self._attentions(i, len(resnets)), sampler))
        self.down_blocks = nn.ModuleList(down)

        # Without attention the middle is a single resnet, as some distilled checkpoints have it.
        self.mid_block = Level(
            [self._resnet(last, last) for _ in range(2 if config.mid_depth else 1)],
            [self._transformer(levels[-1], config.mid_depth)] if config.mid_depth else [],
        )

        up = []
        for i in reversed(levels):
            resnets = []
            for _ in range(config.layers_per_level + 1):
                resnets.append(self._resnet(width + skips.pop(), config.widths[i]))
                width = config.widths[i]
            up.append(
                Level(resnets, self._attentions(i, len(resnets)), Upsample(width) if i else None)
            )
        self.up_blocks = nn.ModuleList(up)

        self.conv_norm_out = GroupNorm(config.norm_groups, first, eps=config.eps, silu=True)
        self.conv_out = nn.Conv2d(first, config.out_channels, 3, padding=1)
        self.to_rows: nn.Module | None
        self.register_module("to_rows", None)
        self._row_widths = [projection.out_features for projection in self.time_projections()]

    @property
    def dtype(self) -> torch.dtype:
        """The weights' dtype."""
        return self.conv_in.weight.dtype

    def time_rows(
        self,
        timesteps: Tensor,
        pooled: Tensor | None = None,
        size_ids: Tensor | None = None,
        guidance: Tensor | None = None,
    ) -> Tensor:
        """Embed a whole schedule: one row a timestep, holding what every resnet adds.

        timesteps: (S,), any dtype. pooled: (B, P) and size_ids: (B, ids) for SDXL, else None.
        guidance: (B,), the guidance weight minus one, for distilled UNets (Luo et al. 2023).
        Returns (S, B, E), or (S, 1, E) if nothing but the timesteps is given; E in forward order.
        """
        embedded = None
        if guidance is not None:
            embedded = sinusoid(1000 * guidance, self.config.guidance_width, shift=1.0)
        return self._rows(timesteps[:, None], pooled, size_ids, embedded)

    def time_projections(self) -> list[nn.Linear]:
        """List what every resnet projects the embedded time by, in forward order."""
        return [
            resnet.time_emb_proj
            for resnet in self.modules()
            if isinstance(resnet, Resnet) and resnet.time_emb_proj is not None
        ]

    def context(self, encoder_hidden_states: Tensor) -> list[KV]:
        """Project a text (B, N, C) to keys and values (B, M, N, K), a pair a cross-attention."""
        return [layer.keys_values(encoder_hidden_states) for layer in self.cross_attentions()]

    def cross_attentions(self) -> list[Attention]:
        """List the cross-attentions, in forward order."""
        return [
            block.attn2
            for block in self.modules()  # registered in forward order, as the resnets are
            if isinstance(block, TransformerBlock)
        ]

    def forward(self, x: Tensor, row: Tensor, kv: Sequence[KV]) -> Tensor:
        """Predict from x (B, C, H, W), a row (B or 1, E) of `time_rows` and `context`'s kv.

        H and W may be any, odd included. Returns (B, C_out, H, W).
        Guidance asks twice of one x: where kv (and row, unless it is 1) have 2 B, so has the
        result, and what comes before the first cross-attention is computed once for both.
        """
        return self.forward_deep(x, row, kv)[0]

    def forward_deep(self, x: Tensor, row: Tensor, kv: Sequence[KV]) -> tuple[Tensor, Tensor]:
        """Predict as `forward` does, and return beside it what the last resnet is given, (B, C, H,
        W): the work of all deeper layers, for `forward_shallow` to use again."""
        rows = iter(torch.split(row, self._row_widths, dim=-1))
        pairs = iter(kv)
        if row.shape[0] != 1:
            x = widen(x, row.shape[0])
        x = self.conv_in(x)
        skips = [x]
        for level in self.down_blocks:
            x = level(x, rows, pairs, saved=skips)
        x = self.mid_block(x, rows, pairs)
        *deeper, last = self.up_blocks
        for level in deeper:
            x = level(x, rows, pairs, skips=skips)
        deep = last(x, rows, pairs, skips=skips, only=slice(-1))
        x = last(deep, rows, pairs, skips=skips, only=slice(-1, None))
        out: Tensor = self.conv_out(self.conv_norm_out(x))
        return out, deep

    def forward_shallow(self, x: Tensor, row: Tensor, kv: Sequence[KV], deep: Tensor) -> Tensor:
        """Predict as `forward` does, but with the `deep` of an earlier step (Ma et al. 2023,
        DeepCache): only the first convolution and the last resnet see x and row anew.
        """
        if row.shape[0] != 1:
            x = widen(x, row.shape[0])
        rows = iter(torch.split(row, self._row_widths, dim=-1)[-1:])
        pairs = iter(kv[len(kv) - self.config.depths[0] :])
        last = self.up_blocks[-1]
        x = last(deep, rows, pairs, skips=[self.conv_in(x)], only=slice(-1, None))
        out: Tensor = self.conv_out(self.conv_norm_out(x))
        return out

    def standard(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        encoder_hidden_states: Tensor,
        text_embeds: Tensor | None = None,
        time_ids: Tensor | None = None,
        timestep_cond: Tensor | None = None,
    ) -> Tensor:
        """Predict as other tools call it: everything at once.

        sample: (B, C, H, W). timestep: a number, or int or float of shape (), (1,) or (B,).
        encoder_hidden_states: (B, N, C). text_embeds: (B, P) and time_ids: (B, ids) for SDXL.
        timestep_cond: (B, guidance_width), embedded already. Returns (B, C_out, H, W).
        """
        t = torch.as_tensor(timestep, device=sample.device).reshape(-1)
        row = self._rows(t, text_embeds, time_ids, timestep_cond)
        return self.forward(sample, row, self.context(encoder_hidden_states))

    def _rows(
        self,
        t: Tensor,
        pooled: Tensor | None,
        size_ids: Tensor | None,
        guidance: Tensor | None,
    ) -> Tensor:
        """Embed t (…,) and conditions (B, ·) that broadcast with it; project for every resnet."""
        takes_pooled = self.add_embedding is not None
        if {pooled is not None, size_ids is not None} != {takes_pooled}:
            raise UsageError(
                "this UNet needs pooled text and size ids, and not both were given"
                if takes_pooled
                else "pooled text or size ids were given to a UNet that takes none; leave them out"
            )
        if guidance is not None and self.time_embedding.cond_proj is None:
            raise UsageError(
                "an embedded guidance weight was given to a UNet that takes none; leave it out"
            )
        e = self.time_embedding(
            self._waves(t, self.config.widths[0]),
            None if guidance is None else guidance.to(self.dtype),
        )
        if self.add_embedding is not None and pooled is not None and size_ids is not None:
            sizes = self._waves(size_ids, self.config.size_width).flatten(-2)
            e = e + self.add_embedding(torch.cat([pooled.to(self.dtype), sizes], dim=-1))
        e = F.silu(e)
        if self.to_rows is not None:
            rows: Tensor = self.to_rows(e)
            return rows
        return torch.cat([projection(e) for projection in self.time_projections()], dim=-1)

    def _waves(self, numbers: Tensor, width: int) -> Tensor:
        return sinusoid(
            numbers,
            width,
            cos_first=self.config.flip_sin_to_cos,
            shift=self.config.frequency_shift,
        ).to(self.dtype)

    def _resnet(self, in_width: int, width: int) -> Resnet:
        config = self.config
        return Resnet(
            in_width,
            width,
            groups=config.norm_groups,
            eps=config.eps,
            time_width=config.time_width,
        )

    def _attentions(self, level: int, count: int) -> list[Transformer]:
        depth = self.config.depths[level]
        return [self._transformer(level, depth) for _ in range(count if depth else 0)]

    def _transformer(self, level: int, depth: int) -> Transformer:
        config = self.config
        return Transformer(
            config.widths[level],
            config.heads[level],
            config.context_width,
            depth,
            groups=config.norm_groups,
            linear=config.linear_projection,
            upcast=config.upcast_attention,
        )
