"""The published evaluations, each in a module of its own behind one interface, `base.Suite`."""

from .base import Suite
from .registry import SUITES, SuiteFiles, load_suites
from .run import evaluate_suites

__all__ = ["SUITES", "Suite", "SuiteFiles", "evaluate_suites", "load_suites"]
