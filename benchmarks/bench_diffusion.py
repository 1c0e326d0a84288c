"""Masked-diffusion sampling, one token per step: the loop against dlmserve's commit rule around the same model, what
caches save, and what trace credit costs with a vocabulary of 49,152.

python benchmarks/bench_diffusion.py       (pip install --no-deps dlmserve adds the peer)

SmolLM2 is only made bidirectional here: its text means nothing, its costs are those of a model of that size.
"""

from __future__ import annotations

import sys
from functools import partial
from importlib.util import find_spec, module_from_spec, spec_from_file_location

import torch
from common import heading, interleaved, ratio, report

import tokenry
from tokenry.decode import CreditFusion, MaskedDiffusionModel, diffusion_generate, encode_prompts
from tokenry.models.masks import make_bidirectional

UNUSED = 5  # <reponame> of SmolLM2, as mask
BLOCK, ROUNDS = 8, 3
CASES = {  # model: (prompts, width of the window)
    "smollm2": (["Write a story about rain, in the style of a weather report."], 32),
    "zoo/denoiser": (["sort 4092718365=", "add 843000+257000=", "sudoku 1.3..4.22.4..3.1="] * 8, 32),
}


def peer_sampler():
    """dlmserve's sampler module, which needs nothing but torch, unlike the package; None where it is not installed."""
    package = find_spec("dlmserve")
    if package is None:
        return None
    spec = spec_from_file_location("dlmserve_sampler", f"{package.submodule_search_locations[0]}/sampler.py")
    sys.modules[spec.name] = module_from_spec(spec)
    spec.loader.exec_module(sys.modules[spec.name])
    return sys.modules[spec.name]


@torch.no_grad()
def with_peer(sampler, denoiser: MaskedDiffusionModel, inputs: dict, width: int) -> torch.Tensor:
    """The LLaDA loop with the peer's commit rule."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    start = ids.shape[1]
    x = torch.cat([ids, torch.full((len(ids), width), denoiser.mask_token_id)], 1)
    mask = torch.cat([mask, torch.ones(len(ids), width, dtype=mask.dtype)], 1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    one = torch.ones(len(ids), dtype=torch.long)
    for end in range(start + BLOCK, start + width + 1, BLOCK):
        for _ in range(BLOCK):
            out = denoiser.model(input_ids=x, attention_mask=mask, position_ids=positions, use_cache=False)
            logits = out.logits.index_fill(-1, torch.tensor([denoiser.mask_token_id]), -torch.inf)
            x = sampler.commit_top_k_by_confidence(x, logits, x == denoiser.mask_token_id, one, end)
    return x


def rounds(name: str, prompts: list[str], width: int) -> None:
    model, tokenizer = tokenry.load(name)
    mask = None if name.startswith("zoo/") else UNUSED
    denoiser = MaskedDiffusionModel(make_bidirectional(model), tokenizer, mask_token_id=mask)
    inputs = encode_prompts(tokenizer, prompts)
    run = partial(diffusion_generate, denoiser, **inputs, gen_length=width, block_length=BLOCK)
    heading(f"{name}: {len(prompts)} prompts, windows of {width}, blocks of {BLOCK}, median of {ROUNDS} rounds")
    runs = {
        "plain": run,
        "prefix": lambda: run(cache="prefix"),
        "dual": lambda: run(cache="dual"),
        "credit": lambda: run(transforms=[CreditFusion()]),
        "credit, 8 slots": lambda: run(transforms=[CreditFusion(slots=8)]),
    }
    sampler = peer_sampler()
    if sampler:
        runs["dlmserve"] = lambda: with_peer(sampler, denoiser, inputs, width)
        same = torch.equal(run().sequences, runs["dlmserve"]())
        print(f"{'the same text as with dlmserve':<78} {same}")
    seconds = interleaved(runs, ROUNDS)
    if sampler:
        found = ratio(seconds, "plain", "dlmserve")
        report("tokens per second, tokenry / dlmserve", found, ">= 0.95", found >= 0.95)
    for kind, goal in (("prefix", 1.2), ("dual", 1.3), ("credit", 0.9), ("credit, 8 slots", 0.95)):
        found = ratio(seconds, kind, "plain")
        report(f"tokens per second, {kind} / plain", found, f">= {goal}", found >= goal)


def main() -> None:
    for name, (prompts, width) in CASES.items():
        rounds(name, prompts, width)


if __name__ == "__main__":
    main()
