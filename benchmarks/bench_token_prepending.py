"""Cost of Token Prepending on the embedded model, and the embedder against sentence-transformers.

python benchmarks/bench_token_prepending.py
"""

from __future__ import annotations

import torch
from common import heading, interleaved, ratio, report
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Pooling

import tokenry
from tokenry.measure.tasks.sts import load_pairs, spread
from tokenry.models.folders import cache_folder
from tokenry.represent import PromptEmbedder, TokenPrepending, clean_up

TEXTS, ROUNDS = 96, 7


@torch.no_grad()
def main() -> None:
    model, tokenizer = tokenry.load(dtype="float32")
    texts = [pair.first for pair in spread(load_pairs("dev"), TEXTS)]
    plain, early = (PromptEmbedder(model, tokenizer, output_layer=k) for k in (-1, 15))
    method = TokenPrepending().encoder(model, tokenizer)
    text_only = {"text": {"method": "forward", "method_output_name": "last_hidden_state"}}  # no chat template
    body = Transformer(
        str(cache_folder() / "smollm2-135m-instruct"),
        processor_kwargs={"padding_side": "left"},
        modality_config=text_only,
        module_output_name="token_embeddings",
    )
    peer = SentenceTransformer(
        modules=[body, Pooling(body.get_embedding_dimension(), pooling_mode="lasttoken")], device="cpu"
    )
    prompts = [f'This sentence : "{clean_up(text)}" means in one word:"' for text in texts]
    runs = {
        "plain": lambda: plain.encode(texts),
        "method": lambda: method.encode(texts),
        "early": lambda: early.encode(texts),
        "peer": lambda: peer.encode(prompts, batch_size=16, convert_to_tensor=True),
    }
    same = (runs["plain"]() - runs["peer"]()).abs().max()
    heading(f"Token Prepending, SmolLM2-135M, {TEXTS} sentences of STS-B, median of {ROUNDS} rounds")
    seconds = interleaved(runs, ROUNDS)
    report("largest difference from sentence-transformers' last-token pooling", float(same), "<= 0.001", same <= 1e-3)
    for name, other, what, goal in (
        ("peer", "plain", "time of the plain prompt / sentence-transformers", 1.05),
        ("plain", "method", "time with Token Prepending (two more tokens) / without", 1.15),
        ("plain", "early", "time when 15 of 30 layers are read / all", 0.6),
    ):
        found = ratio(seconds, name, other)
        report(what, found, f"<= {goal}", found <= goal)


if __name__ == "__main__":
    main()
