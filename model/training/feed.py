"""What a training reads, made ready beside it in processes of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar

from torch.utils.data import DataLoader, Dataset

_P = TypeVar("_P")
_T = TypeVar("_T")


class _Made(Dataset[_T], Generic[_P, _T]):
    """Things by place; what makes them is a pure function, so that any process may make any of them."""

    def __init__(self, make: Callable[[_P], _T]) -> None:
        self.make = make

    def __getitem__(self, place: _P) -> _T:
        return self.make(place)


def _as_it_is(made: _T) -> _T:
    return made


def made_ahead(
    make: Callable[[_P], _T], places: Iterable[_P], workers: int, *, ahead: int = 4, pin: bool = False
) -> Iterator[_T]:
    """make(place) for each place, in order; each of `workers` processes is `ahead` of its turn, 0 is none.

    `pin` puts tensors into memory from which a GPU copies them while it computes.
    """
    if workers == 0:
        return map(make, places)
    loader: Iterable[_T] = DataLoader(
        _Made(make),
        batch_size=None,
        sampler=places,  # they stand for indices
        collate_fn=_as_it_is,
        num_workers=workers,
        prefetch_factor=ahead,
        pin_memory=pin,
    )
    return iter(loader)
