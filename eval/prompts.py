"""Sentences that a subject or a style is tried in."""

from __future__ import annotations

# DreamBooth's prompts for an object and for a living subject: Ruiz et al. 2023, arXiv:2208.12242,
# supplement; github.com/google/dreambooth, dataset/prompts_and_classes.txt. {} is the subject.
_PLACES = (
    "a {} in the jungle",
    "a {} in the snow",
    "a {} on the beach",
    "a {} on a cobblestone street",
    "a {} on top of pink fabric",
    "a {} on top of a wooden floor",
    "a {} with a city in the background",
    "a {} with a mountain in the background",
    "a {} with a blue house in the background",
    "a {} on top of a purple rug in a forest",
)
_PROPERTIES = (
    "a red {}",
    "a purple {}",
    "a shiny {}",
    "a wet {}",
    "a cube shaped {}",
)
OBJECTS = (
    *_PLACES,
    "a {} with a wheat field in the background",
    "a {} with a tree and autumn leaves in the background",
    "a {} with the Eiffel Tower in the background",
    "a {} floating on top of water",
    "a {} floating in an ocean of milk",
    "a {} on top of green grass with sunflowers around it",
    "a {} on top of a mirror",
    "a {} on top of the sidewalk in a crowded street",
    "a {} on top of a dirt road",
    "a {} on top of a white rug",
    *_PROPERTIES,
)
LIVING = (
    *_PLACES,
    "a {} wearing a red hat",
    "a {} wearing a santa hat",
    "a {} wearing a rainbow scarf",
    "a {} wearing a black top hat and a monocle",
    "a {} in a chef outfit",
    "a {} in a firefighter outfit",
    "a {} in a police outfit",
    "a {} wearing pink glasses",
    "a {} wearing a yellow shirt",
    "a {} in a purple wizard outfit",
    *_PROPERTIES,
)

# Ours: contents far apart, so that a style that only suits its training pictures is seen to fail.
STYLED = " in the style of {}"
_CONTENTS = (
    "a lighthouse on a rocky coast",
    "a bowl of fruit on a table",
    "a portrait of a young woman",
    "an old man with a beard",
    "a fox in a forest",
    "a galloping horse",
    "a sleeping cat",
    "a city street in the rain",
    "a mountain lake at dawn",
    "a steam locomotive",
    "a sailing ship at sea",
    "a windmill in a field of tulips",
    "a castle on a hill",
    "a cup of tea and a book",
    "a vintage car by the road",
    "a dancer on a stage",
    "a crowded market",
    "a tree in autumn",
    "a spaceship above a desert",
    "an empty room with a chair",
)
STYLE = tuple(content + STYLED for content in _CONTENTS)
