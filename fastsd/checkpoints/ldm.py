"""Weight names of the original layout (LDM, SGM) <-> the diffusers layout's.

The original numbers a UNet's blocks through (`input_blocks.7.1`) where diffusers nests them
(`down_blocks.2.attentions.0`); which is which depends on the number of levels and of layers a
level. So a map is built for one shape, as two tables: prefixes of modules, and what follows them.
Knows names only: no file, no tensor.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_VAE_RESNET = {"nin_shortcut": "conv_shortcut"}
_VAE_ATTENTION = {
    "norm": "group_norm",
    "q": "to_q",
    "k": "to_k",
    "v": "to_v",
    "proj_out": "to_out.0",
}
_OPEN_CLIP_LAYER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}
# in_proj_weight and in_proj_bias hold these three, one after the other in their rows
STACKED = ("q_proj", "k_proj", "v_proj")


@dataclass(frozen=True)
class NameMap:
    """prefixes: original module -> ours. inner: our prefix -> names inside it, original -> ours."""

    prefixes: Mapping[str, str]
    inner: Mapping[str, Mapping[str, str]]

    def ours(self, key: str) -> str | None:
        """Return our name of an original key such as input_blocks.1.0.in_layers.0.weight."""
        found = _longest_prefix(key, self.prefixes)
        if found is None:
            return None
        prefix, rest = found
        return self.prefixes[prefix] + _renamed(rest, self.inner.get(self.prefixes[prefix], {}))

    def original(self, name: str) -> str | None:
        """Return the original name of one of ours."""
        found = _longest_prefix(name, self._originals)
        if found is None:
            return None
        prefix, rest = found
        inner = {ours: theirs for theirs, ours in self.inner.get(prefix, {}).items()}
        return self._originals[prefix] + _renamed(rest, inner)

    @cached_property
    def _originals(self) -> dict[str, str]:
        return {ours: theirs for theirs, ours in self.prefixes.items()}


def _longest_prefix(key: str, prefixes: Mapping[str, str]) -> tuple[str, str] | None:
    """Split `key` after the longest whole prefix of `prefixes`; the rest begins with a dot."""
    end = len(key)
    while (end := key.rfind(".", 0, end)) > 0:
        if key[:end] in prefixes:
            return key[:end], key[end:]
    return None


def _renamed(rest: str, names: Mapping[str, str]) -> str:
    """Rename the module that `rest`, ".module.weight", names."""
    module, _, leaf = rest[1:].rpartition(".")
    return f".{names.get(module, module)}.{leaf}" if module else rest


def unet_map(attends: Iterable[bool], layers: int) -> NameMap:
    """Map a UNet's names. attends: of each level, from the finest; layers: resnets a level."""
    levels = list(attends)
    last = len(levels) - 1
    prefixes = {
        "time_embed.0": "time_embedding.linear_1",
        "time_embed.2": "time_embedding.linear_2",
        "label_emb.0.0": "add_embedding.linear_1",
        "label_emb.0.2": "add_embedding.linear_2",
        "input_blocks.0.0": "conv_in",
        "middle_block.0": "mid_block.resnets.0",
        "middle_block.1": "mid_block.attentions.0",
        "middle_block.2": "mid_block.resnets.1",
        "out.0": "conv_norm_out",
        "out.2": "conv_out",
    }
    for i, attention in enumerate(levels):
        for j in range(layers):
            block = f"input_blocks.{1 + i * (layers + 1) + j}"
            prefixes[f"{block}.0"] = f"down_blocks.{i}.resnets.{j}"
            if attention:
                prefixes[f"{block}.1"] = f"down_blocks.{i}.attentions.{j}"
        if i < last:
            block = f"input_blocks.{(i + 1) * (layers + 1)}"
            prefixes[f"{block}.0.op"] = f"down_blocks.{i}.downsamplers.0.conv"
    for i, attention in enumerate(reversed(levels)):
        for j in range(layers + 1):
            block = f"output_blocks.{i * (layers + 1) + j}"
            prefixes[f"{block}.0"] = f"up_blocks.{i}.resnets.{j}"
            if attention:
                prefixes[f"{block}.1"] = f"up_blocks.{i}.attentions.{j}"
        if i < last:
            prefixes[f"{block}.{2 if attention else 1}.conv"] = f"up_blocks.{i}.upsamplers.0.conv"
    return NameMap(prefixes, {ours: _RESNET for ours in prefixes.values() if ".resnets." in ours})


def vae_map(levels: int, layers: int) -> NameMap:
    """Map a VAE's names; its decoder has one more resnet a level."""
    prefixes = {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}
    for side in ("encoder", "decoder"):
        prefixes |= {
            f"{side}.conv_in": f"{side}.conv_in",
            f"{side}.mid.block_1": f"{side}.mid_block.resnets.0",
            f"{side}.mid.attn_1": f"{side}.mid_block.attentions.0",
            f"{side}.mid.block_2": f"{side}.mid_block.resnets.1",
            f"{side}.norm_out": f"{side}.conv_norm_out",
            f"{side}.conv_out": f"{side}.conv_out",
        }
    for i in range(levels):
        up = levels - 1 - i
        for j in range(layers):
            prefixes[f"encoder.down.{i}.block.{j}"] = f"encoder.down_blocks.{i}.resnets.{j}"
        for j in range(layers + 1):
            prefixes[f"decoder.up.{i}.block.{j}"] = f"decoder.up_blocks.{up}.resnets.{j}"
        if i < levels - 1:
            prefixes[f"encoder.down.{i}.downsample.conv"] = (
                f"encoder.down_blocks.{i}.downsamplers.0.conv"
            )
        if i > 0:
            prefixes[f"decoder.up.{i}.upsample.conv"] = f"decoder.up_blocks.{up}.upsamplers.0.conv"
    inner = {ours: _VAE_RESNET for ours in prefixes.values() if ".resnets." in ours}
    inner |= {ours: _VAE_ATTENTION for ours in prefixes.values() if ".attentions." in ours}
    return NameMap(prefixes, inner)


def clip_map(layers: int) -> NameMap:
    """Map the names of transformers' text model: ours, after a prefix that some merges dropped."""
    modules = ["embeddings", "final_layer_norm", *(f"encoder.layers.{i}" for i in range(layers))]
    bare = {module: module for module in modules}
    return NameMap(bare | {f"text_model.{module}": module for module in modules}, {})


def open_clip_map(layers: int) -> NameMap:
    """Map OpenCLIP's names, but for those that are not modules of ours: see OPEN_CLIP_TENSORS."""
    prefixes = {"token_embedding": "embeddings.token_embedding", "ln_final": "final_layer_norm"}
    blocks = {f"transformer.resblocks.{i}": f"encoder.layers.{i}" for i in range(layers)}
    return NameMap(prefixes | blocks, {ours: _OPEN_CLIP_LAYER for ours in blocks.values()})


OPEN_CLIP_TENSORS = {
    "positional_embedding": "embeddings.position_embedding.weight",
    "text_projection": "text_projection.weight",  # transposed
}
