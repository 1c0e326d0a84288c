"""Prompts, a call and a test of fit for speculative decoding."""

import numpy as np
import torch
from scipy.stats import chisquare
from transformers import LlamaConfig, LlamaForCausalLM

from tokenry.decode import speculative

PROMPTS = ["the old lighthouse stood on the old", "Elara walked along the shore and Elara", "the"]


MANY = [("naive", 3), ("rrs", 3), ("rrs-without", 3), ("kseq", 3), ("greedy", 3)]


def encode(tokenizer, prompts=PROMPTS):
    batch = tokenizer(prompts, return_tensors="pt", padding=True)
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}


def run(model, inputs, custom=speculative, **options):
    return model.generate(
        **inputs,
        custom_generate=custom,
        pad_token_id=1,
        return_dict_in_generate=True,
        **{"max_new_tokens": 24, "do_sample": False, **options},
    )


def tiny(seed, vocabulary=5):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(12.0) if parameter.dim() > 1 else None
    return model


def p_value(counts, distribution):
    """Of a chi-square test; cells that expect fewer than five are joined."""
    expected = distribution / distribution.sum() * counts.sum()
    rare = expected < 5
    observed = np.append(counts[~rare], counts[rare].sum())
    joined = np.append(expected[~rare], expected[rare].sum())
    assert counts[distribution == 0].sum() == 0
    return chisquare(observed[joined > 0], joined[joined > 0]).pvalue
