"""Case 29: safetensors with a header that is huge, claims to be, nests, repeats, overlaps or lies,
and markup in metadata, names and captions -> refused by name within bounds of time and memory; in
every report text stays text."""

import json
import os
from html.parser import HTMLParser

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from tests.evaluated import evaluated
from tests.faults.hostile import EVIL, hostile_adapters, peak, picture
from tests.faults.removals import Removal
from tests.runs import arguments
from tests.tiny import tiny_clip

WITHOUT = [
    Removal(
        "a header has a largest length",
        "train/safetensors_file.py",
        "    if length > MAX_HEADER_BYTES:",
        "    if False:",
        "bounds and generate",
    ),
    Removal(
        "a header has at most so many tensors",
        "train/safetensors_file.py",
        "    if len(pairs) > MAX_TENSORS:",
        "    if False:",
        "bounds and generate",
    ),
    Removal(
        "nothing is there twice",
        "train/safetensors_file.py",
        "    if len(found) < len(pairs):",
        "    if False:",
        "bounds and generate",
    ),
    Removal(
        "tensors fill the file without gap or overlap",
        "train/safetensors_file.py",
        "        _check_places(tensors, start, size)\n",
        "",
        "bounds and generate",
    ),
    Removal(
        "a tensor is as long as its shape says",
        "train/safetensors_file.py",
        "    if bits != 8 * (last - first):",
        "    if False:",
        "bounds and generate",
    ),
    Removal(
        "a pipe or device is not read",
        "train/safetensors_file.py",
        "    if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):",
        "    if False:",
        "pipe",
    ),
    Removal(
        "the settings in an adapter's metadata are of a plain LoRA",
        "train/adapter_file.py",
        "    adapter_settings.read(file, found.metadata)\n",
        "",
        "bounds and generate",
    ),
    Removal(
        "the dataset's report escapes captions",
        "eval/dataset_report.py",
        '<small class="clamp">{escape(each["caption"])}</small>',
        '<small class="clamp">{each["caption"]}</small>',
        "dataset",
    ),
    Removal(
        "reports escape what stands beside a picture",
        "eval/report.py",
        '    title = f"<h3>{escape(comparison.prompt)}</h3>" if comparison.prompt else ""',
        '    title = f"<h3>{comparison.prompt}</h3>" if comparison.prompt else ""',
        "evaluation",
    ),
    Removal(
        "the rating page's content cannot end its element",
        "eval/rating_page.py",
        '.replace("<", "\\\\u003c")',
        "",
        "comparison",
    ),
]
ROOM = 600  # MiB that refusing one may take more than refusing a file of no bytes
SECONDS = 30  # on a machine that is busy; by itself, all are refused in less than two


@pytest.mark.slow
@pytest.mark.parametrize("entry_point", ["scripts/generate.py", "train/lora.py"])
def test_hostile_files_are_refused_by_name_in_bounds(starter, world, tmp_path, entry_point):
    most, words = {}, {}
    for name, (content, said) in hostile_adapters().items():
        file = tmp_path / f"{name}.safetensors"
        file.write_bytes(content)
        if entry_point == "train/lora.py":
            more = arguments(world, tmp_path / "run", f"lora.start_from={file}")
        else:
            base = (f"model={world / 'base'}", f"output={tmp_path / 'out'}", "prompt=x")
            more = [*base, f"adapters={file}"]
        run = starter.start(entry_point, *more)
        most[name], seconds = peak(run)
        words[name] = run.output
        assert run.codes == [2] and "Traceback" not in run.output, (name, run.output)
        assert said in run.output and str(file) in run.output and seconds < SECONDS, run.output
        assert len(run.output) < 5000 and "\x1b" not in run.output, run.output
        file.unlink()
    assert max(most.values()) < most["none"] + ROOM, most
    assert not (tmp_path / "run").exists() and not (tmp_path / "out").exists()


def test_a_base_or_an_adapter_that_is_a_pipe_is_not_waited_for(starter, world, tmp_path):
    os.mkfifo(tmp_path / "learned_embeds.safetensors")
    base = (f"model={world / 'base'}", f"output={tmp_path / 'out'}", "prompt=x")
    said = starter.finish("scripts/generate.py", *base, f"adapters={tmp_path}", code=2, timeout=30)
    assert "learned_embeds.safetensors cannot be read as safetensors (it is no regular" in said
    (tmp_path / "link.safetensors").symlink_to("/dev/zero")
    zero = f"adapters={tmp_path / 'link.safetensors'}"
    assert "no such file" in starter.finish("scripts/generate.py", *base, zero, code=2, timeout=30)


# Markup --------------------------------------------------------------------------------------


class Page(HTMLParser):
    """What a browser would make of a page: its elements, and its text."""

    def __init__(self, content):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(content)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


def assert_text_stays_text(file, *texts, scripts=0):
    page = Page(file.read_text("utf-8"))
    assert sum(tag == "script" for tag, _ in page.tags) == scripts, file
    for tag, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on")], (file, tag, attributes)
        assert tag != "img" or attributes["src"].startswith("data:"), (file, attributes)
    for text in texts:
        assert " ".join(text.split()) in " ".join(page.text.split()), (file, text)


BAD_NAME = "<img src=x onerror=alert(3)>'\"&amp;"  # a file's has no /


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / f"set {BAD_NAME}"
    for number in range(4):
        name = f"{number}{BAD_NAME if number < 2 else ''}.png"
        picture(folder / name, (60 * number, 90, 250 - 80 * number), f"{EVIL} {number}")
    (folder / f"broken{BAD_NAME}.png").write_bytes(b"no picture")
    (folder / f"broken{BAD_NAME}.txt").write_text(EVIL)
    long = folder / "long.png"
    picture(long, (9, 9, 9), EVIL * 9)
    return folder


def test_in_a_dataset_s_report(starter, pictures, tmp_path):
    args = (f"source={pictures}", f"output={tmp_path / 'out'}", "duplicate_distance=24")
    starter.finish("scripts/prepare.py", *args)
    file = tmp_path / "out" / "report.html"
    assert_text_stays_text(file, f"{EVIL} 0", f"0{BAD_NAME}.png", f"broken{BAD_NAME}.png")


@pytest.mark.slow
def test_in_a_run_s_report_and_its_evaluation(starter, world, pictures, tmp_path):
    run = tmp_path / BAD_NAME
    clip = tiny_clip(tmp_path / "clip", dimension=60)
    how = [
        *(f"data.path={pictures}", f"data.cache={tmp_path / 'cache'}"),
        *("data.on_bad_image=report", "train.steps=2", "preview.every=1", "checkpoint.every=1"),
        *(f"preview.prompts={json.dumps([EVIL])}", f"data.captions.trigger={EVIL}"),
        *("validation.every=0", f"evaluation.clip={clip}", f"evaluation.path={pictures}"),
        *("evaluation.images=6", "evaluation.steps=1", f"evaluation.general={json.dumps([EVIL])}"),
    ]
    base = tmp_path / f"base {BAD_NAME}"
    base.symlink_to(world / "base")
    starter.finish("train/lora.py", *arguments(world, run, f"model.path={base}", *how))
    assert_text_stays_text(run / "report.html", EVIL, BAD_NAME, scripts=1)
    (pictures / f"broken{BAD_NAME}.png").unlink()
    starter.finish("eval/evaluate.py", f"run={run}")
    assert_text_stays_text(run / "eval" / "report.html", EVIL)


def test_in_a_comparison_and_on_its_rating_page(starter, tmp_path):
    runs = [evaluated(tmp_path / f"a{BAD_NAME}", subject=EVIL)]
    runs += [evaluated(tmp_path / f"b{BAD_NAME}", subject=EVIL, gain=0.02, seed=1, grey=200)]
    args = (f"runs={json.dumps([str(run) for run in runs])}", f"output={tmp_path / 'out'}")
    starter.finish("eval/compare.py", *args)
    starter.finish("eval/compare.py", *args, f"rating={tmp_path / 'rating.html'}")
    assert_text_stays_text(tmp_path / "out" / "compare.html", EVIL, BAD_NAME)
    assert_text_stays_text(tmp_path / "rating.html", scripts=2)  # its content, and its own


def test_metadata_with_markup_is_no_reason_to_refuse(starter, world, tmp_path):
    file = tmp_path / "word.safetensors"
    save_file({"<owl>": torch.zeros(1, 32)}, file, metadata={EVIL: EVIL, "format": "pt"})
    base = (f"model={world / 'base'}", f"output={tmp_path / 'out'}", "prompt=an <owl>")
    how = (f"adapters={file}", "steps=1", "width=64", "height=64")
    starter.finish("scripts/generate.py", *base, *how)
    assert Image.open(tmp_path / "out" / "00000.png").size == (64, 64)
