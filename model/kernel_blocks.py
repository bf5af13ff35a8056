"""Blocks in one call of a kernel: a decoder's for one new token a row, an encoder's over short texts."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from model.attention import KV, Rotation
from model.block import ACTIVATIONS, Block, PostNorm
from model.cache import LayerCache
from model.fused import FusedGatedFeedForward, KernelAttention, KernelCrossAttention
from model.kernels import Kernels
from model.masks import Mask, RowSpans
from model.quantize import KernelInt8Linear
from model.transformer import Decoder, Encoder

_pointer, _whole, _small = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
_Fields = list[tuple[str, Any]]


class _Linear(ctypes.Structure):
    _fields_: ClassVar[_Fields] = [
        *((name, _pointer) for name in ("weight", "shift", "w_scale", "bias")),
        *((name, _whole) for name in ("n_in", "depth", "n_out")),
    ]


class _Norm(ctypes.Structure):
    _fields_: ClassVar[_Fields] = [
        ("weight", _pointer),
        ("bias", _pointer),
        ("eps", ctypes.c_float),
        ("kind", _small),
    ]


class _Block(ctypes.Structure):
    _fields_: ClassVar[_Fields] = [
        *((name, _Norm) for name in ("attention_norm", "cross_norm", "feed_forward_norm")),
        *((name, _Linear) for name in ("qkv", "out", "cross_q", "cross_out", "up", "down")),
        *((name, _pointer) for name in ("k", "v", "memory_k", "memory_v", "first")),
    ]


class _Shape(ctypes.Structure):
    _fields_: ClassVar[_Fields] = [
        *((name, _whole) for name in ("d_model", "n_heads", "n_kv_heads", "head_dim", "d_ff")),
        *((name, _small) for name in ("norm_first", "activation", "gated", "has_cross")),
    ]


class _Step(ctypes.Structure):
    _fields_: ClassVar[_Fields] = [
        *((name, _whole) for name in ("n_rows", "row_stride", "head_stride")),
        *((name, _whole) for name in ("memory_row_stride", "memory_head_stride", "group")),
        *((name, _pointer) for name in ("last", "memory_last", "cosines", "sines")),
        ("origins", _pointer),
        *((name, _whole) for name in ("origin_stride", "first_row")),
        ("rows", _pointer),
        *((name, _small) for name in ("n_threads", "whole_texts")),
    ]


# Positions of a text. In longer ones attention, query by query, costs more than what is saved in calls.
LONGEST = 96


def is_suited(stack: Encoder | Decoder) -> bool:
    """Are the blocks of an encoder or a decoder made of what the kernel knows?"""
    return all(map(_is_known, stack.blocks))


def _is_known(block: nn.Module) -> bool:
    assert isinstance(block, Block)
    attentions: list[nn.Module] = [block.attention]
    if hasattr(block, "cross_attention"):
        attentions.append(block.cross_attention)
    return (
        all(isinstance(each, KernelAttention | KernelCrossAttention) for each in attentions)
        and all(isinstance(each.q_norm, nn.Identity) for each in attentions)
        and all(isinstance(linear, KernelInt8Linear) for linear in _linears(block))
        and all(isinstance(norm, nn.LayerNorm | nn.RMSNorm) for norm in _norms(block))
    )


def _linears(block: Block) -> list[Any]:
    """qkv, out, cross q, cross out, up, down; without a memory those of self-attention in the middle."""
    own, feed_forward = block.attention, block.feed_forward
    gated = isinstance(feed_forward, FusedGatedFeedForward)
    middle = [block.cross_attention.q_proj, block.cross_attention.out_proj] if _has_cross(block) else []
    first = [own.qkv_proj, own.out_proj]
    return [*first, *(middle or first), feed_forward.gate_up if gated else feed_forward.up, feed_forward.down]


def _norms(block: Block) -> list[Any]:
    """Those of attention, cross-attention (without a memory that of attention again) and feed-forward."""
    middle = block.add_cross if _has_cross(block) else block.add_attention
    return [block.add_attention.norm, middle.norm, block.add_feed_forward.norm]


def _has_cross(block: Block) -> bool:
    return hasattr(block, "cross_attention")


def _describe_linear(linear: KernelInt8Linear) -> _Linear:
    tensors = linear.weight, linear.shift, linear.w_scale, linear.bias
    depth = linear.weight.size(1) * 4
    return _Linear(*(each.data_ptr() for each in tensors), linear.in_features, depth, linear.out_features)


def _describe_norm(norm: nn.LayerNorm | nn.RMSNorm) -> _Norm:
    bias = getattr(norm, "bias", None)
    assert norm.eps is not None
    return _Norm(
        norm.weight.data_ptr(),
        None if bias is None else bias.data_ptr(),
        norm.eps,
        1 if isinstance(norm, nn.LayerNorm) else 2,
    )


class _Plan:
    """The blocks as the kernel reads them; it keeps alive what they point to."""

    def __init__(self, blocks: Sequence[Any]) -> None:
        first: Any = blocks[0]
        linears, norms = [_linears(block) for block in blocks], [_norms(block) for block in blocks]
        self._alive = [tensor for block in blocks for tensor in (*block.parameters(), *block.buffers())]
        self.layers = (_Block * len(blocks))()
        for layer, own_linears, own_norms in zip(self.layers, linears, norms, strict=True):
            layer.attention_norm, layer.cross_norm, layer.feed_forward_norm = map(_describe_norm, own_norms)
            names = ("qkv", "out", "cross_q", "cross_out", "up", "down")
            for name, linear in zip(names, own_linears, strict=True):
                setattr(layer, name, _describe_linear(linear))
        attention, down = first.attention, first.feed_forward.down
        gated = isinstance(first.feed_forward, FusedGatedFeedForward)
        self.shape = _Shape(
            attention.qkv_proj.in_features,
            attention.n_heads,
            attention.n_kv_heads,
            attention.head_dim,
            down.in_features,
            not isinstance(first.add_attention, PostNorm),
            list(ACTIVATIONS.values()).index(first.feed_forward.activation),
            gated,
            _has_cross(first),
        )
        self.widest = max(linear.out_features for linear in linears[0])
        self.work = self.shape.d_model + self.widest + self.shape.n_heads * self.shape.head_dim


class _OneCall(nn.Module):
    """What a stack whose blocks run in one call of a kernel does beside describing the step."""

    blocks: nn.ModuleList
    _kernels: Kernels
    # Called before blocks run, as late as can be: their call leaves the interpreter to other threads.
    before: Callable[[], None] = staticmethod(lambda: None)

    @functools.cached_property
    def _plan(self) -> _Plan:
        """Made at the first step: until then weights may be exchanged for those of another model."""
        return _Plan(list(self.blocks))

    def _run(self, x: Tensor, step: _Step) -> Tensor:
        x = x.contiguous()  # as it comes out of the embeddings: nobody else holds it
        plan = self._plan
        work = torch.empty(step.n_rows * plan.work)
        self.before()
        self._kernels.run_blocks(plan.shape, plan.layers, step, x, work, plan.widest)
        return x


def tell_before_blocks(model: nn.Module, tell: Callable[[], None]) -> bool:
    """Have `tell` called before a model's blocks run; False where they do not run in one call."""
    stacks = [stack for stack in model.children() if isinstance(stack, _OneCall)]
    for stack in stacks:
        stack.before = tell
    return bool(stacks)


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


class KernelDecoder(_OneCall, Decoder):
    """The same decoder; where every row has one new token, its blocks run in one call.

    So the interpreter, with its lock, is needed once a step and not a hundred times. Rows may also be tokens
    of prompts, each at its place in a row of the cache.
    """

    def __init__(self, decoder: Decoder, kernels: Kernels) -> None:
        nn.Module.__init__(self)
        self.embeddings, self.rotary, self.norm = decoder.embeddings, decoder.rotary, decoder.norm
        self.blocks, self.window, self.n_full_layers = decoder.blocks, decoder.window, decoder.n_full_layers
        self._kernels = kernels

    def _through_blocks(
        self,
        x: Tensor,
        masks: Sequence[Mask | None],
        cache: Sequence[LayerCache] | None,
        memory: Sequence[KV] | None,
        memory_mask: Mask | None,
        rotation: Rotation | None,
    ) -> Tensor:
        spans = [mask for mask in masks if isinstance(mask, RowSpans)]
        if cache is None or len(spans) < len(masks):
            self.before()
            return super()._through_blocks(x, masks, cache, memory, memory_mask, rotation)
        step = _make_step(len(x), cache[0], spans[0], rotation)
        if memory is not None and not _read_memory(step, memory, memory_mask):
            self.before()
            return super()._through_blocks(x, masks, cache, memory, memory_mask, rotation)
        plan = self._plan
        for layer, held, own in zip(plan.layers, cache, spans, strict=True):
            offset = held.first * held.k.stride(0) * held.k.element_size()
            layer.k, layer.v = held.k.data_ptr() + offset, held.v.data_ptr() + offset
            layer.first = _address(own.first)
        for layer, (k, v) in zip(plan.layers, memory or (), strict=False):
            layer.memory_k, layer.memory_v = k.data_ptr(), v.data_ptr()
        return self._run(x, step)


class KernelEncoder(_OneCall, Encoder):
    """The same encoder; over short texts its blocks run in one call."""

    def __init__(self, encoder: Encoder, kernels: Kernels) -> None:
        nn.Module.__init__(self)
        self.embeddings, self.rotary, self.norm = encoder.embeddings, encoder.rotary, encoder.norm
        self.blocks = encoder.blocks
        self._kernels = kernels

    def forward(self, token_ids: Tensor, mask: Tensor | None, segment_ids: Tensor | None = None) -> Tensor:
        """As `Encoder.forward`; short texts go by themselves, so that they feel no long one beside them."""
        length = token_ids.size(1)
        if mask is None or length <= LONGEST:
            return super().forward(token_ids, mask, segment_ids)
        ends = (mask.view(-1, length) * torch.arange(1, length + 1)).amax(1)
        short = ends <= LONGEST
        if short.all() or not short.any():
            return super().forward(token_ids, mask, segment_ids)
        parts = []
        for some in (short, ~short):
            width = max(1, int(ends[some].amax()))
            segments = None if segment_ids is None else segment_ids[some, :width]
            parts.append(super().forward(token_ids[some, :width], mask[some][..., :width], segments))
        memory = torch.zeros(*token_ids.shape, parts[0].size(2))
        for some, own in zip((short, ~short), parts, strict=True):
            memory[some, : own.size(1)] = own
        return memory

    def _through_blocks(self, x: Tensor, mask: Tensor | None, rotation: Rotation | None) -> Tensor:
        n_texts, length, _ = x.shape
        if length > LONGEST:
            self.before()
            return super()._through_blocks(x, mask, rotation)
        if mask is None:
            return self._through_texts(x.flatten(0, 1), torch.full((n_texts,), length), rotation).view_as(x)
        # What stands behind a text, or between its parts, is read by nobody: it is not computed.
        seen = mask.view(n_texts, length)
        turns = rotation and (_packed(rotation[0], seen), _packed(rotation[1], seen))
        memory = torch.zeros_like(x)
        memory[seen] = self._through_texts(x[seen], seen.sum(1), turns)
        return memory

    def _through_texts(self, x: Tensor, lengths: Tensor, rotation: Rotation | None) -> Tensor:
        """x (N, D), the tokens of texts of some lengths (B,), one text after the other."""
        plan, n_rows = self._plan, len(x)
        ends = lengths.cumsum(0)
        first, last = (ends - lengths).repeat_interleave(lengths), (ends - 1).repeat_interleave(lengths)
        cosines, sines = rotation or (None, None)
        step = _Step(
            n_rows=n_rows,
            last=last.data_ptr(),
            cosines=_address(cosines),
            sines=_address(sines),
            n_threads=torch.get_num_threads(),
            whole_texts=True,
        )
        k, v = torch.empty(2, n_rows * plan.shape.n_kv_heads * plan.shape.head_dim)
        for layer in plan.layers:  # one after the other
            layer.k, layer.v, layer.first = k.data_ptr(), v.data_ptr(), first.data_ptr()
        return self._run(x, step)


def _packed(turns: Tensor, seen: Tensor) -> Tensor:
    """turns (B, 1, S, K / 2) -> those of what is seen (B, S), (N, K / 2)."""
    return turns.squeeze(1)[seen]


def _make_step(n_rows: int, cache: LayerCache, spans: RowSpans, rotation: Rotation | None) -> _Step:
    cosines, sines = rotation or (None, None)
    return _Step(
        n_rows=n_rows,
        row_stride=cache.k.stride(0),
        head_stride=cache.k.stride(1),
        last=spans.last.data_ptr(),
        cosines=_address(cosines),
        sines=_address(sines),
        origins=None if cache.origins is None else cache.origins[cache.first].data_ptr(),
        origin_stride=0 if cache.origins is None else cache.origins.stride(0),
        first_row=cache.first,
        rows=_address(spans.rows),
        n_threads=torch.get_num_threads(),
    )


def _read_memory(step: _Step, memory: Sequence[KV], mask: Mask | None) -> bool:
    """Note where the memory of a step lies; False where the kernel cannot read it."""
    k, v = memory[0]
    if not isinstance(mask, RowSpans) or k.stride() != v.stride() or k.stride(2) != k.size(3):
        return False
    step.memory_row_stride, step.memory_head_stride = k.stride(0), k.stride(1)
    step.group, step.memory_last = step.n_rows // len(k), mask.last.data_ptr()
    return True
