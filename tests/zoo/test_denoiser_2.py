"""zoo/denoiser-2: its tokens, how it begins as zoo/denoiser, what it learns, and what it can do in wide windows."""

from itertools import islice

import pytest
import torch

from tokenry import load
from tokenry.data.problems import draw_problems, split_of
from tokenry.data.puzzles import LISTING, PUZZLES
from tokenry.decode import Daedal, MaskedDiffusion
from tokenry.zoo import denoiser, denoiser_2


@pytest.fixture(scope="module")
def tokenizer():
    return denoiser_2.build_tokenizer()


def test_old_tokens_keep_their_ids_and_lists_have_tokens(tokenizer):
    old, new = denoiser.build_tokenizer().get_vocab(), tokenizer.get_vocab()
    assert {token: new[token] for token in old} == old and len(new) == len(old) + 10
    for task in (*PUZZLES, LISTING):
        for problem in draw_problems(task, 4):
            text = problem.question + problem.answer + "<eos>"
            ids = tokenizer.encode(text)
            assert tokenizer.decode(ids) == text and tokenizer.unk_token_id not in ids
            assert len(tokenizer.encode(problem.answer)) == len(problem.answer)


def test_it_begins_as_the_denoiser(tokenizer):
    model, (start, old) = denoiser_2.untrained(tokenizer), load("zoo/denoiser")
    ids = torch.tensor([old.encode("sort 4092=0249<eos><mask>")])
    with torch.no_grad():
        found, right = model(ids).logits, start(ids).logits
    torch.testing.assert_close(found[..., : len(old)], right)
    assert model.config.vocab_size == len(tokenizer) == found.shape[-1] and model.config.is_causal is False


def test_windows_are_as_wide_as_96_and_lists_are_learnt(tokenizer):
    eos, widths, lists = tokenizer.eos_token_id, set(), 0
    for ids, prompt in islice(denoiser.examples(tokenizer, 1, denoiser_2.COURSE), 600):
        question, window = tokenizer.decode(ids[:prompt]), ids[prompt:]
        assert split_of(question) == "train" and eos not in ids[:prompt]
        assert eos not in window or set(window[window.index(eos) :]) == {eos}
        widths.add(len(window))
        if question.startswith("list "):
            lists += 1
            text, times = question[5:-1].split("*")
            right = "".join(f"{number + 1}{text}" for number in range(int(times)))
            written = tokenizer.decode(window, skip_special_tokens=True)
            assert right.startswith(written) and len(written) == min(len(right), len(window))
    assert 64 < max(widths) <= 96 and 0.35 < lists / 600 < 0.55


def test_training_repeats_itself_from_the_seed(monkeypatch):
    monkeypatch.setattr(denoiser_2, "STEPS", 3)
    monkeypatch.setattr(denoiser, "BATCH_TOKENS", 300)
    first, again = (denoiser_2.train(2)[0] for _ in range(2))
    assert not first.training
    for a, b in zip(first.parameters(), again.parameters()):
        assert torch.equal(a, b)


@pytest.mark.parametrize("width", [48, 96])
def test_the_model_of_the_package_solves_its_puzzles_in_wide_windows(width):
    model, tokenizer = load("zoo/denoiser-2")
    for task in (*PUZZLES, LISTING):
        problems = draw_problems(task, 16, seed=5, levels=denoiser_2.COURSE.levels[task.name])
        method = MaskedDiffusion(block_length=width)
        out = method.generate(model, tokenizer, [p.question for p in problems], max_new_tokens=width)
        assert sum(task.check(p, text) for p, text in zip(problems, out.texts)) >= 14


def test_windows_grow_with_lists():
    model, tokenizer = load("zoo/denoiser-2")
    method = Daedal(initial_gen_length=8, eos_check_tokens=2)
    questions = [f"list caeb*{level}=" for level in LISTING.levels]
    out = method.generate(model, tokenizer, questions, max_new_tokens=96)
    widths = [len(window) for window in out.windows]
    assert widths == sorted(widths) and all(5 * (i + 1) <= width < 60 for i, width in enumerate(widths))
