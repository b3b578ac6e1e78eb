"""Durations as people say them."""

from __future__ import annotations


def as_duration(seconds: float) -> str:
    """Return a duration in two digits of the unit that suits it: "40 s", "12 min", "3.4 hours", "5.2 days"."""
    for unit, length, limit in (("s", 1, 120), ("min", 60, 120 * 60), ("hours", 3600, 48 * 3600)):
        if seconds < limit:
            return f"{_two_digits(seconds / length)} {unit}"
    return f"{_two_digits(seconds / 86400)} days"


def _two_digits(value: float) -> str:
    return f"{value:.1f}" if value < 9.95 else f"{value:.2g}" if value < 99.5 else f"{value:.0f}"
