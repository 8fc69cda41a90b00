from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.wording import OBJECT, STYLE, Wording
from train.config import CaptionConfig, UserError

TAGS = "one, two, three, four, five"


def captions(wording, texts, count=60, **where):
    where = {"seed": 0, "id": "a.png"} | where
    texts = (texts,) if isinstance(texts, str) else texts
    return [wording.caption(texts, epoch=epoch, **where) for epoch in range(count)]


def the_one(wording, text):
    """The caption of a wording that has only one for this text."""
    (caption,) = wording.variants((text,)) or []
    assert caption == wording.caption((text,), seed=3, epoch=4, id="x")
    return caption


def test_a_caption_is_a_function_of_seed_epoch_picture_and_repeat():
    wording = Wording(shuffle_tags=True, tag_dropout=0.2)
    first = captions(wording, TAGS)
    assert captions(wording, TAGS) == first and len(set(first)) > 30
    assert captions(wording, TAGS, seed=1) != first
    assert captions(wording, TAGS, id="b.png") != first
    assert captions(wording, TAGS, repeat=1) != first


def test_one_of_several_captions_is_drawn_evenly_or_the_first_taken():
    drawn = Counter(captions(Wording(), ("a", "b", "c"), 300))
    assert sorted(drawn) == ["a", "b", "c"] and min(drawn.values()) > 70
    assert set(captions(Wording(choose="first"), ("a", "b", "c"))) == {"a"}
    assert Wording().variants(("b", "a", "b")) == ["a", "b"]


def test_a_replacement_stands_for_whatever_captions_there_are():
    for texts in (("a", "b"), ("a",), ()):
        assert set(captions(Wording(replace="<owl>"), texts)) == {"<owl>"}
    whole = Wording(replace="{x|x}, y", wildcards=True, trigger="sks", templates=("a {}!",))
    assert the_one(whole, "z") == "a sks, x, y!"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a {red|blue} hat", {"a red hat", "a blue hat"}),
        ("{a|b|{c|d}}", {"a", "b", "c", "d"}),
        ("{very|} big", {"very big", "big"}),
        ("{one}", {"one"}),
        ("x{}y", {"xy"}),
        ("{a|b", {"{a|b"}),
        ("a|b}", {"a|b}"}),
        ("{a|{b|c}", {"{a|b", "{a|c"}),
        ("}{a|b}{", {"}a{", "}b{"}),
        (r"\{a\|b\} {c\|d|e}", {"{a|b} c|d", "{a|b} e"}),
        (r"{a\}|b}", {"a}", "b"}),
        (r"back\slash", {r"back\slash"}),
        ("{1|2} {1|2}", {"1 1", "1 2", "2 1", "2 2"}),
    ],
)
def test_wildcards(text, expected):
    wording = Wording(wildcards=True)
    assert wording.variants((text,)) == sorted(expected)
    assert set(captions(wording, text)) == expected
    assert the_one(Wording(), text) == text


def test_wildcards_are_drawn_evenly_at_each_level():
    drawn = Counter(captions(Wording(wildcards=True), "{a|{b|c}}", 400))
    assert 160 < drawn["a"] < 240 and 70 < drawn["b"] < 130


def test_tags_are_shuffled_behind_those_kept():
    found = captions(Wording(shuffle_tags=True, keep_tags=2), TAGS, 100)
    assert {caption[:8] for caption in found} == {"one, two"}
    assert all(sorted(caption.split(", ")) == sorted(TAGS.split(", ")) for caption in found)
    assert len(set(found)) == 6


def test_tags_are_dropped_each_by_itself_but_for_those_kept():
    found = captions(Wording(tag_dropout=0.25, keep_tags=1), TAGS, 1000)
    counts = Counter(tag for caption in found for tag in caption.split(", "))
    assert counts["one"] == 1000
    assert all(690 < counts[tag] < 810 for tag in ("two", "three", "four", "five"))
    assert all(caption in TAGS for caption in found if caption.count(",") == 4)


def test_a_caption_is_taken_apart_only_where_tags_move():
    assert the_one(Wording(), "1,000 hats,, red") == "1,000 hats,, red"
    assert the_one(Wording(shuffle_tags=True, keep_tags=9), " a ,, b,c ,") == "a, b, c"


@pytest.mark.parametrize(
    ("separator", "text", "expected"),
    [(";", "a;b ; c", "a; b; c"), (" | ", "a|b | c", "a | b | c"), (" ", "a b  c", "a b c")],
)
def test_separators(separator, text, expected):
    wording = Wording(separator=separator, shuffle_tags=True, keep_tags=3, trigger="t")
    assert the_one(wording, text) == wording._joint.join(["t", expected])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a cat", "sks hat, a cat"),
        ("a SKS  Hat on a cat", "a SKS Hat on a cat"),
        ("a sks hats", "sks hat, a sks hats"),
        ("", "sks hat"),
    ],
)
def test_the_trigger_is_put_in_front_where_it_is_lacking(text, expected):
    assert the_one(Wording(trigger="sks hat"), text) == expected


def test_the_trigger_survives_shuffling_and_dropping():
    wording = Wording(trigger="sks", shuffle_tags=True, tag_dropout=0.9)
    found = captions(wording, "sks, a, b", 200)
    assert all(caption.split(", ").count("sks") == 1 for caption in found)
    added = captions(wording, "a, b, c")
    assert all(caption.split(", ")[0] == "sks" for caption in added)


def test_the_order_of_operations():
    wording = Wording(
        prefix="P. ",
        suffix=", S",
        trigger="sks",
        shuffle_tags=True,
        keep_tags=2,
        wildcards=True,
        templates=("a {} and\na {}",),
    )
    assert the_one(wording, "{x,|x ,}  y") == "P. a sks, x, y and a sks, x, y, S"


def test_the_templates_of_textual_inversion():
    assert (len(OBJECT), len(STYLE)) == (27, 19)
    assert {template.count("{}") for template in OBJECT + STYLE} == {1}
    wording = Wording.of(CaptionConfig(templates="object"))
    assert len(set(captions(wording, "<cat>", 400))) == 27
    assert wording.variants(("<cat>",)) == sorted(t.replace("{}", "<cat>") for t in OBJECT)
    assert "a painting in the style of <cat>" in captions(
        Wording.of(CaptionConfig(templates="style")), "<cat>", 200
    )


def test_mistakes_are_refused_at_once():
    with pytest.raises(UserError, match=r"data.captions.templates: 'a photo' has no \{\}"):
        Wording.of(CaptionConfig(templates=["{}", "a photo"]))
    with pytest.raises(UserError, match="separator is empty"):
        Wording.of(CaptionConfig(separator=""))


def test_every_key_of_the_configuration_counts():
    values = {
        "prefix": "p",
        "suffix": "s",
        "trigger": "t",
        "choose": "first",
        "replace": "r",
        "separator": ";",
        "shuffle_tags": True,
        "keep_tags": 1,
        "tag_dropout": 0.5,
        "wildcards": True,
        "templates": ["{}!"],
    }
    assert set(values) == set(CaptionConfig.model_fields) - {"max_tokens"}
    assert Wording.of(CaptionConfig(**values)) == Wording(**values | {"templates": ("{}!",)})
    assert Wording.of(CaptionConfig()) == Wording()


def test_too_many_variants_are_none():
    assert Wording(wildcards=True).variants(("{a|b}" * 5,)) is not None
    assert Wording(wildcards=True).variants(("{a|b}" * 6,)) is None
    assert Wording(wildcards=True).variants(("{a|a}" * 60,)) is None
    assert Wording(shuffle_tags=True).variants((TAGS,)) is None
    assert Wording(tag_dropout=0.1).variants((TAGS,), limit=31) is None
    assert len(Wording(tag_dropout=0.1).variants((TAGS,), limit=32)) == 32


def test_a_wording_that_draws_nothing_has_one_variant():
    wording = Wording(choose="first", prefix="a ", keep_tags=2, templates=("{}", "{}"))
    assert wording.variants(("b, c", "d")) == ["a b, c"]


wordings = st.builds(
    Wording,
    prefix=st.sampled_from(["", "p "]),
    suffix=st.sampled_from(["", " s"]),
    trigger=st.sampled_from(["", "a", "t u"]),
    choose=st.sampled_from(["first", "random"]),
    replace=st.sampled_from(["", "", "r, s"]),
    shuffle_tags=st.booleans(),
    keep_tags=st.integers(0, 2),
    tag_dropout=st.sampled_from([0.0, 0.5]),
    wildcards=st.booleans(),
    templates=st.sampled_from([(), ("{}",), ("x {}", "{} y")]),
)


@given(
    wordings,
    st.lists(st.text("ab{|}\\, ", max_size=12), min_size=1, max_size=3).map(tuple),
    st.integers(0, 9),
)
@settings(deadline=None, max_examples=300)
def test_every_caption_is_one_of_its_variants(wording, texts, seed):
    variants = wording.variants(texts, limit=64)
    found = {wording.caption(texts, seed=seed, epoch=epoch, id="x") for epoch in range(10)}
    assert variants is None or found <= set(variants)
    assert all(caption == " ".join(caption.split()) for caption in found)
    if variants is not None and len(variants) == 1:
        assert variants == sorted(found)
