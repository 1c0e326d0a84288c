"""The neuron map of the embedded model against the bare matrix products and maxima it consists of.

python benchmarks/bench_lm_head_neurons.py [--layers 3] [--rounds 5] [--full]

The peer is `(rows @ head.T).amax(-1)` over the same chunks, in the same run, dtype and threads, into one buffer. The
rounds take turns on the last layers; `--full` maps the whole model once, names and file included.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch
from common import heading, interleaved, ratio, report

import tokenry
from tokenry.measure.cost import Meter
from tokenry.models.anatomy import unembedding
from tokenry.read import LMHeadNeurons, NeuronMap
from tokenry.read.weights.directions import TILE, Spread, neuron_rows, top_tokens

TOP, CHUNK = 5, 512
LLAMA_8B = 2 * 32 * 14336 * 4096 * 128256  # operations of the map of Llama-3.1-8B


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--full", action="store_true")
    given = parser.parse_args()
    model, tokenizer = tokenry.load(dtype="float32", device="cpu")
    head, depth = unembedding(model), model.config.num_hidden_layers
    neurons = model.config.intermediate_size
    spread, buffer, tile = Spread.of(head), torch.empty(CHUNK, len(head)), torch.empty(TILE, CHUNK)

    def bare(layers: range) -> None:
        for layer in layers:
            for part in neuron_rows(model, layer).split(CHUNK):
                torch.mm(part, head.T, out=buffer[: len(part)]).amax(-1)

    def tiled(layers: range) -> None:
        for layer in layers:
            for part in neuron_rows(model, layer).split(CHUNK):
                for tokens in head.split(TILE):
                    torch.mm(tokens, part.T, out=tile[: len(tokens)]).amax(0)

    def mapped(layers: range, bottom: bool = False) -> None:
        for layer in layers:
            for part in neuron_rows(model, layer).split(CHUNK):
                top_tokens(part, head, TOP, bottom)
                spread.deviation(part)

    last = range(depth - given.layers, depth)
    heading(f"LM-head neurons, SmolLM2-135M, {len(last)} layers, top {TOP}, median of {given.rounds} rounds")
    runs = {
        "bare": lambda: bare(last),
        "tiled": lambda: tiled(last),
        "map": lambda: mapped(last),
        "bottom": lambda: mapped(last, bottom=True),
    }
    seconds = interleaved(runs, given.rounds)
    cost = ratio(seconds, "bare", "map")
    report("map / bare products and maxima", cost, "<= 1.25", cost <= 1.25)
    print(f"with bottom tokens: {ratio(seconds, 'bare', 'bottom'):.3f}")
    print(f"map / the same products in tiles that fit in the cache: {ratio(seconds, 'tiled', 'map'):.3f}")
    operations = 2 * len(last) * neurons * model.config.hidden_size * len(head)
    speed = operations / sorted(seconds["map"])[given.rounds // 2]
    print(f"{speed / 1e9:.0f} GFLOP/s; Llama-3.1-8B at this speed: {LLAMA_8B / speed / 60:.0f} minutes (paper: 15)")
    if given.full:
        full(model, tokenizer, lambda: bare(range(depth)))


def full(model, tokenizer, bare) -> None:
    """The whole map once, between two runs of the bare products."""
    heading("the whole map, once")
    started = time.perf_counter()
    bare()
    first = time.perf_counter() - started
    with Meter() as meter, tempfile.TemporaryDirectory() as folder:
        names = LMHeadNeurons(top_k=TOP, chunk=CHUNK).map(model, tokenizer)
        names.save(Path(folder) / "map.safetensors")
        size = (Path(folder) / "map.safetensors").stat().st_size
        assert NeuronMap.load(Path(folder) / "map.safetensors").shape == names.shape
    started = time.perf_counter()
    bare()
    cost = 2 * meter.seconds / (first + time.perf_counter() - started)
    print(f"{names.shape[0] * names.shape[1]} neurons x {names.header['vocabulary']} tokens: {meter.seconds:.1f} s")
    report("map, with names and file / bare products and maxima", cost, "<= 1.25", cost <= 1.25)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    peak = (weights + meter.peak_bytes) / 1e9
    report(f"weights and peak above them, GB (file: {size / 1e6:.1f} MB)", peak, "<= 1.5", peak <= 1.5)


if __name__ == "__main__":
    main()
