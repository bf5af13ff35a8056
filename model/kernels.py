"""Kernels in C for decoding on a CPU, compiled for the processor at hand where a compiler is.

An eager step of a small decoder is hundreds of operations of microseconds each; in C it is a handful a layer.
They say what torch's operations say, which stay the reference, and the way of machines without a compiler.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import platform
import re
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger("model.kernels")

_SOURCE = Path(__file__).with_name("kernels.c")
_COMPILERS = ("cc", "gcc", "clang")
# Nothing that changes what is computed but the order of sums: NaN and infinity stay what they are.
_FLAGS = ("-std=gnu11", "-O3", "-fopenmp", "-fno-math-errno", "-fno-trapping-math")
# Every compiler knows but one of them on ARM.
_NATIVE = "-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native"
_COMPILE_SECONDS = 60.0

_pointer, _long, _int = ctypes.c_void_p, ctypes.c_long, ctypes.c_int
_STORED: list[Any] = [_pointer, _pointer, *[_long] * 5]


class ShortlistWeights(ctypes.Structure):
    """Some outputs alone, packed as all of them are, and which they are: `struct shortlist`."""

    _fields_ = (
        ("weight", _pointer),
        ("shift", _pointer),
        ("w_scale", _pointer),
        ("bias", _pointer),
        ("n", ctypes.c_int64),
        ("ids", _pointer),
    )


class Kernels:
    """The compiled functions, on tensors of float32 on the CPU.

    They read memory as they are told: shapes are the caller's business. MemoryError where there is none for
    intermediate results.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self.panel = int(library.panel_width())  # outputs whose 8-bit weights lie together
        self.has_int8 = self.panel > 0
        self._self_attention = library.self_attention
        origins: list[Any] = [_pointer, _long, _long]
        self._self_attention.argtypes = [*_STORED, *origins, *[_pointer] * 5, _long, _pointer, _int]
        self._stored_attention = library.stored_attention
        self._stored_attention.argtypes = [*_STORED, _pointer, _pointer, _long, _long, _pointer, _int]
        self._best_tokens = library.best_tokens
        self._best_tokens.argtypes = [_pointer, *[_long] * 3, _pointer, _pointer, _int]
        self._draw_tokens = library.draw_tokens
        self._draw_tokens.argtypes = [_pointer, _long, _long, *[_pointer] * 4, _int, _pointer, _pointer, _int]
        if self.has_int8:
            self._int8_shift = library.int8_shift
            self._int8_shift.argtypes = [_pointer, _long, _long, _pointer]
            self._int8_linear = library.int8_linear
            self._int8_linear.argtypes = [_pointer, *[_long] * 3, *[_pointer] * 4, _long, _pointer, _int]
            self._best_outputs = library.best_outputs
            self._best_outputs.argtypes = [_pointer, *[_long] * 3, *[_pointer] * 4, _long]
            self._best_outputs.argtypes += [_pointer, _long, _long, _pointer, _pointer, _int]
            self._select_outputs = library.select_outputs
            self._select_outputs.argtypes = [_pointer, _long, _pointer, _long, _pointer]
            self._best_listed = library.best_listed
            self._best_listed.argtypes = [_pointer, *[_long] * 3, *[_pointer] * 3, *[_long] * 2]
            self._best_listed.argtypes += [_pointer, _pointer, _int]
            self._run_blocks = library.run_blocks
            self._run_blocks.argtypes = [_pointer, _pointer, _long, *[_pointer] * 3, _long]

    def int8_shift(self, weight: Tensor) -> Tensor:
        """weight (N, K), int8 -> where the sum of each output begins, (N,) int32."""
        weight = weight.contiguous()
        shift = torch.empty(len(weight), dtype=torch.int32)
        self._int8_shift(weight.data_ptr(), *weight.shape, shift.data_ptr())
        return shift

    def int8_linear(
        self, x: Tensor, weight: Tensor, shift: Tensor, w_scale: Tensor, bias: Tensor, out: Tensor
    ) -> None:
        """x (M, K) times weights packed as `model.quantize` does it -> out (M, N)."""
        product = _product(x, weight, shift, w_scale, bias)
        _check(self._int8_linear(*product, out.data_ptr(), torch.get_num_threads()))

    def best_outputs(
        self,
        x: Tensor,
        weight: Tensor,
        shift: Tensor,
        w_scale: Tensor,
        bias: Tensor,
        n_best: int,
        banned: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """`best_tokens` of what `int8_linear` gives, which is never stored: (B, n) ids, log-probabilities.

        banned (n, 2), int64: a row, or -1 for all, and the output that is impossible there.
        """
        n_rows, n_best = len(x), min(n_best, len(bias))
        ids, logprobs = torch.empty(n_rows, n_best, dtype=torch.long), torch.empty(n_rows, n_best)
        _check(
            self._best_outputs(
                *_product(x, weight, shift, w_scale, bias),
                banned.data_ptr(),
                len(banned),
                n_best,
                ids.data_ptr(),
                logprobs.data_ptr(),
                torch.get_num_threads(),
            )
        )
        return ids, logprobs

    def select_outputs(self, weight: Tensor, ids: Tensor) -> Tensor:
        """weight (N, K), int8, K a multiple of 4; ids (n,) -> theirs in panels (n / P, K / 4, P, 4)."""
        n_fours = weight.size(1) // 4
        out = torch.empty(-(-len(ids) // self.panel), n_fours, self.panel, 4, dtype=torch.int8)
        self._select_outputs(weight.data_ptr(), weight.size(1), ids.data_ptr(), len(ids), out.data_ptr())
        return out

    def best_listed(
        self,
        x: Tensor,
        depth: int,
        common: ShortlistWeights,
        lists: ctypes.Array[ShortlistWeights],
        n_best: int,
        banned: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """`best_outputs` of rows x (M, K) that choose among some outputs, and among those of a list each."""
        ids, logprobs = torch.empty(len(x), n_best, dtype=torch.long), torch.empty(len(x), n_best)
        _check(
            self._best_listed(
                x.data_ptr(),
                *x.shape,
                depth,
                ctypes.byref(common),
                lists,
                banned.data_ptr(),
                len(banned),
                n_best,
                ids.data_ptr(),
                logprobs.data_ptr(),
                torch.get_num_threads(),
            )
        )
        return ids, logprobs

    def self_attention(
        self,
        qkv: Tensor,
        k: Tensor,
        v: Tensor,
        first_row: int,
        n_heads: int,
        last: Tensor,
        first: Tensor | None,
        rotation: tuple[Tensor, Tensor] | None,
        origins: Tensor | None = None,
    ) -> Tensor:
        """One new token in each of B rows: qkv (B, (H + 2 H_kv) K), k and v (N, H_kv, S, K) -> (B, H K).

        Row first_row is the first of them. Queries and keys are turned in place; keys and values are stored
        at last (B,), then a row reads the positions first (B,), else 0, .. last, each out of the row that
        `origins` (N, S) int32 names for it.
        """
        n_rows, n_kv_heads, head_dim = qkv.size(0), k.size(1), k.size(3)
        k, v = k[first_row:], v[first_row:]
        out = torch.empty(n_rows, n_heads * head_dim)
        cosines, sines = rotation or (None, None)
        _check(
            self._self_attention(
                k.data_ptr(),
                v.data_ptr(),
                k.stride(0),
                k.stride(1),
                n_heads,
                n_kv_heads,
                head_dim,
                None if origins is None else origins[first_row].data_ptr(),
                0 if origins is None else origins.stride(0),
                first_row,
                qkv.data_ptr(),
                cosines.data_ptr() if cosines is not None else None,
                sines.data_ptr() if sines is not None else None,
                first.data_ptr() if first is not None else None,
                last.data_ptr(),
                n_rows,
                out.data_ptr(),
                torch.get_num_threads(),
            )
        )
        return out

    def run_blocks(
        self,
        shape: ctypes.Structure,
        blocks: ctypes.Array[Any],
        step: ctypes.Structure,
        x: Tensor,
        work: Tensor,
        widest: int,
    ) -> None:
        """x (B, T, D) through blocks as `model.kernel_blocks` describes them, in place."""
        described = ctypes.byref(shape), blocks, len(blocks), ctypes.byref(step)
        _check(self._run_blocks(*described, x.data_ptr(), work.data_ptr(), widest))

    def stored_attention(self, q: Tensor, k: Tensor, v: Tensor, last: Tensor) -> Tensor:
        """q (B, H, 1, K) over k and v (B / G, H_kv, S, K), up to last (B / G,) -> (B, H K).

        G neighbouring rows of q read one of k and v, in which the positions of a head follow each other.
        """
        n_rows, n_heads, _, head_dim = q.shape
        out = torch.empty(n_rows, n_heads * head_dim)
        _check(
            self._stored_attention(
                k.data_ptr(),
                v.data_ptr(),
                k.stride(0),
                k.stride(1),
                n_heads,
                k.size(1),
                head_dim,
                q.data_ptr(),
                last.data_ptr(),
                n_rows,
                n_rows // k.size(0),
                out.data_ptr(),
                torch.get_num_threads(),
            )
        )
        return out

    def best_tokens(self, logits: Tensor, n_best: int) -> tuple[Tensor, Tensor]:
        """logits (B, V) -> ids of the n greatest of each row, and log-probabilities, each (B, n), best first.

        What is impossible has -inf; all of a row that holds what is no number has NaN.
        """
        logits = logits.contiguous()
        n_rows, vocab_size = logits.shape
        n_best = min(n_best, vocab_size)
        ids, logprobs = torch.empty(n_rows, n_best, dtype=torch.long), torch.empty(n_rows, n_best)
        out = ids.data_ptr(), logprobs.data_ptr()
        _check(
            self._best_tokens(logits.data_ptr(), n_rows, vocab_size, n_best, *out, torch.get_num_threads())
        )
        return ids, logprobs

    def draw_tokens(
        self,
        logits: Tensor,
        temperature: Tensor,
        top_k: Tensor,
        top_p: Tensor,
        uniform: Tensor,
        *,
        logprobs: bool,
    ) -> tuple[Tensor, Tensor]:
        """logits (B, V) -> a token of each row and its log-probability, each (B,).

        temperature and top_p (B,) float32, top_k (B,) int64, uniform (B,) float64, as `model.sampling.sample`
        takes them. NaN for a row that holds what is no number, or nothing that is possible; without
        `logprobs` 0 for all others.
        """
        logits = logits.contiguous()
        temperature, top_p = temperature.float(), top_p.float()
        n_rows, vocab_size = logits.shape
        ids, found = torch.empty(n_rows, dtype=torch.long), torch.empty(n_rows)
        _check(
            self._draw_tokens(
                logits.data_ptr(),
                n_rows,
                vocab_size,
                temperature.data_ptr(),
                top_k.data_ptr(),
                top_p.data_ptr(),
                uniform.data_ptr(),
                logprobs,
                ids.data_ptr(),
                found.data_ptr(),
                torch.get_num_threads(),
            )
        )
        return ids, found


def _product(x: Tensor, weight: Tensor, shift: Tensor, w_scale: Tensor, bias: Tensor) -> tuple[int, ...]:
    """x (M, K) and packed weights of N outputs, as every kernel takes them that multiplies."""
    packed = weight.data_ptr(), shift.data_ptr(), w_scale.data_ptr(), bias.data_ptr()
    return x.data_ptr(), *x.shape, weight.size(1) * 4, *packed, len(bias)


def _check(failed: int) -> None:
    if failed:
        raise MemoryError("a kernel found no memory for its intermediate results")


@functools.cache
def compiled() -> Kernels | None:
    """The kernels, compiled at the first call; None where no compiler is, or it fails, which is logged."""
    try:
        command = _compiler()
        if command is None:
            log.info("no C compiler: steps run through torch's operations alone")
            return None
        # A folder that nobody else may write to, and that is gone once the library is loaded.
        with tempfile.TemporaryDirectory() as folder:
            library = Path(folder) / "kernels.so"
            command += [*_FLAGS, _NATIVE, "-shared", "-fPIC", str(_SOURCE), "-o", str(library), "-lm"]
            subprocess.run(  # noqa: S603  # the compiler of this machine, on a file of this package
                command,
                check=True,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=_COMPILE_SECONDS,
            )
            return Kernels(_load(library))
    except (OSError, ValueError, AttributeError, subprocess.SubprocessError) as error:
        log.warning(
            "kernels.c was not compiled, steps run through torch's operations alone: %s", _reason(error)
        )
        return None


def _compiler() -> list[str] | None:
    """What CC names, with its arguments, else the first that is here. Raises ValueError for an open quote."""
    named = shlex.split(os.environ.get("CC", ""))
    return named or next(([name] for name in _COMPILERS if shutil.which(name)), None)


def _reason(error: Exception) -> str:
    """Why there are no kernels, in a line: of what a compiler says the first that is wrong."""
    if isinstance(error, subprocess.TimeoutExpired):
        return f"{error.cmd[0]} took more than {error.timeout:g} seconds"
    if not isinstance(error, subprocess.CalledProcessError):
        return str(error)
    lines = [line.strip() for line in error.stderr.splitlines() if line.strip()]
    wrong = [line for line in lines if re.search("error|cannot|unsupported|undefined", line, re.IGNORECASE)]
    return next(iter(wrong or lines), f"{error.cmd[0]} ended with {error.returncode}")


def _load(library: Path) -> ctypes.CDLL:
    """Out of memory where the system can: a container's /tmp often allows no programs."""
    if not hasattr(os, "memfd_create"):
        return ctypes.CDLL(str(library))
    descriptor = os.memfd_create("kernels")
    try:
        with os.fdopen(descriptor, "wb", closefd=False) as file:
            file.write(library.read_bytes())
        # Under a name of its own: of one that it knows, the loader returns what it has.
        name = library.with_suffix(".memory.so")
        name.symlink_to(f"/proc/self/fd/{descriptor}")
        return ctypes.CDLL(str(name))
    finally:
        os.close(descriptor)
