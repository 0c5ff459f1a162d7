"""`fastsd convert`: write a model in another form."""

from pathlib import Path
from typing import Annotated

import typer

from fastsd.cli.app import Lora, Prediction, Preset, Tokenizer, Vae, Variant, app, weighted_files


@app.command(
    epilog="""Examples:

\b
  fastsd convert model.safetensors model/            # a folder that diffusers loads
  fastsd convert model/ model.safetensors --dtype fp16
  fastsd convert old.ckpt model.safetensors          # the pickle's tensors, and nothing else
  fastsd convert lora.pt lora.safetensors
  fastsd convert xl.safetensors xl-fast/ --lora light4.safetensors --preset lightning-4

A folder keeps a preset, and is drawn with as such unasked; LoRAs become part of the weights.
A pickle is read by torch's weights-only loader in a process of its own, with bounds on its memory,
time and files; one that asks for more than weights is refused.
"""
)
def convert(
    source: Annotated[str, typer.Argument(help="A file, a folder, a hub id, or a pickle.")],
    target: Annotated[
        Path, typer.Argument(help="A new folder, or a new file that ends in .safetensors.")
    ],
    dtype: Annotated[
        str | None, typer.Option(help="fp32, fp16 or bf16. [default: the source's own]")
    ] = None,
    prediction: Prediction = None,
    preset: Preset = None,
    vae: Vae = None,
    lora: Lora = None,
    tokenizer: Tokenizer = None,
    variant: Variant = None,
) -> None:
    """Write a model in another form: safetensors only, whole or not at all; print its path."""
    from fastsd.checkpoints import convert as run

    run(
        source,
        target,
        dtype=dtype,
        prediction=prediction,
        preset=preset,
        vae=vae,
        tokenizer=tokenizer,
        variant=variant,
        loras=weighted_files(lora or ()),
    )
    print(target)
