"""Pictures through time, of which a slider shows those of one moment, of all prompts at once.

Without the script, and on paper, all of them stand there one beside the other.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from eval.report import Panel, figure, heading

SCRIPT = """
for (const section of document.querySelectorAll(".times")) {
  const slide = section.querySelector(".slide");
  if (!slide) continue;
  const names = JSON.parse(section.dataset.names);
  const range = slide.querySelector("input"), said = slide.querySelector("output");
  const show = () => {
    for (const figure of section.querySelectorAll("[data-time]"))
      figure.hidden = figure.dataset.time !== range.value;
    said.textContent = names[range.value];
    range.setAttribute("aria-valuetext", names[range.value]);
  };
  range.addEventListener("input", show);
  section.classList.add("sliding");
  slide.hidden = false;
  show();
}
"""
"""For `write_page`."""


@dataclass(frozen=True)
class Film:
    """The pictures of one prompt: one to compare with, if any, and one of each time; None where a
    time has none."""

    prompt: str
    before: Panel | None
    after: Sequence[Panel | None]


def slider(
    title: str,
    explanation: str,
    times: Sequence[str],
    films: Sequence[Film],
    *,
    chosen: int = -1,
    longest: int,
) -> str:
    """Heading, slider and films; nothing without any.

    times: what the slider says at each of its places. chosen: the place where it begins. longest:
    pixels of a picture's longer side.
    """
    if not films:
        return ""
    cards = "".join(_card(film, longest) for film in films)
    moves = len(times) > 1
    control = _control(times, range(len(times))[chosen]) if moves else ""
    return (
        f'<section class="times{"" if moves else " sliding"}" data-names="'
        f'{escape(json.dumps(list(times)))}">{heading(title, explanation)}{control}'
        f'<div class="film">{cards}</div></section>'
    )


def _control(times: Sequence[str], chosen: int) -> str:
    return (
        '<div class="slide" hidden><label for="time">Time</label>'
        f'<input type="range" id="time" min="0" max="{len(times) - 1}" step="1" value="{chosen}" '
        f'autocomplete="off" aria-valuetext="{escape(times[chosen])}">'
        f'<output for="time">{escape(times[chosen])}</output></div>'
    )


def _card(film: Film, longest: int) -> str:
    pictures = [figure(film.before, film.prompt, longest)] if film.before else []
    pictures += [
        figure(panel, film.prompt, longest).replace("<figure>", f'<figure data-time="{k}">', 1)
        for k, panel in enumerate(film.after)
        if panel
    ]
    row = f'<div class="row">{"".join(pictures)}</div>'
    return f"<article><h3>{escape(film.prompt)}</h3>{row}</article>"
