"""Every logits processor that `generate` can make, in the loop that drafts: the text is that of plain `generate`."""

import pytest
import torch
from support.drafting import MANY, p_value, run, tiny
from support.families import build
from transformers import LlamaConfig, LlamaForCausalLM

from tokenry import InputError
from tokenry.decode import Violation, loop

PROMPTS = ["the old sea and the old sea and the old", "a whisper in the night, a whisper", "the"]
OPTIONS = {
    "bad words": {"bad_words_ids": [[292], [259, 263]]},
    "suppressed": {"suppress_tokens": list(range(2, 260))},
    "suppressed at first": {"begin_suppress_tokens": list(range(100, 320))},
    "no repeated n-gram": {"no_repeat_ngram_size": 2},
    "no n-gram of the prompt": {"encoder_no_repeat_ngram_size": 2},
    "repetition penalty": {"repetition_penalty": 1.8},
    "penalty of the prompt": {"encoder_repetition_penalty": 1.7},
    "least new tokens": {"min_new_tokens": 8},
    "least length": {"min_length": 24},
    "bias": {"sequence_bias": [[[292], -9.0], [[259, 263], 5.0]]},
    "forced end": {"forced_eos_token_id": 7},
    "forced begin": {"forced_bos_token_id": 9},
    "decay": {"exponential_decay_length_penalty": (3, 1.2), "min_new_tokens": 6},
    "infinities": {"remove_invalid_values": True, "suppress_tokens": [5, 6]},
    "normalized": {"renormalize_logits": True, "suppress_tokens": [5, 6]},
    "watermark": {"watermarking_config": {"bias": 2.5, "seeding_scheme": "selfhash"}},
    "allowed": {"prefix_allowed_tokens_fn": lambda row, ids: list(range(10 + row, 320, 2))},
}
WARPERS = {
    "temperature": {"temperature": 0.7},
    "top-k": {"top_k": 5},
    "top-p": {"top_p": 0.7},
    "min-p": {"min_p": 0.1},
    "top-h": {"top_h": 0.4},
    "typical": {"typical_p": 0.6},
    "epsilon": {"epsilon_cutoff": 0.02},
    "eta": {"eta_cutoff": 0.02},
}


@pytest.fixture(scope="module")
def model():
    """One that repeats itself and could end at any time: eos is a token like others."""
    found = build("llama")
    found.generation_config.eos_token_id = 292
    return found


@pytest.fixture(scope="module")
def small():
    """Agrees with no other model, and has a vocabulary that is padded further."""
    torch.manual_seed(7)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=324, bos_token_id=None, eos_token_id=None, **sizes)).eval()


@pytest.fixture
def inputs(tokenizer):
    batch = tokenizer(PROMPTS, return_tensors="pt", padding=True)
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}


def plain(model, inputs, **options):
    return model.generate(**inputs, pad_token_id=1, **{"max_new_tokens": 24, "do_sample": False, **options}).tolist()


@pytest.mark.parametrize("drafter", ["prompt-lookup", "ngram", "model"])
@pytest.mark.parametrize("name", OPTIONS)
def test_drafting_changes_no_greedy_text(model, small, inputs, name, drafter):
    wanted = plain(model, inputs, **OPTIONS[name])
    drafter = small if drafter == "model" else drafter
    for drafts in (1, 4):
        assert run(model, inputs, drafter=drafter, num_drafts=drafts, **OPTIONS[name]).sequences.tolist() == wanted


class Once:
    """Takes back two tokens of the first row, once; from then on its rows have unequal lengths."""

    fired = False

    def check(self, row):
        if row.number == 0 and len(row.ids) == 4 and not self.fired:
            self.fired = True
            return Violation(2, "once", {row.ids[2]: 0.0})
        return None

    def hold(self, row):
        return 2


@pytest.mark.parametrize("name", OPTIONS)
def test_rows_that_come_alone_have_their_own_processors(model, tokenizer, inputs, name):
    """After a rewind rows are scored one by one: those that were not rewound are what they are without."""
    out = run(model, inputs, loop, monitors=[Once()], processing_class=tokenizer, **OPTIONS[name])
    wanted = plain(model, inputs, **OPTIONS[name])
    assert [event.row for event in out.events] == [0]
    for row in (1, 2):
        assert wanted[row][inputs["input_ids"].shape[1] :][: len(out.new_ids[row])] == out.new_ids[row]


@pytest.mark.parametrize(("verifier", "drafts"), [("kseq", 3), ("rrs-without", 3), ("greedy", 3)])
@pytest.mark.parametrize("name", [*OPTIONS, *WARPERS])
def test_sampling_with_every_verifier_goes_through(model, inputs, name, verifier, drafts):
    options = {**OPTIONS, **WARPERS}[name]
    out = run(model, inputs, do_sample=True, seed=1, verifier=verifier, num_drafts=drafts, max_new_tokens=8, **options)
    assert max(map(len, out.new_ids)) == 8


# --- the distribution, by enumeration --------------------------------------------------------------------------------


def distribution(model, prompt, length, options):
    """Probability of every continuation of the prompt (1, T) under the processors of `generate`."""
    taken = []
    model.generate(prompt, custom_generate=lambda *_, logits_processor, **__: taken.append(logits_processor), **options)
    vocabulary = model.config.vocab_size
    distributions = torch.ones(1, dtype=torch.double)
    ids = prompt
    for _ in range(length):
        with torch.no_grad():
            scores = taken[0](ids, model(ids).logits[:, -1])
        distributions = (distributions[:, None] * scores.double().softmax(-1)).flatten()
        ids = torch.cat([ids.repeat_interleave(vocabulary, 0), torch.arange(vocabulary).repeat(len(ids))[:, None]], 1)
    return distributions.numpy()


LAWS = {
    "bad words": {"bad_words_ids": [[2], [0, 3]]},
    "suppressed": {"suppress_tokens": [2, 4]},
    "no repeated n-gram": {"no_repeat_ngram_size": 3},
    "least new tokens": {"min_new_tokens": 4, "eos_token_id": 2},
    "penalty": {"repetition_penalty": 1.5},
    "allowed": {"prefix_allowed_tokens_fn": lambda _, ids: [(int(ids[-1]) + 1) % 5, 0]},
    "top-k and top-p": {"top_k": 3, "top_p": 0.8, "temperature": 1.3},
}


@pytest.mark.parametrize(("verifier", "drafts"), [("single", 1), *MANY])
@pytest.mark.parametrize("name", LAWS)
def test_the_distribution_under_processors(name, verifier, drafts):
    model, prompt, rows, length = tiny(0), torch.tensor([[1, 2, 0, 3, 1, 2, 0, 1, 2]]), 400, 3
    options = {"do_sample": True, "top_k": 0, "max_new_tokens": length + 2, **LAWS[name]}
    batch = {"input_ids": prompt.expand(rows, -1), "attention_mask": torch.ones(rows, prompt.shape[1])}
    out = run(model, batch, seed=5, drafter="prompt-lookup", verifier=verifier, num_drafts=drafts, **options)
    code = out.sequences[:, prompt.shape[1] :][:, :length].numpy() @ (5 ** torch.arange(length).flip(0)).numpy()
    counts = torch.bincount(torch.from_numpy(code), minlength=5**length).numpy()
    assert p_value(counts, distribution(model, prompt, length, options)) > 1e-3


def test_nothing_left_for_the_target_is_an_error_as_in_generate(model, inputs):
    options = {"suppress_tokens": list(range(320)), "do_sample": True}
    with pytest.raises(RuntimeError):
        plain(model, inputs, **options)
    with pytest.raises(RuntimeError):
        run(model, inputs, **options)


def test_the_shared_part_of_a_padded_vocabulary_drafts(model, small, inputs):
    """Narrower or wider than the target: tokens that only one of them has are not drafted, and the distribution
    stays."""
    wide = run(model, inputs, drafter=small, num_drafts=3)
    assert wide.sequences.tolist() == plain(model, inputs)
    twin = build("llama")
    twin.resize_token_embeddings(316)
    narrow = run(model, inputs, drafter=twin, num_drafts=1)
    assert narrow.sequences.tolist() == plain(model, inputs)
    assert narrow.stats.block_efficiency > 1.5
    with pytest.raises(InputError, match="draft vocabulary 5 != target 320"):
        run(model, inputs, drafter=tiny(0))
