"""Names to local parts: requirements section 4."""

from __future__ import annotations

import re
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hopthu.names import (
    NameRefused,
    check_local_part,
    clean,
    fill_pattern,
    legacy_encoding,
    take_apart,
    transliterate,
)

VOWELS = "aăâeêioôơuưy"
TONES = ["", "\u0300", "\u0309", "\u0303", "\u0301", "\u0323"]
SMALL = sorted(
    {unicodedata.normalize("NFC", vowel + tone) for vowel in VOWELS for tone in TONES} | set("bcdđghklmnpqrstvxwzfj")
)
SYLLABLES = st.text(st.sampled_from(SMALL), min_size=1, max_size=7).map(str.capitalize)
NAMES = st.lists(SYLLABLES, min_size=1, max_size=5).map(" ".join)
PLAIN_NAMES = NAMES.filter(lambda name: legacy_encoding(name) is None)


@pytest.mark.parametrize(
    ("name", "local_part"),
    [
        ("Đặng Thị Ngọc Ánh", "dangthingocanh"),
        ("Lê Ðức Thọ", "leductho"),  # U+00D0, Icelandic eth
        ("ĐỖ ðình Đạt", "dodinhdat"),
        ("H'Hen Niê", "hhennie"),
        ("H’Hen Niê", "hhennie"),
        ("HʼHen Niê", "hhennie"),
        ("Y Thông Ê-ban", "ythongeban"),
        ("Ea H’leo", "eahleo"),
        ("M'Đrăk", "mdrak"),
        ("Nguyễn Thị Tố Uyên", "nguyenthitouyen"),
        ("Hoà", "hoa"),
        ("Hòa", "hoa"),
        ("Thuỷ", "thuy"),
        ("Thủy", "thuy"),
        ("Quách Thị Hương Ước", "quachthihuonguoc"),
        ("  Trần\u00a0Văn\u200b \t An ", "tranvanan"),
        ("Tp. Buôn Ma Thuột", "tpbuonmathuot"),
        ("Phường 12", "phuong12"),
        ("Siu Čưh", "siucuh"),
    ],
)
def test_known_names(name: str, local_part: str) -> None:
    assert transliterate(name) == local_part
    assert transliterate(unicodedata.normalize("NFD", name)) == local_part


@given(PLAIN_NAMES)
def test_result_is_ascii_and_the_spelling_in_unicode_does_not_matter(name: str) -> None:
    result = transliterate(name)
    assert re.fullmatch("[a-z0-9]{1,64}", result)
    for form in ("NFC", "NFD"):
        assert transliterate(unicodedata.normalize(form, name)) == result


@given(PLAIN_NAMES)
def test_case_spaces_and_signs_do_not_matter(name: str) -> None:
    result = transliterate(name)
    assert transliterate(name.upper()) == result
    assert transliterate(name.lower()) == result
    assert transliterate(f"\u00a0{name.replace(' ', ' - ')}'’. ") == result
    assert transliterate(result) == result


@given(st.text())
def test_any_text_gives_a_local_part_or_one_sentence(text: str) -> None:
    try:
        result = transliterate(text)
    except NameRefused as refusal:
        sentence = str(refusal)
    else:
        assert check_local_part(result) == result
        return
    assert sentence
    assert "\n" not in sentence


@given(st.one_of(st.text(), st.text(" \t\u00a0\u200b\ufeffaăe\u0301", max_size=8)))
def test_cleaning_is_stable_and_leaves_no_outer_space(text: str) -> None:
    cleaned = clean(text)
    assert clean(cleaned) == cleaned
    assert cleaned == cleaned.strip()
    assert unicodedata.is_normalized("NFC", cleaned)
    assert not re.search("[\\s\u200b\u00a0\ufeff]{2}|[^\\S ]", cleaned)


@pytest.mark.parametrize("name", ["", " ", "\u200b", "'", "Иван", "阮", "a/b", "Sở A & B", "Bˉưm ƀ", "a" * 65, "１"])
def test_refused_names(name: str) -> None:
    with pytest.raises(NameRefused):
        transliterate(name)


@pytest.mark.requirement("N-72")
@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        ("NguyÔn V¨n Hïng", "TCVN3"),
        ("TrÇn ThÞ Hßa", "TCVN3"),
        ("§Æng Ngäc ¸nh", "TCVN3"),
        ("Phan §×nh Phïng", "TCVN3"),
        ("Nguyeãn Vaên Huøng", "VNI"),
        ("Traàn Thò Hoàng", "VNI"),
        ("Leâ Quyù Ñoân", "VNI"),
        ("NGUYEÃN VAÊN AN", "VNI"),
    ],
)
def test_old_encodings_are_refused(text: str, encoding: str) -> None:
    assert legacy_encoding(text) == encoding
    with pytest.raises(NameRefused, match=encoding):
        transliterate(text)


@pytest.mark.requirement("N-72")
@given(st.lists(SYLLABLES.filter(lambda text: len(text) < 3), min_size=1).map(" ".join))
def test_short_syllables_are_old_encodings_only_with_impossible_pairs(name: str) -> None:
    pairs = {name[index : index + 2].lower() for index in range(len(name) - 1)}
    impossible = re.compile("a[ùõâêéèúáàã]|e[ùõâáàã]|o[ùõâ]|u[ùõ]|y[ùõ]|ô[ùõ]")
    expected = "VNI" if any(impossible.fullmatch(pair) for pair in pairs) else None
    assert legacy_encoding(name) == expected


@pytest.mark.parametrize(
    "name",
    ["Hoàng Hoa Thám", "Huỳnh Thúc Kháng", "Nguyễn Quý Đôn", "Khuất Duy Tiến", "Nguyễn Thuý",
     "Ngoãn", "Xuân Huề", "Buôn Ma Thuột", "Krông Păk", "Sở LĐTBXH", "UBND TỈNH", "M'Đrăk",
     "Hoằng Hoá", "Kbuôr", "Ayŭn", "Đoàn Khuê", "Nguyễn Oánh", "Ủy ban Dân số GD&TE"],
)  # fmt: skip
def test_good_names_are_not_taken_for_old_encodings(name: str) -> None:
    assert legacy_encoding(name) is None
    assert legacy_encoding(unicodedata.normalize("NFD", name)) is None


def test_a_lone_n_with_tilde_is_asked_about() -> None:
    assert legacy_encoding("Ñu") is None
    with pytest.raises(NameRefused, match="local_part"):
        transliterate("Ñinh Vaên".replace("aê", "ă"))


@pytest.mark.parametrize("text", ["", "A", "a b", "a+b", ".a", "a.", "đ", "a@b", "-", "a" * 65, "a\n"])
def test_local_parts_that_cannot_stand(text: str) -> None:
    with pytest.raises(NameRefused):
        check_local_part(text)


@pytest.mark.parametrize("text", ["a", "1", "contact-svhttdl", "nguyenthien.ubnd", "ten_sd", "a" * 64])
def test_local_parts_that_can_stand(text: str) -> None:
    assert check_local_part(text) == text


@pytest.mark.parametrize(
    ("pattern", "address"),
    [
        ("{ho}{dem}{ten}-{unit}", "nguyenthitouyen-svhttdl"),
        ("{hovaten}.{unit}", "nguyenthitouyen.svhttdl"),
        ("{ho}{dem}{ten}", "nguyenthitouyen"),
        ("x_{ten}{unit}1", "x_uyensvhttdl1"),
    ],
)
def test_patterns_of_persons(pattern: str, address: str) -> None:
    values = {"ho": "Nguyễn", "dem": "Thị Tố", "ten": "Uyên", "unit": "svhttdl"}
    assert fill_pattern(take_apart(pattern), values) == address


def test_a_person_without_middle_name() -> None:
    values = {"ho": "Nguyễn", "dem": "", "ten": "Thiện", "unit": "ubnd"}
    assert fill_pattern(take_apart("{hovaten}.{unit}"), values) == "nguyenthien.ubnd"


@pytest.mark.parametrize(("ten", "unit"), [("/", "ubnd"), ("An", ""), ("a" * 64, "ubnd"), ("NguyÔn", "ubnd")])
def test_what_makes_no_address_is_refused(ten: str, unit: str) -> None:
    with pytest.raises(NameRefused):
        fill_pattern(take_apart("{ten}.{unit}"), {"ten": ten, "unit": unit})


def test_a_name_is_data_and_never_a_pattern() -> None:
    with pytest.raises(NameRefused):
        fill_pattern(take_apart("{ho}{ten}"), {"ho": "{ten}", "ten": "An"})
