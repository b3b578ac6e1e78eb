"""The dense form of codes in memory, described once: its digits and words by width (docs/ARCHITECTURE.md).

dense.h has the same for C. That the two agree is checked when a library loads.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DenseForm:
    """How the codes of a row are stored at one width.

    Attributes:
        digits: codes that a word holds.
        word_bits: bits that a word is stored in: 8, a byte; 7, eight words in seven bytes; 16, a row of low bytes and
            one of high bytes; 9, a row of low bytes and one of the ninth bits.
    """

    digits: int
    word_bits: int

    def words(self, columns: int) -> int:
        """Words of a row of `columns` codes."""
        return _ceil_div(columns, self.digits)

    def row_bytes(self, columns: int) -> int:
        """Bytes of a row of `columns` codes."""
        words = self.words(columns)
        if self.word_bits == 7:
            return 7 * _ceil_div(words, 8)
        if self.word_bits == 16:
            return 2 * words
        if self.word_bits == 9:
            return words + _ceil_div(words, 8)
        return words


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


_BYTE_A_CODE = DenseForm(1, 8)

# By bits of the codes.
DENSE_FORMS = {
    1: DenseForm(5, 8),
    2: DenseForm(3, 7),
    3: DenseForm(5, 16),
    4: DenseForm(2, 9),
    **dict.fromkeys((5, 6, 7, 8), _BYTE_A_CODE),
}
