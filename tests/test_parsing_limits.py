"""train/parsing.py: what nobody would write is refused in words, at once."""

import re
import time

import pytest

from train.config import LoraRun, UserError, load

RUN = ["output=x", "data.path=y"]


def refusal(tmp_path, content):
    """What a configuration file of these bytes is refused with."""
    file = tmp_path / "config.yaml"
    file.write_bytes(content)
    began = time.process_time()
    with pytest.raises(UserError) as caught:
        load(LoraRun, [f"--config={file}", *RUN])
    assert time.process_time() - began < 5
    assert len(str(caught.value)) < 12_000
    return str(caught.value)


def laughs(link):
    """Nine of what is above, twelve times over."""
    lines = [f"a{k}: &a{k} {link(', '.join([f'*a{k - 1}'] * 9))}" for k in range(1, 12)]
    return "\n".join(["a0: &a0 {x: y}", *lines, "data: *a11"]).encode()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"[" * 100_000, "more than 40 levels"),
        (b"- " * 5_000, "more than 40 levels"),
        (b"? " * 5_000, "more than 40 levels"),
        (b"seed: 1\n#" + b"x" * (1 << 20), "more than 1048576 bytes"),
        (b"x: &a y\nz: [" + b"*a, " * 2_000 + b"]", "1000 aliases"),
        (laughs(lambda inner: f"[{inner}]"), "more than 100000 values"),
        (laughs(lambda inner: f"{{<<: [{inner}]}}"), "more than 100000 keys"),
        (b"model: &a {x: *a}", "more than 100000 values"),
        (b"seed: 2001-99-99", "a value in it cannot be read"),
        (b"seed: !!int 0x", "a value in it cannot be read"),
        (b"seed: !!bool x", "a value in it cannot be read"),
        (b"seed: !!timestamp x", "a value in it cannot be read"),
        (b"seed: " + b"9" * 5_000, "a value in it cannot be read"),
        (b"seed: !!python/object/apply:os.system [touch x]", "not valid YAML"),
        (b'output: "a\\0b"\nseed: x', "seed"),
        (b'model: {path: "a\\0b"}', "'model.path'=.* holds NUL"),
        (b'model: {path: "\\ud800"}', "'model.path'=.* not UTF-8"),
        (b"seed: " + b"x" * 100_000, "'seed'='xxx"),
        (b'"\\e[2J": 1', r"unknown key '\\x1b\[2J'"),
        (b"\n".join(b"k%d: 1" % k for k in range(500)), "and 480 more"),
        ("seed: 1".encode("utf-16"), "not valid YAML"),
    ],
)
def test_what_nobody_would_write_is_refused_in_words(tmp_path, content, words):
    assert re.search(words, refusal(tmp_path, content))


def test_an_override_that_is_no_yaml_is_taken_as_text(tmp_path):
    for text in ("2001-99-99", "9" * 5000, "[" * 5000, "!!int 0x", "*a"):
        with pytest.raises(UserError, match="'seed'="):
            load(LoraRun, [*RUN, f"seed={text}"])
    with pytest.raises(UserError, match="holds NUL"):
        load(LoraRun, [*RUN, "model.path=a\0b"])


def test_aliases_merges_and_a_mark_at_the_beginning_are_read(tmp_path):
    text = (
        "\ufeffpreview: &often {every: 3, prompts: &two [a, b]}\n"
        "evaluation: {general: *two}\n"
        "validation: {<<: {every: 5}}\n"
    )
    (tmp_path / "config.yaml").write_text(text, encoding="utf-8")
    config = load(LoraRun, [f"--config={tmp_path / 'config.yaml'}", *RUN])
    assert config.preview.prompts == config.evaluation.general == ["a", "b"]
    assert config.validation.every == 5
