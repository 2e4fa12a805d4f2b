"""Vietnamese names to the local part of an address (requirements section 4).

Every function is pure. The rules are the same for NFC and NFD input.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from functools import lru_cache

from .files import short

LOCAL_PART_OCTETS = 64  # RFC 5321, 4.5.3.1.1

_SPACES = re.compile("[\\s\u00a0\u200b\u200c\u200d\u2060\ufeff]+")
# NFD takes these letters no further apart, so they are mapped by hand. The last four only look
# like đ: Icelandic eth and African d come from wrong keyboards and old converters.
_D_LETTERS = str.maketrans("đĐðÐɖƉ", "dddddd")
_DROPPED = re.compile("['’‘ʼ\\-‐‑–. ]")

# What TCVN3 text looks like once it was read as Latin-1 or Windows-1252: symbols and letters that
# Vietnamese does not use, or an accented capital right after a small letter ("NguyÔn").
_TCVN3 = re.compile("[\u00a1-\u00b3\u00b5-\u00bf×÷ÞþßçÇ]|(?<=[a-zà-ÿ])[À-ÖØ-Ý]")
# VNI writes the mark as a letter of its own after the vowel ("Nguyeãn Vaên"): letters that neither
# Vietnamese nor the languages of the Central Highlands use, or pairs that cannot occur.
_VNI = re.compile("[äåëïöüæøûî]|a[ùõâêéèúáàã]|e[ùõâáàã]|o[ùõâ]|u[ùõ]|y[ùõ]|ô[ùõ]", re.IGNORECASE)

_LOCAL_PART = re.compile("[a-z0-9]+(?:[._-]+[a-z0-9]+)*")
_PLACE = re.compile(r"\{([^{}]*)\}")


class NameRefused(ValueError):
    """A text that cannot become (part of) an address; the message is one clear sentence."""


def clean(text: str) -> str:
    """Give `text` as NFC, trimmed, with every run of white space as one space (section 4, rule 1).

    Zero-width characters and the no-break space count as white space.
    """
    usual = text.isprintable() and "  " not in text and text[:1] != " " and text[-1:] != " "
    if usual and unicodedata.is_normalized("NFC", text):  # nearly always: nothing to do
        return text
    return unicodedata.normalize("NFC", _SPACES.sub(" ", text).strip())


def legacy_encoding(text: str) -> str | None:
    """Name the pre-Unicode encoding, "TCVN3" or "VNI", that `text` seems to be in, or None.

    Such text is refused, not repaired (N-72/2002, LC-7.3, HT-8.1). Text without any telling
    character cannot be recognised.
    """
    composed = unicodedata.normalize("NFC", text)
    if _TCVN3.search(composed):
        return "TCVN3"
    if _VNI.search(composed):
        return "VNI"
    return None


def transliterate(text: str) -> str:
    """Turn a Vietnamese name into lower-case ASCII letters and digits, at most 64 octets.

    Follows section 4, rules 1 to 6: "M'Đrăk" gives "mdrak", "Đặng Thị Ngọc Ánh" "dangthingocanh".

    Raises NameRefused when the text is in TCVN3 or VNI, is empty, is too long, or holds a
    character that is neither dropped nor a Latin letter or digit.
    """
    name = clean(text)
    legacy = legacy_encoding(name)
    if legacy:
        raise NameRefused(f'"{short(name)}" is in {legacy}, not Unicode: convert it (QĐ 72/2002)')
    if "ñ" in name.lower():
        raise NameRefused(f'the ñ of "{short(name)}" may be a VNI đ: give local_part, or write đ')
    apart = unicodedata.normalize("NFD", name.translate(_D_LETTERS))
    bare = "".join(char for char in apart if unicodedata.category(char) != "Mn").lower()
    result = _DROPPED.sub("", bare)
    wrong = re.search("[^a-z0-9]", result)
    if wrong:
        raise NameRefused(f'"{wrong[0]}" of "{short(name)}" has no letter in an address: give local_part')
    if not result:
        raise NameRefused(f'"{short(name)}" leaves nothing for an address: give local_part')
    if len(result) > LOCAL_PART_OCTETS:
        raise NameRefused(f'"{short(result)}" is longer than 64 octets: give a shorter local_part')
    return result


def check_local_part(text: str) -> str:
    """Return `text` when it may stand before the @: groups of a-z and 0-9 joined by . _ or -.

    The plus sign is kept for address extensions, so no mailbox may carry it.

    Raises NameRefused otherwise, or when it is longer than 64 octets (RFC 5321, 4.5.3.1.1).
    """
    if not _LOCAL_PART.fullmatch(text):
        raise NameRefused(f'"{short(text)}" may hold only a-z, 0-9 and, between them, the signs . _ -')
    if len(text) > LOCAL_PART_OCTETS:
        raise NameRefused(f'"{short(text)}" is longer than 64 octets: shorten it')
    return text


Pattern = list[tuple[str, str]]
"""An address pattern taken apart: fixed signs, and the place that follows them ("" at the end)."""


def take_apart(pattern: str) -> Pattern:
    """Take apart a pattern such as "{hovaten}-{unit}"; hovaten is họ, đệm and tên (HT-2.2).

    >>> take_apart("{hovaten}-{unit}")
    [('', 'ho'), ('', 'dem'), ('', 'ten'), ('-', 'unit'), ('', '')]
    """
    pieces = [*_PLACE.split(pattern.replace("{hovaten}", "{ho}{dem}{ten}")), ""]
    return list(zip(pieces[::2], pieces[1::2], strict=True))


def fill_pattern(pattern: Pattern, values: Mapping[str, str]) -> str:
    """Fill an address pattern with transliterated `values`; an empty value fills nothing.

    Values are data: braces inside them are never read as places.

    Raises NameRefused as `transliterate` and `check_local_part` do.
    """
    text = ""
    for fixed, place in pattern:
        text += fixed
        if place and (value := values[place]):
            text += _transliterated(value)
    return check_local_part(text)


_transliterated = lru_cache(maxsize=16384)(transliterate)
