"""The contenders that fastsd is measured against. The only shipped file that imports diffusers.

Each is what a user of that tool does: diffusers as it stands; the same compiled; and diffusers with
its UNet and VAE decoder replaced by a plain export that another engine runs. Exports are prepared
once, for one size and batch, and kept in the user's cache.
"""

from __future__ import annotations

import inspect
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn

from fastsd.benchmarks.contenders import BENCH_EXTRA, Scene
from fastsd.benchmarks.drawing import Drawer, PipelineDrawer, Watch
from fastsd.checkpoints import Checkpoint, open_checkpoint
from fastsd.checkpoints.configs import write_clip, write_unet, write_vae
from fastsd.checkpoints.schedulers import write_schedule
from fastsd.checkpoints.weights import PRECISIONS
from fastsd.errors import MissingDependency
from fastsd.files import published_folder
from fastsd.samplers import resolve

CALIBRATION_STEPS = 8
CALIBRATION_PROMPTS = ("a lighthouse in a storm", "portrait of an old man, oil painting")

# --- diffusers ------------------------------------------------------------------------------------


def diffusers_pipeline(
    model: Path | Checkpoint,
    dtype: torch.dtype = torch.float32,
    components: Mapping[str, Any] | None = None,
) -> Any:
    """Load a folder with diffusers as its users do, quietly, without its safety checker.

    A checkpoint without files (random weights) is given to diffusers' own classes in memory.
    components: what takes the place of the folder's own.
    """
    try:
        import diffusers
    except ImportError as error:
        raise MissingDependency(
            f"diffusers is needed for the baseline ({error}); run {BENCH_EXTRA}"
        ) from None
    given = dict(components or {})
    if isinstance(model, Checkpoint) and not model.path.is_dir():
        pipeline = _assemble(model, given)
    else:
        folder = model.path if isinstance(model, Checkpoint) else model
        with warnings.catch_warnings():  # of what it then puts right itself
            warnings.filterwarnings("ignore", "The configuration file of this scheduler")
            pipeline = diffusers.DiffusionPipeline.from_pretrained(
                folder, local_files_only=True, **given
            )
    pipeline.set_progress_bar_config(disable=True)
    # Explicitly: parts come in whatever dtype their files or that library's release prefers. And
    # not by an argument: its name changed between releases. It warns of a cast even where nothing
    # is to stay as it was.
    verbosity = diffusers.logging.get_verbosity()
    diffusers.logging.set_verbosity_error()
    try:
        return pipeline.to(dtype)
    finally:
        diffusers.logging.set_verbosity(verbosity)


def _assemble(checkpoint: Checkpoint, components: dict[str, Any]) -> Any:
    """Build diffusers' and transformers' own classes around a checkpoint's weights."""
    import diffusers
    import transformers

    config = checkpoint.config
    parts = dict(components)
    for index, encoder in enumerate(config.text_encoders):
        suffix = "" if index == 0 else f"_{index + 1}"
        tokenizer = checkpoint.tokenizers[index]
        written = write_clip(encoder, bos=tokenizer.bos, pad=tokenizer.pad)
        kind = getattr(transformers, written["architectures"][0])
        with torch.device("meta"):
            model = kind(transformers.CLIPTextConfig(**written))
        weights = checkpoint.load(f"text_encoder{suffix}").state_dict()
        prefix = (
            "text_model."
            if any(key.startswith("text_model.") for key in model.state_dict())
            else ""
        )
        _adopt(
            model,
            {
                key if key.startswith("text_projection") else prefix + key: w
                for key, w in weights.items()
            },
        )
        parts[f"text_encoder{suffix}"] = model
        with tempfile.TemporaryDirectory() as folder:
            tokenizer.save(folder)
            parts[f"tokenizer{suffix}"] = transformers.CLIPTokenizer.from_pretrained(folder)
    for name, kind in (("unet", diffusers.UNet2DConditionModel), ("vae", diffusers.AutoencoderKL)):
        if name not in parts:
            parts[name] = _on_meta(kind, checkpoint)
            _adopt(parts[name], checkpoint.load(name).state_dict())
    parts["scheduler"] = _scheduler(checkpoint, None)
    if config.family == "sdxl":
        return diffusers.StableDiffusionXLPipeline(
            **parts,
            force_zeros_for_empty_prompt=config.zero_empty_negative,
            add_watermarker=False,
        )
    return diffusers.StableDiffusionPipeline(
        **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )


def _on_meta(kind: Any, checkpoint: Checkpoint) -> Any:
    """Build a diffusers UNet or VAE of a checkpoint's architecture, without weights."""
    config = checkpoint.config
    is_unet = kind.__name__ == "UNet2DConditionModel"
    with torch.device("meta"):
        return kind.from_config(
            write_unet(config.unet) if is_unet else write_vae(config.vae)
        ).eval()


def _adopt(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Give a module on the meta device weights, shared, and as buffers positions: 0, 1, 2, …"""
    model.load_state_dict(weights, assign=True)
    for name, buffer in list(model.named_buffers()):
        if buffer.is_meta:
            owner, _, leaf = name.rpartition(".")
            positions = torch.arange(buffer.numel()).view(buffer.shape)
            model.get_submodule(owner).register_buffer(leaf, positions, persistent=False)
    model.eval().requires_grad_(False)


def _scheduler(checkpoint: Checkpoint, sampler: str | None) -> Any:
    import diffusers

    schedule = checkpoint.config.schedule
    if sampler:
        name, spacing = resolve(sampler)
        schedule = replace(
            schedule, sampler=name, sigma_spacing=spacing or schedule.sigma_spacing, order=None
        )
    config = write_schedule(schedule)
    return getattr(diffusers, config.pop("_class_name")).from_config(config)


def _pipeline(scene: Scene, precision: str = "fp32", **components: Any) -> Any:
    checkpoint = open_checkpoint(scene.model)
    pipeline = diffusers_pipeline(checkpoint, PRECISIONS[precision], components)
    if scene.sampler:
        pipeline.scheduler = _scheduler(checkpoint, scene.sampler)
    return pipeline.to(scene.device)


def open_diffusers(scene: Scene, *, precision: str = "fp32") -> Drawer:
    """Diffusers as it stands."""
    return _drawer(_pipeline(scene, precision), scene)


def _drawer(pipeline: Any, scene: Scene) -> Drawer:
    """Draw with a pipeline of diffusers', from the noise that it starts from in fp32.

    In half precision it would draw noise in that, which makes other numbers of the same seed, and
    another picture.
    """

    def noise(generator: torch.Generator) -> Tensor:
        side = scene.size // pipeline.vae_scale_factor
        shape = (1, pipeline.unet.config.in_channels, side, side)
        return torch.randn(shape, generator=generator).to(pipeline.unet.dtype)

    half = pipeline.unet.dtype != torch.float32
    return PipelineDrawer(pipeline, scene, _watch_diffusers, noise=noise if half else None)


def open_compiled(scene: Scene, *, precision: str = "fp32", mode: str | None = None) -> Drawer:
    """Diffusers with UNet and VAE decoder compiled; on a GPU channels-last, as its guide says."""
    pipeline = _pipeline(scene, precision)
    if scene.device == "cuda":
        pipeline.unet.to(memory_format=torch.channels_last)
        pipeline.vae.to(memory_format=torch.channels_last)
    else:
        torch._inductor.config.freezing = True
    pipeline.unet.forward = torch.compile(pipeline.unet.forward, mode=mode, fullgraph=True)
    if mode and precision == "fp16" and pipeline.vae.config.force_upcast:
        # Diffusers moves this VAE to fp32 and back in every call: a graph would be recorded anew.
        mode = "max-autotune-no-cudagraphs" if mode == "max-autotune" else None
    pipeline.vae.decode = torch.compile(pipeline.vae.decode, mode=mode, fullgraph=True)
    return _drawer(pipeline, scene)


@contextmanager
def _watch_diffusers(pipeline: Any, watch: Watch) -> Iterator[None]:
    spots = [
        ("text_encoder", pipeline.text_encoder, "forward"),
        ("unet", pipeline.unet, "forward"),
        ("scheduler", pipeline.scheduler, "step"),
        ("vae", pipeline.vae, "decode"),
    ]
    if getattr(pipeline, "text_encoder_2", None) is not None:
        spots.append(("text_encoder", pipeline.text_encoder_2, "forward"))
    before = [(owner, name, owner.__dict__.get(name)) for _, owner, name in spots]
    for part, owner, name in spots:
        setattr(owner, name, _same_signature(watch, part, getattr(owner, name)))
    try:
        yield
    finally:
        for owner, name, own in before:
            if own is None:
                delattr(owner, name)  # the class's method shows again
            else:
                setattr(owner, name, own)


def _same_signature(watch: Watch, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Time `function`; diffusers looks at signatures to know what a scheduler takes."""
    timed = watch.wrap(part, function)
    timed.__signature__ = inspect.signature(function)  # type: ignore[attr-defined]
    return timed


# --- plain exports --------------------------------------------------------------------------------


@final
class _UNetCall(nn.Module):
    """A diffusers UNet as a function of tensors alone."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        text_embeds: Tensor | None = None,
        time_ids: Tensor | None = None,
    ) -> Tensor:
        added = None if text_embeds is None else {"text_embeds": text_embeds, "time_ids": time_ids}
        out: Tensor = self.unet(
            sample, timestep, encoder_hidden_states, added_cond_kwargs=added, return_dict=False
        )[0]
        return out


@final
class _DecoderCall(nn.Module):
    """A diffusers VAE's decoder as a function of tensors alone."""

    def __init__(self, vae: nn.Module) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, latents: Tensor) -> Tensor:
        out: Tensor = self.vae.decode(latents, return_dict=False)[0]  # type: ignore[operator]
        return out


Engine = Callable[..., Tensor]


def _examples(scene: Scene, checkpoint: Checkpoint) -> dict[str, tuple[Tensor, ...]]:
    """Inputs of the shapes that the scene has: for the UNet, for the decoder."""
    config = checkpoint.config
    side = scene.size // config.vae.downscale
    rows = scene.batch * (2 if scene.guided else 1)
    latents = (config.vae.latent_channels, side, side)
    tokens = config.text_encoders[0].max_tokens
    unet: tuple[Tensor, ...] = (
        torch.randn(rows, *latents),
        torch.tensor([500.0]),
        torch.randn(rows, tokens, config.unet.context_width),
    )
    if config.unet.pooled_width:
        pooled, ids = config.unet.pooled_width, config.unet.size_ids
        unet = (*unet, torch.randn(rows, pooled), torch.full((rows, ids), float(scene.size)))
    return {"unet": unet, "vae": (torch.randn(scene.batch, *latents),)}


def _calls(pipeline: Any) -> dict[str, nn.Module]:
    return {"unet": _UNetCall(pipeline.unet).eval(), "vae": _DecoderCall(pipeline.vae).eval()}


def _with_engines(scene: Scene, engines: Mapping[str, Engine]) -> Drawer:
    """A diffusers pipeline whose UNet and decoder are shells around `engines`."""
    import diffusers

    checkpoint = open_checkpoint(scene.model)
    shells = {
        "unet": _shell(diffusers.UNet2DConditionModel, checkpoint),
        "vae": _shell(diffusers.AutoencoderKL, checkpoint),
    }

    def forward(
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        added_cond_kwargs: Mapping[str, Tensor] | None = None,
        **_: Any,
    ) -> tuple[Tensor]:
        added = added_cond_kwargs or {}
        inputs = [sample, timestep.float().reshape(1), encoder_hidden_states]
        inputs += [added[name].float() for name in ("text_embeds", "time_ids") if name in added]
        return (engines["unet"](*inputs),)

    def decode(latents: Tensor, **_: Any) -> tuple[Tensor]:
        return (engines["vae"](latents),)

    shells["unet"].forward = forward
    shells["vae"].decode = decode
    pipeline = _pipeline(scene, **shells)
    return PipelineDrawer(pipeline, scene, _watch_diffusers, fixed_batch=True)


def _shell(kind: Any, checkpoint: Checkpoint) -> Any:
    """A diffusers module that knows its config, holds no weights and says it is on the CPU."""
    module = _on_meta(kind, checkpoint)
    for owner in module.modules():
        for name in list(owner._parameters):
            owner._parameters[name] = nn.Parameter(torch.empty(0), requires_grad=False)
    return module


# --- ONNX Runtime ---------------------------------------------------------------------------------


def prepare_onnx(scene: Scene, folder: str) -> None:
    """Export UNet and decoder with torch.onnx, shapes fixed."""
    checkpoint = open_checkpoint(scene.model)
    calls = _calls(_pipeline(scene))
    with published_folder(Path(folder)) as draft, torch.no_grad():
        for name, example in _examples(scene, checkpoint).items():
            torch.onnx.export(
                calls[name],
                example,
                draft / f"{name}.onnx",
                dynamo=True,
                external_data=True,
                verbose=False,
            )


def open_onnxruntime(scene: Scene, folder: str) -> Drawer:
    """The plain ONNX export in ONNX Runtime. Raises MissingDependency if it has none for GPUs."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = scene.threads
    providers = ["CPUExecutionProvider"]
    if scene.device == "cuda":
        providers.insert(0, "CUDAExecutionProvider")

    def engine(name: str) -> Engine:
        session = onnxruntime.InferenceSession(
            str(Path(folder, f"{name}.onnx")), options, providers=providers
        )
        if providers[0] not in session.get_providers():  # it warns, and takes the CPU
            raise MissingDependency(
                "this ONNX Runtime has no CUDA; run pip install onnxruntime-gpu in its place"
            )
        names = [entry.name for entry in session.get_inputs()]

        def run(*inputs: Tensor) -> Tensor:
            arrays = [tensor.contiguous().cpu().numpy() for tensor in inputs]
            (out,) = session.run(None, dict(zip(names, arrays, strict=True)))
            return torch.from_numpy(out).to(scene.device)

        return run

    return _with_engines(scene, {name: engine(name) for name in ("unet", "vae")})


# --- OpenVINO -------------------------------------------------------------------------------------


def prepare_openvino(scene: Scene, folder: str, *, int8: bool = False) -> None:
    """Convert UNet and decoder, shapes fixed; int8: quantise the UNet after training, with NNCF."""
    import openvino

    checkpoint = open_checkpoint(scene.model)
    pipeline = _pipeline(scene)
    calls, examples = _calls(pipeline), _examples(scene, checkpoint)
    with published_folder(Path(folder)) as draft:
        for name, example in examples.items():
            with torch.no_grad():
                model = openvino.convert_model(
                    calls[name], example_input=example, input=[tuple(t.shape) for t in example]
                )
            if int8 and name == "unet":
                model = _nncf(model, _calibration(scene, pipeline))
            openvino.save_model(model, draft / f"{name}.xml", compress_to_fp16=False)


def _nncf(model: Any, inputs: list[tuple[Tensor, ...]]) -> Any:
    import nncf

    arrays = [tuple(tensor.numpy() for tensor in call) for call in inputs]
    return nncf.quantize(
        model,
        nncf.Dataset(arrays),
        model_type=nncf.ModelType.TRANSFORMER,
        preset=nncf.QuantizationPreset.MIXED,
        subset_size=len(arrays),
    )


def open_openvino(scene: Scene, folder: str, *, int8: bool = False) -> Drawer:
    """The plain conversion in OpenVINO, set for latency.

    int8: it is in the files; the rest is in what OpenVINO holds best on this CPU, else in fp32.
    """
    import openvino

    core = openvino.Core()
    settings: dict[str, int | str] = {
        "INFERENCE_NUM_THREADS": scene.threads,
        "PERFORMANCE_HINT": "LATENCY",
    }
    if not int8:
        settings["INFERENCE_PRECISION_HINT"] = "f32"

    def engine(name: str) -> Engine:
        request = core.compile_model(
            Path(folder, f"{name}.xml"), "CPU", settings
        ).create_infer_request()

        def run(*inputs: Tensor) -> Tensor:
            arrays = [tensor.contiguous().numpy() for tensor in inputs]
            return torch.from_numpy(request.infer(arrays, share_inputs=True)[0].copy())

        return run

    return _with_engines(scene, {name: engine(name) for name in ("unet", "vae")})


# --- Inductor int8 --------------------------------------------------------------------------------


def prepare_inductor(scene: Scene, folder: str) -> None:
    """Quantise the UNet as torchao's guide does, compile it and the fp32 decoder ahead of time."""
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
        X86InductorQuantizer,
        get_default_x86_inductor_quantization_config,
    )

    checkpoint = open_checkpoint(scene.model)
    pipeline = _pipeline(scene)
    calls, examples = _calls(pipeline), _examples(scene, checkpoint)
    inputs = _calibration(scene, pipeline)
    torch._inductor.config.freezing = True
    with published_folder(Path(folder)) as draft, torch.no_grad():
        for name, example in examples.items():
            exported = torch.export.export(calls[name], example)
            if name == "unet":
                quantizer = X86InductorQuantizer()
                quantizer.set_global(get_default_x86_inductor_quantization_config())
                prepared = prepare_pt2e(exported.module(), quantizer)
                for call in inputs:
                    prepared(*call)
                exported = torch.export.export(convert_pt2e(prepared), example)
            torch._inductor.aoti_compile_and_package(
                exported, package_path=str(draft / f"{name}.pt2")
            )


def open_inductor(scene: Scene, folder: str) -> Drawer:
    """Inductor's int8 as it comes."""

    def engine(name: str) -> Engine:
        compiled = torch._inductor.aoti_load_package(str(Path(folder, f"{name}.pt2")))

        def run(*inputs: Tensor) -> Tensor:
            out: Tensor = compiled(*(tensor.contiguous() for tensor in inputs))
            return out

        return run

    return _with_engines(scene, {name: engine(name) for name in ("unet", "vae")})


def _calibration(scene: Scene, pipeline: Any) -> list[tuple[Tensor, ...]]:
    """The UNet's inputs while a few pictures are drawn that no benchmark draws."""
    seen: list[tuple[Tensor, ...]] = []
    forward = pipeline.unet.forward

    def recording(
        sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, **rest: Any
    ) -> Any:
        added = rest.get("added_cond_kwargs") or {}
        extra = tuple(added[name].float() for name in ("text_embeds", "time_ids") if name in added)
        inputs = (sample, timestep.float().reshape(1), encoder_hidden_states, *extra)
        seen.append(tuple(tensor.clone() for tensor in inputs))
        return forward(sample, timestep, encoder_hidden_states, **rest)

    pipeline.unet.forward = recording
    calibrated = replace(scene, steps=CALIBRATION_STEPS)
    drawer = PipelineDrawer(pipeline, calibrated, _watch_diffusers)
    for prompt in CALIBRATION_PROMPTS:
        drawer.latents([prompt] * scene.batch, [10_000 + i for i in range(scene.batch)])
    pipeline.unet.forward = forward
    return seen
