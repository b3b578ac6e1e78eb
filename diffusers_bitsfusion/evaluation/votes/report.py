"""What votes come to: preference with Wilson intervals, by question and category, and how far raters agree."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from math import sqrt
from typing import Any

from ..compositional import OVERALL, ConfidenceInterval
from ..prompts import Prompt
from .store import DESTINATION, NEITHER, QUESTIONS, SOURCE, Vote

_Z = 1.959964  # of a 95 % interval


@dataclass(frozen=True)
class Preference:
    """The votes on one question.

    Attributes:
        destination, source, neither: votes for each.
        preference: share of the destination among the votes for one of the two, with its Wilson interval; None where
            there are none.
    """

    destination: int
    source: int
    neither: int
    preference: ConfidenceInterval | None


@dataclass(frozen=True)
class Agreement:
    """How far raters who answered the same questions agree.

    Attributes:
        pairs: of answers by two raters to one question.
        share: of the pairs that are equal; None without pairs.
        alpha: Krippendorff's for nominal data, 1 for full agreement and 0 for that of chance; None where all answers
            are alike or nobody shares a question.
    """

    pairs: int
    share: float | None
    alpha: float | None


@dataclass(frozen=True)
class PreferenceReport:
    """What the votes come to.

    Attributes:
        raters: votes by the name of each rater.
        questions: by question, overall and by category.
        agreement: by question.
    """

    raters: dict[str, int]
    questions: dict[str, dict[str, Preference]]
    agreement: dict[str, Agreement]

    def as_dict(self) -> dict[str, Any]:
        """Return a JSON-safe dict."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [f"{sum(self.raters.values())} votes of {len(self.raters)} raters"]
        for question, groups in self.questions.items():
            agreement = self.agreement[question]
            lines += ["", QUESTIONS[question]]
            lines += [f"{'':<24}{'preferred':>12}{'95 % interval':>20}{'votes':>8}{'against':>9}{'neither':>9}"]
            lines += [f"{name:<24}{_row(group)}" for name, group in groups.items()]
            if agreement.share is not None:
                alpha = "" if agreement.alpha is None else f", Krippendorff's alpha {agreement.alpha:.2f}"
                lines.append(f"raters agree in {agreement.share:.0%} of {agreement.pairs} pairs of answers{alpha}")
        return "\n".join(lines)


def preference_report(votes: Sequence[Vote], prompts: Sequence[Prompt]) -> PreferenceReport:
    """Sum up votes.

    Args:
        votes: of a `VoteStore`.
        prompts: what they are about, by whose categories they are reported as well.

    Raises:
        ValueError: there are no votes.
    """
    if not votes:
        raise ValueError("There are no votes yet.")
    questions, agreement = {}, {}
    for question in QUESTIONS:
        asked = [vote for vote in votes if vote.question == question]
        groups: dict[str, list[Vote]] = {OVERALL: asked}
        for name in dict.fromkeys(prompt.category for prompt in prompts if prompt.category is not None):
            groups[name] = [vote for vote in asked if prompts[vote.index].category == name]
        questions[question] = {name: _preference(group) for name, group in groups.items()}
        agreement[question] = _agreement(asked)
    return PreferenceReport(dict(Counter(vote.rater for vote in votes)), questions, agreement)


def wilson(successes: int, trials: int) -> ConfidenceInterval:
    """Return a share with its 95 % Wilson interval; there is at least one trial."""
    share, z2 = successes / trials, _Z**2 / trials
    centre = (share + z2 / 2) / (1 + z2)
    half = sqrt(share * (1 - share) * z2 + z2**2 / 4) / (1 + z2)
    return ConfidenceInterval(share, centre - half, centre + half)


def _preference(votes: Sequence[Vote]) -> Preference:
    counts = Counter(vote.choice for vote in votes)
    decided = counts[DESTINATION] + counts[SOURCE]
    interval = wilson(counts[DESTINATION], decided) if decided else None
    return Preference(counts[DESTINATION], counts[SOURCE], counts[NEITHER], interval)


def _agreement(votes: Iterable[Vote]) -> Agreement:
    by_prompt = defaultdict(list)
    for vote in votes:
        by_prompt[vote.index].append(vote.choice)
    shared = [choices for choices in by_prompt.values() if len(choices) > 1]
    pairs = [pair for choices in shared for pair in combinations(choices, 2)]
    if not pairs:
        return Agreement(0, None, None)
    # Each prompt weighs as much as it has answers: its pairs, each both ways round, by the answers less one.
    totals = Counter(choice for choices in shared for choice in choices)
    count = totals.total()
    observed = (
        sum(2 * sum(a != b for a, b in combinations(choices, 2)) / (len(choices) - 1) for choices in shared) / count
    )
    expected = sum(a * b for (n, a), (m, b) in _ordered_pairs(totals) if n != m) / (count * (count - 1))
    share = sum(a == b for a, b in pairs) / len(pairs)
    return Agreement(len(pairs), share, 1 - observed / expected if expected else None)


def _ordered_pairs(totals: Counter[str]) -> Iterable[tuple[tuple[str, int], tuple[str, int]]]:
    return ((first, second) for first in totals.items() for second in totals.items())


def _row(group: Preference) -> str:
    if group.preference is None:
        share = f"{'':>12}{'':>20}"
    else:
        interval = f"{group.preference.low:.1%} to {group.preference.high:.1%}"
        share = f"{group.preference.value:>12.1%}{interval:>20}"
    return f"{share}{group.destination:>8}{group.source:>9}{group.neither:>9}"
