"""The suppression matrix against a full forward for each sentence, receiver heads against stored maps, shared rollouts.

python benchmarks/bench_thought_anchors.py [--tokens 2048] [--sentences 6] [--rollouts 4] [--rounds 1]

So many sentences of the text, evenly spaced, are hidden; receiver heads look at all of them. For the peak memory, a
fresh process runs a plain forward, and another one hides the first sentence and the last ones, of which several run as
one batch.

The peers run in the same process, in turns, after a warm-up on a short text: n full forwards with a mask of four
dimensions and whole logits; a forward that stores queries and keys; `generate` once for each rollout.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from common import heading, ratio, report

import tokenry
from tokenry.measure.cost import Meter
from tokenry.models.masks import as_attention_mask
from tokenry.read import generate_rollouts, receiver_heads, segment_sentences, suppressed_kl
from tokenry.trace import SentenceMean

NEW = 24  # tokens of a rollout
SHORT = 160  # tokens of the text to warm up on
LAST = 12  # sentences hidden for the memory, beside the first


def prose(tokenizer, tokens: int) -> str:
    """So many tokens of short sentences."""
    text = " ".join(f"Word number {i} stands on page {3 * i + 1} of the old book." for i in range(tokens // 10))
    return tokenizer.decode(tokenizer(text).input_ids[:tokens])


class Text:
    """A text of so many tokens and what is timed on it."""

    def __init__(self, model, tokenizer, tokens: int, sentences: int, rollouts: int) -> None:
        text = prose(tokenizer, tokens)
        self.model, self.tokenizer, self.rollouts = model, tokenizer, rollouts
        self.ids = tokenizer(text, return_tensors="pt").input_ids
        self.every = [(s.start, s.stop) for s in segment_sentences(text, tokenizer)]
        apart = len(self.every) / sentences
        self.spans = [self.every[int((i + 0.5) * apart)] for i in range(sentences)]
        self.made: dict[str, torch.Tensor] = {}

    @property
    def runs(self) -> dict[str, Callable[[], object]]:
        return {
            "suppression": self.suppression,
            "forwards": self.one_by_one,
            "heads": lambda: receiver_heads([self.captured(reducers=[SentenceMean(self.every)])]),
            "stored": lambda: self.captured(qk="all"),
            "rollouts": lambda: generate_rollouts(self.model, self.tokenizer, NEW)(self.ids[0].tolist(), self.rollouts),
            "generate": self.alone,
        }

    def suppression(self) -> None:
        self.made["suppression"] = suppressed_kl(self.model, self.ids[0], self.spans)

    def one_by_one(self) -> None:
        """The same divergences by a full forward for each sentence."""
        time, found = self.ids.shape[1], []
        plain = (self.model(self.ids, use_cache=False).logits[0] / 0.6).log_softmax(-1)
        for start, stop in self.spans:
            mask = torch.ones(time, time).tril().bool()
            mask[stop:, start:stop] = False
            given = as_attention_mask(self.model, mask[None, None])
            masked = (self.model(self.ids, given, use_cache=False).logits[0] / 0.6).log_softmax(-1)
            found.append((plain.exp() * (plain - masked)).sum(-1))
        self.made["forwards"] = torch.stack(found)

    def captured(self, **kept):
        with tokenry.capture(self.model, self.tokenizer, **kept) as cap:
            self.model(self.ids, use_cache=False, logits_to_keep=1)
        return cap.trace

    def alone(self) -> None:
        one = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": True, "pad_token_id": 0}
        for _ in range(self.rollouts):
            self.model.generate(self.ids, **one)

    @property
    def apart(self) -> float:
        """The largest difference of divergences."""
        return float((self.made["suppression"] - self.made["forwards"]).abs().max())


def timed(texts: list[Text], rounds: int) -> dict[str, list[float]]:
    """Seconds of every run on the last text, in turns, after one run on each of the others."""
    *short, text = texts
    for run in [run for one in short for run in one.runs.values()]:
        run()
    seconds: dict[str, list[float]] = {name: [] for name in text.runs}
    for _ in range(rounds):
        for name, run in text.runs.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
            print(f"  {name}: {seconds[name][-1]:.1f} s", flush=True)
    return seconds


def peak(kind: str, tokens: int) -> float:
    """Bytes above the loaded model at the peak of one run, in a process of its own."""
    command = [sys.executable, __file__, "--tokens", str(tokens), "--peak", kind]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def print_peak(kind: str, text: Text) -> None:
    spans = [text.every[0], *text.every[-LAST:]]
    text.model(text.ids[:, :SHORT], use_cache=False)  # weights are read from the disk when they are first used
    with Meter() as meter:
        if kind == "plain":
            text.model(text.ids, use_cache=False)
        else:
            suppressed_kl(text.model, text.ids[0], spans)
    print(meter.peak_bytes)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--sentences", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--rollouts", type=int, default=4)
    parser.add_argument("--peak", choices=("plain", "suppression"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    loaded = tokenry.load(dtype="float32", device="cpu")
    text = Text(*loaded, given.tokens, given.sentences, given.rollouts)
    if given.peak:
        return print_peak(given.peak, text)
    hidden = f"{len(text.spans)} of {len(text.every)} sentences hidden"
    heading(f"thought anchors, SmolLM2-135M, {text.ids.shape[1]} tokens, {hidden}, {given.rollouts} rollouts")
    seconds = timed([Text(*loaded, SHORT, 2, 2), text], given.rounds)
    report("largest difference of divergences", text.apart, "<= 1e-4", text.apart <= 1e-4)
    faster = ratio(seconds, "suppression", "forwards")
    report("suppression matrix: times as fast as n full forwards", faster, ">= 2", faster >= 2)
    slower = ratio(seconds, "stored", "heads")
    report("receiver heads: time by a forward that stores queries and keys", slower, "<= 1.5", slower <= 1.5)
    shared = ratio(seconds, "rollouts", "generate")
    report("rollouts: tokens a second by those of a generate for each", shared, ">= 2", shared >= 2)
    more = peak("suppression", given.tokens) / peak("plain", given.tokens)
    report("suppression matrix: peak memory by a plain forward", more, "<= 1.3", more <= 1.3)
    return None


if __name__ == "__main__":
    main()
