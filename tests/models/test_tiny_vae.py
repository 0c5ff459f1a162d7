"""The tiny autoencoder against diffusers' AutoencoderTiny at its true size."""

from __future__ import annotations

import json

import torch
from diffusers import AutoencoderTiny

from fastsd.checkpoints.configs import read_vae, write_vae
from fastsd.models.tiny_vae import TinyVAE
from tests.distances import relative_l2
from tests.models.oracles import BAR


def test_it_equals_diffusers() -> None:
    torch.manual_seed(0)
    theirs = AutoencoderTiny().eval().requires_grad_(False)
    config = read_vae(json.loads(json.dumps(dict(theirs.config))), tiny=True)
    assert (config.blocks, config.downscale, config.scale) == ((1, 3, 3, 3), 8, 1.0)
    ours = TinyVAE(config).eval().requires_grad_(False)
    ours.load_state_dict(theirs.state_dict())
    picture, latents = torch.rand(2, 3, 64, 48) * 2 - 1, 3 * torch.randn(2, 4, 8, 6)
    mean, log_variance = ours.encode(picture).chunk(2, dim=1)
    assert relative_l2(mean, theirs.encode(picture).latents) < BAR
    assert (log_variance == -30).all()
    assert relative_l2(ours.decode(latents), theirs.decode(latents).sample) < BAR
    assert read_vae(write_vae(config), tiny=True) == config
