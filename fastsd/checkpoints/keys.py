"""Weight names: what older tools wrote -> the diffusers layout's own, which our modules carry.

Also says what a set of keys looks like, for the error when they do not fit.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

# Buffers that older transformers saved; they hold 0, 1, 2, … and nothing reads them.
LEFTOVERS = frozenset({"embeddings.position_ids"})

_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_OLD_ATTENTION_KEY = re.compile(r"(.*attentions\.\d+\.)(query|key|value|proj_attn)(\..*)")

# The first that some key starts with names the family.
_FAMILIES = (
    ("model.diffusion_model.", "a whole Stable Diffusion checkpoint in one file"),
    ("lora_", "a LoRA"),
    ("base_model.model.", "a LoRA"),
    ("unet.down_blocks.", "a LoRA"),
    ("emb_params", "a textual inversion"),
    ("controlnet_", "a ControlNet"),
    ("control_model.", "a ControlNet"),
    ("double_blocks.", "a FLUX transformer"),
    ("transformer_blocks.", "a diffusion transformer (Stable Diffusion 3 or FLUX)"),
    ("joint_blocks.", "a diffusion transformer (Stable Diffusion 3)"),
    ("encoder.block.", "a T5 text encoder"),
    ("vision_model.", "a CLIP image encoder"),
    ("add_embedding.", "an SDXL UNet"),
    ("down_blocks.", "a UNet"),
    ("decoder.up_blocks.", "a VAE"),
    ("encoder.layers.", "a CLIP text encoder"),
    ("text_model.", "a CLIP text encoder"),
)


def canonical(part: str, key: str) -> str:
    """Return the name that our module of `part` has for `key`.

    CLIP: older transformers prefixed text_model. VAE: older diffusers called attention's layers
    query, key, value and proj_attn.
    """
    if part.startswith("text_encoder"):
        return key.removeprefix("text_model.")
    if part == "vae" and (old := _OLD_ATTENTION_KEY.fullmatch(key)):
        return old[1] + _OLD_ATTENTION[old[2]] + old[3]
    return key


def foreign(part: str, key: str) -> str:
    """Return the name to save `key` under: CLIP's with the prefix, which every version reads."""
    if part.startswith("text_encoder") and key != "text_projection.weight":
        return f"text_model.{key}"
    return key


def guess(keys: Iterable[str]) -> str:
    """Say what the keys look like, in words."""
    keys = list(keys)
    for prefix, family in _FAMILIES:
        if any(key.startswith(prefix) for key in keys):
            return family
    return "nothing known"
