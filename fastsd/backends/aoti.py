"""What AOTInductor compiled: native code with its weights, loaded with no compiler.

It runs on what it was compiled on: `machine` says that in words, and an artifact of another is
refused before any of its code runs. For a CPU a part is a package; for a GPU, a library beside its
kernels, which is captured in graphs as eager code is.
"""

from __future__ import annotations

import platform
import threading
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, final

import torch
from torch import Tensor

from fastsd.artifact import Artifact
from fastsd.backends.base import ArtifactBackend
from fastsd.backends.cuda_graph import Graphed, gpu_name
from fastsd.backends.heap import give_back_freed_memory, keep_freed_memory
from fastsd.config import ModelConfig
from fastsd.errors import ArtifactError, OutOfMemory
from fastsd.kernels import native

LIBRARY = "kernels.so"  # beside the UNet's package, where it uses kernels of ours
PACKAGE = "package"  # a part's own folder, laid out as torch's loader wants it
INSIDE = "data/aotinductor/model"
# Latents' values from which decoding takes so long that mapping memory anew does not show.
_LARGE = 4 * 32 * 32
_SELDOM = ("vae_encoder", "unet_shallow")
_SETS = ("avx", "amx", "fma", "f16c", "neon", "sve", "i8mm", "bf16", "dot")  # instruction sets


class CompiledBackend(ArtifactBackend):
    """Run every part's code. The UNet takes each picture once, guided or not."""

    native = True

    def __init__(self, artifact: Artifact, config: ModelConfig, *, device: torch.device) -> None:
        super().__init__(artifact, config, device=device)
        for part in self.entries:
            artifact.check_folder(f"{part}/{PACKAGE}")
        self._prepare()
        # While one is opened its weights are in memory twice: the largest goes first. What only
        # some tasks ask for waits until they do.
        self._opening = threading.Lock()
        self._opened = {
            part: self._open(part)
            for part in sorted(self.entries, key=self._size, reverse=True)
            if part not in _SELDOM
        }

    def _prepare(self) -> None:  # noqa: B027  (not every backend needs anything)
        """Do what must be done before the first part is opened."""

    @abstractmethod
    def _load(self, part: str) -> Any:
        """Load a part's code; raises torch's RuntimeError, or OSError, where it cannot."""

    @abstractmethod
    def _call(self, part: str, opened: Any, inputs: list[Tensor]) -> list[Tensor]:
        """Run what `_load` returned; return the outputs in order."""

    def run(self, part: str, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run one part's code."""
        entry = self.entries[part]
        with self._opening:
            if part not in self._opened:
                self.artifact.check_part(part)
                self.artifact.check_folder(f"{part}/{PACKAGE}")
                self._opened[part] = self._open(part)
        given = [inputs[spec.name] for spec in entry.inputs]
        tensors = self._call(part, self._opened[part], given)
        return {spec.name: tensor for spec, tensor in zip(entry.outputs, tensors, strict=True)}

    def _open(self, part: str) -> Any:
        try:
            return self._load(part)
        except (RuntimeError, OSError) as error:
            reason = str(error).splitlines()[0]
            raise ArtifactError(
                f"torch {torch.__version__} cannot load {part} of {self.artifact.path}: {reason}; "
                f"export it again with `fastsd export --to {self.artifact.manifest.target}`"
            ) from None

    def close(self) -> None:
        """Let go of the code and its weights."""
        self._opened.clear()

    def _size(self, part: str) -> int:
        """How large the files of a part are, in bytes."""
        files, entry = self.artifact.manifest.files, self.entries[part]
        return sum(files[file].size_bytes for file in (entry.file, *entry.weights))

    def _unet_fast(self, x: Tensor, row: Tensor, kv: dict[str, Tensor]) -> Tensor:
        return self._predict("unet", x, row, kv)["out_sample"]

    def _predict(
        self, part: str, x: Tensor, row: Tensor, given: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Give a package as many pictures as it takes at once, each with its rows of `given`.

        The package answers `rows` times a picture, twice under guidance. Where only one answer is
        wanted, it is asked the same twice; where it gives one, and two are, it takes every picture
        twice.
        """
        sizes = {spec.name: spec.shape[0] for spec in self.entries[part].inputs}
        per_row = {name: t for name, t in given.items() if name in sizes}
        pictures, rows = sizes["sample"], sizes[next(iter(per_row))]
        assert isinstance(pictures, int) and isinstance(rows, int), "packages have fixed sizes"
        answers, batch, asked = rows // pictures, len(x), len(next(iter(per_row.values())))
        wanted = asked // batch
        if wanted > answers:
            x, batch, wanted = torch.cat([x] * wanted), asked, 1
        outputs = []
        for start in range(0, batch, pictures):
            index = torch.arange(start, start + pictures, device=x.device).clamp(max=batch - 1)
            at = torch.cat([index + batch * min(i, wanted - 1) for i in range(answers)])
            whole = rows == asked and pictures == batch  # nothing to pick: no copies
            inputs = {
                "sample": x if whole else x[index],
                "row": row if len(row) == sizes["row"] == 1 else row.expand(asked, -1)[at],
                **{name: t if whole else t[at] for name, t in per_row.items()},
            }
            self._check_sizes(part, self.entries[part], inputs)
            outputs.append(self.run(part, {name: t.contiguous() for name, t in inputs.items()}))
        joined = {}
        for name in outputs[0]:
            each = [out[name] for out in outputs]
            kept = [t.reshape(answers, pictures, *t.shape[1:])[:wanted] for t in each]
            joined[name] = torch.cat(kept, dim=1)[:, :batch].flatten(0, 1)
        return joined


@final
class AotiBackend(CompiledBackend):
    """Run packages that were compiled for this CPU."""

    name = "aoti"

    def __init__(self, artifact: Artifact, config: ModelConfig, *, device: torch.device) -> None:
        super().__init__(artifact, config, device=device)
        if "unet_shallow" in self.entries:
            self._parts |= {"unet_deep": self._unet_deep, "unet_shallow": self._unet_shallow}

    @classmethod
    def machine(cls, device: torch.device) -> dict[str, str]:
        """Return what the code is bound to: torch, the system, the CPU's instruction sets."""
        return machine()

    def _unet_deep(self, x: Tensor, row: Tensor, kv: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        out = self._predict("unet", x, row, kv)
        return out["out_sample"], out["deep"]

    def _unet_shallow(self, x: Tensor, row: Tensor, kv: dict[str, Tensor], deep: Tensor) -> Tensor:
        return self._predict("unet_shallow", x, row, {**kv, "deep": deep})["out_sample"]

    def _prepare(self) -> None:
        keep_freed_memory()
        if (library := f"unet/{LIBRARY}") in self.artifact.manifest.files:
            native.load(self.artifact.path / library)

    def _load(self, part: str) -> Any:
        from torch.export.pt2_archive._package import AOTICompiledModel

        folder = self.artifact.path / part / PACKAGE
        # torch._inductor.aoti_load_package takes folders too, but warns of each
        loader = torch._C._aoti.AOTIModelPackageLoader(str(folder), "model", False, 1, -1)
        return AOTICompiledModel(loader)

    def _call(self, part: str, opened: Any, inputs: list[Tensor]) -> list[Tensor]:
        large = part == "vae_decoder" and inputs[0].numel() >= _LARGE
        if large:
            give_back_freed_memory()
        out = opened(*inputs)
        if large:
            give_back_freed_memory()
        return [out] if isinstance(out, Tensor) else list(out)


@final
class AotiCudaBackend(Graphed, CompiledBackend):
    """Run libraries that were compiled for this GPU. Unmeasured: no row has run them."""

    name = "aoti-cuda"

    def __init__(self, artifact: Artifact, config: ModelConfig, *, device: torch.device) -> None:
        self._calling = threading.Lock()
        super().__init__(artifact, config, device=device)

    @classmethod
    def machine(cls, device: torch.device) -> dict[str, str]:
        """Return what the code is bound to: the GPU too."""
        return gpu_machine(device)

    def _load(self, part: str) -> Any:
        # Kernels are read when they first run: from here, wherever the process has gone.
        library = (self.artifact.path / self.entries[part].file).resolve()
        # One at a time and with no event of its own around a run, which a graph could not hold.
        with torch.cuda.device(self.device):
            torch.cuda.empty_cache()  # the weights are taken from CUDA itself
            free, _ = torch.cuda.mem_get_info()
            if free < self._size(part):
                raise OutOfMemory(
                    f"not enough GPU memory for {part} of {self.artifact.path}: its weights take "
                    f"{self._size(part) / 2**30:.1f} GiB, and {free / 2**30:.1f} are free"
                )
            return torch._C._aoti.AOTIModelContainerRunnerCuda(  # type: ignore[call-overload]
                str(library), 1, str(self.device), str(library.parent), True
            )

    def _call(self, part: str, opened: Any, inputs: list[Tensor]) -> list[Tensor]:
        with self._calling, torch.cuda.device(self.device):
            outputs: list[Tensor] = opened.run(inputs)
        return outputs


def gpu_machine(device: torch.device) -> dict[str, str]:
    """Return what code for a GPU is bound to: `machine`, and the GPU."""
    return {**machine(), "gpu": gpu_name(device)}


def machine() -> dict[str, str]:
    """Return what compiled code is bound to, in words that `Artifact.check_machine` compares."""
    has = torch.cpu.get_capabilities()
    sets = sorted(name for name in has if name.startswith(_SETS) and has[name] is True)
    return {
        "torch": torch.__version__,
        "system": f"{platform.system()} {platform.machine()}",
        "instruction sets": " ".join(sets),
    }
