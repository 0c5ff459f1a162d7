"""The exact path: the model definitions run by torch, no compiler and no graph file between.

On a GPU their layers use the kernels that are fastest there, passes over memory are spared, and
what a loop repeats is captured (`Graphed`).
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, cast, final

import torch
from torch import nn

from fastsd.backends.base import Part, dtype_of
from fastsd.backends.cuda_graph import Graphed, convolves_in_tf32
from fastsd.backends.fastest import (
    attentions,
    convolutions,
    gates,
    group_norms,
    layer_norms,
    linears,
    sums,
    use_fastest_,
)
from fastsd.backends.for_gpu import JoinedUNet, join_text_, spare_passes_
from fastsd.backends.fp8 import put_in_fp8_, require_fp8
from fastsd.backends.heap import keep_freed_memory
from fastsd.errors import UsageError
from fastsd.kernels import conv3x3, dispatch, linear
from fastsd.models.clip import CLIPText
from fastsd.models.layers import GEGLU, LAYERS, Attention, Linear, Upsample, use_kernel
from fastsd.models.unet import UNet
from fastsd.models.vae import VAE, PixelAttention, fit_fp16_
from fastsd.quant.linear import Fp8Conv3x3
from fastsd.quant.weights import Int8Weight, keep_in_int8_

if TYPE_CHECKING:
    from fastsd.checkpoints import Checkpoint


log = logging.getLogger("fastsd")

# ops whose kernels do not take every weight -> whether one's does, in a dtype
_FITS = {"conv3x3": conv3x3.fits, "linear": linear.fits}
_PARTS_OF = {"vae": ("vae_decoder", "vae_encoder")}
SLOWER = 0.8  # of fp32's speed on a CPU, below which a precision is warned of
WEIGHT_FORMATS = ("int8", "fp8")  # what weights can be kept in, beside the precision


@final
class EagerBackend(Graphed):
    """Run every part with torch and kernels of ours.

    on_host: modules whose weights stay in the host's memory and visit the GPU while they run.
    weights: "int8" keeps the UNet's in int8, and widens each layer's whenever it runs; "fp8" lets
    `put_in_fp8` be called, for the UNet and the decoder.
    to_compile: parts will be: norms are left to the compiler, and attention is one of torch's.
    """

    name = "eager"
    precisions = ("fp32", "fp16", "bf16")

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        precision: str,
        device: torch.device,
        on_host: Sequence[str] = (),
        weights: str | None = None,
        to_compile: bool = False,
    ) -> None:
        self.precision = precision
        self.device = device
        self.dtype = dtype_of(precision, self.precisions, self.name)
        if weights not in (None, *WEIGHT_FORMATS):
            raise UsageError(
                f"weights={weights!r} is unknown; pass {' or '.join(map(repr, WEIGHT_FORMATS))}, "
                "or leave it out: they are kept in the precision"
            )
        if weights == "fp8":
            require_fp8(device, self.dtype)
        self._checkpoint = checkpoint
        self._on_host = tuple(on_host)
        if device.type == "cpu":
            self._meet_cpu()
        host = torch.device("cpu")
        waiting = ("unet", *on_host) if device.type == "cuda" else on_host
        modules = {
            name: checkpoint.load(name, self.dtype, host if name in waiting else device)
            for name in checkpoint.parts
        }
        self.modules = modules  # what calibration watches and adapters change
        # The checkpoint's: a rewritten model has others beside them.
        self._names = {part: {n for n, _ in m.named_parameters()} for part, m in modules.items()}
        self._choices: dict[str, list[str]] = {}  # op or part -> what runs, and why
        self._fp8 = False
        unet, vae = cast(UNet, modules["unet"]), cast(VAE, modules["vae"])
        fit_fp16_(vae)
        texts = {
            name: cast(CLIPText, module)
            for name, module in modules.items()
            if name.startswith("text_")
        }
        if weights == "int8":
            keep_in_int8_(unet, device)
            self._choices["weights"] = ["unet's weights: kept in int8, widened as a layer runs"]
        run: UNet | JoinedUNet = unet
        if device.type == "cuda":
            run = JoinedUNet(unet, device)
            self._fit_gpu_(unet, vae, texts, to_compile=to_compile)
        self._parts = {
            **texts,
            **{f"{name}_norm": text.final_layer_norm for name, text in texts.items()},
            "unet": run,
            "unet_deep": run.forward_deep,
            "unet_shallow": run.forward_shallow,
            "unet_time": run.time_rows,
            "unet_context": run.context,
            "vae_decoder": lambda z: vae.decode(z.to(vae.dtype)),
            "vae_encoder": lambda picture: vae.encode(picture.to(vae.dtype)),
        }
        for name in on_host if device.type != "cpu" else ():
            if name in modules:
                self._keep_on_host(name)
        if device.type == "cuda" and precision == "fp32" and convolves_in_tf32():
            self._choices["convolutions"] = [
                "convolutions: in TF32, as torch does by default; exact with "
                "torch.backends.cudnn.allow_tf32 = False before the model is loaded"
            ]
        for layer in unet.modules() if device.type in ("cpu", "cuda") else ():
            if isinstance(layer, Attention):
                layer.upcast = False  # every kernel there has its scores in fp32 already
        for op in LAYERS:
            self._choices[op] = [str(dispatch.choose(op, device))]
        if device.type == "cuda":
            self._use_fastest(to_compile=to_compile, fp8=weights == "fp8")

    def _meet_cpu(self) -> None:
        if not self._on_host:  # who saves memory wants it back
            keep_freed_memory()
        if self.precision != "fp32" and (gain := dispatch.cpu_gain(self.dtype)) < SLOWER:
            log.warning(
                "this CPU multiplies %s at %.2f times the speed of fp32; precision='fp32' is "
                "faster, and exact",
                self.precision,
                gain,
            )

    def _fit_gpu_(
        self, unet: UNet, vae: VAE, texts: Mapping[str, CLIPText], *, to_compile: bool
    ) -> None:
        """Lay weights out as the GPU's kernels take them, and spare passes between them."""
        device = self.device
        for name, text in texts.items():
            if name not in self._on_host:  # what visits the GPU would take its weights twice
                join_text_(text, device)
        for model in (unet, vae):  # the CPU's own convolutions measured slower channels-last
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        # A compiler does that itself; in fp32, convolutions may be in TF32 and products not.
        if not to_compile and self.precision != "fp32":
            spare_passes_(unet, norms_add="triton" in dispatch.able("layer_norm", device))
            spare_passes_(vae.encoder, norms_add=False)  # its norms are the library's
            spare_passes_(vae.decoder, norms_add="triton" in dispatch.able("group_norm", device))

    def _keep_on_host(self, name: str) -> None:
        """Have a module's parts visit the GPU for as long as they run."""
        module, lock = self.modules[name], threading.RLock()  # its parts move the same weights
        for part in _PARTS_OF.get(name, (name, f"{name}_norm")):
            self._parts[part] = Visiting(module, self._parts[part], self.device, lock)
        where = "locked memory" if locked_(module) else "memory"
        self._choices[name] = [f"{name}: in the host's {where}, on the GPU while it runs"]

    def _use_fastest(self, *, to_compile: bool, fp8: bool) -> None:
        """Let every layer use the kernels that are fastest on this GPU.

        fp8: what it will replace is not tried."""
        use = partial(use_fastest_, dtype=self.dtype, device=self.device)
        unet, vae = cast(UNet, self.modules["unet"]), cast(VAE, self.modules["vae"])
        if to_compile:
            self._choices["attention"] = use("attention", attentions(unet, torch_only=True))
            return
        decoder = vae.decoder
        self._choices["attention"] = use("attention", attentions(unet, decoder))
        self._choices["group_norm"] = use("group_norm", group_norms(unet, decoder))
        self._choices["layer_norm"] = use("layer_norm", layer_norms(unet))
        self._choices["geglu"] = use("geglu", gates(unet))
        self._choices["residual"] = use("residual", sums(unet, decoder))
        if self.dtype != torch.float32:
            # A VAE that visits the GPU would bring the sums of its taps every time too.
            here = nn.Identity() if "vae" in self._on_host else decoder
            self._choices["conv3x3"] = use("conv3x3", convolutions(unet, here))
            self._choices["linear"] = use("linear", linears(unet, feed_forward=not fp8))

    def put_in_fp8(self, draw: Callable[[], object]) -> None:
        """Put the UNet's and the decoder's layers in fp8, by the ranges of numbers `draw` shows.

        For good: adapters fit no longer.
        """
        unet, vae = self.modules["unet"], self.modules["vae"]
        assert isinstance(unet, UNet)
        # What visits the GPU stays as it is, and a tiny decoder has no norms to round in.
        decoder = vae.decoder if isinstance(vae, VAE) and "vae" not in self._on_host else None
        count = put_in_fp8_(unet, decoder, draw)
        counted = {kind: count.pop(kind) for kind in ("linear layers", "convolutions")}
        kinds = [f"{n} {kind}" for kind, n in counted.items() if n]
        where = "unet and decoder" if decoder is not None and _convolves_in_fp8(decoder) else "unet"
        self._choices["fp8"] = [f"fp8: {' and '.join(kinds)} of {where} multiply in it"]
        self._choices["fp8"] += [f"fp8: {n} inputs are rounded by {op}" for op, n in count.items()]
        self._fp8 = True

    def use(self, op: str, implementation: str) -> None:
        """Compute `op` by `implementation` in every part."""
        choice = dispatch.choose(op, self.device, implementation)
        if op in _FITS:
            self._require_fits(op, implementation)
        for module in self.modules.values():
            use_kernel(module, op, implementation)
            for layer in module.modules() if op == "attention" else ():
                if isinstance(layer, PixelAttention):  # its heads are too wide for most
                    layer.implementation = "products" if implementation == "products" else "sdpa"
            for layer in module.modules() if op == "geglu" else ():
                if isinstance(layer, GEGLU) and isinstance(layer.proj, Linear):
                    layer.proj.implementation = "library"  # ours would gate in that kernel's place
        self._choices[op] = [str(choice)]

    def _require_fits(self, op: str, implementation: str) -> None:
        """Raise UsageError unless every convolution or linear layer can be computed so."""
        if op == "conv3x3" and any(map(_convolves_in_fp8, self.modules.values())):
            raise UsageError(
                "the convolutions multiply in fp8, which one kernel does; load the model without "
                "weights='fp8' to choose another"
            )
        for module in self.modules["unet"].modules() if implementation != "library" else ():
            if isinstance(module, LAYERS[op]):
                weight = (module.conv if isinstance(module, Upsample) else module).weight
                if not isinstance(weight, torch.Tensor) or not _FITS[op](weight, self.dtype):
                    raise UsageError(
                        f"{op} by {implementation!r} takes fp16 and bf16 that are not kept in "
                        f"int8, on GPUs since Hopper; this model is in {self.precision} on "
                        f"{self.device}{' and int8' if _in_int8(self.modules['unet']) else ''}; "
                        "use 'library'"
                    )

    def explain(self) -> list[str]:
        """Say what runs, and which kernels."""
        return [*super().explain(), *(line for said in self._choices.values() for line in said)]

    def weights(self, part: str) -> Mapping[str, torch.Tensor]:
        """Return the modules' own parameters: what is written to them is used at once.

        Those that are kept in int8 are `Int8Weight`s: no tensors, but taken for such by torch.
        """
        if part not in self.modules:
            raise UsageError(f"the model has no {part}; it has {', '.join(self.modules)}")
        if self._fp8:
            raise UsageError(
                "the weights were rounded to fp8, and take no adapters; load the model without "
                "weights='fp8'"
            )
        module, names = self.modules[part], self._names[part]
        named = {
            **dict(module.named_parameters()),
            **cast(dict[str, torch.Tensor], _in_int8(module)),
        }
        return {name: weight for name, weight in named.items() if name in names}

    def changed(self, part: str) -> None:
        """Sum the taps of up-samplers anew."""
        for module in self.modules[part].modules():
            if isinstance(module, Upsample) and module.phases is not None:
                module.phase_()

    def unrounded(self, part: str) -> Mapping[str, torch.Tensor]:
        """Return as the checkpoint has them the weights that are kept in int8, on the host."""
        names = _in_int8(self.modules[part]).keys() & self._names[part]
        if not names:
            return {}
        again = self._checkpoint.load(part, self.dtype)  # mapped from its files, as far as it can
        return {name: weight for name, weight in again.named_parameters() if name in names}


def _convolves_in_fp8(module: nn.Module) -> bool:
    return any(isinstance(layer, Fp8Conv3x3) for layer in module.modules())


def _in_int8(module: nn.Module) -> dict[str, Int8Weight]:
    return {n: m for n, m in module.named_modules() if isinstance(m, Int8Weight)}


def locked_(module: nn.Module) -> bool:
    """Move a module's weights to host memory that stays where it is, which a GPU reads by itself.

    It takes up to twice the bytes, rounded to powers of two, and stays with the process. Returns
    False, with some or none moved, where there is not enough of it.
    """
    try:
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.data = tensor.data.pin_memory()
    except RuntimeError:
        return False
    return True


@final
class Visiting:
    """A part whose module's weights are on `device` while it runs, and inside `staying`.

    lock: one for all parts of the module, which run one at a time; a thread may take it again.
    """

    def __init__(
        self, module: nn.Module, part: Part, device: torch.device, lock: threading.RLock
    ) -> None:
        self._holder = _Holder(module, part)
        self._device = device
        self._lock = lock
        self._weights: dict[str, torch.Tensor] | None = None  # there, while they stay

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self.staying() as weights:
            return torch.func.functional_call(self._holder, weights, args, kwargs)

    @contextmanager
    def staying(self) -> Iterator[dict[str, torch.Tensor]]:
        """Keep the weights there from call to call; other threads wait."""
        with self._lock:
            if self._weights is not None:
                yield self._weights
                return
            self._weights = {
                name: parameter.to(self._device, non_blocking=True)
                for name, parameter in self._holder.named_parameters()
            }
            try:
                yield self._weights
            finally:
                self._weights = None


@final
class _Holder(nn.Module):
    """A part as the call of a module."""

    def __init__(self, module: nn.Module, part: Part) -> None:
        super().__init__()
        self.module = module
        self._part = (part,)  # hidden: a module here would be a submodule

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._part[0](*args, **kwargs)
