"""The part of an export's metadata (train/adapter_metadata.py) that tells how and on what it was
trained, in the words of kohya's trainer, from a run directory."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

from data.records import Table
from train.config import CaptionConfig, DataConfig, SourceConfig
from train.pictures import index_file
from train.run_record import Run

MAX_TAG_BYTES = 4 << 20  # of all tags in the header, the most frequent ones; it may have 10 MB
_LOSSES = {"mse": "l2"}


def of_training(run: Run, file: Path | None) -> dict[str, Any]:
    """How long, how fast and with what. file: what was trained."""
    last = run.lines[-1] if run.lines else {}
    step, epoch = run.taken or last.get("step"), last.get("epoch")
    batches = round(last["step"] / epoch) if epoch else None
    started, finished = times(run, file)
    return {
        "ss_training_started_at": started,
        "ss_training_finished_at": finished,
        "ss_session_id": session(run),
        "ss_training_comment": f"sd-atelier {run.manifest.get('sd_atelier')}",
        "ss_steps": step,
        "ss_max_train_steps": run.setting("train.steps"),
        "ss_epoch": math.ceil(step / batches) if step and batches else None,
        "ss_num_epochs": math.ceil(epoch) if epoch else None,
        "ss_num_batches_per_epoch": batches,
        "ss_seed": run.setting("seed"),
        "ss_mixed_precision": run.setting("train.mixed_precision"),
        "ss_full_fp16": False,
        "ss_gradient_checkpointing": run.setting("train.gradient_checkpointing"),
        "ss_gradient_accumulation_steps": _accumulated(run),
        "ss_max_grad_norm": run.setting("train.clip_norm"),
        **_of_optimizer(run),
        **_of_objective(run),
    }


def _of_optimizer(run: Run) -> dict[str, Any]:
    rate = run.setting("optim.learning_rate")
    with_text = run.setting("lora.text_encoder") is not None
    text_rate = run.setting("optim.text_encoder.learning_rate") or rate
    only_tokens = run.setting("textual_inversion") is not None and run.setting("lora") is None
    tokens = run.setting("optim.tokens.learning_rate") or rate
    decay = run.setting("optim.weight_decay")
    return {
        "ss_learning_rate": tokens if only_tokens else rate,
        "ss_unet_lr": None if only_tokens else rate,
        "ss_text_encoder_lr": text_rate if with_text else None,
        "ss_lr_scheduler": run.setting("optim.schedule"),
        "ss_lr_warmup_steps": run.setting("optim.warmup_steps"),
        "ss_optimizer": f"{run.setting('optim.name')}(weight_decay={decay})",
    }


def _of_objective(run: Run) -> dict[str, Any]:
    loss = run.setting("diffusion.loss")
    return {
        "ss_min_snr_gamma": run.setting("diffusion.min_snr_gamma"),
        "ss_noise_offset": run.setting("diffusion.noise_offset") or None,
        "ss_adaptive_noise_scale": None,
        "ss_multires_noise_iterations": None,
        "ss_multires_noise_discount": None,
        "ss_ip_noise_gamma": run.setting("diffusion.input_perturbation") or None,
        "ss_zero_terminal_snr": run.setting("diffusion.zero_terminal_snr"),
        "ss_debiased_estimation": run.setting("diffusion.debiased"),
        "ss_loss_type": _LOSSES.get(loss, loss),
        "ss_prior_loss_weight": run.setting("dreambooth.prior_weight"),
        "ss_scale_weight_norms": None,
        # SD 2's text encoder ends at the layer before the last, so that nothing is skipped.
        "ss_clip_skip": None,
        "ss_lowram": False,
        "ss_cache_latents": True,
    }


def times(run: Run, file: Path | None) -> tuple[float | None, float | None]:
    """When training began and ended, in seconds since 1970, by the files that it wrote first and
    last. They are right as long as copies of the run keep their times."""
    first = [run.folder / "manifest.json", *(run.folder / "previews" / "base").glob("*.png")]
    began = [path.stat().st_mtime for path in first if path.is_file()]
    last = file if file is not None else run.folder / "metrics.jsonl"
    ended = last.stat().st_mtime if last.is_file() else None
    return min(began, default=None), ended


def session(run: Run) -> int:
    """A number that tells runs apart."""
    facts = repr((run.config, run.manifest.get("base"), run.dataset.get("sha256")))
    return int(hashlib.sha256(facts.encode()).hexdigest()[:8], 16)


def _micro_batch(run: Run) -> int | None:
    """Images per forward pass and process."""
    whole, own = run.setting("train.batch_size"), run.setting("train.micro_batch_size")
    if own or not whole:
        return own
    return -(-int(whole) // int(run.manifest.get("processes", 1)))


def _accumulated(run: Run) -> int | None:
    micro = _micro_batch(run)
    if not micro:
        return None
    together = micro * int(run.manifest.get("processes", 1))
    return -(-int(run.setting("train.batch_size")) // together)


def of_data(run: Run) -> dict[str, Any]:
    """The pictures and their captions."""
    data = run.setting("data") or {}
    side = data.get("resolution")
    side = max(side) if isinstance(side, list) else side
    captions = data.get("captions") or {}
    max_tokens = captions.get("max_tokens")
    return {
        **_of_sources(run),
        "ss_batch_size_per_device": _micro_batch(run),
        "ss_total_batch_size": run.setting("train.batch_size"),
        "ss_resolution": (side, side) if side else None,
        "ss_enable_bucket": True,
        "ss_bucket_no_upscale": not data.get("upscale", True),
        "ss_min_bucket_reso": data.get("min_side") or (side // 2 if side else None),
        "ss_max_bucket_reso": data.get("max_side") or (side * 2 if side else None),
        "ss_bucket_info": _buckets(run),
        "ss_flip_aug": data.get("flip"),
        "ss_color_aug": False,
        "ss_random_crop": data.get("crop") == "random",
        "ss_face_crop_aug_range": None,
        "ss_shuffle_caption": captions.get("shuffle_tags"),
        "ss_keep_tokens": captions.get("keep_tags"),
        "ss_caption_dropout_rate": data.get("caption_dropout"),
        "ss_caption_dropout_every_n_epochs": 0,
        "ss_caption_tag_dropout_rate": captions.get("tag_dropout"),
        "ss_max_token_length": None if max_tokens == 75 else max_tokens,
    }


def _of_sources(run: Run) -> dict[str, Any]:
    sources = [source for source in run.dataset.get("sources", []) if isinstance(source, dict)]
    repeats = {settings.name: settings.repeats for _, settings in _settings(run)}
    folders: dict[str, Any] = {
        str(source.get("name")): {
            "n_repeats": repeats.get(source.get("name"), 1),
            "img_count": source.get("pictures", 0),
        }
        for source in sources
    }
    images = sum(folder["n_repeats"] * folder["img_count"] for folder in folders.values())
    known = {"ss_dataset_dirs": folders, "ss_num_train_images": images} if folders else {}
    return {
        **known,
        "ss_reg_dataset_dirs": {},
        "ss_num_reg_images": _class_pictures(run),
        "ss_tag_frequency": dict(_tags(run)),
    }


def _class_pictures(run: Run) -> int | None:
    """How many pictures of DreamBooth's classes there are; None where they were given."""
    classes = run.dataset.get("classes") or []
    if run.setting("dreambooth.prior") != "images" or not classes:
        return 0
    given = any(one.get("path") for one in classes)
    return None if given else len(classes) * int(run.setting("dreambooth.class_images"))


def _buckets(run: Run) -> dict[str, Any]:
    found = run.dataset.get("buckets") or {}
    sides = [[int(side) for side in size.split("x")] for size in found]
    rows = zip(sides, found.values(), strict=True)
    return {"buckets": {str(i): {"resolution": s, "count": n} for i, (s, n) in enumerate(rows)}}


def _settings(run: Run) -> list[tuple[DataConfig, SourceConfig]]:
    """The run's sources; none where its configuration cannot be read any more."""
    try:
        data = DataConfig(**(run.setting("data") or {}))
    except (TypeError, ValueError):
        return []
    return [(data, source) for source in data.named_sources()]


def _tags(run: Run) -> Iterator[tuple[str, dict[str, int]]]:
    """How often each source's captions hold what, in lower case, between separators; as far as the
    index of its pictures is still there."""
    sources = _settings(run)
    for data, source in sources:
        try:
            captions = Table.open(index_file(data, source)).column("captions")
        except (OSError, ValueError):
            continue
        yield str(source.name), counted(captions, source, MAX_TAG_BYTES // len(sources))


def counted(captions: list[list[str]], source: SourceConfig, size: int) -> dict[str, int]:
    """The tags of captions with how often they are there, the most frequent ones first, so many
    that they take no more than so many bytes of a header."""
    wording = source.captions or CaptionConfig()
    counts: Counter[str] = Counter()
    for several in captions:
        for caption in [wording.replace] if wording.replace else several:
            tags = (tag.strip().lower() for tag in caption.split(wording.separator))
            counts.update(tag for tag in tags if tag)
    ordered = counts.most_common()
    ends = accumulate(_size(tag, count) for tag, count in ordered)
    return dict(pair for pair, end in zip(ordered, ends, strict=True) if end <= size)


def _size(tag: str, count: int) -> int:
    """Bytes of a tag in a header: JSON within JSON, so that what is escaped is escaped twice."""
    entry = json.dumps({tag: count})[1:-1] + ", "
    return len(json.dumps(entry)) - len('""')
