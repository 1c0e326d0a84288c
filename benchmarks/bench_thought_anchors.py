"""The suppression matrix against a full forward for each sentence, receiver heads against stored maps, shared rollouts.

python benchmarks/bench_thought_anchors.py [--tokens 2048] [--sentences 6] [--many 40] [--rollouts 4] [--rounds 1]

So many sentences of the text, evenly spaced, are hidden; receiver heads look at all of them. A chain of thought of 2048
tokens has 40 to 100 sentences, so many are hidden, too; what a full forward for each would take is estimated from those
for the few. For the peak memory, a fresh process runs a plain forward, and another one hides the first sentence and the
last ones, of which several run as one batch.

Beside a speed stands what counting tokens allows: n + 1 forwards of the whole text against one of it and one of what
comes after each sentence, less than 2 for any number of evenly spaced ones. What goes beyond that are cheaper tokens:
keys behind the part that is fed are not read, where a full forward masks them, and several sentences share the plain
logits.

The peers run in the same process, in turns, after a warm-up on a short text: n full forwards with a mask of four
dimensions and whole logits; a forward that stores queries and keys; `generate` once for each rollout.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise

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

    def __init__(self, model, tokenizer, tokens: int, sentences: int, many: int, rollouts: int) -> None:
        text = prose(tokenizer, tokens)
        self.model, self.tokenizer, self.rollouts = model, tokenizer, rollouts
        self.ids = tokenizer(text, return_tensors="pt").input_ids
        self.every = [(s.start, s.stop) for s in segment_sentences(text, tokenizer)]
        self.spans, self.many = self.spaced(sentences), self.spaced(min(many, len(self.every)))
        self.made: dict[str, torch.Tensor] = {}
        self.seconds: list[float] = []  # of a plain forward and one for each sentence

    def spaced(self, count: int) -> list[tuple[int, int]]:
        return [self.every[int((i + 0.5) * len(self.every) / count)] for i in range(count)]

    @property
    def runs(self) -> dict[str, Callable[[], object]]:
        return {
            "suppression": self.suppression,
            "forwards": self.one_by_one,
            "many": lambda: suppressed_kl(self.model, self.ids[0], self.many),
            "heads": lambda: receiver_heads([self.captured(reducers=[SentenceMean(self.every)])]),
            "stored": lambda: self.captured(qk="all"),
            "rollouts": lambda: generate_rollouts(self.model, self.tokenizer, NEW)(self.ids[0].tolist(), self.rollouts),
            "generate": self.alone,
        }

    def suppression(self) -> None:
        self.made["suppression"] = suppressed_kl(self.model, self.ids[0], self.spans)

    def one_by_one(self) -> None:
        """The same divergences by a full forward for each sentence."""
        total, started = self.ids.shape[1], [time.perf_counter()]
        plain, found = (self.model(self.ids, use_cache=False).logits[0] / 0.6).log_softmax(-1), []
        for start, stop in self.spans:
            started.append(time.perf_counter())
            mask = torch.ones(total, total).tril().bool()
            mask[stop:, start:stop] = False
            given = as_attention_mask(self.model, mask[None, None])
            masked = (self.model(self.ids, given, use_cache=False).logits[0] / 0.6).log_softmax(-1)
            found.append((plain.exp() * (plain - masked)).sum(-1))
        self.seconds = [after - before for before, after in pairwise([*started, time.perf_counter()])]
        self.made["forwards"] = torch.stack(found)

    def captured(self, **kept):
        with tokenry.capture(self.model, self.tokenizer, **kept) as cap:
            self.model(self.ids, use_cache=False, logits_to_keep=1)
        return cap.trace

    def alone(self) -> None:
        one = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": True, "pad_token_id": 0}
        for _ in range(self.rollouts):
            self.model.generate(self.ids, **one)

    def against(self, spans: list[tuple[int, int]]) -> str:
        """The forwards for these sentences, and how many times the tokens that have to run they run."""
        total = self.ids.shape[1]
        tokens = (len(spans) + 1) * total / (total + sum(total - stop for _, stop in spans))
        return f"{len(spans)} full forwards (by tokens {tokens:.2f})"

    @property
    def estimated(self) -> float:
        """Seconds of a plain forward and one for each of many sentences."""
        return self.seconds[0] + len(self.many) * statistics.mean(self.seconds[1:])

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
    parser.add_argument("--many", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--rollouts", type=int, default=4)
    parser.add_argument("--peak", choices=("plain", "suppression"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    loaded = tokenry.load(dtype="float32", device="cpu")
    text = Text(*loaded, given.tokens, given.sentences, given.many, given.rollouts)
    if given.peak:
        return print_peak(given.peak, text)
    hidden = f"{len(text.spans)} of {len(text.every)} sentences hidden"
    heading(f"thought anchors, SmolLM2-135M, {text.ids.shape[1]} tokens, {hidden}, {given.rollouts} rollouts")
    seconds = timed([Text(*loaded, SHORT, 2, 2, 2), text], given.rounds)
    report("largest difference of divergences", text.apart, "<= 1e-4", text.apart <= 1e-4)
    faster = ratio(seconds, "suppression", "forwards")
    report(f"suppression: times as fast as {text.against(text.spans)}", faster, ">= 2", faster >= 2)
    faster = text.estimated / statistics.median(seconds["many"])
    report(f"suppression: times as fast, estimated, as {text.against(text.many)}", faster, ">= 2", faster >= 2)
    slower = ratio(seconds, "stored", "heads")
    report("receiver heads: time by a forward that stores queries and keys", slower, "<= 1.5", slower <= 1.5)
    shared = ratio(seconds, "rollouts", "generate")
    report("rollouts: tokens a second by those of a generate for each", shared, ">= 2", shared >= 2)
    more = peak("suppression", given.tokens) / peak("plain", given.tokens)
    report("suppression: peak memory by a plain forward", more, "<= 1.3", more <= 1.3)
    return None


if __name__ == "__main__":
    main()
