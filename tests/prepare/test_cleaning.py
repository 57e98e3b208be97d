"""Cleaning steps: what each removes."""

import pytest

from lemur_jax.common.errors import UserError
from lemur_jax.config import default_config, from_config_dict
from lemur_jax.models.presets import preset
from lemur_jax.prepare.cleaning import filters, parse_steps, shingles


def removed_by(step, options, text, meta=None):
    found = filters(parse_steps("t", {step: options})).remove("id", text, meta or {})
    if found is None:
        return None
    assert (found.step, found.id) == (step, "id")
    return found.reason


@pytest.mark.parametrize(
    ("step", "options", "stays", "goes", "reason"),
    [
        ("length", {"min_chars": 3}, "abc", "ab", "2 characters, fewer than 3"),
        ("length", {"max_chars": 3}, "abc", "abcd", "4 characters, more than 3"),
        ("lines", {"max_chars": 3}, "abc\nabc", "a\nabcd", "a line of 4 characters"),
        ("lines", {"max_mean_chars": 3}, "abcd\nab", "abcde\nab", "lines of 4 characters in the mean"),
        ("alphanumeric", {"min_share": 0.5}, "ab--", "ab---", "40.0% letters and digits"),
        ("alphanumeric", {"min_share": 0.5}, "漢字--", "", "0.0%"),
        ("alphanumeric", {"min_share": 0.5}, "a𝟙_\ud800", "a__\ud800", "25.0%"),
        ("foreign_letters", {}, "naïve 🎉🎉🎉 éé 你好 …“”", "see 你好吗", "not English: '你好吗'"),
        ("foreign_letters", {"run": 4}, "你好吗", "привет", "4 letters"),
    ],
)
def test_filters_on_the_text(step, options, stays, goes, reason):
    assert removed_by(step, options, stays) is None
    assert reason in removed_by(step, options, goes)


def test_filter_on_metadata():
    options = {"licence": ["mit", "bsd"], "lang": ["en"]}
    assert removed_by("metadata", options, "", {"licence": "mit", "lang": "en"}) is None
    assert removed_by("metadata", options, "", {"licence": ["mit", "bsd"], "lang": "en"}) is None
    both = {"licence": ["mit", "gpl"], "lang": "en"}
    assert removed_by("metadata", options, "", both) == "licence is 'gpl'"
    assert removed_by("metadata", options, "", {"licence": "mit", "lang": "de"}) == "lang is 'de'"
    assert removed_by("metadata", options, "", {"licence": [], "lang": "en"}) == "licence is 'empty'"
    assert removed_by("metadata", options, "", {"lang": "en"}) == "licence is None"


def test_a_config_names_a_field_with_dots_by_slashes():
    config = default_config(preset("tiny"))
    config.prepare.steps = {"trees": {"metadata": {"prompt/lang": ("en",)}}}
    options = from_config_dict(config).prepare.steps["trees"]["metadata"]
    assert removed_by("metadata", options, "", {"prompt.lang": "en"}) is None
    assert removed_by("metadata", options, "", {"prompt.lang": "de"}) == "prompt/lang is 'de'"


LANGUAGES = {
    "en": "The committee adjourned without a decision, and the members went home through the rain.",
    "de": "Der Ausschuss vertagte sich ohne Beschluss, und die Mitglieder gingen durch den Regen nach Hause.",
    "fr": "La commission s'est séparée sans décision, et les membres sont rentrés chez eux sous la pluie.",
    "ja": "委員会は結論を出さずに散会し、委員たちは雨の中を帰った。",
    "ru": "Комитет разошёлся, не приняв решения, и его члены пошли домой под дождём.",
}


@pytest.mark.parametrize("language", LANGUAGES)
def test_filter_on_the_language_of_the_text(language):
    pytest.importorskip("py3langid")
    for name, text in LANGUAGES.items():
        reason = removed_by("language", {"keep": (language,)}, text)
        assert reason == (None if name == language else f"the language seems to be {name!r}")
    assert removed_by("language", {"keep": tuple(LANGUAGES)}, LANGUAGES[language]) is None
    # The beginning decides.
    other = "".join(text * 20 for name, text in LANGUAGES.items() if name != language)
    assert removed_by("language", {"keep": (language,), "chars": 60}, LANGUAGES[language] + other) is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (" -- ", ["--"]),
        ("a b", ["a b"]),
        ("a, b c", ["a b c"]),
        ("a b c d", ["a b c", "b c d"]),
        ("a b a b a", ["a b a", "b a b"]),
    ],
)
def test_shingles(text, expected):
    assert shingles(text, 3) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lenght": {}}, r"prepare\.steps\.t has no 'lenght'; did you mean 'length'"),
        ({"length": {"min_char": 3}}, r"steps\.t\.length has no 'min_char'; did you mean 'min_chars'"),
        ({"length": {"min_chars": "3"}}, r"length\.min_chars is '3': it must be of the type int"),
        ({"language": {"keep": ["english"]}}, r"language\.keep names 'english'; there are .*, en, "),
        ({"language": {}}, r"language\.keep names no language"),
        ({"metadata": {"lang": "en"}}, r"metadata\.lang is 'en': it must be of the type tuple"),
        ({"near_duplicates": {"hashes": 100}}, r"bands must divide hashes"),
        ({"near_duplicates": {"bands": 0}}, r"near_duplicates\.bands is 0: it must be 1 or more"),
        ({"near_duplicates": {"hashes": -32}}, r"hashes is -32: it must be 1 or more"),
        ({"near_duplicates": {"words": 0}}, r"words is 0: it must be 1 or more"),
        ({"near_duplicates": {"threshold": 70}}, r"threshold is 70: it must be between 0 and 1"),
        ({"foreign_letters": {"run": 0}}, r"run is 0: it must be 1 or more"),
        ({"length": {"min_chars": -1}}, r"min_chars is -1: it must be 0 or more"),
        ({"separators": {"begin": (5,)}}, r"separators\.begin is 5: it must be of the type str"),
        ({"exact_duplicates": True}, r"t\.exact_duplicates is True: it must be of the type dict"),
        (("exact_duplicates",), r"prepare\.steps\.t is \('exact_duplicates',\): it must be of the type dict"),
        ({"decontaminate": {}}, r"would remove nothing: name human_eval or a JSON Lines file in against"),
        ({"decontaminate": {"against": ("x",), "n": 3}}, r"nothing: name at most n \(3\) as distinct"),
        ({"decontaminate": {"against": ("x",), "n": 0}}, r"decontaminate\.n is 0: it must be 1 or more"),
        ({"decontaminate": {"against": ["nothing.jsonl"]}}, r"cannot read the evaluation set nothing\.jsonl"),
        ({"exact_duplicates": {"x": 1}}, r"exact_duplicates has no 'x'"),
    ],
)
def test_a_mistake_in_the_steps_is_one_line(options, message):
    with pytest.raises(UserError, match=message):
        parse_steps("t", options)
