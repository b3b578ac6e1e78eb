"""Sums of outer products from one triangle, against numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from diffusers_bitsfusion.calibration.gram import Gram, gram_numel


@pytest.mark.parametrize("size", [1, 255, 256, 700])
def test_a_triangle_holds_the_whole_matrix(size):
    rows = torch.randn(40, size, generator=torch.Generator().manual_seed(0))
    gram = Gram(size, torch.device("cpu"))
    for part in rows.split(15):
        gram.add(part)
    expected = rows.double().numpy().T @ rows.double().numpy()
    assert np.allclose(gram.full(), expected, atol=1e-3)
    assert torch.equal(gram.diagonal(), gram.full().diagonal())
    assert gram.values.numel() == gram_numel(size) <= size * (size + 256) / 2
