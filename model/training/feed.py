"""Batches made ready beside the training, in processes of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from model.training.batches import Indices

Batch = dict[str, Tensor]
Place = tuple[int, Indices]  # the batch's number in the whole run, and its examples


class _Collated(Dataset[Batch]):
    """Batches by place: a pure function, so that any process may make any of them."""

    def __init__(self, make: Callable[[Place], Batch]) -> None:
        self.make = make

    def __getitem__(self, place: Place) -> Batch:
        return self.make(place)


def collated(
    make: Callable[[Place], Batch], places: Iterable[Place], workers: int, *, pin: bool
) -> Iterator[Batch]:
    """make(place) for each place, in order; some ahead of their turn in `workers` processes, 0 is none."""
    if workers == 0:
        return map(make, places)
    loader: Iterable[Batch] = DataLoader(
        _Collated(make),
        batch_size=None,
        sampler=places,  # they stand for indices
        num_workers=workers,
        pin_memory=pin,
        prefetch_factor=4,
    )
    return iter(loader)
