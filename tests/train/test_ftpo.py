"""FTPO: the loss against a loop over its definition, pairs from real rewinds, and a trainer that learns."""

import copy
import json
import math
import re
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner

from tokenry.catalog import load as load_method
from tokenry.cli import main
from tokenry.core.errors import InputError
from tokenry.decode import PhraseBan, SequenceState, generate
from tokenry.evidence import ftpo as experiment
from tokenry.measure import claims
from tokenry.measure.compare import compare
from tokenry.train import (
    FTPO,
    FinalTokenDPOTrainer,
    FTPOCollator,
    FTPOConfig,
    FTPOTrainer,
    balance_pairs,
    final_token_dpo_loss,
    ftpo_loss,
    lora_last_layers,
    merged,
    pairs_from_rewinds,
    pairs_from_text,
    read_pairs,
    score_pairs,
)
from tokenry.train.ftpo import auto_learning_rate
from tokenry.train.preference.collator import last_logits
from tokenry.train.preference.pairs import check_pairs, to_pairs, without_function_words

VOCAB = 12
BANNED = ["li", "es", "he", "el", "the", "qu", "and", "on", "in", "al"]
PROMPTS = ["the old", "Elara walked", "It was", "and the wind", "The keeper", "12 345", "along the", "a dream"]


def batch(rows=3, seed=0, scale=3.0):
    """Random logits, and pairs with 1, 2, 3 ... chosen tokens."""
    draw = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(rows, VOCAB, generator=draw)
    reference = scale * torch.randn(rows, VOCAB, generator=draw)
    picks = [torch.randperm(VOCAB, generator=draw).tolist() for _ in range(rows)]
    chosen = torch.tensor([p[1 : 2 + i] + [0] * (rows - 1 - i) for i, p in enumerate(picks)])
    mask = torch.tensor([[True] * (1 + i) + [False] * (rows - 1 - i) for i in range(rows)])
    return logits, reference, chosen, mask, torch.tensor([p[0] for p in picks])


def loss_by_definition(y, ref, chosen, mask, rejected, margin=2.0, tau_target=1.0, tau_aggregate=2.0):
    """The four parts in plain loops over rows and tokens."""
    weights, terms, outside, inside, means = [], [], [], [], []
    for b in range(len(y)):
        c = [int(t) for t, m in zip(chosen[b], mask[b]) if m]
        r = int(rejected[b])
        leads = [float(y[b, t] - y[b, r]) for t in c]
        row = [min(max((margin - d) / margin, 0.0), 1.0) for d in leads]
        weights += row if sum(row) >= 1e-12 else [1.0] * len(row)
        terms += [math.log1p(math.exp(margin - d)) for d in leads]
        drift = (y[b] - ref[b]).tolist()
        inside += [max(abs(drift[t]) - tau_target, 0.0) ** 2 for t in (*c, r)]
        outside += [drift[t] ** 2 for t in range(VOCAB) if t not in (*c, r)]
        means.append(max(abs(sum(drift[t] for t in (*c, r)) / (len(c) + 1)) - tau_aggregate, 0.0) ** 2)
    pref = sum(w * t for w, t in zip(weights, terms)) / sum(weights)
    return pref, sum(outside) / len(outside), sum(inside) / len(inside), sum(means) / len(means)


# --- the loss ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_the_loss_is_its_definition(seed):
    args = batch(rows=4, seed=seed)
    found = ftpo_loss(*args, lambda_aggregate=0.1)
    pref, nontarget, target, aggregate = loss_by_definition(*args)
    assert [float(v) for v in found[1:5]] == pytest.approx([pref, nontarget, target, aggregate], rel=1e-5)
    assert float(found.loss) == pytest.approx(pref + 0.4 * nontarget + 0.05 * target + 0.1 * aggregate, rel=1e-5)
    y, _, chosen, mask, rejected = args
    wins = [[bool(y[b, c] > y[b, rejected[b]]) for c, m in zip(chosen[b], mask[b]) if m] for b in range(4)]
    assert float(found.choice_win) == pytest.approx(sum(sum(w) / len(w) for w in wins) / 4)


def test_at_the_reference_only_chosen_and_rejected_logits_are_pulled():
    logits, _, chosen, mask, rejected = batch()
    y = logits.clone().requires_grad_()
    ftpo_loss(y, logits, chosen, mask, rejected, lambda_aggregate=0.1).loss.backward()
    for b in range(3):
        targets = {int(t) for t, m in zip(chosen[b], mask[b]) if m} | {int(rejected[b])}
        others = [t for t in range(VOCAB) if t not in targets]
        assert torch.equal(y.grad[b, others], torch.zeros(len(others)))
        assert y.grad[b, rejected[b]] != 0  # weights carry gradient, so the sign is that of the pooled ratio


def test_a_won_row_keeps_weight_one_and_a_small_pull():
    """Where every chosen token has its margin the weights fall back to 1, also beside rows that have not won."""
    y = torch.zeros(2, VOCAB)
    y[0, 1], y[0, 2] = 9.0, 7.0  # row 0 leads token 0 by 9 and 7, row 1 not at all
    y.requires_grad_()
    chosen, mask = torch.tensor([[1, 2], [1, 2]]), torch.ones(2, 2, dtype=torch.bool)
    found = ftpo_loss(y, y.detach(), chosen, mask, torch.tensor([0, 0]))
    expected = (F.softplus(torch.tensor(-7.0)) + F.softplus(torch.tensor(-5.0)) + 2 * F.softplus(torch.tensor(2.0))) / 4
    assert float(found.pref) == pytest.approx(float(expected), rel=1e-6)
    (grad,) = torch.autograd.grad(found.pref, y)
    assert float(grad[0, 1]) == pytest.approx(-float(torch.sigmoid(torch.tensor(-7.0))) / 4, rel=1e-4)


def test_weights_carry_gradient():
    y = torch.zeros(1, 3, dtype=torch.float64)
    y[0, 1], y[0, 2] = 1.0, 0.5
    chosen, mask, rejected = torch.tensor([[1, 2]]), torch.ones(1, 2, dtype=torch.bool), torch.tensor([0])

    def pref(step):
        moved = y.clone()
        moved[0, 1] += step
        a, b = (2 - moved[0, 1]) / 2, (2 - moved[0, 2]) / 2
        return float((a * F.softplus(2 - moved[0, 1]) + b * F.softplus(2 - moved[0, 2])) / (a + b))

    leaf = y.clone().requires_grad_()
    (grad,) = torch.autograd.grad(ftpo_loss(leaf, y, chosen, mask, rejected).pref, leaf)
    assert float(grad[0, 1]) == pytest.approx((pref(1e-6) - pref(-1e-6)) / 2e-6, rel=1e-4)


def test_a_constant_moves_only_the_terms_that_tie_to_the_reference():
    logits, reference, *targets = batch()
    before, after = ftpo_loss(logits, reference, *targets), ftpo_loss(logits + 5.0, reference, *targets)
    assert float(after.pref) == pytest.approx(float(before.pref), rel=1e-5)
    assert after.choice_win == before.choice_win
    assert all(a != b for a, b in zip(after[2:5], before[2:5]))


def test_padding_and_order_do_not_count_but_the_batch_does():
    logits, reference, chosen, mask, rejected = batch()
    whole = ftpo_loss(logits, reference, chosen, mask, rejected, lambda_aggregate=0.1)
    for fill in (0, int(rejected[0]), VOCAB - 1):  # a pad id may be any token, also the rejected one
        padded = F.pad(chosen, (0, 3), value=fill)
        wider = ftpo_loss(logits, reference, padded, F.pad(mask, (0, 3)), rejected, lambda_aggregate=0.1)
        assert torch.allclose(torch.stack(whole), torch.stack(wider), rtol=1e-6)
    order = torch.tensor([2, 0, 1])
    moved = ftpo_loss(logits[order], reference[order], chosen[order], mask[order], rejected[order])
    assert float(moved.pref) == pytest.approx(float(whole.pref), rel=1e-6)
    rows = [ftpo_loss(*(a[b : b + 1] for a in (logits, reference, chosen, mask, rejected))).pref for b in range(3)]
    assert abs(float(torch.stack(rows).mean()) - float(whole.pref)) > 1e-3  # one pooled ratio, not a mean of rows


def test_final_token_dpo_is_dpo_on_log_probabilities():
    logits, reference, chosen, mask, rejected = batch(rows=4, seed=3)
    lp, ref = logits.log_softmax(-1), reference.log_softmax(-1)
    losses = []
    for b in range(4):
        for c in chosen[b][mask[b]]:
            gap = (lp[b, c] - ref[b, c]) - (lp[b, rejected[b]] - ref[b, rejected[b]])
            losses.append(-F.logsigmoid(0.1 * gap))
    found = final_token_dpo_loss(logits, reference, chosen, mask, rejected)
    assert float(found) == pytest.approx(float(torch.stack(losses).mean()), rel=1e-5)


def test_auto_learning_rate_gives_the_published_values():
    rates = [auto_learning_rate(n, 16, 128) for n in (1000, 8000, 12000)]
    assert rates == pytest.approx([7.1e-5, 2.0e-5, 1.3e-5], rel=0.03)


# --- pairs ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sharp():
    """A small model that is sure of its next token: the random ones of the other tests are close to uniform."""
    from support.families import build

    model = build("llama")
    with torch.no_grad():
        model.lm_head.weight *= 8
    return model


@pytest.fixture(scope="module")
def rewinds(sharp, tokenizer):
    """Real rewinds under a ban."""
    sampling = {"do_sample": True, "seed": 0, "max_new_tokens": 60, "pad_token_id": 1}
    out = generate(sharp, tokenizer, PROMPTS, monitors=[PhraseBan(BANNED)], **sampling)
    assert len(out.pairs) > 20
    return out.pairs


def test_pairs_come_from_the_places_that_were_taken_back(rewinds, tokenizer):
    pairs = pairs_from_rewinds(rewinds, tokenizer)
    last = {tuple(r["context_ids"]): r for r in rewinds}
    assert {tuple(p["prompt_ids"]) for p in pairs} <= set(last)
    for pair in pairs:
        rewind = last[tuple(pair["prompt_ids"])]
        probabilities = dict(rewind["candidates"])
        tried = {r["rejected"] for r in rewinds if r["context_ids"] == pair["prompt_ids"]}
        assert pair["rejected_id"] == rewind["rejected"] and not tried & set(pair["chosen_ids"])
        scores = [probabilities[c] for c in pair["chosen_ids"]]
        assert scores == sorted(scores) and scores[0] >= 0.01 * max(probabilities.values())
    check_pairs(pairs, 320)


def test_chosen_tokens_neither_begin_nor_complete_a_pattern(rewinds, tokenizer):
    """The ban itself is the oracle for what completes a phrase; beginnings are told by their letters."""
    seen = {r["rule"].removeprefix("phrase:") for r in rewinds}
    assert len(seen) > 4
    for pair in pairs_from_rewinds(rewinds, tokenizer):
        for token in pair["chosen_ids"]:
            word = tokenizer.decode([token]).strip().lower()
            assert len(word) > 1 and not any(p.startswith(word) for p in seen)
            row = SequenceState(0, [], tokenizer)
            for known in pair["prompt_ids"]:
                row.append(known)
            row.checked = len(row.text)
            row.append(token)
            assert PhraseBan(sorted(seen)).check(row) is None


def test_n_grams_are_not_completed(tokenizer):
    ids = tokenizer.encode("the whisper of the")
    (sea,) = tokenizer.encode(" sea")
    rewind = {"context_ids": ids, "rejected": 50, "candidates": [(sea, 0.5)], "rule": "ngram:dream cliff"}
    (free,) = pairs_from_rewinds([rewind], tokenizer)
    assert free["chosen_ids"] == [sea]
    assert pairs_from_rewinds([{**rewind, "rule": "ngram:whisper sea"}], tokenizer) == []


def test_a_later_rewind_replaces_the_earlier_one_and_remembers_what_was_tried(tokenizer):
    a, b, c, d = (tokenizer.encode(w)[0] for w in (" was", " sea", " and", " the"))
    first = {"context_ids": [5, 6], "rejected": a, "candidates": [(b, 0.6), (c, 0.4)], "rule": "phrase:zzz"}
    second = {"context_ids": [5, 6], "rejected": b, "candidates": [(c, 0.5), (a, 0.3), (d, 0.2)], "rule": "phrase:zzz"}
    (pair,) = pairs_from_rewinds([first, second], tokenizer)
    assert pair["rejected_id"] == b and pair["chosen_ids"] == [d, c]


def test_pairs_of_another_tokenizer_are_refused(rewinds, tokenizer):
    wrong = {**rewinds[0], "rejected_text": "quite another text"}
    with pytest.raises(InputError, match="train the model that the pairs were made with"):
        pairs_from_rewinds([wrong], tokenizer)


def made(counts, chosen=4):
    return [
        {"prompt_ids": [1, n], "chosen_ids": list(range(100, 100 + chosen)), "rejected_id": token}
        for token, count in counts.items()
        for n in range(count)
    ]


def test_balance_holds_frequent_tokens_back_by_the_rule():
    counts = {1: 100, 2: 20, 3: 20, 4: 5, 5: 5}
    weights = {1: 100 * (20 / 100) ** 0.8, 2: 20, 3: 20, 4: 5, 5: 5}
    total = sum(weights.values())
    picked = Counter(p["rejected_id"] for p in balance_pairs(made(counts), 0.8, 60))
    assert picked.total() == 60
    for token, weight in weights.items():
        assert abs(picked[token] - round(60 * weight / total)) <= 1
    plain = Counter(p["rejected_id"] for p in balance_pairs(made(counts), 0.0, 75))
    assert plain[1] == 50 and plain[2] == 10  # shares as they come


def test_balance_fills_up_from_whoever_is_furthest_below():
    """A token whose pairs are dropped keeps its share, which the others then take."""
    pairs = made({1: 30, 2: 30}) + made({3: 30}, chosen=1)
    picked = Counter(p["rejected_id"] for p in balance_pairs(pairs, 0.8, 40, min_chosen=4))
    assert picked == {1: 20, 2: 20}
    everything = balance_pairs(pairs, 0.8, None, min_chosen=1)
    assert sorted(map(str, everything)) == sorted(map(str, pairs))
    assert balance_pairs(pairs, seed=1) == balance_pairs(pairs, seed=1) != balance_pairs(pairs, seed=2)


def test_text_pairs(tokenizer):
    (pair,) = pairs_from_text([{"prompt": "the old", "chosen": [" the", " s"], "rejected": " a"}], tokenizer)
    assert tokenizer.decode(pair["prompt_ids"]) == "the old"
    assert [tokenizer.decode([t]) for t in (*pair["chosen_ids"], pair["rejected_id"])] == [" the", " s", " a"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "the old", "chosen": [" whisper"], "rejected": " a"}, r"' whisper' is \d tokens \(' w', 'hi'"),
        ({"prompt": "the gh", "chosen": ["t"], "rejected": " a"}, "joins with the end of the prompt"),
    ],
)
def test_text_that_is_not_one_token_is_refused(tokenizer, row, message):
    with pytest.raises(InputError, match=message):
        pairs_from_text([row], tokenizer)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chosen_ids": [3, 9]}, "rejected token 9 among the chosen"),
        ({"chosen_ids": []}, "no chosen token"),
        ({"chosen_ids": [3, 3]}, "names a chosen token twice"),
        ({"chosen_ids": [320]}, "token 320; this model has tokens 0 to 319"),
        ({"rejected_id": -1}, "token -1"),
        ({"prompt_ids": []}, "empty context"),
    ],
)
def test_bad_pairs_are_refused(change, message):
    pair = {"prompt_ids": [5], "chosen_ids": [3], "rejected_id": 9}
    with pytest.raises(InputError, match=message):
        check_pairs([pair, {**pair, **change}], 320)


def test_files_and_filters_say_what_is_wrong(tmp_path, tokenizer):
    path = tmp_path / "pairs.jsonl"
    for text, message in (("{}\nno", "line 2 of"), ("", "holds no pairs"), ("[1]", "line 1 of .* is a list")):
        path.write_text(text)
        with pytest.raises(InputError, match=message):
            read_pairs(path)
    with pytest.raises(InputError, match="cannot be read"):
        read_pairs(tmp_path / "nothing")
    with pytest.raises(InputError, match="is not understood"):
        to_pairs([{"question": 1}], tokenizer)
    with pytest.raises(InputError, match="none of 3 pairs has 4 chosen"):
        balance_pairs(made({1: 3}, chosen=2))
    the = tokenizer.encode(" the")[0]
    with pytest.raises(InputError, match="all 2 pairs reject a function word"):
        without_function_words(made({the: 2}), tokenizer)


# --- batches and the reference -------------------------------------------------------------------------------------


def test_the_collator_pads_left_and_keeps_the_right_end():
    pairs = [
        {"prompt_ids": [5, 6, 7, 8], "chosen_ids": [1], "rejected_id": 2},
        {"prompt_ids": [9], "chosen_ids": [3, 4], "rejected_id": 5},
    ]
    made = FTPOCollator(0, max_length=3)(pairs)
    assert made["input_ids"].tolist() == [[6, 7, 8], [0, 0, 9]]
    assert made["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]
    assert made["position_ids"].tolist() == [[0, 1, 2], [0, 0, 0]]
    assert made["chosen_mask"].tolist() == [[True, False], [True, True]]
    with pytest.raises(InputError, match="a context has 4 tokens, max_length is 3"):
        FTPOCollator(0, max_length=3, truncate=False)(pairs)


@pytest.mark.parametrize("kind", ["llama", "gemma3", "opt"])
def test_last_logits_do_not_depend_on_padding(make_model, kind):
    model = make_model(kind)
    contexts = [[5, 6, 7, 8, 9, 10], [11, 12], [13]]
    pairs = [{"prompt_ids": c, "chosen_ids": [1], "rejected_id": 2} for c in contexts]
    with torch.no_grad():
        made = FTPOCollator(0)(pairs)
        if kind == "opt":  # learned positions count from the mask by themselves
            made.pop("position_ids")
            found = model(input_ids=made["input_ids"], attention_mask=made["attention_mask"]).logits[:, -1]
        else:
            found = last_logits(model, made)
        for row, context in zip(found, contexts):
            assert torch.allclose(row, model(torch.tensor([context])).logits[0, -1], atol=1e-4)


def trainer_for(model, pairs, tmp_path, cls=FTPOTrainer, lora=None, **arguments):
    values = {"use_cpu": True, "disable_tqdm": True, "learning_rate": 3e-3, "early_stop_choice_win": 2.0}
    config = FTPOConfig(output_dir=str(tmp_path), **{**values, **arguments})
    torch.manual_seed(0)
    peft_config = lora_last_layers(model, rank=8, last=2, dropout=0.0, **(lora or {}))
    return cls(copy.deepcopy(model), config, pairs, peft_config=peft_config)


@pytest.fixture(scope="module")
def pairs(rewinds, tokenizer):
    return balance_pairs(pairs_from_rewinds(rewinds, tokenizer), min_chosen=1)


def test_before_training_policy_and_reference_are_one(sharp, pairs, tmp_path):
    """A fresh adapter changes nothing, bit for bit, and the shared lower blocks give the plain model's logits."""
    trainer = trainer_for(sharp, pairs, tmp_path)
    inputs = trainer.data_collator(pairs[:6])
    assert trainer.frozen == 2
    logits, reference = trainer._both_logits(trainer.model, inputs)
    assert torch.equal(logits, reference)
    assert torch.equal(reference, last_logits(sharp, inputs))


def test_the_shared_reference_is_the_whole_one(sharp, pairs, tmp_path):
    trainer = trainer_for(sharp, pairs, tmp_path, max_steps=4)
    trainer.train()
    inputs = trainer.data_collator(pairs[:6])
    logits, reference = trainer._both_logits(trainer.model, inputs)
    with torch.no_grad():
        assert torch.allclose(reference, last_logits(sharp, inputs), atol=1e-5)
        assert torch.allclose(logits, last_logits(trainer.model, inputs), atol=1e-5)
    assert (logits - reference).abs().max() > 0.1


def test_training_wins_pairs_and_the_tie_holds_the_rest(sharp, pairs, tmp_path):
    free = trainer_for(sharp, pairs, tmp_path, max_steps=40, lambda_nontarget=0.0)
    tied = trainer_for(sharp, pairs, tmp_path, max_steps=40, lambda_nontarget=4.0)
    before = score_pairs(free.model, pairs, free.data_collator)
    after = {}
    for name, trainer in (("free", free), ("tied", tied)):
        trainer.train()
        after[name] = {k: float(v.mean()) for k, v in score_pairs(trainer.model, pairs, trainer.data_collator).items()}
        assert after[name]["choice_win"] > 0.9 > float(before["choice_win"].mean())
        assert after[name]["rejected"] < 0.3 * float(before["rejected"].mean())
        logged = [entry for entry in trainer.state.log_history if "pref" in entry]
        assert logged[-1]["pref"] < 0.5 * logged[0]["pref"] and {"nontarget", "choice_win"} <= set(logged[0])
    assert after["tied"]["drift"] < 0.7 * after["free"]["drift"]
    assert float(before["drift"].max()) == 0.0


def test_dpo_learns_the_same_pairs(sharp, pairs, tmp_path):
    trainer = trainer_for(sharp, pairs, tmp_path, FinalTokenDPOTrainer, max_steps=40)
    before = float(score_pairs(trainer.model, pairs, trainer.data_collator)["choice_win"].mean())
    trainer.train()
    assert float(score_pairs(trainer.model, pairs, trainer.data_collator)["choice_win"].mean()) > max(before, 0.8)


def test_without_learning_rate_nothing_changes(sharp, pairs, tmp_path):
    trainer = trainer_for(sharp, pairs, tmp_path, max_steps=2, learning_rate=0.0, weight_decay=0.0)
    start = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    trainer.train()
    assert all(torch.equal(p, start[n]) for n, p in trainer.model.named_parameters())


def test_training_stops_at_the_threshold(sharp, pairs, tmp_path):
    trainer = trainer_for(sharp, pairs, tmp_path, max_steps=100, logging_steps=5, early_stop_choice_win=0.8)
    trainer.train()
    assert trainer.state.global_step < 100 and trainer.state.global_step % 5 == 0
    assert trainer.state.log_history[-2]["choice_win"] >= 0.8


def test_evaluation_reports_the_parts(sharp, pairs, tmp_path):
    trainer = trainer_for(sharp, pairs, tmp_path, per_device_eval_batch_size=4)
    found = trainer.evaluate(pairs[:8])
    losses = [
        ftpo_loss(
            last_logits(sharp, b), last_logits(sharp, b), *(b[k] for k in ("chosen_ids", "chosen_mask", "rejected_ids"))
        )
        for b in (trainer.data_collator(pairs[i : i + 4]) for i in (0, 4))
    ]
    assert found["eval_loss"] == pytest.approx(float(sum(o.loss for o in losses) / 2), rel=1e-5)
    logged = trainer.state.log_history[-1]
    assert logged["eval_pref"] == pytest.approx(float(sum(o.pref for o in losses) / 2), rel=1e-5)


def test_a_frozen_copy_serves_as_reference(sharp, pairs, tmp_path):
    config = FTPOConfig(output_dir=str(tmp_path), use_cpu=True, disable_tqdm=True)
    trainer = FTPOTrainer(copy.deepcopy(sharp), config, pairs, ref_model=sharp)
    inputs = trainer.data_collator(pairs[:4])
    logits, reference = trainer._both_logits(trainer.model, inputs)
    assert torch.equal(logits, reference) and logits.requires_grad and not reference.requires_grad


@pytest.mark.parametrize("tied", [False, True])
def test_the_merged_model_is_the_adapted_one_and_loads_anywhere(sharp, pairs, tmp_path, tied):
    from transformers import AutoModelForCausalLM

    base = copy.deepcopy(sharp)
    if tied:
        base.config.tie_word_embeddings = True
        base.lm_head.weight = base.model.embed_tokens.weight
    embeddings = base.model.embed_tokens.weight.detach().clone()
    trainer = trainer_for(base, pairs, tmp_path, max_steps=4)
    trainer.train()
    inputs = trainer.data_collator(pairs[:4])
    with torch.no_grad():
        expected = last_logits(trainer.model.eval(), inputs)
        plain = merged(trainer.model)
        plain.save_pretrained(tmp_path / "merged")
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        assert torch.allclose(last_logits(plain, inputs), expected, atol=1e-4)
        assert torch.allclose(last_logits(loaded, inputs), expected, atol=1e-4)
    assert torch.equal(loaded.model.embed_tokens.weight, embeddings)
    assert not torch.equal(loaded.lm_head.weight, embeddings)


def test_refusals_of_the_trainer(sharp, pairs, tmp_path):
    config = FTPOConfig(output_dir=str(tmp_path), use_cpu=True)
    with pytest.raises(InputError, match="neither an adapter nor a reference"):
        FTPOTrainer(copy.deepcopy(sharp), config, pairs)
    with pytest.raises(InputError, match="no pairs to train on"):
        trainer_for(sharp, [], tmp_path)
    with pytest.raises(InputError, match="among the chosen"):
        trainer_for(sharp, [{**pairs[0], "rejected_id": pairs[0]["chosen_ids"][0]}], tmp_path)
    trainer = trainer_for(sharp, pairs, tmp_path)
    inputs = trainer.data_collator(pairs[:4])
    inputs["attention_mask"][0, -1] = 0
    with pytest.raises(InputError, match="padded on the right"):
        trainer.compute_loss(trainer.model, inputs)
    with pytest.raises(InputError, match="margin=0 is not allowed"):
        FTPOConfig(output_dir=str(tmp_path), margin=0)
    with pytest.raises(InputError, match="margin=-1"):
        ftpo_loss(*batch(), margin=-1)
    with pytest.raises(InputError, match="this model has 1 to 4 layers"):
        lora_last_layers(sharp, last=5)
    with pytest.raises(InputError, match=r"ftpo: margin='0'"):
        load_method("ftpo").from_strings(["margin=0"])


# --- the method and the command line -------------------------------------------------------------------------------


def test_the_method_passes_its_parameters_on(sharp, tokenizer, rewinds, tmp_path):
    method = FTPO(min_chosen=1, rank=4, last_layers=1, margin=3.0, dropout=0.0, batch_size=4, max_length=9)
    chosen = method.pairs(rewinds, tokenizer)
    trainer = method.trainer(copy.deepcopy(sharp), tokenizer, chosen, tmp_path, use_cpu=True, disable_tqdm=True)
    assert trainer.args.margin == 3.0 and trainer.args.loss_terms()["margin"] == 3.0
    assert trainer.args.learning_rate == pytest.approx(auto_learning_rate(len(chosen), 4, 4))
    assert trainer.frozen == 3 and trainer.data_collator.max_length == 9
    assert trainer.model.peft_config["default"].r == 4


def test_from_the_ban_to_the_trained_model(sharp, tokenizer, tmp_path):
    """decode --save-pairs, train, decode with what was saved: the banned words become rarer in plain sampling."""
    folder, prompts = tmp_path / "model", tmp_path / "prompts.txt"
    sharp.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    prompts.write_text("\n".join(PROMPTS * 3))
    phrases = json.dumps(BANNED)
    sampling = ["--raw", "--min-p", "0", "--max-new-tokens", "60"]
    pairs, trained = tmp_path / "pairs.jsonl", tmp_path / "trained"

    def run(*args):
        result = CliRunner().invoke(main, list(map(str, args)))
        assert result.exit_code == 0, result.output
        return result.stdout

    def hits(model):
        texts = run("decode", "--model", model, "--prompts", prompts, "--seed", "7", *sampling).splitlines()
        assert len(texts) == 3 * len(PROMPTS)
        return sum(len(re.findall(rf"\b({'|'.join(BANNED)})\b", json.loads(t)["text"].lower())) for t in texts)

    ban = ["--method", "antislop", "-o", f"phrases={phrases}"]
    run("decode", "--model", folder, "--prompts", prompts, *ban, *sampling, "--save-pairs", pairs)
    options = ["rank=16", "last_layers=4", "learning_rate=0.005", "dropout=0", "epochs=8", "batch_size=8"]
    spread = [word for option in options for word in ("-o", option)]
    command = [
        "train",
        "--method",
        "ftpo",
        "--data",
        pairs,
        "--model",
        folder,
        "--output",
        trained,
        "--hold-out",
        "0.3",
        *spread,
    ]
    summary = json.loads(run(*command, "--json"))
    assert summary["after"]["rejected"] < 0.5 * summary["before"]["rejected"] and summary["held_out"] > 0
    assert (trained / "adapter" / "adapter_config.json").exists()
    assert hits(trained) < 0.6 * hits(folder)
    refused = CliRunner().invoke(main, list(map(str, command)))
    assert refused.exit_code == 2 and "is not an empty folder" in refused.output


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--method", "ftpo", "--data", "/nowhere", "--output", "x"], "'/nowhere' cannot be read"),
        (["--method", "antislop", "--data", "x", "--output", "x"], "belongs to the stage 'decode'"),
        (["--method", "ftpo", "--data", "x", "--output", "x", "--hold-out", "1"], "--hold-out 1.0"),
    ],
)
def test_the_command_line_refuses(args, message):
    result = CliRunner().invoke(main, ["train", *args])
    assert result.exit_code == 2 and message in result.output


# --- the comparison ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def comparison(sharp, tokenizer, tmp_path_factory):
    """The whole experiment on the small model: its own words, 4 stories, 3 passages, 4 pairs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TOKENRY_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(experiment, "lines", lambda name: BANNED if "words" in name else PROMPTS * 3)
        for name, value in (("ROUNDS", 1), ("NEW_TOKENS", 60), ("HELD_OUT", 4), ("PASSAGES", 3)):
            patch.setattr(experiment, name, value)
        rates = {"learning_rate": 3e-3, "epochs": 8, "early_stop_choice_win": 2.0, "min_chosen": 1}
        method = FTPO(rank=8, last_layers=2, batch_size=8, dropout=0.0, **rates)
        build = lambda: experiment.build(copy.deepcopy(sharp), tokenizer, samples=4, method=method)  # noqa: E731
        found = build()
        patch.setattr(FTPOTrainer, "train", None)  # made once: a second time it comes from the cache
        again = build()
        assert [s.setting for s in found.arms] == [s.setting for s in again.arms]
        return compare(found)


def test_pairs_of_a_prompt_stay_together():
    pairs = [{"prompt_ids": ids} for ids in ([1, 2, 5], [1, 9], [1, 2, 6], [1, 7, 8], [3, 4], [1, 2, 5, 5])]
    held, kept = experiment.split(pairs, [[1], [1, 2], [3, 4]], 2)
    assert held == [pairs[0], pairs[2], pairs[5]] and kept == [pairs[1], pairs[3], pairs[4]]


def test_the_experiment_measures_each_kind_of_sample(comparison, sharp, tokenizer):
    plain, method = experiment.PLAIN, experiment.METHOD
    assert {s.id.split("-")[0] for s in comparison.samples} == {"story", "text", "pair"}
    assert comparison.mean(experiment.BAN, "hits_per_1000_words") == 0
    assert comparison.mean(plain, "hits_per_1000_words") > 0
    for sample, nll in zip(comparison.samples, comparison.values(plain, "text_nll")):
        if sample.id.startswith("text"):
            ids = tokenizer(sample.prompt, return_tensors="pt").input_ids[:, :256]
            with torch.no_grad():
                logprobs = sharp(ids).logits[0, :-1].log_softmax(-1)
            assert nll == pytest.approx(-float(logprobs.gather(1, ids[0, 1:, None]).mean()), rel=1e-4)
        else:
            assert math.isnan(nll)
    assert comparison.mean(plain, "drift") == 0 and comparison.mean(method, "drift") > 0
    assert comparison.mean(method, "rejected") < comparison.mean(plain, "rejected")
    assert comparison.mean(method, "drift") < comparison.mean(experiment.UNTIED, "drift")
    for arm in experiment.TRAINED:
        assert comparison.mean(arm, "rejected") < 0.7 * comparison.mean(plain, "rejected"), arm


def test_the_verdict_follows_from_the_numbers(comparison, monkeypatch):
    """Ratios of sums over stories; the finding names every arm."""
    monkeypatch.setattr(claims, "UNITS", 2)  # so that few stories decide
    plain, method = experiment.PLAIN, experiment.METHOD

    def rate(arm):
        hits, words = (comparison.table(arm)[n][:4] for n in ("hits_per_1000_words", "words"))
        return (hits * words).sum() / words.sum()

    expected = 1 - rate(method) / rate(plain)
    assert experiment.fewer_hits(comparison, method).interval.mean == pytest.approx(expected)
    findings = experiment.findings(comparison)
    low, high = experiment.fewer_hits(comparison, method).interval[1:3]
    assert findings[0].outcome == ("holds" if low >= 0.6 else "fails" if high < 0.6 else "undecided")
    assert f"fewer hits, ftpo: {expected:.1%}" in findings[0].numbers
    assert f"antislop while sampling {1:.1%}" in findings[0].numbers
    ratio = math.exp(comparison.difference(method, plain, "text_nll").mean)
    low, high = (math.exp(v) for v in comparison.difference(method, plain, "text_nll")[1:3])
    assert findings[1].outcome == ("holds" if high <= 1.05 else "fails" if low > 1.05 else "undecided")
    assert f"ftpo / plain: {ratio:.3f}" in findings[1].numbers
