"""The alphabet: 41 phoneme classes, as numbered by the public Brain-to-Text '25 dataset.

Class 0 is both the CTC blank and the boundary before the first and after the last phoneme; class 40
is the silence that follows every word.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from ..errors import DataError

if TYPE_CHECKING:
    import numpy as np

PHONEMES: tuple[str, ...] = (
    "BLANK",
    *("AA", "AE", "AH", "AO", "AW", "AY", "B", "CH", "D", "DH", "EH", "ER", "EY"),
    *("F", "G", "HH", "IH", "IY", "JH", "K", "L", "M", "N", "NG", "OW", "OY"),
    *("P", "R", "S", "SH", "T", "TH", "UH", "UW", "V", "W", "Y", "Z", "ZH"),
    " | ",
)
N_PHONEMES = len(PHONEMES)
BLANK = 0
SILENCE = N_PHONEMES - 1

_CLASS_OF = {symbol.strip(): index for index, symbol in enumerate(PHONEMES)}


def phoneme_ids(symbols: Iterable[str]) -> np.ndarray:
    """Class ids [n] int32 of phoneme symbols; stress digits ("AH0") and spaces do not matter.

    Raises:
        DataError: a symbol is not in the alphabet.
    """
    import numpy as np  # the launcher, which reads manifests, has none

    ids = []
    for symbol in symbols:
        bare = symbol.strip().rstrip("012")
        if bare not in _CLASS_OF:
            raise DataError(
                f"'{symbol}' is not a phoneme symbol: use ARPAbet without stress "
                f"({PHONEMES[1]} … {PHONEMES[SILENCE - 1]}) or '|' for silence."
            )
        ids.append(_CLASS_OF[bare])
    return np.asarray(ids, dtype=np.int32)


def phoneme_symbols(ids: Iterable[int]) -> list[str]:
    """Symbols of phoneme class ids, silence as "|".

    Raises:
        DataError: an id is outside 0 … 40.
    """
    symbols = []
    for index in ids:
        if not 0 <= int(index) < N_PHONEMES:
            raise DataError(f"Phoneme class {index} is outside 0 … {SILENCE}.")
        symbols.append(PHONEMES[int(index)].strip())
    return symbols
