"""What is drawn while a model is watched, to find the ranges of its numbers. Knows no pipeline."""

from __future__ import annotations

from typing import Any

from PIL import Image

from fastsd.config import ModelConfig

# For models whose makers give none: things, places, people and styles.
PROMPTS = (
    "a photograph of an astronaut riding a horse",
    "a bowl of fruit on a wooden table, morning light",
    "portrait of an old fisherman, oil painting",
    "a city street at night in the rain, neon signs",
    "a small red house by the sea, watercolor",
    "a cat sleeping on a pile of books",
    "mountains above the clouds at sunset, highly detailed",
    "an isometric drawing of a tiny workshop",
)
GUIDANCE = 7.5


def draw_settings(config: ModelConfig, size: tuple[int, int], steps: int) -> dict[str, Any]:
    """Return what a model is drawn with when it is calibrated, and compared with itself.

    GUIDANCE and `steps`, but models made for few steps as they were made. An inpainting model draws
    all but the edge of a grey picture. size: height, width.
    """
    height, width = size
    found: dict[str, Any] = {"height": height, "width": width}
    if config.schedule.steps is None:
        found |= {"num_inference_steps": steps, "guidance_scale": GUIDANCE}
    if config.inpaints:
        mask = Image.new("L", (width, height))
        mask.paste(255, (width // 8, height // 8, width - width // 8, height - height // 8))
        found |= {"image": Image.new("RGB", mask.size, "grey"), "mask_image": mask}
    return found
