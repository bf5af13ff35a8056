"""Where bfloat16 is used, and where it is left aside."""

import platform

import pytest
import torch
from torch import Tensor

from model.training.muon import orthogonalise
from model.training.precision import autocast, multiplies_bf16


@pytest.mark.parametrize(
    ("machine", "has", "pays"), [("x86_64", True, True), ("x86_64", False, False), ("aarch64", False, True)]
)
def test_a_processor_without_instructions_for_it_goes_without(
    monkeypatch: pytest.MonkeyPatch, machine: str, has: bool, pays: bool
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has)
    multiplies_bf16.cache_clear()
    try:
        assert multiplies_bf16("cpu") is pays
        assert multiplies_bf16("cuda")
        a = torch.ones(4, 4)
        dtypes: list[torch.dtype] = []
        for wanted in (True, False):
            with autocast("cpu", bf16=wanted):
                product: Tensor = a @ a
            dtypes.append(product.dtype)
        assert dtypes == [torch.bfloat16 if pays else torch.float32, torch.float32]
        assert orthogonalise(torch.randn(2, 8, 4)).dtype is dtypes[0]
    finally:
        multiplies_bf16.cache_clear()
