"""Constrained beam search against plain beam search, in the same process and in turns.

python benchmarks/bench_dcsqe.py [--batch 8] [--beams 5] [--rounds 5] [--vocabulary 32000]

Both write the same number of tokens. zoo/translator-a is so small that the search itself is most of its time; the other
model has random weights, the shape of a small translation model, and a vocabulary of usual size.
"""

from __future__ import annotations

import argparse
from types import SimpleNamespace

import torch
from common import heading, interleaved, ratio, report
from transformers import BartConfig, BartForConditionalGeneration

import tokenry
from tokenry.data.translation import draw_sentences
from tokenry.judge import ReferenceConstrainedLogitsProcessor

NEW = 24  # tokens that are written


def large(vocabulary: int) -> BartForConditionalGeneration:
    """Random weights: 6 + 6 layers of width 512, as Marian's models have."""
    torch.manual_seed(0)
    shape = {"d_model": 512, "encoder_layers": 6, "decoder_layers": 6, "encoder_ffn_dim": 2048, "decoder_ffn_dim": 2048}
    heads = {"encoder_attention_heads": 8, "decoder_attention_heads": 8}
    ids = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None, "decoder_start_token_id": 3}
    config = BartConfig(vocab_size=vocabulary, forced_eos_token_id=None, **shape, **heads, **ids)
    return BartForConditionalGeneration(config).eval()


def compare(name: str, model, ids: torch.Tensor, references: list[list[int]], beams: int, rounds: int) -> None:
    """Report the ratio of times for one model."""
    tokens = SimpleNamespace(eos_token_id=model.config.eos_token_id, pad_token_id=model.config.pad_token_id)
    options = {"num_beams": beams, "do_sample": False, "max_new_tokens": NEW, "min_new_tokens": NEW}

    def constrained():
        pull = ReferenceConstrainedLogitsProcessor(references, tokens)
        return model.generate(ids, **options, logits_processor=[pull])

    seconds = interleaved({"constrained": constrained, "plain": lambda: model.generate(ids, **options)}, rounds)
    slower = ratio(seconds, "plain", "constrained")
    report(f"{name}: time of constrained by plain beam search", slower, "<= 1.1", slower <= 1.1)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--beams", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--vocabulary", type=int, default=32_000)
    given = parser.parse_args()
    heading(f"constrained beam search, batch {given.batch}, {given.beams} beams, {NEW} tokens")
    model, tokenizer = tokenry.load("zoo/translator-a", device="cpu")
    sentences = draw_sentences(given.batch, "test")
    asked = tokenizer([s.source for s in sentences], return_tensors="pt", padding=True, padding_side="right")
    references = [tokenizer(s.target).input_ids for s in sentences]
    compare("zoo/translator-a", model, asked.input_ids, references, given.beams, given.rounds)
    drawn = torch.randint(4, given.vocabulary, (given.batch, NEW)).tolist()
    ids = torch.randint(4, given.vocabulary, (given.batch, NEW))
    compare(
        "12 layers of width 512", large(given.vocabulary), ids, [[*row, 1] for row in drawn], given.beams, given.rounds
    )


if __name__ == "__main__":
    main()
