"""The KV cache: what decoding remembers, a plain object that is passed in.

Row n of the cache belongs to slot n. Active rows stay contiguous (0 .. n_active), so a step reads a
slice of the buffers and never gathers.
"""

from __future__ import annotations

import math
import mmap
from dataclasses import dataclass

import torch
from torch import Tensor

from model.attention import KV
from model.transfer import to_device


@dataclass(frozen=True)
class LayerCache:
    """One layer's part of a view: writes the new keys and values, returns all that may be read."""

    k: Tensor  # (N, H, S_max, K)
    v: Tensor
    rows: Tensor  # (B, 1) the rows written
    positions: Tensor  # (B, T) where in its row each new token goes
    first: int
    length: int
    origins: Tensor | None = None

    def update(self, k: Tensor, v: Tensor) -> KV:
        """k and v (B, H, T, K) of the new tokens -> everything up to `length`, each (B, H, S, K).

        RuntimeError where rows read out of each other, which takes a kernel.
        """
        if self.origins is not None:
            raise RuntimeError("rows that follow others are for kernels alone")
        self.k[self.rows, :, self.positions] = k.transpose(1, 2).to(self.k.dtype)
        self.v[self.rows, :, self.positions] = v.transpose(1, 2).to(self.v.dtype)
        last = self.first + self.rows.size(0)
        return self.k[self.first : last, :, : self.length], self.v[self.first : last, :, : self.length]


def zeros(shape: tuple[int, ...], *, device: torch.device | str, dtype: torch.dtype) -> Tensor:
    """As `torch.zeros`; on the CPU what nothing has written yet takes no memory.

    The kernel hands out pages of zeros at the first touch, so rows that no load ever needs cost address space
    alone. `torch.zeros` writes them all. Raises MemoryError where there is not even that.
    """
    n_bytes = math.prod(shape) * dtype.itemsize
    if torch.device(device).type != "cpu" or not n_bytes:
        return torch.zeros(shape, device=device, dtype=dtype)
    try:
        memory = mmap.mmap(-1, n_bytes, **_PRIVATE)
    except OSError as error:
        raise MemoryError(f"no room for {n_bytes} bytes of a cache: {error}") from None
    return torch.frombuffer(memory, dtype=dtype).view(shape)


# Memory of this process alone, not shared with its children.
_PRIVATE = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}


class KVCache:
    """Static buffers for `n_slots` rows of `max_len` positions in every layer."""

    def __init__(
        self,
        n_layers: int,
        n_slots: int,
        n_kv_heads: int,
        max_len: int,
        head_dim: int,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        shape = (n_layers, n_slots, n_kv_heads, max_len, head_dim)
        # Zeros, not empty: a masked position still enters the product with v, and 0 * NaN is NaN.
        self.k = zeros(shape, device=device, dtype=dtype)
        self.v = zeros(shape, device=device, dtype=dtype)
        self.n_layers, self.n_slots, self.max_len = n_layers, n_slots, max_len
        self.origins: Tensor | None = None

    def track_origins(self) -> None:
        """From now on a row that follows another reads what that one holds, in place of a copy of it.

        (N, S_max) int32: the row that holds what a row reads at a position. Beams of a sentence share most of
        their past, so this is also less to read. Kernels alone can read such rows.
        """
        self.origins = torch.arange(self.n_slots, dtype=torch.int32)[:, None].repeat(1, self.max_len)

    @property
    def n_bytes(self) -> int:
        return 2 * self.k.numel() * self.k.element_size()

    def view(self, first: int, positions: Tensor, length: int) -> list[LayerCache]:
        """Rows first .. first + B, where `positions` (B, T) are written and `length` positions are read."""
        n_rows = positions.size(0)
        if first + n_rows > self.n_slots or length > self.max_len:
            raise IndexError(
                f"rows {first}..{first + n_rows} of {self.n_slots}, length {length} of {self.max_len}"
            )
        rows = torch.arange(first, first + n_rows, device=self.k.device).unsqueeze(1)
        layers = zip(self.k.unbind(), self.v.unbind(), strict=True)
        return [LayerCache(k, v, rows, positions, first, length, self.origins) for k, v in layers]

    def whole(self) -> list[LayerCache]:
        """All rows, for a kernel that is told where each token belongs."""
        nothing = torch.empty(0, 1, dtype=torch.long)
        layers = zip(self.k.unbind(), self.v.unbind(), strict=True)
        return [LayerCache(k, v, nothing, nothing, 0, self.max_len, self.origins) for k, v in layers]

    def write(self, first: int, layer_kvs: list[KV]) -> None:
        """Store whole (k, v) pairs, each (B, H, S, K), into rows from `first` on: a projected memory."""
        for layer, (k, v) in enumerate(layer_kvs):
            rows, length = slice(first, first + k.size(0)), k.size(2)
            self.k[layer, rows, :, :length] = k.to(self.k.dtype)
            self.v[layer, rows, :, :length] = v.to(self.v.dtype)

    def read(self, first: int, n_rows: int, length: int, every: int = 1) -> list[KV]:
        """The stored pairs of every so many rows, each (B / every, H, S, K): views, not copies."""
        rows = slice(first, first + n_rows, every)
        k, v = self.k[:, rows, :, :length], self.v[:, rows, :, :length]
        return list(zip(k.unbind(), v.unbind(), strict=True))

    def follow(self, sources: list[int], targets: list[int], length: int) -> None:
        """targets[i] goes on from what sources[i] reads, up to `length` positions; no row is both.

        Where origins are tracked nothing is copied; so what others read a row must not write differently.
        """
        if self.origins is None:
            self.copy_rows(sources, targets, length)
        elif sources:
            self.origins[targets, :length] = self.origins[sources, :length]

    def copy_rows(self, sources: list[int], targets: list[int], length: int) -> None:
        """targets[i] becomes what sources[i] was before the call, up to `length` positions.

        Rows that follow a source follow its copy from now on.
        """
        if not sources:
            return
        if self.origins is not None:
            self._rename(sources, targets, length)
        if self.k.device.type == "cpu" and set(sources).isdisjoint(targets):
            self._copy_each(sources, targets, length)
            return
        source, target = to_device([sources, targets], self.k.device)
        self.k[:, target, :, :length] = self.k[:, source, :, :length]
        self.v[:, target, :, :length] = self.v[:, source, :, :length]

    def _rename(self, sources: list[int], targets: list[int], length: int) -> None:
        assert self.origins is not None
        names = torch.arange(self.n_slots, dtype=torch.int32)
        names[sources] = torch.tensor(targets, dtype=torch.int32)
        self.origins[targets, :length] = self.origins[sources, :length]
        self.origins[:, :length] = names[self.origins[:, :length].long()]

    def _copy_each(self, sources: list[int], targets: list[int], length: int) -> None:
        """Copies of whole runs of numbers, where a CPU's indexed copy goes number by number."""
        for source, target in zip(sources, targets, strict=True):
            self.k[:, target, :, :length] = self.k[:, source, :, :length]
            self.v[:, target, :, :length] = self.v[:, source, :, :length]

    def take_block(self, pool: KVCache, block: int, row: int, start: int) -> None:
        """Copy a block of another cache, a row of it, into a row of this one from position `start` on."""
        place = slice(start, start + pool.max_len)
        self.k[:, row, :, place] = pool.k[:, block]
        self.v[:, row, :, place] = pool.v[:, block]

    def give_block(self, pool: KVCache, block: int, row: int, start: int) -> None:
        """The inverse of `take_block`."""
        place = slice(start, start + pool.max_len)
        pool.k[:, block] = self.k[:, row, :, place]
        pool.v[:, block] = self.v[:, row, :, place]
