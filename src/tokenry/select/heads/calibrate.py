"""Needle prompts, and a head profile made from them.

    python -m tokenry.select.heads.calibrate src/tokenry/select/heads/data/smollm2.json

writes the profile that ships for the embedded model (about two minutes on one core).
"""

from __future__ import annotations

import random
import sys

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...core.errors import InputError
from .profile import HeadProfile
from .retrieval import NeedlePrompt, identify_retrieval_heads, layer_eviction_error

__all__ = ["calibrate_model", "make_needle_prompts"]

HEAD_SEED, ERROR_SEED = 1_000_003, 2_000_003  # apart from the small seeds that tests and experiments use

COLOURS = "red blue green yellow white black grey brown purple orange pink golden silver copper ivory".split()
THINGS = "door gate chest cabin tower vault locker garage cellar attic drawer safe hatch cupboard trunk".split()
PEOPLE = "The baker,A young teacher,The old sailor,My neighbour,The gardener,A tired nurse,The postman".split(",")
DEEDS = "repaired,painted,forgot,carried,sold,cleaned,borrowed,drew,found,described,wrapped,admired".split(",")
OBJECTS = "a wooden chair,the long ladder,a basket of apples,the torn map,a pair of boots,the small boat".split(",")
TIMES = "before breakfast,in the late afternoon,on a rainy day,during the festival,after the meeting".split(",")
PLACES = "near the river,behind the market,at the edge of town,beside the church,under the bridge".split(",")
ENDINGS = "and nobody asked why,while the children laughed,although it was cold,as everyone had hoped".split(",")


def make_needle_prompts(
    tokenizer: PreTrainedTokenizerBase, n: int, length: int = 500, seed: int = 0
) -> list[NeedlePrompt]:
    """Prompts of about `length` tokens: everyday sentences, one of which gives the code of a door or the like.

    The needle stands between any two sentences, the prompt ends with "... is" and the answer is five digits.

    Raises:
        InputError: a length too short for the needle and the question.
    """
    return [_make(tokenizer, length, random.Random(f"{seed} {i}")) for i in range(n)]


def _make(tokenizer: PreTrainedTokenizerBase, length: int, rng: random.Random) -> NeedlePrompt:
    place = f"{rng.choice(COLOURS)} {rng.choice(THINGS)}"
    answer = " " + " ".join(rng.sample("0123456789", 5))
    needle = f"The secret code of the {place} is{answer}."
    question = f"The secret code of the {place} is"
    room = length - _tokens(tokenizer, f" {needle} {question}")
    if room < 30:
        raise InputError(f"a length of {length} tokens has no room for filler; give at least {length - room + 30}")
    filler: list[str] = []
    while room > 0:
        filler.append(_sentence(rng))
        room -= _tokens(tokenizer, " " + filler[-1])
    filler.insert(rng.randrange(len(filler)), needle)
    return NeedlePrompt(" ".join([*filler, question]), answer)


def _tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> int:
    return len(tokenizer(text, add_special_tokens=False).input_ids)


def _sentence(rng: random.Random) -> str:
    start = f"{rng.choice(PEOPLE)} {rng.choice(DEEDS)} {rng.choice(OBJECTS)}"
    return f"{start} {rng.choice(PLACES)} {rng.choice(TIMES)}, {rng.choice(ENDINGS)}."


def calibrate_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    head_prompts: int = 24,
    error_prompts: int = 12,
    length: int = 500,
) -> HeadProfile:
    """A complete profile of `model`: head order (teacher forced, which small models need) and layer errors."""
    prompts = make_needle_prompts(tokenizer, head_prompts, length, HEAD_SEED)
    profile = identify_retrieval_heads(model, tokenizer, prompts, teacher_forced=True)
    prompts = make_needle_prompts(tokenizer, error_prompts, length, ERROR_SEED)
    top = min(4, profile.heads)
    error = layer_eviction_error(model, tokenizer, prompts, profile, top_heads=top)
    return profile.model_copy(update={"error": tuple(round(e, 6) for e in error.tolist())})


if __name__ == "__main__":
    from ...models.load import HUB_ID, load

    made = calibrate_model(*load())
    made.model_copy(update={"model": HUB_ID}).save(sys.argv[1])
