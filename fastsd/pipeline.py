"""Pipeline: a prompt in, pictures out. What users import.

Owns the user-facing names (those of diffusers), their checks and the order of a call: encode,
sample, decode. All state belongs to the call, so one Pipeline may be called from many threads at
once.
"""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from PIL.Image import Image
from torch import Tensor

import fastsd
from fastsd.adapters import Adapters
from fastsd.arguments import (
    CALLBACK_TENSORS,
    INSTEAD,
    LARGEST_BATCH,
    OUTPUT_TYPES,
    check_adapters,
    check_callable,
    check_choice,
    check_count,
    check_fraction,
    check_names,
    check_number,
    check_pair,
    check_path,
    chosen_device,
    chosen_precision,
    count_steps,
    generators_of,
    instead,
    levels,
    listed_numbers,
    plain_numbers,
    refuse,
    skipped_steps,
)
from fastsd.artifact import Artifact, is_artifact
from fastsd.backends import BACKENDS, ENGINES, Backend, open_artifact, open_backend
from fastsd.backends.auto import choose
from fastsd.backends.fastest import fastest_step
from fastsd.call import Call, Callback
from fastsd.checkpoints import (
    GIVEN_TENSORS,
    Checkpoint,
    model_name,
    open_checkpoint,
    open_description,
    open_lora,
    read_embedding,
)
from fastsd.conditioning import Prompts, Sizes, TextEncoder, Texts, Vocabulary, condition
from fastsd.engine import GRAPHS, Loops, explained_memory_errors
from fastsd.errors import UnknownName, UsageError
from fastsd.images import LONGEST_SIDE, to_pil
from fastsd.kernels import dispatch
from fastsd.models.layers import LAYERS
from fastsd.models.tiny_vae import TinyVAE
from fastsd.models.vae import VAE
from fastsd.prompts import SYNTAXES
from fastsd.quant.draws import GUIDANCE, PROMPTS, draw_settings
from fastsd.samplers import SAMPLERS, StepTable, build_table, resolve
from fastsd.samplers.schedule import lcm_timesteps
from fastsd.sources import Source
from fastsd.tasks import Decode

log = logging.getLogger("fastsd")

Preview = Callable[[int, list[Image]], object]

WATCHED, WATCHED_STEPS = 2, 4  # pictures and their steps by which fp8's ranges are found
TILE = 64  # latents along a side that low_memory decodes at once


@dataclass(frozen=True)
class Output:
    """What a call returns.

    images: PIL pictures; or numpy (B, H, W, 3) or torch (B, 3, H, W) in [0, 1]; or latents (B, C,
    h, w).
    metadata: a dict of plain JSON data for each picture, enough to draw it again.
    As in diffusers, output[0] and output["images"] are the pictures too.
    """

    images: Any
    metadata: list[dict[str, Any]]
    nsfw_content_detected: None = None

    def __getitem__(self, key: str | int | slice) -> Any:
        return getattr(self, key) if isinstance(key, str) else self.to_tuple()[key]

    def to_tuple(self) -> tuple[Any, None]:
        """Return what return_dict=False gives."""
        return self.images, self.nsfw_content_detected


class Pipeline:
    """Stable Diffusion on one backend: text to image, image to image, inpainting, outpainting.

    pipe = Pipeline.from_pretrained("builtin")
    apple = pipe("a red apple", num_inference_steps=20, guidance_scale=7.5, seed=0).images[0]
    pipe("a green apple", image=apple, strength=0.6, seed=1).images[0]
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        name: str,
        sampler: str | None = None,
        backend: str | None = None,
        precision: str | None = None,
        device: str | torch.device | None = None,
        artifact: Artifact | None = None,
        graph: str = "step",
        low_memory: bool = False,
        weights: str | None = None,
        changes: Mapping[str, str] | None = None,
    ) -> None:
        """Open the parts; from_pretrained says what the arguments are.

        changes: what else its pictures are to record of how it was loaded, name -> value.
        """
        check_choice("graph", graph, GRAPHS)
        if low_memory and graph == "loop":
            raise UsageError(
                "low_memory moves the VAE, and graph='loop' captures it; use graph='step'"
            )
        self.checkpoint = checkpoint
        self.artifact = artifact
        self.config = checkpoint.config
        self.name = name
        self.sampler = sampler or checkpoint.config.schedule.sampler
        self._table(1)  # an unknown sampler is refused here, not at the first call
        self._vocabulary = Vocabulary.of(checkpoint)
        self._progress: dict[str, Any] = {"disable": None}  # None: a bar only on a terminal
        self._graph = graph
        self._low_memory = low_memory
        self._weights = weights
        self._changes = dict(changes or {})
        self._kernels: dict[str, str] = {}  # op -> what `use` asked for
        self._backend = self._open_backend(backend, precision, chosen_device(device))
        self._step = self._chosen_step(self._backend.device)
        self._loops = self._new_loops(self._backend)
        self._adapters = Adapters(self._backend, on_host=low_memory)
        self._vocabulary_lock = threading.Lock()
        self._preview_vae: VAE | TinyVAE | None = None
        if weights == "fp8":
            self._put_in_fp8()

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path,
        *,
        sampler: str | None = None,
        backend: str | None = None,
        precision: str | None = None,
        device: str | torch.device | None = None,
        floor: float | None = None,
        trust_native: bool = False,
        graph: str = "step",
        low_memory: bool = False,
        weights: str | None = None,
        revision: str | None = None,
        variant: str | None = None,
        prediction: str | None = None,
        preset: str | None = None,
        vae: str | Path | None = None,
        tokenizer: str | Path | None = None,
        local_files_only: bool | None = None,
        cache_dir: str | Path | None = None,
        token: str | None = None,
        dtype: str | torch.dtype | None = None,
        torch_dtype: str | torch.dtype | None = None,
        use_safetensors: bool | None = None,
        safety_checker: None = None,
        feature_extractor: None = None,
        requires_safety_checker: bool = False,
        **unknown: object,
    ) -> Pipeline:
        """Load a model: "builtin", a folder in the diffusers layout, a single file, a hub id, or an
        exported engine's folder, which brings its backend and precision with it.

        sampler: a name or alias from `fastsd samplers`; None takes the checkpoint's own.
        backend, precision: None takes "eager" and "fp32", the exact path; fp16 and bf16 are faster
        on GPUs.
        backend "auto" takes what `fastsd tune` found fastest here; floor: of those, one whose worst
        picture is within so many dB of the exact one.
        device: "cpu", "cuda", …; None takes a GPU where there is one.
        prediction: "eps", "v" or "x0" where a file does not say (Stable Diffusion 2.x) or is wrong.
        preset: "lightning-4", "hyper-8", "sdxl-turbo", "lcm", … (config.FEW_STEPS): how to sample a
        model distilled to few steps whose file does not say so, or one that a LoRA makes such.
        vae: another VAE in place of the model's, a folder or a file; a tiny autoencoder (TAESD)
        decodes with a twentieth of the work.
        tokenizer: a folder with one, for the rare single file whose vocabulary is not CLIP's.
        variant: "fp16" takes those files of a folder that have this in their names.
        dtype (or torch_dtype), use_safetensors, safety_checker=None: as diffusers scripts have
        them.
        trust_native: load an exported engine that holds native code although you did not export it.
        graph: what is one CUDA graph: "step"; "loop", all steps and the decoding, captured for each
        step count anew; or "none".
        low_memory: decode in tiles of 512 pixels, which is near the same picture only. On a GPU,
        keep in the host's memory the text encoders and the VAE while they do not run, and the
        weights that LoRAs replace; keep one captured step at a time. On a CPU, leave glibc's heap
        as it is, which else keeps freed memory, all of the process's, for the next step.
        weights: "int8" keeps the UNet's weights in int8, but the first and last layer's, and widens
        a layer's whenever it runs: half of fp16's memory, a quarter of fp32's, for the time that
        takes and a near picture. "fp8", on GPUs since Ada, has most of the UNet's linear layers in
        fp8 and multiplies in it, since Hopper most convolutions of the UNet's and the decoder's
        resnets too, for a near picture; two pictures of a few steps are drawn while it loads, to
        find the ranges of numbers, and LoRAs cannot be loaded.
        Raises CheckpointError for a model that cannot be read, ArtifactError for an engine that
        cannot be used, UsageError for a wrong argument.
        """
        refuse(unknown, cls.from_pretrained)
        check_path("model", model)
        if safety_checker or feature_extractor or requires_safety_checker:
            raise UsageError("safety checkers are not supported; pass safety_checker=None")
        if use_safetensors is False:
            raise UsageError("only safetensors are loaded; drop use_safetensors=False")
        artifact = None
        if backend is not None:
            check_choice("backend", backend, ("auto", *BACKENDS))
        changes = {
            "prediction": prediction,
            "preset": preset,
            "vae": vae,
            "tokenizer": tokenizer,
            "variant": variant,
        }
        if floor is not None and backend != "auto":
            raise UsageError("floor chooses among what was tuned; pass backend='auto' with it")
        if weights is not None and backend == "auto":
            raise UsageError(
                f"backend='auto' chooses among what was tuned, and weights={weights!r} was not; "
                "pass backend='eager', or leave weights out"
            )
        if is_artifact(model):
            for name, given in changes.items():
                if given is not None:
                    raise UsageError(f"an engine has its {name} built in; leave {name} out")
            if backend == "auto":
                raise UsageError(
                    "backend='auto' chooses an engine for a model; leave it out, or give the model"
                )
            artifact = Artifact.open(model, trust_native=trust_native)
            checkpoint = open_description(artifact.path)
        else:
            checkpoint = open_checkpoint(
                model,
                revision=revision,
                variant=variant,
                prediction=prediction,
                preset=preset,
                vae=vae,
                tokenizer=tokenizer,
                local_files_only=local_files_only,
                cache_dir=cache_dir,
                token=token,
            )
        if backend == "auto":
            backend = None
            way = choose(
                checkpoint,
                floor,
                precision=chosen_precision(precision, dtype or torch_dtype),
                device=chosen_device(device).type,
            )
            _tell(way.reason)
            if way.engine is not None:
                artifact = Artifact.open(way.engine)
        return cls(
            checkpoint,
            name=model_name(model),
            sampler=sampler,
            backend=backend,
            precision=chosen_precision(precision, dtype or torch_dtype),
            device=device,
            artifact=artifact,
            graph=graph,
            low_memory=low_memory,
            weights=weights,
            changes={name: Path(given).resolve().name for name, given in changes.items() if given},
        )

    @classmethod
    def from_single_file(cls, file: str | Path, **options: Any) -> Pipeline:
        """Do what from_pretrained does, under the name that diffusers has for single files."""
        return cls.from_pretrained(file, **options)

    @property
    def device(self) -> torch.device:
        """Where the parts run."""
        return self._backend.device

    @property
    def dtype(self) -> torch.dtype:
        """What the parts compute in."""
        return self._backend.dtype

    def to(self, *targets: str | torch.device | torch.dtype) -> Pipeline:
        """Move to a device, a dtype or both, and return the pipeline itself. Waits for calls."""
        devices = [chosen_device(t) for t in targets if not isinstance(t, torch.dtype)]
        precisions = [chosen_precision(None, t) for t in targets if isinstance(t, torch.dtype)]

        def asked(now: Backend) -> tuple[torch.device, str]:
            return (devices or [now.device])[-1], (precisions or [None])[-1] or now.precision

        now = self._backend
        if asked(now) == (now.device, now.precision):
            return self
        with self._adapters.rebound():
            now = self._backend  # another thread may have moved it meanwhile
            device, precision = asked(now)
            if (device, precision) == (now.device, now.precision):
                return self
            if self._weights == "fp8":
                raise UsageError(
                    "a model with weights='fp8' stays where it was loaded; pass device and "
                    "precision to from_pretrained"
                )
            opened = self._open_backend(now.name, precision, device)
            for op, implementation in self._kernels.items():
                dispatch.require(op, implementation, device)
                if op in LAYERS:  # the sampler's step is no layer
                    opened.use(op, implementation)
            now.close()
            self._backend = self._adapters.backend = opened
            self._step = self._chosen_step(device)
            self._loops = self._new_loops(opened)  # what is captured goes with the old one
        return self

    def _open_backend(
        self, backend: str | None, precision: str | None, device: torch.device
    ) -> Backend:
        if self.artifact is None:
            return open_backend(
                backend or "eager",
                self.checkpoint,
                precision=precision or "fp32",
                device=device,
                on_host=("text_encoder", "text_encoder_2", "vae") if self._low_memory else (),
                weights=self._weights,
            )
        manifest = self.artifact.manifest
        for what, given, fixed in (
            ("backend", backend, ENGINES.get(manifest.target)),
            ("precision", precision, manifest.precision),
        ):
            if given not in (None, fixed):
                raise UsageError(
                    f"{what} {given!r} was asked for, and the engine {self.artifact.path} has "
                    f"{fixed!r}; leave {what} out, or export again"
                )
        for what, asked in (("weights", self._weights), ("low_memory", self._low_memory)):
            if asked:
                raise UsageError(
                    f"{what}={asked!r} is for a model's own weights, and the engine "
                    f"{self.artifact.path} was built with its own; leave {what} out"
                )
        return open_artifact(self.artifact, self.config, device=device)

    def _put_in_fp8(self) -> None:
        """Draw a little in full precision, uncaptured, and let the backend round its layers."""
        side = self.config.default_size
        settings = {
            **draw_settings(self.config, (side, side), WATCHED_STEPS),
            "output_type": "np",
        }

        def draw() -> None:
            for seed, prompt in enumerate(PROMPTS[:WATCHED]):
                self(prompt, seed=seed, **settings)

        bars, self._progress = self._progress, {"disable": True}
        try:
            with self.running_on(self._backend, graph="none"):
                self._backend.put_in_fp8(draw)
        finally:
            self._progress = bars

    @contextmanager
    def running_on(self, backend: Backend, *, graph: str | None = None) -> Iterator[None]:
        """Draw by `backend` inside the block, e.g. by one that watches this pipeline's own parts.

        graph: as from_pretrained has it; None leaves it. Not while another thread draws.
        """
        before = self._backend, self._loops
        self._backend, self._loops = backend, self._new_loops(backend, graph)
        try:
            yield
        finally:
            self._backend, self._loops = before

    def load_preview_vae(self, path: str | Path) -> None:
        """Load what decodes previews, a folder or a file; best a tiny autoencoder (TAESD).

        Without one they are decoded by the model's own VAE, which may take longer than a step.
        """
        check_path("path", path)
        module = self.checkpoint.with_vae(path).load("vae", device=self.device)
        assert isinstance(module, (VAE, TinyVAE))
        self._preview_vae = module

    def _show(self, preview: Preview, row: int, clean: Tensor, decoder: Decode) -> None:
        """Decode clean latents (B, C, h, w), the pictures that a run is on its way to.

        decoder: the model's own, where no other was loaded.
        """
        vae = self._preview_vae
        if vae is None:
            pictures = decoder(clean)
        else:
            vae = vae.to(self.device)
            pictures = vae.decode(clean.to(vae.dtype) / vae.config.scale + vae.config.shift)
        preview(row, to_pil((pictures.float() / 2 + 0.5).nan_to_num().clamp(0, 1)))

    def load_lora_weights(
        self,
        source: str | Path | Mapping[str, Tensor],
        *,
        weight_name: str | None = None,
        adapter_name: str | None = None,
        subfolder: str = "",
        revision: str | None = None,
        token: str | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool | None = None,
        **unknown: object,
    ) -> None:
        """Load a LoRA and turn it on, alone and at weight 1, as in diffusers; see set_adapters.

        source: a safetensors file of kohya's, PEFT's or diffusers' making, a folder or hub id that
        holds one (subfolder and weight_name say where), or a dict of tensors. Weights are changed
        in place, once no call uses them: a call, in whatever thread, sees one set of them from
        start to end.
        revision, token, cache_dir, local_files_only: for a hub id.
        Raises CheckpointError, with nothing changed, for one that does not fit the model.
        """
        refuse(unknown, self.load_lora_weights)
        if not isinstance(source, Mapping):
            check_path("source", source)
        parts = self.checkpoint.parts or ("unet",)  # an engine's description has no weights
        weights = {part: self._backend.weights(part) for part in parts}
        lora = open_lora(
            source,
            self.config,
            weights,
            weight_name=weight_name,
            subfolder=subfolder,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
        )
        self._adapters.load(adapter_name, lora)

    def set_adapters(
        self, adapter_names: str | Sequence[str], adapter_weights: float | Sequence[float] = 1.0
    ) -> None:
        """Turn these adapters on, at these weights, and all others off."""
        names = check_names("adapter_names", adapter_names)
        strengths = listed_numbers(adapter_weights, len(names))
        if len(strengths) != len(names) or len(set(names)) != len(names):
            raise UsageError(
                f"{len(names)} adapters ({', '.join(names)}) were given {len(strengths)} weights; "
                "give each once, with one weight, or one weight for all"
            )
        self._adapters.set(dict(zip(names, strengths, strict=True)))

    def unload_lora_weights(self) -> None:
        """Forget every adapter: the weights are the checkpoint's again, bit for bit."""
        self._adapters.drop(None)

    def delete_adapters(self, adapter_names: str | Sequence[str]) -> None:
        """Forget these adapters; others that are on stay so."""
        self._adapters.drop(check_names("adapter_names", adapter_names))

    def disable_lora(self) -> None:
        """Turn every adapter off; they stay loaded."""
        self._adapters.set({})

    def enable_lora(self) -> None:
        """Turn every loaded adapter on, at weight 1."""
        self._adapters.set_all(1.0)

    def get_active_adapters(self) -> list[str]:
        """Name the adapters that are on."""
        return list(self._adapters.active)

    def get_list_adapters(self) -> dict[str, list[str]]:
        """Name the loaded adapters of each part that they change."""
        return self._adapters.by_part()

    def set_progress_bar_config(self, **config: Any) -> None:
        """Pass `config` on to tqdm, e.g. disable=True."""
        self._progress = {**self._progress, **config}

    def _new_loops(self, backend: Backend, graph: str | None = None) -> Loops:
        limit = {"limit_bytes": 0} if self._low_memory else {}
        return Loops(backend, graph=graph or self._graph, **limit)

    def _chosen_step(self, device: torch.device) -> dispatch.Choice:
        """Choose what computes the sampler's step, the loop's own part, whatever the backend."""
        asked = self._kernels.get("sampler_step")
        if asked is None and device.type == "cuda":
            return fastest_step(device)  # measured once, and not in a request
        return dispatch.choose("sampler_step", device, asked)

    def use(self, **implementations: str) -> Pipeline:
        """Compute ops by other kernels: pipe.use(attention="cudnn", group_norm="triton").

        Ops and implementations are those of fastsd.kernels.dispatch; what cannot run here raises
        UsageError or MissingDependency. Not during a call. Returns the pipeline itself.
        """
        for op, implementation in implementations.items():
            dispatch.require(op, implementation, self.device)
        try:
            for op, implementation in implementations.items():
                if op in LAYERS:
                    self._backend.use(op, implementation)
                self._kernels[op] = implementation
        finally:  # what is captured are the old kernels
            self._step = self._chosen_step(self.device)
            self._loops = self._new_loops(self._backend)
        return self

    def prepare(
        self,
        *,
        batch: int = 1,
        height: int | None = None,
        width: int | None = None,
        guidance: bool | None = None,
        num_inference_steps: int = 1,
        cache_interval: int = 1,
    ) -> Pipeline:
        """Warm up and capture, so that the first picture comes as fast as the rest.

        batch: pictures at once. height, width: pixels; None takes the model's own size. guidance:
        with it or without, None as the model draws by itself; the two are captured apart, as are
        sizes and batches. Everything else
        (prompt of one chunk, seed, sampler, steps, the weight of guidance) may change without a new
        capture, but guidance_rescale, a mask for a model that does not inpaint, and more than 128
        evaluations are captured when they are first asked for.
        cache_interval: steps that reuse deeper layers' work are captured apart too, for whatever
        interval above 1. Where the whole loop is captured, it is for that interval, for
        num_inference_steps and for pictures as PIL's only. Text encoders are captured for a batch
        of prompts and for one prompt of a batch of pictures, as they are without learned words and
        clip_skip. Returns the pipeline.
        """
        check_count("batch", batch)
        settings = {
            **draw_settings(self.config, self._size(height, width), num_inference_steps),
            "num_inference_steps": num_inference_steps,
            "guidance_scale": None if guidance is None else GUIDANCE if guidance else 1.0,
            "strength": 1.0 if self.config.inpaints else None,
            "cache_interval": cache_interval,
        }
        for prompts in dict.fromkeys((batch, 1)):
            self([""] * prompts, num_images_per_prompt=batch // prompts, seed=0, **settings)
        return self

    def explain(self) -> list[str]:
        """Say how the parts run and what is captured, a line a fact."""
        return [*self._backend.explain(), str(self._step), *self._loops.explain()]

    def load_textual_inversion(
        self, source: str | Path | Mapping[str, Tensor], token: str | None = None, **unknown: object
    ) -> None:
        """Teach the prompts a learned word: a safetensors file, or its tensors by name.

        token: how prompts call it; None takes the name in the file, or the file's own.
        Raises CheckpointError for a file that is none or fits another model; UsageError for a
        token that is taken.
        """
        refuse(unknown, self.load_textual_inversion)
        if not isinstance(source, Mapping):
            check_path("source", source)
        widths = [encoder.width for encoder in self.config.text_encoders]
        embedding = read_embedding(source, widths, token)
        with self._vocabulary_lock:
            loaded = self._vocabulary.embeddings
            if embedding.token in [e.token for e in loaded]:
                raise UsageError(
                    f"a learned word {embedding.token!r} is loaded already; give another token, or "
                    "call unload_textual_inversion first"
                )
            self._vocabulary = Vocabulary.of(self.checkpoint, [*loaded, embedding])

    @property
    def embeddings(self) -> dict[str, str]:
        """The learned words that prompts may use -> the SHA-256 of their vectors."""
        return {e.token: e.sha256 for e in self._vocabulary.embeddings}

    def unload_textual_inversion(self, tokens: str | Sequence[str] | None = None) -> None:
        """Forget learned words; None forgets all."""
        with self._vocabulary_lock:
            loaded = self._vocabulary.embeddings
            every = [e.token for e in loaded]
            forget = every if tokens is None else check_names("tokens", tokens)
            for token in forget:
                check_choice("learned word", token, every)
            self._vocabulary = Vocabulary.of(
                self.checkpoint, [e for e in loaded if e.token not in forget]
            )

    @torch.no_grad()
    def __call__(
        self,
        prompt: Texts | None = None,
        prompt_2: Texts | None = None,
        *,
        image: Any = None,
        mask_image: Any = None,
        strength: float | None = None,
        mask_feather: int | None = None,
        outpaint: Sequence[int] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        denoising_start: float | None = None,
        denoising_end: float | None = None,
        guidance_scale: float | None = None,
        guidance_rescale: float = 0.0,
        negative_prompt: Texts | None = None,
        negative_prompt_2: Texts | None = None,
        prompt_syntax: str = "plain",
        clip_skip: int | None = None,
        num_images_per_prompt: int = 1,
        eta: float = 0.0,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        seed: int | Sequence[int] | None = None,
        sampler: str | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        negative_pooled_prompt_embeds: Tensor | None = None,
        original_size: tuple[int, int] | None = None,
        crops_coords_top_left: tuple[int, int] = (0, 0),
        target_size: tuple[int, int] | None = None,
        aesthetic_score: float = 6.0,
        negative_aesthetic_score: float = 2.5,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        preview: Preview | None = None,
        batch_invariant: bool = False,
        cache_interval: int = 1,
        adapters: Mapping[str, float] | None = None,
        **unknown: object,
    ) -> Any:
        """Draw pictures for `prompt`, a string or a list, and return an Output.

        The task is what is given: a prompt alone; with image, image to image; with mask_image too,
        inpainting; with outpaint, outpainting. Variations of a picture are image to image with
        several seeds. Arguments mean what they mean in diffusers. Beyond those:

        image: one picture, or one for each prompt: PIL, numpy or torch, in [0, 1]; or latents.
        mask_image: of image's size; white is drawn, black is kept.
        strength: the part of the steps that are walked; None takes 0.8, SDXL 0.3; with a mask 1.0,
        SDXL 0.9999, all as in diffusers.
        mask_feather: None returns the picture as decoded, which is near the given one outside the
        mask; a number of pixels returns the given one, bit for bit, but for a feathered edge of
        that width around the mask. outpaint: pixels to add on the left, top, right and bottom.

        seed: picture i draws from its own generator seeded seed + i (of a list, seed[i]), so that
        it is the same picture alone or in any batch; None, with no generator either, takes one from
        torch's global generator. sampler: overrides the pipeline's for this call.
        prompt_syntax: "plain" reads prompts as diffusers does, to the letter and cut at 77 tokens;
        "weighted" as AUTOMATIC1111's web UI does: (word:1.3), [word], BREAK, any length.
        batch_invariant: run one picture at a time inside, for the same bits whatever the batch.
        cache_interval: after the first fifth of the steps, run the UNet's deeper layers at every so
        many only; 2 takes about two thirds of the time and draws a near picture, not the same.
        adapters: the LoRAs of this call alone, name -> weight, {} for none; None takes those that
        set_adapters left on. A call that asks for others than the one before changes the weights
        first, and waits for calls that use them.
        num_inference_steps: None takes 50, or what a distilled model was made for.
        guidance_scale: None takes what the checkpoint records (the built-in model: 2), or what a
        distilled model was made for, else 7.5, or 5.0 for SDXL; 1 or less draws without guidance.
        height, width: pixels, multiples of the VAE's factor (8); None takes the image's size, or
        the model's own. Pictures are resized to them.
        latents: (B, C, height / 8, width / 8), standard normal numbers to start from.
        preview(step, pictures): called after every step with the PIL pictures that the model is on
        its way to, as load_preview_vae decodes them; what it returns is ignored.
        callback_on_step_end(pipe, step, timestep, tensors): may return changed tensors, and may set
        pipe._interrupt = True (decode what there is) or pipe._guidance_scale; an exception ends the
        call. It must not wait for another thread that draws by, or changes, the same pipeline.

        Raises UsageError, NumericsError or OutOfMemory.
        """
        refuse(unknown, type(self).__call__)
        prompts = Prompts(
            prompt=prompt,
            prompt_2=prompt_2,
            negative_prompt=negative_prompt,
            negative_prompt_2=negative_prompt_2,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            pooled_prompt_embeds=pooled_prompt_embeds,
            negative_pooled_prompt_embeds=negative_pooled_prompt_embeds,
        )
        prompts.check(self.config)
        count = check_count("num_images_per_prompt", num_images_per_prompt)
        with explained_memory_errors("image at this size"):
            size = self._size(height, width)
            source = Source.given(
                self.config,
                image,
                mask_image,
                outpaint=outpaint,
                size=(height, width),
                feather=mask_feather,
            )
        if source is not None:
            size = source.size(self.config)
            if len(source.pictures) not in (1, prompts.batch):
                raise UsageError(
                    f"{len(source.pictures)} pictures were given for {prompts.batch} prompts; "
                    "give one, or one each"
                )
        if prompts.batch * count > LARGEST_BATCH:
            raise UsageError(
                f"{prompts.batch * count} pictures were asked for at once, at most {LARGEST_BATCH} "
                "are drawn; call several times"
            )
        guidance = self._default_guidance(source) if guidance_scale is None else guidance_scale
        check_number("guidance_scale", guidance)
        check_fraction("guidance_rescale", guidance_rescale)
        check_number("eta", eta)
        check_number("aesthetic_score", aesthetic_score)
        check_number("negative_aesthetic_score", negative_aesthetic_score)
        check_choice("output_type", output_type, OUTPUT_TYPES)
        check_choice("prompt_syntax", prompt_syntax, SYNTAXES)
        vocabulary = self._vocabulary
        if check_count("cache_interval", cache_interval) > 1:
            self._check_cached(batch_invariant)
        original_size = check_pair("original_size", original_size)
        crop = check_pair("crops_coords_top_left", crops_coords_top_left) or (0, 0)
        target_size = check_pair("target_size", target_size)
        adapters = check_adapters(adapters)
        check_callable("callback_on_step_end", callback_on_step_end)
        check_callable("preview", preview)
        watched = check_names(
            "callback_on_step_end_tensor_inputs", callback_on_step_end_tensor_inputs or ()
        )
        for name in watched:
            check_choice("callback_on_step_end_tensor_inputs entry", name, CALLBACK_TENSORS)
        timesteps = levels("timesteps", timesteps)
        sigmas = levels("sigmas", sigmas)
        if num_inference_steps is None:
            if sigmas is None and timesteps is None:
                timesteps = levels("timesteps", self.config.schedule.timesteps)
            num_inference_steps = self.config.schedule.steps or 50
        steps = count_steps(num_inference_steps, timesteps, sigmas)
        strength = self._strength(strength, source, denoising_start)
        start, walked = 0, timesteps
        if strength is not None and self._starts_lower(sampler or self.sampler, source):
            walked = timesteps or lcm_timesteps(self.config.schedule, steps, strength).tolist()
        else:
            start = skipped_steps(steps, strength)
        table = self._table(
            None if walked is not None or sigmas is not None else num_inference_steps,
            sampler=sampler,
            eta=eta,
            start=start,
            denoising_start=denoising_start,
            denoising_end=denoising_end,
            timesteps=walked,
            sigmas=sigmas,
        )
        seeds, generators = generators_of(seed, generator, prompts.batch * count)

        memory = explained_memory_errors(f"pictures of {size[1]}x{size[0]}")
        with memory, self._adapters.in_use(adapters) as loras:
            encoder = TextEncoder(
                backend=self._backend,
                config=self.config,
                tokenizers=vocabulary.tokenizers,
                learned=vocabulary.learned,
                syntax=prompt_syntax,
                clip_skip=0 if clip_skip is None else clip_skip,
                one_at_a_time=batch_invariant,
                once=self._loops.once,
            )
            sizes = Sizes(
                original=original_size,
                crop=crop,
                target=target_size,
                scores=(aesthetic_score, negative_aesthetic_score),
            )
            guided = self.config.guided(guidance)
            conditioning = condition(prompts, sizes, encoder, size=size, count=count, guided=guided)
            call = Call(
                pipeline=self,
                backend=self._backend,
                loops=self._loops,
                kernel=self._step.implementation,
                tile=TILE if self._low_memory else None,
                progress=self._progress,
                table=table,
                conditioning=conditioning,
                batch=prompts.batch * count,
                size=size,
                guidance=float(guidance),
                rescale=float(guidance_rescale),
                source=source,
                from_noise=source is not None and source.mask is not None and strength == 1,
                noised=denoising_start is not None,
                callback=callback_on_step_end,
                callback_tensors=tuple(watched),
                preview=None if preview is None else partial(self._show, preview),
                one_at_a_time=batch_invariant,
                cache_interval=cache_interval,
            )
            images = call.draw(generators, latents, output_type)
        if not return_dict:
            return (images, None)
        own_objects = {
            "generator": generator,
            "latents": latents,
            "image": image if source is not None and source.latent else None,
            "prompt_embeds": prompt_embeds,
            "negative_prompt_embeds": negative_prompt_embeds,
            "callback_on_step_end": callback_on_step_end if call.altered else None,
            "lora": loras if (GIVEN_TENSORS in dict(loras)) else None,
        }
        settings = {
            "steps": steps,
            "sampler": sampler or self.sampler,
            **self._sampler_titles(sampler or self.sampler),
            "guidance_scale": float(guidance),
            "guidance_rescale": float(guidance_rescale) or None,
            "prompt_syntax": prompt_syntax,
            "clip_skip": None if clip_skip is None else int(clip_skip),
            "strength": strength,
            "mask_feather": None if source is None else source.feather,
            "outpaint": plain_numbers(outpaint),
            "denoising_start": None if denoising_start is None else float(denoising_start),
            "denoising_end": None if denoising_end is None else float(denoising_end),
            "eta": float(eta),
            "height": int(size[0]),
            "width": int(size[1]),
            "timesteps": timesteps,
            "sigmas": sigmas,
            "original_size": plain_numbers(original_size),
            "crops_coords_top_left": plain_numbers(crop),
            "target_size": plain_numbers(target_size),
            "aesthetic_score": float(aesthetic_score),
            "negative_aesthetic_score": float(negative_aesthetic_score),
            "batch_invariant": bool(batch_invariant),
            "cache_interval": int(cache_interval) if cache_interval > 1 else None,
            "lora": [f"{title}:{str(weight).removesuffix('.0')}" for title, weight in loras]
            or None,
            "interrupted_after": call.interrupted_after,
            "not_recorded": [name for name, value in own_objects.items() if value is not None],
        }
        return Output(images, self._metadata(prompts, count, seeds, settings, source, vocabulary))

    def _check_cached(self, batch_invariant: bool) -> None:
        """Raise UsageError where steps cannot reuse what an earlier one made."""
        if batch_invariant:
            raise UsageError("cache_interval and batch_invariant do not go together; drop one")
        try:
            self._backend.part("unet_shallow")
        except UsageError:
            raise UsageError(
                f"this {self._backend.name} engine computes whole steps only; drop cache_interval, "
                "or use the checkpoint itself, or an engine of `fastsd export --to aoti`"
            ) from None

    def _default_guidance(self, source: Source | None) -> float:
        if self.config.schedule.guidance is not None:
            return self.config.schedule.guidance
        inpaints = source is not None and source.mask is not None
        return 7.5 if inpaints else self.config.usual_guidance

    def _strength(
        self, strength: float | None, source: Source | None, denoising_start: float | None
    ) -> float | None:
        if denoising_start is not None and (
            source is None or not source.latent or source.mask is not None
        ):
            raise UsageError(
                "denoising_start goes on from latents that another model left; give them as "
                "image, without a mask: image=base(…, output_type='latent').images"
            )
        if source is None or denoising_start is not None:
            if strength is not None:
                raise UsageError(
                    "strength says how much of image to change; "
                    + ("give image" if source is None else "denoising_start says it here; drop it")
                )
            return None
        if strength is None:
            masked, xl = source.mask is not None, self.config.family.startswith("sdxl")
            return {(0, 0): 0.8, (0, 1): 0.3, (1, 0): 1.0, (1, 1): 0.9999}[masked, xl]
        check_fraction("strength", strength)
        return float(strength)

    def _starts_lower(self, sampler: str, source: Source | None) -> bool:
        """Whether image to image walks all steps, from lower down, where others leave out the
        first: as in diffusers, of latent consistency models that are told the guidance weight."""
        told = self.config.unet.guidance_width and source is not None and source.mask is None
        return bool(told) and resolve(sampler)[0] == "lcm"

    def _size(self, height: int | None = None, width: int | None = None) -> tuple[int, int]:
        factor = self.config.vae.downscale
        default = (self.config.default_size,) * 2
        if self.artifact is not None and not self.artifact.manifest.dynamic:
            default = self.artifact.manifest.size
        own_height, own_width = default
        size = (own_height if height is None else height, own_width if width is None else width)
        for name, side in zip(("height", "width"), size, strict=True):
            if check_count(name, side) >= LONGEST_SIDE:
                raise UsageError(f"{name} must be below {LONGEST_SIDE} pixels, not {side}")
            if side % factor:
                below = side // factor * factor
                near = f"{below} or {below + factor}" if below else f"{factor}"
                raise UsageError(
                    f"{name} must be a multiple of {factor} pixels, not {side}; try {near}"
                )
        return size

    def _table(self, steps: int | None, *, sampler: str | None = None, **options: Any) -> StepTable:
        given = {"sampler": sampler or self.sampler, **options}
        # Others may change, and keep their hash.
        plain = all(v is None or type(v) in (int, float, str) for v in (steps, *given.values()))
        return (_built if plain else build_table)(self.config.schedule, steps, **given)

    def _sampler_titles(self, name: str) -> dict[str, str | None]:
        """What people's tools call a sampler, and the spacing of its noise levels if it has one."""
        key, spacing = resolve(name)
        spacing = spacing or self.config.schedule.sigma_spacing
        respaced = spacing != "schedule" and "sigma_spacing" in SAMPLERS[key].accepts
        return {
            "sampler_title": SAMPLERS[key].title,
            "schedule_type": spacing.title() if respaced else None,
        }

    def _metadata(
        self,
        prompts: Prompts,
        count: int,
        seeds: list[int] | None,
        settings: dict[str, Any],
        source: Source | None,
        vocabulary: Vocabulary,
    ) -> list[dict[str, Any]]:
        """One dict a picture; seed is None where the caller's own generators drew the noise.

        not_recorded names what was given and is no JSON: with any of it, the rest is not enough.
        """
        return [
            {
                **prompts.row(i // count),
                "seed": seeds[i] if seeds else None,
                **settings,
                "embeddings": vocabulary.named_in([*prompts.row(i // count).values()]) or None,
                **({} if source is None else source.digests(i, prompts.batch * count)),
                "model": self.name,
                # With weights of its own, a checkpoint has an engine in its place by choice.
                "backend": "auto"
                if self.artifact is not None and self.checkpoint.parts
                else self._backend.name,
                "precision": self._backend.precision,
                "weights": self._weights,
                "low_memory": self._low_memory or None,
                **self._changes,
                "versions": {"fastsd": fastsd.__version__, "torch": torch.__version__},
            }
            for i in range(prompts.batch * count)
        ]

    def __reduce__(self) -> NoReturn:
        raise UsageError(
            "a Pipeline cannot be pickled or copied: it holds the device's memory; load it in each "
            "process with from_pretrained"
        )

    def __getattr__(self, name: str) -> Any:
        raise UnknownName(f"Pipeline has no {name!r}; {instead(name, dir(type(self)))}")

    def __setattr__(self, name: str, value: object) -> None:
        if name in INSTEAD:
            raise UnknownName(f"Pipeline has no {name!r}; {INSTEAD[name]}")
        super().__setattr__(name, value)


# A table takes a millisecond or two to build, is read-only, and mostly the last call's.
_built = lru_cache(maxsize=32, typed=True)(build_table)


def _tell(line: str) -> None:
    """Say what was chosen: to the program's own log, or on stderr where it keeps none."""
    if log.hasHandlers():
        log.info(line)
    else:
        print(line, file=sys.stderr)
