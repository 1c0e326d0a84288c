"""Training a token value model: its loss, its examples, what it learns, and the command line from file to search."""

import json
import math

import pytest
import torch
from click.testing import CliRunner
from support.families import build, byte_tokenizer

from tokenry import InputError
from tokenry.cli import main
from tokenry.train import (
    GradedQuestion,
    TokenValueModel,
    TVMTraining,
    ValueCollator,
    ValueConfig,
    ValueTrainer,
    shared_tokens,
    token_value_loss,
    value_examples,
)

QUESTIONS = [
    GradedQuestion([10, 11], [[50, 60], [50, 61], [50, 60, 70], [51, 60]], [1.0, 0.0, 1.0, 0.0]),
    GradedQuestion([12], [[50, 60], [51, 61, 62]], [0.0, 1.0]),
]


def test_the_loss_is_its_definition():
    logits, labels = torch.tensor([[0.0, 2.0, -1.0]]), torch.tensor([[0.25, math.nan, 1.0]])
    v = logits.sigmoid()[0]
    mse = ((v[0] - 0.25) ** 2 + (v[2] - 1) ** 2) / 2
    bce = -(0.25 * v[0].log() + 0.75 * (1 - v[0]).log() + v[2].log()) / 2
    assert torch.allclose(token_value_loss(logits, labels), mse)
    assert torch.allclose(token_value_loss(logits, labels, "bce"), bce)


@pytest.mark.parametrize("loss", ["mse", "bce"])
def test_it_is_least_where_the_value_is_the_label(loss):
    labels = torch.tensor([[0.1, 0.5, 0.9]])
    logits = labels.logit().requires_grad_()
    token_value_loss(logits, labels, loss).backward()
    assert float(logits.grad.abs().max()) < 1e-7
    near = [token_value_loss(labels.logit() + shift, labels, loss) for shift in (-0.3, 0.0, 0.3)]
    assert near[1] < near[0] and near[1] < near[2]


def test_the_question_and_padding_have_no_label():
    examples = value_examples(QUESTIONS)
    batch = ValueCollator(1)([examples[0], examples[5]])
    assert batch["input_ids"].tolist() == [[10, 11, 50, 60], [12, 51, 61, 62]]
    third = 2 / 3
    wanted = torch.tensor([[math.nan, math.nan, third, 1.0], [math.nan, 1.0, 1.0, 1.0]])
    assert torch.allclose(batch["labels"], wanted, equal_nan=True)
    assert ValueCollator(1, 3)([examples[0]])["labels"][0, 2] == pytest.approx(third), "the end is cut, not the start"
    assert shared_tokens(QUESTIONS) == pytest.approx(5 / 14), "50 three times, 50 60 twice"


def trained(tmp_path, tokenizer, **options):
    torch.manual_seed(0)
    method = TVMTraining(learning_rate=3e-3, batch_size=6, epochs=80, **options)
    trainer = method.trainer(build("llama"), tokenizer, QUESTIONS, tmp_path, lambda *_: None)
    trainer.train()
    return method, trainer


@pytest.mark.parametrize("loss", ["mse", "bce"])
def test_it_learns_the_shares(loss, tmp_path, tokenizer):
    method, trainer = trained(tmp_path, tokenizer, loss=loss)
    model = trainer.model.eval()
    first = model.score(torch.tensor([[10, 11, 50], [10, 11, 51]]))[:, -1]
    assert first.tolist() == pytest.approx([2 / 3, 0], abs=0.1)
    assert max(method.score(trainer, QUESTIONS).values()) < 0.01
    method.save(trainer, tmp_path / "values")
    again = TokenValueModel.opened(tmp_path / "values").score(torch.tensor([[10, 11, 50]]))
    assert float(again[0, -1]) == pytest.approx(float(first[0]), abs=1e-6)


def test_padding_is_not_learned(llama, tokenizer):
    """The loss of a batch of unequal rows is that of each row alone, weighted by its tokens."""
    model, collate = TokenValueModel.from_language_model(llama, tokenizer), ValueCollator(1)
    with torch.no_grad():
        model.head.weight.normal_(std=0.3)
    examples = value_examples(QUESTIONS)

    def loss(rows):
        batch = collate(rows)
        return token_value_loss(model(batch["input_ids"], batch["attention_mask"]).logits[..., 0], batch["labels"])

    sizes = [len(example["labels"]) for example in examples]
    with torch.no_grad():
        alone = sum(float(loss([e])) * n for e, n in zip(examples, sizes)) / sum(sizes)
        whole = float(loss(examples))
    assert whole == pytest.approx(alone, abs=1e-6)


# --- files and the command line --------------------------------------------------------------------------------------


def test_a_file(tmp_path, tokenizer):
    path = tmp_path / "graded.jsonl"
    text = {"prompt": "the sea", "solutions": ["a dream", "night"], "correct": [True, 0.5]}
    ids = {"prompt_ids": [5, 6], "solution_ids": [[7], [8, 9]], "correct": [0, 1]}
    path.write_text("\n".join(map(json.dumps, (text, ids))))
    found = sorted(TVMTraining().read(path, tokenizer), key=lambda q: len(q.prompt_ids))
    end = tokenizer.eos_token_id
    words = [tokenizer(x).input_ids for x in ("the sea", "a dream", "night")]
    expected = GradedQuestion(words[0], [words[1] + [end], words[2] + [end]], [1.0, 0.5])
    assert expected in found and GradedQuestion([5, 6], [[7], [8, 9]], [0.0, 1.0]) in found


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": "a", "solutions": ["b"], "correct": [True]}, "a question has 1 solutions, at least 2 are needed"),
        ({"prompt": "a", "solutions": ["b", "c"], "correct": [True]}, "2 solutions have 1 grades"),
        ({"prompt": "a", "solutions": ["b", ""], "correct": [True, False]}, "a solution is empty"),
        ({"prompt": " ", "solutions": ["b", "c"], "correct": [True, False]}, "the prompt is empty"),
        ({"prompt": "a", "solutions": ["b", "c"], "correct": [True, 2.0]}, "correct.1"),
        ({"prompt_ids": [], "solution_ids": [[5], [6]], "correct": [1, 0]}, "prompt_ids is empty"),
        ({"prompt": "a", "solutions": "b", "correct": [True]}, "field 'solutions'"),
        ({"prompt": "a", "correct": []}, "field 'solutions' is missing"),
    ],
)
def test_what_is_no_graded_question(row, words, tmp_path, tokenizer):
    (tmp_path / "graded.jsonl").write_text(json.dumps(row))
    with pytest.raises(InputError, match=words) as refusal:
        TVMTraining().read(tmp_path / "graded.jsonl", tokenizer)
    assert "write lines like" in str(refusal.value)


def test_what_the_trainer_refuses(llama, tokenizer, tmp_path):
    model, config = TokenValueModel.from_language_model(llama, tokenizer), ValueConfig(str(tmp_path))
    good = {"prompt_ids": [5], "solution_ids": [6, 7], "labels": [0.5, 1.0]}

    def make(*rows, words=tokenizer, config=config):
        return ValueTrainer(model, config, list(rows), processing_class=words)

    for rows, words in (
        ([], "there are no solutions to train on"),
        ([good, {**good, "labels": [1.0]}], "example 1 has 1 labels for 2 tokens"),
        ([{**good, "labels": [0.5, 2.0]}], "example 0 has labels from 0.5 to 2.0"),
        ([{**good, "solution_ids": [6, 999]}], "example 0 has ids from 5 to 999, the model has 320 tokens"),
        ([{**good, "prompt_ids": [5] * 5000}], "leaves none of its solution"),
    ):
        with pytest.raises(InputError, match=words):
            make(*rows)
    with pytest.raises(InputError, match="pass processing_class=tokenizer"):
        make(good, words=None)
    other = byte_tokenizer()
    other.add_tokens(["<more>"])
    with pytest.raises(InputError, match="the value model reads the vocabulary"):
        make(good, words=other)
    with pytest.raises(InputError, match="loss='mae' is unknown"):
        ValueConfig(str(tmp_path), loss="mae")
    with pytest.raises(InputError, match="no token of the batch has a label"):
        token_value_loss(torch.zeros(1, 1), torch.tensor([[math.nan]]))
    with pytest.raises(InputError, match="question 0: a question has 1 solutions"):
        value_examples([GradedQuestion([5], [[6]], [1.0])])


def test_from_a_file_to_a_search(tmp_path, tokenizer):
    """Train on the command line, and search with what that saves."""
    build("llama").save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [{"prompt": f"the sea {n}", "solutions": ["a dream", "night"], "correct": [n % 2, 0.5]} for n in range(4)]
    (tmp_path / "graded.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def run(*args):
        result = CliRunner().invoke(main, [*map(str, args), "--model", str(tmp_path / "model"), "--json"])
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    out = tmp_path / "values"
    told = run("train", "--method", "tvm", "--data", tmp_path / "graded.jsonl", "--output", out, "--hold-out", 0.25)
    assert (told["held_out"], told["questions"]) == (1, 3)
    assert set(told["after"]) == set(TVMTraining.measures)
    options = ["-o", f"values={out}", "-o", "beams=2", "-o", "candidates=4", "-o", "max_step_tokens=3"]
    found = run("decode", "the sea", "--method", "tvm-search", *options, "--raw", "--max-new-tokens", 8)
    assert found["kept"] == len(found["ids"]) <= 8 and found["written"] >= found["kept"]
