"""Error of quantization along the timesteps (paper, section 6), measured while training or for the next run."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..utils.errors import DamagedFileError
from ..utils.files import write_atomically
from ..utils.json_files import is_number, read_json
from ..utils.timesteps import TimestepDistribution

# Number of bins that all timesteps are divided into.
BINS = 20


@dataclass(frozen=True)
class TimestepErrors:
    """Error of quantization in the model's estimate of the clean latents, along the timesteps.

    Attributes:
        timesteps: middle of each bin.
        errors: mean squared error of the estimate in each bin; for models that predict noise this is the paper's
            (1 - alpha_bar) / alpha_bar * |difference of noise|^2 (section 6).
    """

    timesteps: list[float]
    errors: list[float]

    @classmethod
    def load(cls, path: Path) -> TimestepErrors:
        """Read a curve that `save` has written.

        Raises:
            DamagedFileError: the file does not hold as many errors as increasing timesteps.
        """
        content = read_json(path)
        curves = [content.get(key) for key in ("timesteps", "errors")]
        if not (
            content.keys() == {"timesteps", "errors"}
            and all(isinstance(curve, list) and all(is_number(value) for value in curve) for curve in curves)
            and len(curves[0]) == len(curves[1]) > 0
            and curves[0] == sorted(set(curves[0]))
            and min(curves[1]) >= 0
        ):
            raise DamagedFileError(path, "is no curve of errors: it must have timesteps and errors, lists as long")
        return cls(**content)

    def distribution(self, num_timesteps: int) -> TimestepDistribution:
        """Return the distribution of timesteps in proportion to the errors, interpolated between the bins."""
        return TimestepDistribution(np.interp(np.arange(num_timesteps) + 0.5, self.timesteps, self.errors))

    def save(self, path: Path) -> None:
        """Write the curve to a JSON file."""
        content = {"timesteps": self.timesteps, "errors": self.errors}
        write_atomically(path, json.dumps(content, indent=2) + "\n")

    def plot(self, path: Path) -> None:
        """Plot the curve to an image file.

        Raises:
            ImportError: matplotlib is not installed.
        """
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6, 3.5), layout="constrained")
        axes = figure.subplots()
        axes.semilogy(self.timesteps, self.errors, marker=".")
        axes.set(xlabel="timestep", ylabel="squared error of the clean latents", title="Quantization error")
        axes.grid(alpha=0.3)
        figure.savefig(path, dpi=150)


class ErrorMeter:
    """Meter of the errors of `TimestepErrors`, sample by sample.

    Args:
        alphas_cumprod: floating [timesteps] of the noise schedule.
        prediction_type: "epsilon", "v_prediction" or "sample".

    Attributes:
        sums: float64 [bins], sum of the squared errors.
        counts: float64 [bins], number of samples.
    """

    def __init__(self, alphas_cumprod: Tensor, prediction_type: str) -> None:
        # Squared factors from an error of the prediction to an error of the clean latents, by timestep.
        alphas = alphas_cumprod.double()
        factors = {"epsilon": (1 - alphas) / alphas, "v_prediction": 1 - alphas, "sample": torch.ones_like(alphas)}
        self._factors = factors[prediction_type].cpu()
        self.sums = torch.zeros(BINS, dtype=torch.float64)
        self.counts = torch.zeros(BINS, dtype=torch.float64)

    def update(self, student: Tensor, teacher: Tensor, timesteps: Tensor) -> None:
        """Add the errors of a batch.

        Args:
            student: predictions of the quantized model, floating [batch, ...].
            teacher: predictions of the full-precision model, floating [batch, ...].
            timesteps: int64 [batch].
        """
        timesteps = timesteps.cpu()
        squared = (student.double() - teacher.double()).square().flatten(1).mean(1).cpu()
        bins = timesteps * BINS // len(self._factors)
        self.sums.index_add_(0, bins, squared * self._factors[timesteps])
        self.counts.index_add_(0, bins, torch.ones_like(squared))

    def result(self) -> TimestepErrors:
        """Return the curve, without the bins that have no sample."""
        width = len(self._factors) / BINS
        seen = self.counts > 0
        middles = (torch.arange(BINS) + 0.5) * width
        return TimestepErrors(middles[seen].tolist(), (self.sums[seen] / self.counts[seen]).tolist())
