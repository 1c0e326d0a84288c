"""Drafts by enumeration: what a verifier must give, in closed form."""

import itertools

import torch

from tokenry.decode.speculation.verifiers import (
    output_distribution,
)


def row(*values):
    return torch.tensor(values, dtype=torch.float64)


def random_pair(seed, size=None):
    """Two rows; every third pair has zeros in both, every fourth is sharp, every fifth equal."""
    generator = torch.Generator().manual_seed(seed)
    size = size or 3 + seed % 4
    sharp = 6.0 if seed % 4 == 0 else 1.5
    p, q = (torch.randn(2, size, generator=generator, dtype=torch.float64) * sharp).softmax(-1)
    if seed % 3 == 0:
        p, q = p.clone(), q.clone()
        p[seed % size] = q[(seed + 1) % size] = 0
        if size > 4:
            q[seed % size] = 0
        p, q = p / p.sum(), q / q.sum()
    return (p, p.clone()) if seed % 5 == 4 else (p, q)


def draft_distribution(q, n, sampling):
    """All drafts with their probabilities."""
    chances = q.tolist()
    if sampling == "with":
        for tokens in itertools.product(range(len(chances)), repeat=n):
            yield tokens, float(q[list(tokens)].prod())
    elif sampling == "without":
        for tokens in itertools.permutations(range(len(chances)), n):
            probability = 1.0
            for i, token in enumerate(tokens):
                left = sum(c for x, c in enumerate(chances) if x not in tokens[:i])
                probability *= chances[token] / left if left > 0 else 0.0
            yield tokens, probability
    else:
        top = sorted(range(len(chances)), key=lambda x: -chances[x])[: n - 1]
        rest = {x: c for x, c in enumerate(chances) if x not in top}
        for token, chance in rest.items():
            yield (*top, token), chance / sum(rest.values())


def enumerated(verifier, p, q, n):
    """Output distribution, probability that a test passes, and that a drafted token comes out."""
    distribution, passed, drafted = torch.zeros_like(p), 0.0, 0.0
    for tokens, chance in draft_distribution(q, n, verifier.sampling):
        if chance > 0:
            out, accepted = output_distribution(verifier, p, q, tokens)
            distribution += chance * out
            passed += chance * accepted
            drafted += chance * float(out[sorted(set(tokens))].sum())
    return distribution, passed, drafted


def drafts_exist(q, n, sampling):
    return sampling == "with" or int((q > 0).sum()) >= n
