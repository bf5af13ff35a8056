"""Tensors in safetensors files: what is there is known before anything is read, and read one by one.

The files are memory-mapped, and each tensor goes straight to its device and number format, so that the host
holds little more than the largest tensor beside the model.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path, PurePath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}  # bytes of one number
_OTHERS = {"I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}  # of buffers
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


# The modules that hold a parameter, and as what attribute, by the parameter's first name.
Owners = dict[str, list[tuple[nn.Module, str]]]


class WeightsError(ValueError):
    """Weights that are not there or do not fit; the message names the file and the tensor."""


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: where, how large, and as what numbers."""

    path: Path
    shape: tuple[int, ...]
    dtype: str

    @property
    def n_numbers(self) -> int:
        return prod(self.shape)

    @property
    def n_bytes(self) -> int:
        return self.n_numbers * (_FLOATS | _OTHERS).get(self.dtype, 1)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder, one or the shards of an index. Raises `WeightsError`."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if (folder / INDEX).is_file():
        return _shards(folder)
    pickles = sorted(path.name for path in folder.glob("*") if path.suffix in _PICKLES)
    if pickles:
        raise WeightsError(
            f"{folder / pickles[0]}: a pickle, which can run code and is never loaded; "
            f"save the model as {WEIGHTS}"
        )
    raise WeightsError(f"{folder / WEIGHTS}: no such file")


def _shards(folder: Path) -> list[Path]:
    path = folder / INDEX
    try:
        names = json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()
        shards = sorted({str(name) for name in names})
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise WeightsError(f"{path}: not an index of shards: {error}") from None
    for name in shards:
        if PurePath(name).name != name or not name.endswith(".safetensors"):
            raise WeightsError(f"{path}: {name!r} is not the name of a safetensors file beside it")
        if not (folder / name).is_file():
            raise WeightsError(f"{folder / name}: no such file, but {INDEX} names it")
    return [folder / name for name in shards]


def read_headers(paths: Iterable[Path]) -> dict[str, Stored]:
    """Every tensor of some files by its name; reads no numbers. Raises `WeightsError`."""
    found: dict[str, Stored] = {}
    for path in paths:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (it is no mapping)
                    if name in found:
                        raise WeightsError(f"{path}: {name} is in {found[name].path.name} too")
                    part = file.get_slice(name)
                    found[name] = Stored(path, tuple(part.get_shape()), str(part.get_dtype()))
        except (SafetensorError, OSError) as error:
            raise WeightsError(f"{path}: not a whole safetensors file: {error}") from None
    return found


@dataclass(frozen=True)
class Take:
    """How a stored tensor becomes parameters: `targets` are equal parts of its first dimension.

    A spare one may lie where the model has no such part.
    """

    targets: tuple[str, ...]
    transposed: bool = False
    reversed: bool = False
    flattened: bool = False
    spare: bool = False

    def shapes(self, shape: tuple[int, ...]) -> tuple[int, ...] | None:
        """The shape of each part; None where it cannot be parted so."""
        turned = shape[::-1] if self.transposed else (prod(shape),) if self.flattened else shape
        if not turned or turned[0] % len(self.targets):
            return None
        return (turned[0] // len(self.targets), *turned[1:])

    def parts(self, tensor: Tensor) -> list[Tensor]:
        """The parts of a tensor, in the order of `targets`."""
        turned = tensor.t() if self.transposed else tensor.flatten() if self.flattened else tensor
        turned = turned.flip(0) if self.reversed else turned
        return list(turned.chunk(len(self.targets)))


def parameter_names(model: nn.Module) -> dict[str, str]:
    """Every name that a parameter goes by, with the first of them, by which it is known."""
    first: dict[int, str] = {}
    return {
        name: first.setdefault(id(parameter), name)
        for name, parameter in model.named_parameters(remove_duplicate=False)
    }


def plan(
    model: nn.Module, stored: Mapping[str, Stored], takes: Mapping[str, Take], where: Path
) -> dict[str, Take]:
    """Which tensors fill the model's parameters one to one, by shapes alone. Raises `WeightsError`.

    A tensor whose parameter is filled already, under its first name, is a copy that nobody reads.
    """
    known, shapes = parameter_names(model), {name: p.shape for name, p in model.named_parameters()}
    takes = {
        name: take for name, take in takes.items() if not take.spare or known.keys() >= set(take.targets)
    }
    extra = sorted(name for name, take in takes.items() if not known.keys() >= set(take.targets))
    if extra:
        raise WeightsError(
            f"{where}: unknown tensor {extra[0]} ({len(extra)} in all), the configuration has no place for it"
        )
    chosen: dict[str, str] = {}  # parameter -> tensor
    for name, take in sorted(takes.items(), key=lambda item: item[1].targets != _first_names(item[1], known)):
        found = take.shapes(stored[name].shape)
        for target in take.targets:
            wanted = tuple(shapes[known[target]])
            if found != wanted:
                raise WeightsError(
                    f"{where}: {name} has shape {stored[name].shape}, "
                    f"the configuration wants {wanted} for {target}"
                )
            if stored[name].dtype not in _FLOATS:
                raise WeightsError(f"{where}: {name} holds {stored[name].dtype}, not floating-point numbers")
            chosen.setdefault(known[target], name)
    missing = sorted(shapes.keys() - chosen.keys())
    if missing:
        raise WeightsError(f"{where}: missing tensor {missing[0]} ({len(missing)} in all)")
    used = set(chosen.values())
    return {
        name: replace(take, targets=tuple(known[target] for target in take.targets))
        for name, take in takes.items()
        if name in used
    }


def _first_names(take: Take, known: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(known.get(target, target) for target in take.targets)


def fill(
    model: nn.Module,
    stored: Mapping[str, Stored],
    takes: Mapping[str, Take],
    device: torch.device | str,
    dtype: torch.dtype,
) -> None:
    """Put planned tensors in the place of the model's parameters, file by file, on device, in dtype."""
    owners = _owners(model)
    for path in sorted({stored[name].path for name in takes}):
        with safe_open(path, framework="pt", device=str(device)) as file:
            for name in (name for name in takes if stored[name].path == path):
                _place(owners, takes[name], file.get_tensor(name), dtype)


def read_all(stored: Mapping[str, Stored]) -> dict[str, Tensor]:
    """Every tensor of some files, on the host."""
    tensors: dict[str, Tensor] = {}
    for path in sorted({each.path for each in stored.values()}):
        with safe_open(path, framework="pt") as file:
            tensors |= {name: file.get_tensor(name) for name in stored if stored[name].path == path}
    return tensors


def fill_from(model: nn.Module, tensors: Mapping[str, Tensor], where: Path) -> None:
    """Put tensors of the parameters' own names in their place. Raises `WeightsError`."""
    stored = {
        name: Stored(where, tuple(t.shape), "F32" if t.is_floating_point() else str(t.dtype))
        for name, t in tensors.items()
    }
    takes = plan(model, stored, {name: Take((name,)) for name in tensors}, where)
    owners = _owners(model)
    for name, take in takes.items():
        _place(owners, take, tensors[name], tensors[name].dtype)


def _place(owners: Owners, take: Take, tensor: Tensor, dtype: torch.dtype) -> None:
    for target, part in zip(take.targets, take.parts(tensor), strict=True):
        # A copy in any case: a part of a tensor would keep the whole, a mapped one the file.
        values = part.to(dtype, copy=True, memory_format=torch.contiguous_format)
        parameter = nn.Parameter(values, requires_grad=False)
        for module, attribute in owners[target]:
            setattr(module, attribute, parameter)


def _owners(model: nn.Module) -> Owners:
    owners: Owners = {}
    for name, first in parameter_names(model).items():
        path, _, attribute = name.rpartition(".")
        owners.setdefault(first, []).append((model.get_submodule(path), attribute))
    return owners


class _NoNumbers(TorchFunctionMode):
    """Draws no first weights: where there is no memory they go nowhere, and asking costs a second."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__name__", "") in ("normal_", "uniform_", "kaiming_uniform_"):
            return args[0] if args else (kwargs or {})["tensor"]
        return func(*args, **(kwargs or {}))


def empty_model(build: Callable[[], Any]) -> Any:
    """What `build` makes, with parameters that have shapes and no memory."""
    with torch.device("meta"), _NoNumbers():
        return build()


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file that appears whole or not at all."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")  # its own, where several write the same
    write(part)
    part.chmod(0o644)  # safetensors makes it private; a service may run as another user
    part.replace(path)


def files_sha256(paths: list[Path]) -> str:
    """The hex digest of a file, or of the digests of several."""
    digests = []
    for path in paths:
        with path.open("rb") as file:
            digests.append(hashlib.file_digest(file, "sha256").hexdigest())
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
