"""People's preference between two pipelines: votes on pairs of images, and the report on them."""

from .report import PreferenceReport, preference_report
from .store import QUESTIONS, Vote, VoteStore

__all__ = ["QUESTIONS", "PreferenceReport", "Vote", "VoteStore", "preference_report"]
