"""People's preference between two pipelines: votes on pairs of pictures, and what they come to."""

from .report import PreferenceReport, preference_report
from .store import QUESTIONS, Vote, VoteStore

__all__ = ["QUESTIONS", "PreferenceReport", "Vote", "VoteStore", "preference_report"]
