"""What is prompted for, and what a run calls its subject."""

import hashlib
from pathlib import Path

import pytest

from eval.forgetting import GENERAL
from eval.prompts import LIVING, OBJECTS
from eval.protocols import load, names_of
from train.config import DreamBoothRun, LoraRun, RunConfig, TextualInversionRun, UserError
from train.config import load as load_config

ROOT = Path(__file__).resolve().parent.parent


def dog(name):
    return load(str(name), subject="zwx dog", noun="dog")


def test_the_documented_file_is_one(tmp_path):
    text = (ROOT / "docs/evaluation.md").read_text(encoding="utf-8")
    (tmp_path / "own.yaml").write_text(text.split("```yaml\n")[1].split("```")[0])
    protocol = load(str(tmp_path / "own.yaml"), subject="zwx dog", noun="dog")
    assert protocol.prompts[0].text == "a zwx dog in the snow"
    assert protocol.prior_prompts == ("a photo of a dog",) and len(protocol.general) == 1


@pytest.mark.parametrize(("name", "theirs"), [("objects", OBJECTS), ("living", LIVING)])
def test_dreambooths_protocols_have_25_prompts(name, theirs):
    found = dog(name)
    assert [prompt.text for prompt in found.prompts] == [t.format("zwx dog") for t in theirs]
    assert len({prompt.text for prompt in found.prompts}) == 25
    assert found.general == GENERAL and found.prior_prompts == ("a dog", "a photo of a dog")


@pytest.mark.parametrize(
    ("prompts", "digest"), [(OBJECTS, "351df13940ddefc3"), (LIVING, "4ba00988f0dc5dfb")]
)
def test_the_prompts_are_word_for_word_the_published_ones(prompts, digest):
    # of google/dreambooth, dataset/prompts_and_classes.txt at e9b8c013, {0} {1} written {}
    assert hashlib.sha256("\n".join(prompts).encode()).hexdigest()[:16] == digest


def test_a_prompt_is_judged_without_the_invented_word():
    prompt = dog("living").prompts[10]
    assert prompt.text == "a zwx dog wearing a red hat"
    assert prompt.class_text == prompt.described == "a dog wearing a red hat"


def test_a_style_is_judged_by_its_content_and_swept_over_scales():
    found = load("style", subject="zwx mosaic", noun="mosaic")
    prompt = found.prompts[0]
    assert prompt.text == f"{prompt.described} in the style of zwx mosaic"
    assert prompt.class_text == f"{prompt.described} in the style of mosaic"
    assert len({one.described for one in found.prompts}) == 20
    assert found.scales[0] == 0 and found.scales[-1] == 1 and not found.prior_prompts
    plain = load("style", subject="zwx mosaic", noun="").prompts[0]
    assert plain.class_text == plain.described == prompt.described


def test_ones_own_prompts_are_read_from_a_file(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("prompts: ['a {} on ice']\nprior_prompts: ['one {}']\ngeneral: [a cow]\n")
    found = dog(file)
    assert (found.name, found.prior_prompts, found.general) == ("mine", ("one dog",), ("a cow",))
    assert [prompt.text for prompt in found.prompts] == ["a zwx dog on ice"]
    file.write_text("prompts: ['a {} on ice']")
    assert dog(file).general == GENERAL


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("prompts: ['a dog on ice']", "has no {}; write {} once"),
        ("prompts: ['a {} and a {}']", "has 2 {}"),
        ("prompts: []", "prompts"),
        ("prompts: ['a {} on ice', 'a {} on ice']", "twice"),
        ("prompts: ['a {}']\ngeneral: ['']", "empty prompt"),
        ("prior_prompts: ['a {}']", "'prompts' is required"),
        ("prompts: ['a {}']\nprior_promts: []", "did you mean 'prior_prompts'?"),
        ("prompts: a {}", "give a list"),
        ("- a {}", "write `prompts:`"),
        ("prompts: [", "not valid YAML"),
    ],
)
def test_a_wrong_file_is_refused_by_name_with_the_remedy(tmp_path, text, said):
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as caught:
        dog(file)
    assert said in str(caught.value) and str(file) in str(caught.value)


def test_unknown_protocols_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"objects, living, style .* did you mean living\?"):
        dog("livng")
    with pytest.raises(UserError, match="cannot be read"):
        dog(tmp_path / "absent.yaml")


def test_the_toy_protocol_names_what_the_toy_world_has():
    found = load(str(ROOT / "configs/prompts/owl.yaml"), subject="owl circle", noun="circle")
    assert len(found.prompts) == 18
    assert found.prompts[0].text == "a small owl circle on a grey background"


# What a run calls its subject


def run(schema, *overrides) -> RunConfig:
    return load_config(schema, ["output=x", "data.path=y", *overrides])


DOG = ("zwx dog", "dog")
GIVEN = ("evaluation.subject=dog", "evaluation.noun=dog")


def dreambooth(caption, class_prompt, *more):
    return run(DreamBoothRun, f"{caption}", f"dreambooth.class_prompt={class_prompt}", *more)


@pytest.mark.parametrize(
    ("caption", "class_prompt", "names"),
    [
        ("data.caption=a photo of zwx dog", "a photo of a dog", DOG),
        ("data.caption=a photo of a zwx dog", "a photo of a dog", ("zwx dog", "dog")),
        ("data.captions.replace=zwx dog in a bucket", "a dog", ("zwx dog", "dog")),
        (
            "data.caption=an image of my zwx toy car on sand",
            "an image of a toy car",
            ("my zwx toy car", "toy car"),
        ),
        ("data.caption=a close-up photo of a zwx dog", "a close-up photo of a dog", DOG),
        ("data.caption=a 3d model of zwx dog", "a 3d model of a dog", DOG),
        ("data.caption=a painting of zwx dog", "a dog", DOG),
        ("data.caption=a zwx dog sitting on grass", "a dog sitting on grass", DOG),
        ("data.captions.replace=a zwx dog, studio light", "a dog, studio light", DOG),
        ("data.caption=A Photo of zwx dog.", "a photo of a dog", DOG),
        (
            "data.caption=a photo of a bottle of zwx perfume",
            "a photo of a bottle of perfume",
            ("zwx perfume", "perfume"),
        ),
        (
            "data.caption=a photo of a bottle of zwx perfume",
            "a photo of a bottle",
            ("bottle of zwx perfume", "bottle"),
        ),
        (
            "data.caption=a photo of a red zwx car",
            "a photo of a red car",
            ("red zwx car", "red car"),
        ),
        ("data.caption=a photo of a dog named zwx", "a photo of a dog", ("dog named zwx", "dog")),
        ("data.caption=a photo of sks", "a photo of a dog", ("sks", "dog")),
        ("data.captions.replace=zwx, a photo of a brown dog", "a photo of a dog", ("zwx", "dog")),
    ],
)
def test_dreambooths_names_come_from_caption_and_class_prompt(caption, class_prompt, names):
    assert names_of(dreambooth(caption, class_prompt)) == names


def test_of_several_subjects_the_first_is_meant():
    sources = (
        "[{path: a, caption: a photo of zwx dog}, "
        "{path: b, caption: a photo of vby cat, class_prompt: a photo of a cat}]"
    )
    config = load_config(
        DreamBoothRun,
        ["output=x", f"data.sources={sources}", "dreambooth.class_prompt=a photo of a dog"],
    )
    assert names_of(config) == ("zwx dog", "dog")


def test_a_tokens_names_are_the_token_and_its_initial_words():
    tokens = "textual_inversion.tokens=[{token: <my-owl>, initial: snowy owl}]"
    assert names_of(run(TextualInversionRun, tokens)) == ("<my-owl>", "snowy owl")


def test_the_evaluations_own_names_come_first():
    config = dreambooth(
        "data.caption=a photo of zwx dog",
        "a photo of a dog",
        "evaluation.subject=zwx puppy",
        "evaluation.noun=puppy",
    )
    assert names_of(config) == ("zwx puppy", "puppy")
    assert names_of(run(LoraRun, "evaluation.subject=zwx", "evaluation.noun=dog")) == ("zwx", "dog")


def test_names_that_cannot_be_told_are_asked_for():
    with pytest.raises(UserError, match="evaluation.subject=.* and evaluation.noun="):
        names_of(run(LoraRun))
    wildcards = dreambooth("data.caption=a photo of zwx dog", "{a dog|a photo of a dog}")
    with pytest.raises(UserError, match='give evaluation.noun="dog"'):
        names_of(wildcards)


@pytest.mark.parametrize(
    "caption",
    ["a photo of a dog", "a photo of the Dog in a bucket", "a photo of a dog on zwx beach"],
)
def test_a_caption_without_a_word_of_its_own_names_no_subject(caption):
    with pytest.raises(UserError, match='give evaluation.subject="zwx dog"$'):
        names_of(dreambooth(f"data.caption={caption}", "a photo of a dog"))
    given = names_of(dreambooth(f"data.caption={caption}", "a photo of a dog", *GIVEN))
    assert given == ("dog", "dog")  # who says so may


def test_a_style_needs_no_noun():
    config = run(LoraRun, "evaluation.protocol=style", "evaluation.subject=zwx mosaic")
    assert names_of(config) == ("zwx mosaic", "")
