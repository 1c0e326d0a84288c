"""Makes the lists of patterns that the embedded model overuses, slop_smollm2.txt and slop_words_smollm2.txt.

    python tools/make_slop_list.py OUTPUT [--words 10] [--phrases 15] [--human FOLDER] [--stories STORIES.json]

FOLDER holds the human texts that phrases are compared with (*.txt). Without --stories, 96 stories are generated first.
The rules are those of src/tokenry/data/prompts/README.md; nothing is chosen by hand.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from importlib.resources import files
from pathlib import Path

from tokenry.judge import SlopProfile

IN_STORIES, OVERUSE = 5, 10  # seen in at least so many stories, and so many times as often as in human text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--words", type=int, default=10)
    parser.add_argument("--phrases", type=int, default=15)
    parser.add_argument("--human", type=Path, help="needed for phrases")
    parser.add_argument("--stories", type=Path, help="JSON list of texts")
    arguments = parser.parse_args()
    prompts = (files("tokenry.data") / "prompts" / "profile_prompts.txt").read_text(encoding="utf-8").splitlines()
    stories = json.loads(arguments.stories.read_text()) if arguments.stories else generate_stories(prompts)
    lines = overused_words(stories, prompts)[: arguments.words]
    if arguments.phrases:
        texts = sorted(arguments.human.glob("*.txt"))
        human = " ".join(" ".join(f.read_text(encoding="utf-8").split()) for f in texts)
        lines = overused_trigrams(stories, human)[: arguments.phrases] + lines
    arguments.output.write_text("\n".join(lines) + "\n", encoding="utf-8")


def generate_stories(prompts: list[str]) -> list[str]:
    """Two stories to every prompt, in batches of 12."""
    import tokenry

    model, tokenizer = tokenry.load()
    sampling = {"do_sample": True, "temperature": 1.0, "min_p": 0.05, "top_k": 0, "max_new_tokens": 160}
    texts: list[str] = []
    for seed in (0, 1):
        for i in range(0, len(prompts), 12):
            texts += tokenry.generate(model, tokenizer, prompts[i : i + 12], seed=1000 * seed + i, **sampling).texts
    return texts


def overused_words(stories: list[str], prompts: list[str]) -> list[str]:
    """The words that the profile ranks highest, among those in enough stories and in no prompt."""
    asked = set(words(" ".join(prompts)))
    spread = {p.text: sum(p.text in story.lower() for story in stories) for p in SlopProfile.fit(stories).words}
    return [word for word, count in spread.items() if count >= IN_STORIES and word not in asked]


def overused_trigrams(stories: list[str], human: str) -> list[str]:
    """The trigrams in most stories that are rarer in human text; of two overlapping ones the first."""
    counts = Counter(gram for story in stories for gram in set(trigrams(story)))
    reference, rate = Counter(trigrams(human)), len(human) / sum(map(len, stories))
    picked: list[str] = []
    for gram, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        if count < IN_STORIES or count * rate / max(reference[gram], 0.5) <= OVERUSE:
            continue
        a, b = set(gram.split()[:2]), set(gram.split()[1:])
        if not any(a == set(p.split()[1:]) or b == set(p.split()[:2]) for p in picked):
            picked.append(gram)
    return picked


def trigrams(text: str) -> list[str]:
    found = words(text)
    return [" ".join(found[i : i + 3]) for i in range(len(found) - 2)]


def words(text: str) -> list[str]:
    return re.findall(r"[a-z']+", text.lower())


if __name__ == "__main__":
    main()
