"""LoRA files: one adapter of a UNet with kohya or diffusers keys in a safetensors file; see lora_metadata.py for what it says of itself."""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from hyper_sd.files import fsync, share
from hyper_sd.lora_metadata import DIFFUSERS_KEY, LoraInfo, diffusers_metadata, to_info, to_metadata, to_targets, with_recipe
from hyper_sd.lora_metadata import SamplerRecipe as SamplerRecipe
from hyper_sd.lora_metadata import SamplerRow as SamplerRow
from hyper_sd.roles import LoraSpec

LoraFormat = Literal["kohya", "diffusers"]
LoraDtype = Literal["fp32", "fp16", "bf16"]

DTYPES: dict[LoraDtype, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class LoraHeader:
    """What is known of a LoRA file from its header alone: no tensor has been read.

    `modules` maps a module's name as the file spells it to its tensors' names by side (lora_A, lora_B, alpha). `info` and
    `targets` are None in a file this project did not write.
    """

    path: Path
    key: str
    format: LoraFormat
    dtype: LoraDtype
    rank: int
    modules: Mapping[str, Mapping[str, str]]
    metadata: Mapping[str, str]
    info: LoraInfo | None
    targets: tuple[str, ...] | None

    def require_rank(self, rank: int) -> None:
        """Raise ValueError for a file of another rank."""
        if rank != self.rank:
            raise ValueError(
                f"{self.key}={self.path} has rank {self.rank} but lora.rank={rank}; set lora.rank={self.rank} or give another file"
            )

    def require_base(self, fingerprint: Mapping[str, Any]) -> None:
        """Raise ValueError for a file trained on another base model; a file without a fingerprint passes."""
        if self.info is None:
            return
        theirs, ours = self.info.fingerprint, json.loads(json.dumps(fingerprint))
        for name in sorted(theirs.keys() | ours.keys()):
            if theirs.get(name) != ours.get(name):
                raise ValueError(
                    f"{self.key}={self.path} was trained on another base model, {self.info.base_model}: its {name} is "
                    f"{theirs.get(name)!r}, this teacher's {ours.get(name)!r}; set teacher.path to that model or give another file"
                )


@dataclass(frozen=True, kw_only=True)
class LoraFile:
    """The float32 tensors of a LoRA file, keyed as `Roles.tensors` is; `spec.alpha` is the alpha they are to be used with."""

    header: LoraHeader
    tensors: dict[str, Tensor]
    spec: LoraSpec


def save_lora(
    path: Path,
    tensors: Mapping[str, Tensor],
    spec: LoraSpec,
    info: LoraInfo,
    *,
    format: LoraFormat = "kohya",
    dtype: LoraDtype = "fp32",
    check: Callable[[Path], object] | None = None,
) -> None:
    """Write one adapter's tensors (keyed as in `Roles.tensors`) so that `pipe.load_lora_weights(path)` applies them at alpha / rank.

    The file appears under its name complete, flushed to the disk and accepted by `check`, or not at all; equal contents are
    equal bytes. Raises ValueError for tensors that do not make an adapter of `spec`, empty or non-finite ones, and a path that
    cannot be written.
    """
    modules = _modules_of(tensors, spec.rank)
    keyed = _kohya_tensors(modules, spec.alpha, dtype) if format == "kohya" else _diffusers_tensors(modules, dtype)
    metadata = to_metadata(spec, info, title=f"{info.stage} of {info.base_model}")
    if format == "diffusers":
        metadata[DIFFUSERS_KEY] = diffusers_metadata(spec)
    with _atomic(path) as temporary:
        save_file(keyed, temporary, metadata=metadata)
        _sort_header(temporary)
        if check is not None:
            check(temporary)


def inspect_lora(path: Path, *, key: str = "init") -> LoraHeader:
    """Read the header of a kohya or diffusers LoRA of a UNet. Raises ValueError, naming `key`, for anything else."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            names: list[str] = file.keys()
            slices = {name: file.get_slice(name) for name in names}
            shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
            dtypes = {part.get_dtype() for name, part in slices.items() if not name.endswith(".alpha")}
    except FileNotFoundError:
        raise ValueError(f"{key}={path}: there is no such file") from None
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{key}={path} is not a whole safetensors file ({error}): truncated, or of another format") from None
    modules, format = _modules_named(shapes, f"{key}={path}")
    ranks = {shapes[names["lora_A"]][0] for names in modules.values()}
    if len(ranks) != 1:
        raise ValueError(f"{key}={path} mixes the ranks {sorted(ranks)}; only a LoRA with one rank for all its modules can be used")
    try:
        info = to_info(metadata)
    except ValueError as error:
        raise ValueError(f"{key}={path}: {error}") from None
    return LoraHeader(
        path=path,
        key=key,
        format=format,
        dtype=_dtype_name(dtypes, f"{key}={path}"),
        rank=ranks.pop(),
        modules=modules,
        metadata=metadata,
        info=info,
        targets=to_targets(metadata),
    )


def read_lora(
    path: Path, modules: Iterable[str], *, spec: LoraSpec | None = None, fingerprint: Mapping[str, Any] | None = None, key: str = "init"
) -> LoraFile:
    """Read a LoRA file back into tensors keyed as `Roles.tensors`; `modules` are the network's module paths (`net.named_modules()`).

    With `spec` the file must have its rank, and lora_B is scaled so that the tensors mean the same at `spec.alpha`; with
    `fingerprint` the file must be of that base model. A file that gives no alpha has alpha = rank, as diffusers takes it.
    Raises ValueError, naming `key`, before a tensor is read.
    """
    header = inspect_lora(path, key=key)
    if spec is not None:
        header.require_rank(spec.rank)
    if fingerprint is not None:
        header.require_base(fingerprint)
    paths = _module_paths(header, modules)
    with safe_open(path, framework="pt") as file:
        alphas = _alphas(header, lambda name: float(file.get_tensor(name)))
        if spec is None:
            spec = LoraSpec(rank=header.rank, alpha=next(iter(alphas.values())), targets=header.targets or tuple(sorted(paths.values())))
        tensors: dict[str, Tensor] = {}
        for name, sides in header.modules.items():
            tensors[f"{paths[name]}.lora_A.weight"] = file.get_tensor(sides["lora_A"]).float()
            tensors[f"{paths[name]}.lora_B.weight"] = file.get_tensor(sides["lora_B"]).float() * (alphas[name] / spec.alpha)
    return LoraFile(header=header, tensors=tensors, spec=spec)


def replace_recipe(path: Path, recipe: SamplerRecipe) -> None:
    """Give a LoRA file of ours another sampler recipe; its tensors stay as they are, bit for bit."""
    metadata = with_recipe(inspect_lora(path, key="lora").metadata, recipe)
    with _atomic(path) as temporary:
        save_file(load_file(path), temporary, metadata=metadata)
        _sort_header(temporary)


# ---- tensors to keys -------------------------------------------------------------------------------------------------------


def _modules_of(tensors: Mapping[str, Tensor], rank: int) -> dict[str, tuple[Tensor, Tensor]]:
    """(lora_A, lora_B) by module path, checked."""
    for name, value in tensors.items():
        if value.numel() == 0:
            raise ValueError(f"refusing to write a LoRA with an empty tensor: {name} has shape {tuple(value.shape)} (not gathered?)")
    paths = [name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight")]
    modules = {}
    if not paths or set(tensors) != {f"{path}.{side}.weight" for path in paths for side in ("lora_A", "lora_B")}:
        raise ValueError(f"not an adapter: expected <module>.lora_A.weight and .lora_B.weight of each module, got {sorted(tensors)[:3]} …")
    for path in paths:
        a, b = tensors[f"{path}.lora_A.weight"].detach(), tensors[f"{path}.lora_B.weight"].detach()
        if a.shape[0] != rank or b.shape[1] != rank:
            raise ValueError(f"{path} has rank {a.shape[0]} (lora_A) and {b.shape[1]} (lora_B), expected lora.rank={rank}")
        modules[path] = (a, b)
    return modules


def _cast(value: Tensor, dtype: LoraDtype, name: str) -> Tensor:
    cast = value.to(device="cpu", dtype=DTYPES[dtype]).contiguous()
    if not cast.isfinite().all():
        why = "training diverged" if not value.isfinite().all() else f"its largest value {value.abs().max():.3g} overflows dtype={dtype}"
        raise ValueError(f"refusing to write a LoRA with non-finite numbers: {name}; {why}")
    return cast


def _kohya_tensors(modules: Mapping[str, tuple[Tensor, Tensor]], alpha: float, dtype: LoraDtype) -> dict[str, Tensor]:
    keyed: dict[str, Tensor] = {}
    for path, (a, b) in modules.items():
        name = kohya_name(path)
        if f"{name}.alpha" in keyed:
            raise ValueError(f"two modules share the kohya name {name}; use format=diffusers")
        keyed[f"{name}.lora_down.weight"] = _cast(a, dtype, path)
        keyed[f"{name}.lora_up.weight"] = _cast(b, dtype, path)
        keyed[f"{name}.alpha"] = torch.tensor(float(alpha))
    return keyed


def _diffusers_tensors(modules: Mapping[str, tuple[Tensor, Tensor]], dtype: LoraDtype) -> dict[str, Tensor]:
    return {
        f"unet.{path}.{side}.weight": _cast(value, dtype, path)
        for path, pair in modules.items()
        for side, value in zip(("lora_A", "lora_B"), pair, strict=True)
    }


def kohya_name(path: str) -> str:
    """`lora_unet_<module path with _>`."""
    return "lora_unet_" + path.replace(".", "_")


# ---- keys to tensors -------------------------------------------------------------------------------------------------------


def _modules_named(shapes: Mapping[str, tuple[int, ...]], where: str) -> tuple[dict[str, dict[str, str]], LoraFormat]:
    """Module name as the file spells it -> tensor name by side, and the format the names are in."""
    modules: dict[str, dict[str, str]] = {}
    formats: set[LoraFormat] = set()
    for name, shape in shapes.items():
        module, side = _split(name)
        if module is None:
            raise ValueError(
                f"{where} has the tensor {name!r}, which is no part of a UNet LoRA; it must have kohya keys "
                "(lora_unet_….lora_down.weight, .lora_up.weight, .alpha) or diffusers keys (unet.….lora_A.weight, .lora_B.weight)"
            )
        if 0 in shape:
            raise ValueError(f"{where}: the tensor {name!r} is empty, its shape is {shape}")
        formats.add("kohya" if name.startswith("lora_unet_") else "diffusers")
        modules.setdefault(module, {})[side] = name
    for module, sides in modules.items():
        if missing := {"lora_A", "lora_B"} - sides.keys():
            raise ValueError(f"{where} is incomplete: {module} has no {' and no '.join(sorted(missing))}")
    if len(formats) != 1:
        raise ValueError(f"{where} is no LoRA: it has {'kohya and diffusers keys mixed' if formats else 'no tensors'}")
    return modules, formats.pop()


def _split(name: str) -> tuple[str | None, str]:
    """A tensor's name to (module, side); module is None for a name of neither format."""
    if name.startswith("lora_unet_"):
        module, _, suffix = name.partition(".")
        side = {"lora_down.weight": "lora_A", "lora_up.weight": "lora_B", "alpha": "alpha"}.get(suffix)
        return (module if side else None), side or ""
    for side in ("lora_A", "lora_B"):
        if name.startswith("unet.") and name.endswith(f".{side}.weight"):
            return name.removeprefix("unet.").removesuffix(f".{side}.weight"), side
    return None, ""


def _module_paths(header: LoraHeader, modules: Iterable[str]) -> dict[str, str]:
    """Module name in the file -> module path in the network."""
    spell = kohya_name if header.format == "kohya" else str
    known: dict[str, str] = {spell(path): path for path in modules}
    unknown = [name for name in header.modules if name not in known]
    if unknown:
        raise ValueError(
            f"{header.key}={header.path} does not fit the network: {len(unknown)} of its {len(header.modules)} modules are not in it "
            f"(first: {unknown[0]}); check teacher.path"
        )
    return {name: known[name] for name in header.modules}


def _alphas(header: LoraHeader, read: Callable[[str], float]) -> dict[str, float]:
    """alpha by module name in the file."""
    config: dict[str, Any] = json.loads(header.metadata.get(DIFFUSERS_KEY, "{}")) if header.format == "diffusers" else {}
    for name in ("alpha_pattern", "use_rslora", "use_dora"):
        if config.get(f"unet.{name}"):
            raise ValueError(f"{header.key}={header.path} was saved with {name}={config[f'unet.{name}']}, which is not supported")
    default = float(config.get("unet.lora_alpha", header.rank))
    return {name: read(sides["alpha"]) if "alpha" in sides else default for name, sides in header.modules.items()}


def _dtype_name(names: set[str], where: str) -> LoraDtype:
    known: dict[str, LoraDtype] = {"F32": "fp32", "F16": "fp16", "BF16": "bf16"}
    if len(names) != 1 or not names <= known.keys():
        raise ValueError(f"{where} holds the dtypes {sorted(names)}; a LoRA must be in one of F32, F16 and BF16")
    return known[names.pop()]


# ---- writing ---------------------------------------------------------------------------------------------------------------


@contextmanager
def _atomic(path: Path) -> Iterator[Path]:
    """A sibling to write to; on a normal exit it is flushed to the disk and takes the name `path`, else it is removed."""
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp.safetensors")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            share(temporary)
            fsync(temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        fsync(path.parent)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"the LoRA cannot be written to {path}: {error}; choose another out (export) or run.dir (training)") from error


def _sort_header(path: Path) -> None:
    """safetensors writes metadata in an order that differs from process to process; sorted, equal contents are equal bytes."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        assert len(text) <= size, "the same entries in another order cannot be longer"
        file.seek(8)
        file.write(text.ljust(size))
