"""What is exported: every part of a model as a module with named inputs and outputs, and its trace.

Two layouts. `standard` has the parts and names that other tools expect (diffusers' ONNX and
OpenVINO exports, Optimum, openvino-genai). `fast` is our own contract (backends/base.py): what does
not depend on the latents is made once by parts of its own.

Knows no target's library.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, final

import torch
from torch import Tensor, nn

from fastsd.artifact import TensorSpec, digest_of
from fastsd.backends.for_gpu import JoinedUNet
from fastsd.checkpoints import Checkpoint
from fastsd.config import ModelConfig
from fastsd.errors import UsageError
from fastsd.models.clip import CLIPOutput, CLIPText
from fastsd.models.unet import UNet
from fastsd.models.vae import VAE, fit_fp16_

LAYOUTS = ("standard", "fast")
SHALLOW = ("aoti",)  # targets whose steps may reuse what the deeper layers made (unet_shallow)
ONCE = ("aoti", "aoti-cuda")  # targets whose UNet takes each picture once, guided or not
JOINED = ("aoti-cuda",)  # targets whose UNet takes keys and values as one tensor
QUANTISED = ("int8", "fp8")  # precisions that need a QuantSpec

Told = UNet | JoinedUNet  # what does a UNet's work, by the same methods


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the user asked to be exported.

    size: height and width in pixels. batch: pictures at once. dynamic: size and batch may vary.
    refit: let TensorRT engines take other weights later.
    floor: the PSNR in dB that the receipt's worst picture must reach. prompts: to calibrate and
    measure with; () takes the model's own.
    """

    target: str
    precision: str = "fp32"
    size: tuple[int, int] = (512, 512)
    batch: int = 1
    dynamic: bool = False
    layout: str = "standard"
    floor: float | None = None
    prompts: tuple[str, ...] = ()
    refit: bool = False

    def __post_init__(self) -> None:
        if self.layout not in LAYOUTS:
            raise UsageError(f"layout {self.layout!r} is unknown; it is {' or '.join(LAYOUTS)}")
        if self.batch < 1:
            raise UsageError(f"batch must be 1 or more, not {self.batch}")
        if any(side < 8 or side % 8 for side in self.size):
            height, width = self.size
            raise UsageError(f"size must be multiples of 8 pixels, not {width}x{height}")


@final
@dataclass(frozen=True, eq=False)
class GraphPart:
    """A part ready to be traced.

    module: takes `inputs` in order and returns one tensor, or a tuple, named by `outputs`.
    inputs: their specs, whose words are the sizes that may vary. example: tensors to trace with.
    """

    name: str
    module: nn.Module
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[str, ...]
    example: tuple[Tensor, ...]


def part_names(checkpoint: Checkpoint, request: Request) -> tuple[str, ...]:
    """Return the parts of a model in the request's layout."""
    hoisted = ("unet_time", "unet_context") if request.layout == "fast" else ()
    shallow = ("unet_shallow",) if request.target in SHALLOW else ()
    return (*checkpoint.config.text_parts, *hoisted, "unet", *shallow, "vae_decoder", "vae_encoder")


def load_part(
    checkpoint: Checkpoint,
    name: str,
    request: Request,
    dtype: torch.dtype,
    prepared: Callable[[str, nn.Module], nn.Module] = lambda part, module: module,
) -> GraphPart:
    """Load one part in the request's layout and sizes.

    dtype: of weights and activations. VAEs that overflow in fp16 are rescaled inside.
    prepared: given the part's name and the model loaded for it, returns what is traced instead.
    """
    component = next((whole for whole in ("unet", "vae") if name.startswith(whole)), name)
    module = checkpoint.load(component, dtype)
    if isinstance(module, VAE):
        fit_fp16_(module)
    module = prepared(name, module)
    if isinstance(module, UNet) and request.target in JOINED:
        module = JoinedUNet(module, next(module.parameters()).device)
    return _PARTS[name](module, checkpoint.config, request, dtype)


# --- sizes ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Sizes:
    """The sizes of a request: numbers where fixed, words where they may vary."""

    request: Request
    config: ModelConfig

    @property
    def rows(self) -> int | str:
        """Of the UNet: two a picture under guidance, one for models made to do without.

        Whose guidance can be switched on all the same have two where other tools run them.
        """
        made_for = self.config.schedule.guidance
        unguided = self.request.layout == "fast" and made_for is not None and made_for <= 1
        per_picture = 1 if unguided or self.config.unet.guidance_width else 2
        return "rows" if self.request.dynamic else per_picture * self.request.batch

    @property
    def pictures(self) -> int | str:
        return "pictures" if self.request.dynamic else self.request.batch

    @property
    def pixels(self) -> tuple[int | str, int | str]:
        factor = self.config.vae.downscale
        if self.request.dynamic:
            return (f"{factor}*latent_height", f"{factor}*latent_width")
        return self.request.size

    @property
    def tokens(self) -> int | str:
        """Of the context: one chunk, or any number of them."""
        return "tokens" if self.request.dynamic else self.config.text_encoders[0].max_tokens

    @property
    def latent(self) -> tuple[int | str, int | str]:
        factor = self.config.vae.downscale
        height, width = self.request.size
        if self.request.dynamic:
            return ("latent_height", "latent_width")
        return (height // factor, width // factor)


# What sizes that may vary are traced with: unlike each other and any fixed size, never 0 or 1.
_TRACED = {
    "rows": 2,
    "pictures": 2,
    "steps": 3,
    "tokens": 154,
    "latent_height": 16,
    "latent_width": 24,
}


def _traced_with(size: int | str) -> int:
    if isinstance(size, int):
        return size
    factor, _, name = size.rpartition("*")
    return int(factor or 1) * _TRACED[name]


def _example(spec: TensorSpec, high: int = 1) -> Tensor:
    shape = [_traced_with(size) for size in spec.shape]
    generator = torch.Generator().manual_seed(0)
    dtype: torch.dtype = getattr(torch, spec.dtype)
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator).to(dtype)
    return torch.randint(0, high, shape, generator=generator, dtype=dtype)


def dtype_name(dtype: torch.dtype) -> str:
    """Return numpy's name, as a TensorSpec has it."""
    return str(dtype).removeprefix("torch.")


# --- tracing -------------------------------------------------------------------------------------

# A side of one pixel, at a UNet's lowest level, is a case of its own to torch's tracer, which asks
# to be told that there is none. Graphs hold no such case: they run at any size.
_SMALLEST = {"latent_height": 9, "latent_width": 9}  # 2 pixels wide after three halvings


def traced(part: GraphPart) -> torch.export.ExportedProgram:
    """Trace a part; the sizes that are words may vary."""
    with quiet(), torch.no_grad():  # with gradients Inductor would freeze nothing
        return torch.export.export(
            part.module, part.example, dynamic_shapes=(_dynamic(part),), strict=False
        )


def _dynamic(part: GraphPart) -> tuple[dict[int, Any], ...]:
    """Name the sizes that may vary: "rows", or "8*latent_height" for a multiple of another."""
    dims: dict[str, Any] = {}

    def dim(word: str) -> Any:
        factor, _, name = word.rpartition("*")
        if name not in dims:
            dims[name] = torch.export.Dim(name, min=_SMALLEST.get(name))
        return int(factor) * dims[name] if factor else dims[name]

    return tuple(
        {axis: dim(size) for axis, size in enumerate(spec.shape) if isinstance(size, str)}
        for spec in part.inputs
    )


@contextmanager
def quiet() -> Iterator[None]:
    """Hold back what tracers and compilers warn of in their own code."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


# --- the parts' modules --------------------------------------------------------------------------


class _Call(nn.Module):
    """One function of a module, traced as `forward`."""

    def __init__(self, module: nn.Module, function: Callable[..., Any]) -> None:
        super().__init__()
        self.module = module
        self.function = function

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(*inputs)


def _text_part(index: int) -> Callable[..., GraphPart]:
    def make(
        module: CLIPText, config: ModelConfig, request: Request, dtype: torch.dtype
    ) -> GraphPart:
        text = config.text_encoders[index]
        name = config.text_parts[index]
        sizes = _Sizes(request, config)
        # openvino-genai encodes the negative prompt beside the prompt.
        rows = sizes.rows if request.target == "openvino" else sizes.pictures
        spec = TensorSpec("input_ids", "int64", (rows, text.max_tokens))
        outputs: tuple[str, ...] = (
            ("last_hidden_state", "pooler_output")
            if text.projection is None
            else ("text_embeds", "last_hidden_state")
        )
        # clip_skip reads an earlier layer, through the final norm where the UNet reads the last.
        # In the standard layout other tools expect that one alone.
        norm: nn.Module = nn.Identity() if config.text_layer != -1 else module.final_layer_norm
        if config.text_layer != -1 or request.layout == "fast":
            outputs += tuple(f"hidden_states.{i}" for i in range(text.layers + 1))

        def encode(input_ids: Tensor) -> tuple[Tensor | None, ...]:
            out: CLIPOutput = module(input_ids)
            named = {
                "last_hidden_state": out.last,
                "pooler_output": out.pooled,
                "text_embeds": out.embeds,
                **{f"hidden_states.{i}": norm(hidden) for i, hidden in enumerate(out.hidden)},
            }
            return tuple(named[name] for name in outputs)

        example = (_example(spec, text.vocab_size),)
        return GraphPart(name, _Call(module, encode), (spec,), outputs, example)

    return make


def _unet_standard(
    module: UNet, config: ModelConfig, request: Request, dtype: torch.dtype
) -> GraphPart:
    unet, sizes, name = config.unet, _Sizes(request, config), dtype_name(dtype)
    whole = request.target == "openvino"  # openvino-genai gives int64 of shape (1,), nothing else
    inputs = [
        TensorSpec("sample", name, (sizes.rows, unet.in_channels, *sizes.latent)),
        TensorSpec("timestep", "int64", (1,)) if whole else TensorSpec("timestep", "float32", ()),
        TensorSpec("encoder_hidden_states", name, (sizes.rows, sizes.tokens, unet.context_width)),
    ]
    if unet.pooled_width:
        inputs += [
            TensorSpec("text_embeds", name, (sizes.rows, unet.pooled_width)),
            TensorSpec("time_ids", "float32", (sizes.rows, unet.size_ids)),
        ]
    if unet.guidance_width:
        inputs.append(TensorSpec("timestep_cond", name, (sizes.rows, unet.guidance_width)))
    takes = [spec.name for spec in inputs]

    def predict(*given: Tensor) -> Tensor:
        return module.standard(**dict(zip(takes, given, strict=True)))

    return GraphPart(
        "unet", _Call(module, predict), tuple(inputs), ("out_sample",), _examples(inputs)
    )


def _examples(inputs: list[TensorSpec]) -> tuple[Tensor, ...]:
    return tuple(_example(spec, 1000) for spec in inputs)


def _unet_fast(
    module: Told, config: ModelConfig, request: Request, dtype: torch.dtype, part: str = "unet"
) -> GraphPart:
    unet, sizes, name = config.unet, _Sizes(request, config), dtype_name(dtype)
    zeros = partial(torch.zeros, device=next(module.parameters()).device)
    with torch.no_grad():
        text = zeros(1, config.text_encoders[0].max_tokens, unet.context_width, dtype=dtype)
        kv = dict(zip(_kv_names(module), _flat(module.context(text)), strict=True))
        width = module.time_rows(
            zeros(1),
            zeros(1, unet.pooled_width) if unet.pooled_width else None,
            zeros(1, unet.size_ids) if unet.pooled_width else None,
        ).shape[-1]
    # Guidance asks twice of one picture. Where the batch is fixed, the graph repeats it itself,
    # after what the two rows share; were it to vary, the tracer could not tell rows from pictures.
    once = request.target in ONCE
    alike = once and not (unet.pooled_width or unet.guidance_width)  # rows of time alone
    samples = sizes.pictures if once else sizes.rows
    inputs = [
        TensorSpec("sample", name, (samples, unet.in_channels, *sizes.latent)),
        TensorSpec("row", name, (1 if alike else sizes.rows, width)),
        *(
            TensorSpec(
                label, dtype_name(t.dtype), (sizes.rows, *t.shape[1:-2], sizes.tokens, t.shape[-1])
            )
            for label, t in kv.items()
        ),
    ]
    if part == "unet_shallow":
        last = len(kv) - 2 * unet.depths[0]  # the last resnet's attentions, if it has any
        deep = TensorSpec("deep", name, (sizes.rows, unet.widths[0], *sizes.latent))
        inputs = [*inputs[:2], deep, *inputs[2 + last :]]

    def given(flat: Sequence[Tensor]) -> Any:
        return flat[0] if isinstance(module, JoinedUNet) else _paired(flat)

    def predict(sample: Tensor, row: Tensor, *flat: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        if part == "unet_shallow":
            return module.forward_shallow(sample, row, given(flat[1:]), flat[0])
        if request.target in SHALLOW:
            return module.forward_deep(sample, row, given(flat))
        out: Tensor = module(sample, row, given(flat))
        return out

    reused = request.target in SHALLOW and part == "unet"
    outputs = ("out_sample", "deep") if reused else ("out_sample",)
    return GraphPart(part, _Call(module, predict), tuple(inputs), outputs, _examples(inputs))


def _kv_names(module: Told) -> tuple[str, ...]:
    """Name what a UNet makes of a text: keys and values layer by layer, or of all as one."""
    if isinstance(module, JoinedUNet):
        return ("kv",)
    layers = range(len(module.cross_attentions()))
    return tuple(f"{letter}.{i}" for i in layers for letter in "kv")


def _flat(context: Any) -> tuple[Tensor, ...]:
    """List the tensors that `_kv_names` names."""
    return (context,) if isinstance(context, Tensor) else tuple(t for kv in context for t in kv)


def _paired(flat: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    return list(zip(flat[::2], flat[1::2], strict=True))


def _unet(module: UNet, config: ModelConfig, request: Request, dtype: torch.dtype) -> GraphPart:
    make = _unet_standard if request.layout == "standard" else _unet_fast
    return make(module, config, request, dtype)


def _unet_time(
    module: Told, config: ModelConfig, request: Request, dtype: torch.dtype
) -> GraphPart:
    unet, sizes = config.unet, _Sizes(request, config)
    inputs = [TensorSpec("timesteps", "float32", ("steps",))]
    if unet.pooled_width:
        inputs += [
            TensorSpec("pooled", dtype_name(dtype), (sizes.rows, unet.pooled_width)),
            TensorSpec("size_ids", "float32", (sizes.rows, unet.size_ids)),
        ]
    if unet.guidance_width:
        inputs.append(TensorSpec("guidance", "float32", (sizes.rows,)))
    takes = [spec.name for spec in inputs]

    def embed(*given: Tensor) -> Tensor:
        return module.time_rows(**dict(zip(takes, given, strict=True)))

    return GraphPart("unet_time", _Call(module, embed), tuple(inputs), ("rows",), _examples(inputs))


def _unet_context(
    module: Told, config: ModelConfig, request: Request, dtype: torch.dtype
) -> GraphPart:
    sizes = _Sizes(request, config)
    spec = TensorSpec(
        "encoder_hidden_states",
        dtype_name(dtype),
        (sizes.rows, sizes.tokens, config.unet.context_width),
    )

    def project(context: Tensor) -> tuple[Tensor, ...]:
        return _flat(module.context(context))

    return GraphPart(
        "unet_context", _Call(module, project), (spec,), _kv_names(module), _examples([spec])
    )


def _vae_decoder(
    module: VAE, config: ModelConfig, request: Request, dtype: torch.dtype
) -> GraphPart:
    sizes = _Sizes(request, config)
    shape = (sizes.pictures, config.vae.latent_channels, *sizes.latent)
    spec = TensorSpec("latent_sample", dtype_name(dtype), shape)
    return GraphPart(
        "vae_decoder", _Call(module, module.decode), (spec,), ("sample",), _examples([spec])
    )


def _vae_encoder(
    module: VAE, config: ModelConfig, request: Request, dtype: torch.dtype
) -> GraphPart:
    sizes = _Sizes(request, config)
    shape = (sizes.pictures, config.vae.in_channels, *sizes.pixels)
    spec = TensorSpec("sample", dtype_name(dtype), shape)
    return GraphPart(
        "vae_encoder",
        _Call(module, module.encode),
        (spec,),
        ("latent_parameters",),
        _examples([spec]),
    )


_PARTS: dict[str, Callable[..., GraphPart]] = {
    "text_encoder": _text_part(0),
    "text_encoder_2": _text_part(1),
    "unet": _unet,
    "unet_shallow": partial(_unet_fast, part="unet_shallow"),
    "unet_time": _unet_time,
    "unet_context": _unet_context,
    "vae_decoder": _vae_decoder,
    "vae_encoder": _vae_encoder,
}


def source_digest(checkpoint: Checkpoint) -> str:
    """Return the SHA-256 of a checkpoint's weights and configs, wherever it lies."""
    weights = {
        part: [digest_of(file) for file in files.weights]
        for part, files in checkpoint.parts.items()
    }
    facts: dict[str, Any] = {"weights": weights, "config": asdict(checkpoint.config)}
    facts["tokenizers"] = [tokenizer.digest for tokenizer in checkpoint.tokenizers]
    if checkpoint.merged:
        facts["merged"] = [(lora.digest(), strength) for lora, strength in checkpoint.merged]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
