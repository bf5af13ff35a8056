"""Which beginnings of prompts are kept, and what makes room for new ones. No tensors.

A prompt is cut into blocks. A block is known by its tokens and the block before it, so that equal beginnings
are one chain of blocks, shared by all prompts that begin so.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

Key = tuple[int, tuple[int, ...]]  # the block before (-1: none), and the tokens
_ROOT = -1


@dataclass
class _Block:
    key: Key
    n_children: int = 0


class PrefixIndex:
    """Keys of the blocks of a pool; blocks are numbers below `n_blocks`.

    A block that others build on stays; of the rest the one goes that was used least recently.
    """

    def __init__(self, n_blocks: int, block_tokens: int) -> None:
        self.n_blocks, self.block_tokens = n_blocks, block_tokens
        self._known: OrderedDict[Key, int] = OrderedDict()  # least recently used first
        self._blocks: dict[int, _Block] = {}
        self._free = list(range(n_blocks))

    def find(self, token_ids: Sequence[int]) -> list[int]:
        """The blocks that hold the longest known beginning, in order."""
        found: list[int] = []
        for tokens in self._cut(token_ids):
            key = (found[-1] if found else _ROOT, tokens)
            block = self._known.get(key)
            if block is None:
                break
            self._known.move_to_end(key)
            found.append(block)
        return found

    def add(self, token_ids: Sequence[int]) -> list[tuple[int, int]]:
        """Make every whole block of a prompt known: (block, first position) of those that must be filled.

        Fewer where no room can be made.
        """
        new: list[tuple[int, int]] = []
        chain: list[int] = []
        for n, tokens in enumerate(self._cut(token_ids)):
            key = (chain[-1] if chain else _ROOT, tokens)
            block = self._known.get(key)
            if block is None:
                block = self._make(key, set(chain))
                if block is None:
                    break
                new.append((block, n * self.block_tokens))
            self._known.move_to_end(key)
            chain.append(block)
        return new

    def forget(self) -> None:
        """Everything unknown: what the blocks hold cannot be trusted."""
        self._known.clear()
        self._blocks.clear()
        self._free = list(range(self.n_blocks))

    def _cut(self, token_ids: Sequence[int]) -> Iterator[tuple[int, ...]]:
        size = self.block_tokens
        for start in range(0, len(token_ids) - size + 1, size):
            yield tuple(token_ids[start : start + size])

    def _make(self, key: Key, kept: set[int]) -> int | None:
        if not self._free and not self._evict(kept):
            return None
        block = self._free.pop()
        self._known[key], self._blocks[block] = block, _Block(key)
        if key[0] != _ROOT:
            self._blocks[key[0]].n_children += 1
        return block

    def _evict(self, kept: set[int]) -> bool:
        for key, block in self._known.items():
            if self._blocks[block].n_children == 0 and block not in kept:
                del self._known[key], self._blocks[block]
                if key[0] != _ROOT:
                    self._blocks[key[0]].n_children -= 1
                self._free.append(block)
                return True
        return False
