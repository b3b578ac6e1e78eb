"""Image quality: scores of prompts, distances to a reference model's images, and one report of both.

Imported on demand: `import diffusers_bitsfusion` alone loads nothing of it.
"""

from .clip import Clip, clip_score
from .compositional import ConfidenceInterval, bootstrap_mean, bootstrap_scores, load_scorer
from .distribution import cmmd, frechet_distance
from .generate import Sampling, draw_images, generate_images
from .grid import image_grid
from .images import image_metrics
from .pipeline import DENOISERS, load_pipeline
from .prompts import Prompt, read_captions, read_prompts, sample_prompts
from .report_table import format_report
from .run import clip_beside, evaluate
from .suites import SUITES, SuiteFiles, evaluate_suites, load_suites

__all__ = [
    "DENOISERS",
    "SUITES",
    "Clip",
    "ConfidenceInterval",
    "Prompt",
    "Sampling",
    "SuiteFiles",
    "bootstrap_mean",
    "bootstrap_scores",
    "clip_beside",
    "clip_score",
    "cmmd",
    "draw_images",
    "evaluate",
    "evaluate_suites",
    "format_report",
    "frechet_distance",
    "generate_images",
    "image_grid",
    "image_metrics",
    "load_pipeline",
    "load_scorer",
    "load_suites",
    "read_captions",
    "read_prompts",
    "sample_prompts",
]
