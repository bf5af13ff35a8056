"""Int8 weights with dynamic activations for the CPU; all that touches torch's quantised operators is here."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor, nn

from model.kernels import Kernels, ShortlistWeights


def is_supported() -> bool:
    """Does this build of torch have an int8 matrix product for this processor?"""
    return torch.backends.quantized.engine != "none"


class Int8Linear(nn.Module):
    """y = x Wᵀ + b with W in int8, a scale per output, and each row of x in 8 bits with its own scale.

    torch's dynamic product has one scale for the whole of x, by which a row's answer would depend on its
    neighbours. So each row is divided by its largest absolute value, and a row that reaches from -1 to 1
    stands before them: the common scale is then the same whatever the batch holds. A row without numbers
    stays so, and is alone with it.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """weight (N, K), K at least 2; bias (N,) or None."""
        super().__init__()
        n_out, n_in = weight.shape
        if n_in < 2:
            raise ValueError("an int8 product needs rows of at least 2 numbers")
        self.in_features, self.out_features = n_in, n_out
        weight = weight.detach().float().contiguous()
        self.digest = hashlib.sha256(weight.numpy().tobytes()).digest()
        bias = torch.zeros(n_out) if bias is None else bias.detach().float()
        self.register_buffer("bias", bias, persistent=False)
        self._pack(weight)

    bias: Tensor
    span: Tensor

    def _pack(self, weight: Tensor) -> None:
        scale = weight_scale(weight)
        with warnings.catch_warnings():
            # torch marks these as deprecated in favour of a package that is built on them.
            warnings.simplefilter("ignore", DeprecationWarning)
            warnings.simplefilter("ignore", UserWarning)
            zeros = torch.zeros(len(scale), dtype=torch.long)
            quantised = torch.quantize_per_channel(weight, scale.double(), zeros, 0, torch.qint8)
            self._packed = torch.ops.quantized.linear_prepack(quantised, None)
        # Without VNNI pairs of 8-bit products are added in 16 bits; one bit less keeps them from overflow.
        self._reduce_range = not _has_vnni()
        span = torch.zeros(1, self.in_features)
        span[0, 0], span[0, 1] = -1.0, 1.0
        self.register_buffer("span", span, persistent=False)

    @property
    def n_bytes(self) -> int:
        """What the packed weights take."""
        return self.in_features * self.out_features

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., N), float32."""
        rows = x.reshape(-1, self.in_features)
        scale = rows.abs().amax(-1, keepdim=True)  # vectorised, 18 times as fast as the norm of this name
        unit = (rows / scale).nan_to_num_(0.0)  # 0 / 0 is a row of zeros; NaN comes back with the scale
        spanned = torch.cat((self.span, unit))
        product = torch.ops.quantized.linear_dynamic(spanned, self._packed, self._reduce_range)
        out = torch.addcmul(self.bias, product[1:], scale)
        return out.view(*x.shape[:-1], self.out_features)


class KernelInt8Linear(Int8Linear):
    """The same in one call of a kernel, which rounds a row to steps of a 127th of its greatest number."""

    weight: Tensor  # panels of P outputs: (N / P, K / 4, P, 4), both padded with zeros
    shift: Tensor
    w_scale: Tensor

    def __init__(self, weight: Tensor, bias: Tensor | None, kernels: Kernels) -> None:
        self._kernels = kernels  # before weights are packed as it wants them
        super().__init__(weight, bias)

    def _pack(self, weight: Tensor) -> None:
        n_out, n_in = weight.shape
        scale = weight_scale(weight)
        panel = self._kernels.panel
        padded = torch.zeros(-(-n_out // panel) * panel, -(-n_in // 4) * 4, dtype=torch.int8)
        padded[:n_out, :n_in] = (weight / scale[:, None]).round()
        panels = padded.view(-1, panel, padded.size(1) // 4, 4).transpose(1, 2).contiguous()
        self.register_buffer("weight", panels, persistent=False)
        self.register_buffer("shift", self._kernels.int8_shift(padded), persistent=False)
        self.register_buffer("w_scale", scale, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., N), float32."""
        rows = x.reshape(-1, self.in_features).contiguous()
        out = torch.empty(len(rows), self.out_features)
        self._kernels.int8_linear(rows, self.weight, self.shift, self.w_scale, self.bias, out)
        return out.view(*x.shape[:-1], self.out_features)

    def best(self, x: Tensor, n_best: int, banned: Tensor) -> tuple[Tensor, Tensor]:
        """x (M, K) -> ids and log-probabilities of the n greatest outputs of each row, each (M, n).

        banned (n, 2): a row, or -1 for all, and an output that has -inf there. As `Kernels.best_tokens` of
        `forward`, in half the time for many rows: no logit ever leaves the cache.
        """
        own = self.weight, self.shift, self.w_scale, self.bias
        return self._kernels.best_outputs(x.contiguous(), *own, n_best, banned)

    @property
    def n_bytes(self) -> int:
        """What the packed weights take, and those by output, once somebody has asked for some."""
        return super().n_bytes * (1 + ("_rows" in self.__dict__))

    def select(self, ids: Tensor) -> Selected:
        """Some outputs (N,), in rising order, packed for `best_listed`."""
        panels = self._kernels.select_outputs(self._rows, ids)
        shift = torch.zeros(panels.size(0) * panels.size(2), dtype=torch.int32)  # as long as the panels are
        shift[: len(ids)] = self.shift[ids]
        return Selected(panels, shift, self.w_scale[ids], self.bias[ids], ids)

    def listed(self, x: Tensor, chosen: Selected) -> Tensor:
        """Some outputs alone: x (M, K) -> (M, n), as `forward` gives them."""
        out = torch.empty(len(x), len(chosen.ids))
        if len(chosen.ids):
            self._kernels.int8_linear(x.contiguous(), *chosen.packed, out)
        return out

    def best_listed(
        self, x: Tensor, common: Selected, lists: Sequence[Selected], n_best: int, banned: Tensor
    ) -> tuple[Tensor, Tensor]:
        """`best` of rows that choose among some outputs and those of a list each, which holds none of these.

        Where there are fewer than n, -inf comes last.
        """
        described = (ShortlistWeights * len(lists))(*(own.described for own in lists))
        depth = self.weight.size(1) * 4
        return self._kernels.best_listed(x.contiguous(), depth, common.described, described, n_best, banned)

    @cached_property
    def _rows(self) -> Tensor:
        """The packed weights output by output, (N, K) int8, for whoever wants some."""
        fours = self.weight.view(torch.int32).squeeze(-1)  # (N / P, K / 4, P)
        rows = fours.transpose(1, 2).reshape(-1, fours.size(1))[: self.out_features]
        return rows.contiguous().view(torch.int8)


class Selected:
    """Some outputs of a product in 8 bits, and what a kernel is told of them."""

    def __init__(self, weight: Tensor, shift: Tensor, w_scale: Tensor, bias: Tensor, ids: Tensor) -> None:
        """weight in panels, shift for all of their outputs; the others (n,), of which ids rise."""
        self.ids = ids
        self.packed = weight, shift, w_scale, bias
        pointers = (tensor.data_ptr() for tensor in self.packed)
        self.described = ShortlistWeights(*pointers, len(ids), ids.data_ptr())


def share_int8(model: nn.Module, other: nn.Module) -> None:
    """Let a model have another's packed weights where, under the same names, they are the same."""
    theirs = dict(other.named_modules())
    for name, own in list(model.named_modules()):
        twin = theirs.get(name)
        if isinstance(own, Int8Linear) and isinstance(twin, Int8Linear) and _is_same(own, twin):
            parent, _, key = name.rpartition(".")
            setattr(model.get_submodule(parent), key, twin)


def _is_same(own: Int8Linear, twin: Int8Linear) -> bool:
    return type(own) is type(twin) and own.digest == twin.digest and torch.equal(own.bias, twin.bias)


def weight_scale(weight: Tensor) -> Tensor:
    """weight (N, K) -> what one of 127 steps is worth, for each output (N,)."""
    return weight.abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny) / 127


def _has_vnni() -> bool:
    return bool(torch.cpu._is_vnni_supported())  # noqa: SLF001  # there is no public one in every version
