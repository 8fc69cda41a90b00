"""Prints a completion script for a shell: tasks, keys, --config and the values of few words.

    eval "$(python scripts/completion.py bash)"          # in ~/.bashrc, from the repository's root
    eval "$(python scripts/completion.py zsh)"           # in ~/.zshrc, after compinit
    python scripts/completion.py fish | source           # in config.fish

All keys are in what is printed, so that no Python runs while one types; print it anew after an
update. It completes after `python`, `python3` and `accelerate launch`.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from types import UnionType
from typing import Any, Union, get_args, get_origin

from train.config import Section, UserError, command, fields
from train.parsing import choices
from train.screens import FLAGS, done

ENTRIES = {
    "train/lora.py": "train.config:LoraRun",
    "train/dreambooth.py": "train.config:DreamBoothRun",
    "train/textual_inversion.py": "train.config:TextualInversionRun",
    "train/full.py": "train.config:FullRun",
    "eval/evaluate.py": "train.config:RunConfig",
    "scripts/init.py": "scripts.init:InitConfig",
    "scripts/prepare.py": "scripts.prepare_config:PrepareConfig",
    "scripts/caption.py": "scripts.caption:CaptioningConfig",
    "scripts/depth.py": "scripts.depth:DepthConfig",
    "scripts/prior_images.py": "scripts.prior_images:PriorConfig",
    "scripts/generate.py": "scripts.generation.config:GenerateConfig",
    "scripts/export.py": "scripts.export:ExportConfig",
    "scripts/plan.py": "scripts.planning:PlanConfig",
    "scripts/sweep.py": "scripts.sweeping:SweepConfig",
    "scripts/runs.py": "scripts.runs:ListConfig,CompareConfig,ReportConfig",
    "scripts/adapters.py": "scripts.adapters:"
    "InspectConfig,CompareConfig,MergeConfig,ResizeConfig,ExtractConfig",
    "scripts/benchmark.py": "scripts.benchmark:TrainBenchmark,DataBenchmark,EvalBenchmark,"
    "CheckpointBenchmark,GenerateBenchmark,PlanBenchmark,WatermarkBenchmark",
    "scripts/cache.py": "scripts.cache:VerifyConfig,PruneConfig",
    "scripts/watermark.py": "scripts.watermark:WatermarkConfig",
    "scripts/reference.py": "scripts.reference:ReferenceConfig",
    "eval/compare.py": "eval.compare:CompareConfig",
}
TASKS = {
    "scripts/runs.py": "list compare report",
    "scripts/adapters.py": "inspect compare merge resize extract",
    "scripts/benchmark.py": "train data eval checkpoint generate plan watermark",
    "scripts/cache.py": "verify prune",
}
TAKE_A_RUN_S = ("scripts/plan.py", "scripts/sweep.py")  # keys, beside their own
EVALUATE = "eval/evaluate.py"

Keys = dict[str, list[str]]
"""By key, the values that it may have where they are few words."""


def main(arguments: list[str]) -> None:
    shells = {"bash": bash, "zsh": zsh, "fish": fish}
    if arguments in (["--help"], ["-h"]):
        print((__doc__ or "").strip())
        return
    if len(arguments) != 1 or arguments[0] not in shells:
        raise UserError(f"give a shell: {', '.join(shells)}")
    print(shells[arguments[0]](all_keys()))
    done()


def all_keys() -> dict[str, Keys]:
    """The keys of every entry."""
    found = {entry: keys_of(schema) for entry, schema in ENTRIES.items()}
    run = {key: values for entry in list(ENTRIES)[:4] for key, values in found[entry].items()}
    found |= {entry: run | found[entry] for entry in TAKE_A_RUN_S}
    found[EVALUATE] = {"run": [], **{k: v for k, v in run.items() if k.startswith("evaluation.")}}
    return found


def keys_of(schema: str) -> Keys:
    """The keys of configurations, named "module:Class,Class", but for those of lists' items."""
    module, _, names = schema.partition(":")
    found: Keys = {}
    for name in names.split(","):
        section: type[Section] = getattr(importlib.import_module(module), name)
        found |= {key: values(field.annotation) for key, field in fields(section)}
    return {key: known for key, known in found.items() if "[]" not in key}


def values(annotation: Any) -> list[str]:
    """What a key may be set to, as one types it."""
    kinds = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    words = ["true", "false"] if bool in kinds else []
    if get_origin(annotation) is not list:
        words += [str(word) for kind in kinds for word in choices(kind)]
    return words


def sh_functions(entries: dict[str, Keys]) -> Iterator[str]:
    """What bash and zsh have in common: two functions that print words, and one that finds the
    entry among words."""
    yield '_sd_atelier_entry() {\n  local word\n  for word in "$@"; do case "$word" in'
    for entry in entries:
        yield f"    {entry}|*/{entry}) printf '%s' {entry}; return;;"
    yield "  esac; done\n}"
    yield '_sd_atelier_keys() {\n  case "$1" in'
    for entry, keys in entries.items():
        words = " ".join([*TASKS.get(entry, "").split(), *(f"{key}=" for key in keys)])
        yield f"    {entry}) printf '%s' '{words}';;"
    yield "  esac\n}"
    yield '_sd_atelier_values() {\n  case "$1:$2" in'
    for entry, keys in entries.items():
        for key, known in keys.items():
            if known:
                yield f"    {entry}:{key}) printf '%s' '{' '.join(known)}';;"
    yield "  esac\n}"


def bash(entries: dict[str, Keys]) -> str:
    return "\n".join([*sh_functions(entries), _BASH.replace("FLAGS", " ".join(_flags()))])


def zsh(entries: dict[str, Keys]) -> str:
    return "\n".join([*sh_functions(entries), _ZSH.replace("FLAGS", " ".join(_flags()))])


def fish(entries: dict[str, Keys]) -> str:
    lines = [_FISH]
    for entry, keys in entries.items():
        words = [f"{key}={value}" for key, found in keys.items() for value in found or [""]]
        listed = " ".join([*TASKS.get(entry, "").split(), *words, *_flags()])
        lines.append(
            f"complete -c python -c python3 -c accelerate -n '__sd_atelier {entry}' -a '{listed}'"
        )
    return "\n".join(lines)


def _flags() -> list[str]:
    return ["--config", "--help", *FLAGS]


# Bash takes = for the end of a word, so that a reply to key=va is the value alone.
_BASH = r"""_sd_atelier() {
  local entry cur key value
  COMPREPLY=()
  entry=$(_sd_atelier_entry "${COMP_WORDS[@]}")
  [ -n "$entry" ] || return
  cur=${COMP_LINE:0:COMP_POINT}
  local before=${cur% *}
  cur=${cur##* }
  if [[ $cur == *=* ]]; then
    key=${cur%%=*} value=${cur#*=}
    local words=$(_sd_atelier_values "$entry" "$key")
    if [ -n "$words" ]; then COMPREPLY=($(compgen -W "$words" -- "$value"))
    else COMPREPLY=($(compgen -f -- "$value")); fi
  elif [[ $before == *--config ]]; then
    COMPREPLY=($(compgen -f -X '!*.y*ml' -- "$cur") $(compgen -d -S / -- "$cur"))
  else
    COMPREPLY=($(compgen -W "$(_sd_atelier_keys "$entry") FLAGS" -- "$cur"))
    [[ ${#COMPREPLY[@]} -ne 1 || ${COMPREPLY[0]} != *= ]] || compopt -o nospace 2>/dev/null
  fi
}
complete -o bashdefault -o default -F _sd_atelier python python3 accelerate"""

_ZSH = r"""_sd_atelier() {
  local entry=$(_sd_atelier_entry $words) key
  local -a found
  if [[ -z $entry ]]; then _default; return; fi
  if [[ $PREFIX == *=* ]]; then
    key=${PREFIX%%=*}
    found=($(_sd_atelier_values $entry $key))
    compset -P '*='
    if (( $#found )); then compadd -- $found; else _files; fi
  elif [[ $words[CURRENT-1] == --config ]]; then
    _files -g '*.y*ml'
  else
    compadd -- FLAGS
    compadd -S '' -- $(_sd_atelier_keys $entry)
  fi
}
compdef _sd_atelier python python3 accelerate"""

_FISH = r"""function __sd_atelier
  for word in (commandline -opc)
    if string match -q -- "*$argv[1]" $word
      return 0
    end
  end
  return 1
end"""

if __name__ == "__main__":
    command(main)
