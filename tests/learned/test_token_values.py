"""Labels counted over shared prefixes, and the model that learns them."""

import json
from collections import defaultdict

import numpy as np
import pytest
import torch
from support.families import build, byte_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from tokenry import InputError
from tokenry.learned import TokenValueModel, prefix_values, token_value_labels


def brute(solutions, correct):
    """The definition, prefix by prefix."""
    return [
        [np.mean([c for other, c in zip(solutions, correct) if other[:k] == ids[:k]]) for k in range(1, len(ids) + 1)]
        for ids in solutions
    ]


def drawn(seed, n=40, vocabulary=3):
    """Solutions of unequal length that share prefixes; some are prefixes of others, some are drawn twice."""
    rng = np.random.default_rng(seed)
    solutions = [rng.integers(0, vocabulary, rng.integers(1, 9)).tolist() for _ in range(n)]
    return solutions + solutions[:3], rng.random(n + 3).round(2).tolist()


@pytest.mark.parametrize("seed", range(6))
def test_labels_are_those_of_the_definition(seed):
    solutions, correct = drawn(seed, vocabulary=2 + seed)
    found = token_value_labels(solutions, correct)
    for mine, wanted in zip(found, brute(solutions, correct), strict=True):
        assert mine == pytest.approx(wanted, abs=1e-12)


def test_the_vocabulary_may_be_large():
    solutions = [[2**31 - 1, 5], [2**31 - 1, 7], [0, 5], [2**31 - 1, 5]]
    assert token_value_labels(solutions, [1, 0, 1, 0]) == [[1 / 3, 0.5], [1 / 3, 0.0], [1.0, 1.0], [1 / 3, 0.5]]


def test_a_label_is_the_mean_of_its_children():
    """The martingale: weighted by counts, over the next tokens and the solutions that end there; the root's is the
    accuracy."""
    solutions, correct = drawn(9)
    labels, counts = prefix_values(solutions, correct)
    nodes, ends, children = {(): (np.mean(correct), len(solutions))}, defaultdict(list), defaultdict(set)
    for ids, own, n, grade in zip(solutions, labels, counts, correct):
        for k in range(len(ids)):
            nodes[tuple(ids[: k + 1])] = (own[k], n[k])
            children[tuple(ids[:k])].add(tuple(ids[: k + 1]))
        ends[tuple(ids)].append(grade)
    for prefix, (value, count) in nodes.items():
        total = sum(np.prod(nodes[child]) for child in children[prefix]) + sum(ends[prefix])
        assert value * count == pytest.approx(total)
        assert count == sum(nodes[child][1] for child in children[prefix]) + len(ends[prefix])


def test_labels_become_the_true_values():
    """Of a chain that can be enumerated: a hundred times the samples, a tenth of the error."""
    p, rng, errors = 0.6, np.random.default_rng(0), {}
    for n in (50, 5000):
        found = []
        for _ in range(30):
            texts = (rng.random((n, 3)) < p).astype(int)
            labels = np.array(token_value_labels(texts.tolist(), (texts.sum(1) > 1).tolist()))
            one, zero = 1 - (1 - p) ** 2, p * p  # right if two of three are 1
            found.append((labels[:, 0] - np.where(texts[:, 0] == 1, one, zero)) ** 2)
        errors[n] = np.sqrt(np.mean(np.concatenate(found)))
    assert errors[50] / errors[5000] == pytest.approx(10, rel=0.25)


def test_labels_from_few_solutions_can_be_left_out():
    found = token_value_labels([[5, 6], [5, 7], [8]], [1, 0, 1], min_count=2)
    assert [[None if np.isnan(v) else v for v in row] for row in found] == [[0.5, None], [0.5, None], [None]]


@pytest.mark.parametrize(
    ("solutions", "correct", "options", "words"),
    [
        ([[5]], [1], {}, "has 1 solutions; draw at least 2"),
        ([], [], {}, "has 0 solutions"),
        ([[5], [6]], [1], {}, "2 solutions have 1 grades"),
        ([[5], []], [1, 0], {}, "a solution has no tokens"),
        ([[5], [6]], [1, 1.5], {}, r"grades from 1 to 1.5 are not allowed; give numbers in \[0, 1\]"),
        ([[5], [6]], [1, float("nan")], {}, "grades from nan"),
        ([[5], [6]], [1, 0], {"min_count": 0}, "min_count=0"),
    ],
)
def test_what_cannot_be_labeled_is_refused(solutions, correct, options, words):
    with pytest.raises(InputError, match=words):
        token_value_labels(solutions, correct, **options)


# --- the model -------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["llama", "qwen2", "gemma3", "opt"])
def values(request, tokenizer):
    return random_values(build(request.param), tokenizer)


def random_values(model, tokenizer):
    made = TokenValueModel.from_language_model(model, tokenizer).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        made.head.weight.normal_(std=0.3)
    return made


IDS = torch.randint(2, 300, (3, 12), generator=torch.Generator().manual_seed(0))


def test_it_begins_as_the_language_model(llama, tokenizer):
    made = TokenValueModel.from_language_model(llama, tokenizer)
    assert torch.equal(made.score(IDS), torch.full((3, 12), 0.5))
    hidden = llama(IDS, output_hidden_states=True).hidden_states[-1]
    assert torch.equal(made.backbone(IDS).last_hidden_state, hidden)
    made.backbone.layers[0].mlp.up_proj.weight.data.zero_()
    assert bool(llama.model.layers[0].mlp.up_proj.weight.any()), "a copy"


def test_padding_on_either_side_changes_nothing(values):
    plain, pad, ones = values.score(IDS), torch.ones(3, 5, dtype=torch.long), torch.ones_like(IDS)
    for side in (1, -1):
        ids, mask = (torch.cat([part, whole][::side], 1) for part, whole in ((pad, IDS), (0 * pad, ones)))
        found = values.score(ids, mask)[:, 5:] if side == 1 else values.score(ids, mask)[:, :-5]
        assert torch.allclose(found, plain, atol=2e-5)


def test_a_value_does_not_see_what_follows(values):
    assert torch.allclose(values.score(IDS[:, :7]), values.score(IDS)[:, :7], atol=1e-5)


def test_the_head_computes_in_float32(llama, tokenizer):
    made = random_values(llama, tokenizer).to(torch.bfloat16)
    states = made.backbone(IDS).last_hidden_state
    wanted = states.float() @ made.head.weight.float().T + made.head.bias.float()
    assert made(IDS).logits.dtype == torch.float32 and torch.equal(made(IDS).logits, wanted)


def test_it_saves_and_loads_as_any_model(values, tokenizer, tmp_path):
    values.save_pretrained(tmp_path)
    loaded = TokenValueModel.opened(tmp_path)
    assert torch.allclose(loaded.score(IDS), values.score(IDS), atol=1e-6) and not loaded.training
    loaded.check(tokenizer)
    assert TokenValueModel.opened(values) is values


def test_another_vocabulary_is_refused(llama, tokenizer):
    made = TokenValueModel.from_language_model(llama, tokenizer)
    other = byte_tokenizer()
    other.add_tokens(["<more>"])
    with pytest.raises(InputError, match=r"the value model reads the vocabulary .*; use the tokenizer it was"):
        made.check(other)


def test_what_no_value_model_can_be_made_of_is_refused(llama, tokenizer):
    from tokenry.models.masks import make_bidirectional

    both = make_bidirectional(LlamaForCausalLM(LlamaConfig(vocab_size=320, hidden_size=8, num_attention_heads=2)))
    with pytest.raises(InputError, match="is bidirectional, but a value must not see what follows"):
        TokenValueModel.from_language_model(both, tokenizer)
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(build("llama"), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(InputError, match="merge_and_unload"):
        TokenValueModel.from_language_model(adapted, tokenizer)


def test_a_folder_that_holds_none_is_refused(llama, tokenizer, tmp_path):
    llama.save_pretrained(tmp_path / "llama")
    whole = random_values(llama, tokenizer)
    whole.save_pretrained(tmp_path / "cut")
    (tmp_path / "cut" / "model.safetensors").write_bytes(b"no tensors")
    whole.save_pretrained(tmp_path / "odd")
    config = json.loads((tmp_path / "odd" / "config.json").read_text())
    (tmp_path / "odd" / "config.json").write_text(json.dumps({**config, "text_config": {"model_type": "none"}}))
    for name in ("llama", "cut", "odd", "absent"):
        with pytest.raises(InputError, match=r"holds no token value model .*TokenValueModel\.save_pretrained"):
            TokenValueModel.opened(tmp_path / name)
    with pytest.raises(InputError, match="int is no token value model"):
        TokenValueModel.opened(3)
