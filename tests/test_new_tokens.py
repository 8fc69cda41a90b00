"""New words: refused where they are not new, and where no caption holds them."""

import json

import pytest
import yaml

from tests.folders import picture
from tests.tiny import tiny_tokenizer
from train import new_tokens, pictures
from train.config import (
    DataConfig,
    ModelConfig,
    TextualInversionRun,
    TokenConfig,
    UserError,
    dump,
    load,
    validate,
)


def token(word="<owl>", **values):
    return TokenConfig(token=word, **{"initial": "bird"} | values)


def run(tokens, **values):
    """The configuration of a run."""
    inversion = {"tokens": tokens, **values.pop("textual_inversion", {})}
    values = {"output": "x", "data": {"path": "p"}, "textual_inversion": inversion} | values
    return validate(TextualInversionRun, values, where="test")


OWL = {"token": "<owl>", "initial": "bird"}
CAT = {"token": "<cat>", "initial": "cat"}


# The configuration


@pytest.mark.parametrize("kind", ["object", "style"])
def test_sentences_stand_for_the_captions_and_the_written_configuration_reads_back(kind, tmp_path):
    config = run([OWL], textual_inversion={"captions": kind})
    captions = config.data.captions
    assert (captions.replace, captions.templates) == ("<owl>", kind)
    assert config.data.caption == "<owl>"  # pictures without captions are fine
    (tmp_path / "config.yaml").write_text(dump(config), encoding="utf-8")
    assert load(TextualInversionRun, ["--config", str(tmp_path / "config.yaml")]) == config


def test_sentences_of_one_s_own_are_kept():
    data = {"path": "p", "captions": {"templates": ["my {}"], "prefix": "p "}}
    captions = run([OWL], data=data).data.captions
    assert (captions.replace, captions.templates, captions.prefix) == ("<owl>", ["my {}"], "p ")


def test_several_tokens_are_learned_from_a_source_each():
    sources = [{"path": "a", "captions": {"prefix": "x "}}, {"path": "b"}]
    data = {"sources": sources, "captions": {"suffix": " y"}}
    config = run([OWL | {"source": "a"}, CAT | {"source": "b"}], data=data)
    first, second = config.data.sources
    assert (first.captions.replace, first.captions.prefix, first.caption) == (
        "<owl>",
        "x ",
        "<owl>",
    )
    assert (second.captions.replace, second.captions.suffix) == ("<cat>", " y")
    assert validate(TextualInversionRun, yaml.safe_load(dump(config)), where="again") == config


def test_own_captions_are_left_as_they_are():
    config = run([OWL, CAT], textual_inversion={"captions": "own"})
    assert config.data == DataConfig(path="p")


@pytest.mark.parametrize(
    ("tokens", "values", "problem"),
    [
        ([OWL | {"token": "<Owl>"}], {}, r"'<Owl>' must be one word in lower case.*: <owl>"),
        ([OWL | {"token": "my owl"}], {}, r"'my owl' must be one word .*: myowl"),
        ([OWL | {"initial": " "}], {}, "initial is blank"),
        ([OWL | {"vectors": 0}], {}, "vectors"),
        ([OWL, OWL], {}, "'<owl>' is there twice"),
        ([OWL, CAT | {"token": "<owl>_1"}], {}, "'<owl>' is there twice, or part of another"),
        ([OWL, CAT], {}, "need one token, and have <owl> and <cat>.*captions=own"),
        ([OWL | {"source": "q"}], {}, "source='q' is none of data.sources: p"),
        ([OWL], {"data": {"path": "p", "captions": {"replace": "x"}}}, "replace='x'.*own"),
        ([], {}, "tokens"),
    ],
)
def test_mistakes_are_told_by_key(tokens, values, problem):
    with pytest.raises(UserError, match=problem):
        run(tokens, **values)


# Against the base's vocabulary


def folder_of(tmp_path, *added):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(list(added))
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    return ModelConfig(path=str(tmp_path))


def test_the_vocabulary_is_read_without_loading_anything(tmp_path):
    words = new_tokens.vocabulary(folder_of(tmp_path, "<cat>"))
    assert words == set(tiny_tokenizer().get_vocab()) | {"<cat>"}
    older = tmp_path / "older"
    older.mkdir()
    (older / "vocab.json").write_text(json.dumps({"a": 0, "a</w>": 1}))
    (older / "added_tokens.json").write_text(json.dumps({"<dog>": 2}))
    assert new_tokens.words_of(older) == {"a", "a</w>", "<dog>"}
    assert new_tokens.words_of(tmp_path / "nowhere") == set()


@pytest.mark.parametrize("word", ["<cat>", "a", "<dog>", "<|endoftext|>", "ab"])
def test_a_token_that_the_base_has_or_whose_second_vector_it_has_is_refused(tmp_path, word):
    words = new_tokens.vocabulary(folder_of(tmp_path, "<cat>", "<dog>_1")) | {"ab</w>"}
    with pytest.raises(UserError, match=r"token=\S+ is not new, the base's vocabulary"):
        new_tokens.refuse_known([word], words)
    new_tokens.refuse_known(["<owl>", "<dog>_2"], words)


def test_tokens_get_ids_of_their_own_named_as_diffusers_names_them():
    tokenizer = tiny_tokenizer()
    size = len(tokenizer)
    tokens = [token(vectors=3), token("<cat>", initial="ab c")]
    owl, cat = new_tokens.add(tokenizer, tokens)
    assert (owl.ids, cat.ids) == ([size, size + 1, size + 2], [size + 3, size + 4, size + 5])
    assert tokenizer.convert_tokens_to_ids(["<owl>", "<owl>_1", "<owl>_2", "<cat>"]) == [
        *owl.ids,
        cat.ids[0],
    ]
    assert tokenizer.convert_ids_to_tokens(cat.initial) == ["a", "b</w>", "c</w>"]
    with pytest.raises(UserError, match="token=<owl> is not new"):
        new_tokens.add(tokenizer, [token()])


# Against the captions


def found(tmp_path, texts, **data):
    for index, text in enumerate(texts):
        picture(tmp_path / f"{index}.png", text, size=(32, 32))
    config = {"path": str(tmp_path), "resolution": 64, "cache": tmp_path / "cache"} | data
    return pictures.find(DataConfig(**config))


def test_own_captions_must_hold_every_token(tmp_path):
    some = found(tmp_path, ["a cat", "a big <OWL>."])
    new_tokens.check_captions([token()], some)
    with pytest.raises(UserError, match=r"no caption holds <dog>.*captions.trigger='<dog>'"):
        new_tokens.check_captions([token(), token("<dog>")], some)


def test_the_trigger_counts_and_captions_that_are_replaced_do_not(tmp_path):
    triggered = found(tmp_path, ["a cat"], captions={"trigger": "<owl>"})
    new_tokens.check_captions([token()], triggered)
    replaced = found(tmp_path, ["an <owl>"], captions={"replace": "a cat"})
    with pytest.raises(UserError, match="no caption holds <owl>"):
        new_tokens.check_captions([token()], replaced)


def test_a_token_must_be_in_the_captions_of_its_own_source(tmp_path):
    for name, text in (("a", "an <owl>"), ("b", "a cat")):
        picture(tmp_path / name / "0.png", text, size=(32, 32))
    sources = [{"path": str(tmp_path / name)} for name in "ab"]
    config = DataConfig(sources=sources, resolution=64, cache=tmp_path / "cache")
    some = pictures.find(config)
    new_tokens.check_captions([token(source="a")], some)
    with pytest.raises(UserError, match="no caption of source b holds <owl>"):
        new_tokens.check_captions([token(source="b")], some)
