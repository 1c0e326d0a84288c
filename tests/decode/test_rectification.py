"""Rectification: caps met exactly, values learned, a cache that follows every rewind, and what is refused."""

import json
import random
from itertools import product

import pytest
import torch
from click.testing import CliRunner
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaModel, LogitsProcessor, LogitsProcessorList, PreTrainedTokenizerFast

from tokenry import InputError
from tokenry.cli import main
from tokenry.decode import Antislop, PhraseBan, generate, loop
from tokenry.decode.contract import Plugins
from tokenry.decode.generation.caps import cap_distribution, cap_top_tokens, iterate_caps
from tokenry.decode.generation.monitor import Violation
from tokenry.decode.generation.sampler import row_seed
from tokenry.decode.generation.sequence import SequenceState
from tokenry.decode.rectification import Rectification, RectifierLogitsProcessor
from tokenry.evidence import rectification as experiment
from tokenry.learned.dead_end_values import DeadEndValueModel, ValueCache, vocabulary_hash
from tokenry.measure.claims import verdict
from tokenry.measure.compare import Comparison
from tokenry.measure.experiment import Experiment
from tokenry.measure.task import Arm, Outcome, Sample
from tokenry.measure.tasks.discourse import DiscourseTask
from tokenry.train import (
    Rectifier,
    RectifierCollator,
    RectifierConfig,
    RectifierTrainer,
    keep_extremes,
    read_episodes,
    sarsa_loss,
)
from tokenry.train.values.episodes import check_episodes
from tokenry.zoo import storyteller

PROMPTS = ["the old lighthouse", "Elara walked along the shore and", "the"]


def encode(tokenizer, prompts=PROMPTS):
    batch = tokenizer(prompts, return_tensors="pt", padding=True)
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}


def run(model, inputs, tokenizer=None, **options):
    return model.generate(
        **inputs,
        custom_generate=loop,
        processing_class=tokenizer,
        pad_token_id=1,
        return_dict_in_generate=True,
        **{"max_new_tokens": 30, **options},
    )


@pytest.fixture
def rectifier(make_model, tokenizer):
    """A random rectifier whose values spread over [-1, 0], so that its caps bind."""
    torch.manual_seed(1)
    made = DeadEndValueModel(make_model("qwen2")).bind(tokenizer).eval()
    with torch.no_grad():
        made.q_head[-1].weight.mul_(8)
        made.q_head[-1].bias.fill_(-0.7)
    return made


def zero(rectifier):
    """The same with Q = 0 everywhere."""
    with torch.no_grad():
        for parameter in rectifier.q_head.parameters():
            parameter.zero_()
    return rectifier


# --- caps on a distribution ------------------------------------------------------------------------------------


def random_caps(rows=64, vocabulary=50, seed=0, tight=0.7):
    generator = torch.Generator().manual_seed(seed)
    logp = (3 * torch.randn(rows, vocabulary, generator=generator)).log_softmax(-1)
    cap = torch.rand(rows, vocabulary, generator=generator) ** (1 / (1 - tight))
    return logp, cap.clamp(1e-7, 1)


def by_bisection(p, cap):
    """min(cap, c p) with the c that makes it sum to 1, in one row of float64."""
    low, high = 1.0, 1e18
    for _ in range(300):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if torch.minimum(cap, middle * p).sum() < 1 else (low, middle)
    return torch.minimum(cap, high * p)


def test_projection_equals_bisection_and_meets_the_caps():
    logp, cap = random_caps()
    capped, infeasible = cap_distribution(logp, cap)
    p = capped.double().exp()
    assert not infeasible.any() and (logp.exp() > cap).any(-1).sum() > 50
    assert float((p - cap).max()) < 1e-6 and torch.allclose(p.sum(-1), torch.ones(64, dtype=torch.float64), atol=1e-6)
    for row in range(64):
        expected = by_bisection(logp[row].double().exp(), cap[row].double())
        assert float((p[row] - expected).abs().max()) < 1e-6


def test_projection_is_the_nearest_distribution_under_the_caps():
    """No step toward another distribution under the caps lowers KL(p' || p)."""
    logp, cap = random_caps(rows=8, vocabulary=12)
    best = cap_distribution(logp, cap)[0].double().exp()

    def divergence(q):
        return (q * (q.log() - logp.double())).sum(-1)

    generator = torch.Generator().manual_seed(3)
    for _ in range(200):
        other = cap_distribution(torch.randn(8, 12, generator=generator) * 3, cap)[0].double().exp()
        mixed = 0.99 * best + 0.01 * other
        assert bool((divergence(mixed) >= divergence(best) - 1e-9).all())


def test_projection_keeps_ratios_of_uncapped_tokens_and_is_idempotent():
    logp, cap = random_caps()
    capped, _ = cap_distribution(logp, cap)
    free = capped.exp() < cap - 1e-5
    gain = (capped - logp).masked_fill(~free, torch.nan)
    spread = gain.nan_to_num(-9).max(-1).values - gain.nan_to_num(9).min(-1).values
    assert float(spread[free.any(-1)].max()) < 1e-4 and float(gain[free].min()) > -1e-5
    again, _ = cap_distribution(capped, cap)
    assert float((again.exp() - capped.exp()).abs().max()) < 1e-6


def test_a_batch_equals_its_rows_and_a_row_within_its_caps_keeps_its_bits():
    logp, cap = random_caps()
    cap[::3] = 1.0
    capped, _ = cap_distribution(logp, cap)
    assert torch.equal(capped[::3], logp[::3])
    for row in range(9):
        assert torch.allclose(capped[row], cap_distribution(logp[row : row + 1], cap[row : row + 1])[0][0], atol=1e-6)


def test_tokens_without_probability_stay_without():
    logits = torch.tensor([[2.0, 1.0, -torch.inf, 0.0]])
    cap = torch.tensor([[0.1, 0.95, 1.0, 0.6]])
    capped, infeasible = cap_distribution(logits, cap)
    assert capped[0, 2] == -torch.inf and not infeasible and float(capped.exp().sum()) == pytest.approx(1, abs=1e-6)
    capped, infeasible = cap_distribution(logits, torch.tensor([[0.1, 0.2, 1.0, 0.1]]))
    assert infeasible and torch.allclose(capped.exp()[0], torch.tensor([0.25, 0.5, 0.0, 0.25]))


def test_next_to_a_dead_end_the_caps_are_the_distribution():
    capped, infeasible = cap_distribution(torch.randn(2, 4), torch.tensor([[0.1, 0.2, 0.1, 0.4], [1.0, 1, 1, 1]]))
    assert infeasible.tolist() == [True, False]
    assert torch.allclose(capped[0].exp(), torch.tensor([0.125, 0.25, 0.125, 0.5]))


def test_caps_that_leave_no_choice_are_the_distribution():
    """They sum to 1 but for rounding, so that whether anything can meet them depends on the last bit."""
    logp, cap = random_caps(rows=500, vocabulary=7)
    cap /= cap.sum(-1, keepdim=True)
    assert torch.allclose(cap_distribution(logp, cap)[0].exp(), cap, atol=1e-6)


def test_the_published_passes_do_not_meet_the_caps():
    logp, cap = random_caps(tight=0.5)
    scores = logp.clone()
    for _ in range(2):
        scores = torch.minimum(scores, cap.log() + scores.exp().sum(-1, keepdim=True).log())
    published = iterate_caps(logp, cap)
    assert torch.allclose(published, scores, atol=1e-5)
    assert float((published.softmax(-1) - cap).max()) > 0.02
    assert float((cap_distribution(logp, cap)[0].exp() - cap).max()) < 1e-6
    assert torch.equal(iterate_caps(logp, torch.ones_like(cap)), logp)


def test_an_api_with_top_tokens_equals_the_whole_vocabulary_without_other_caps():
    logp, cap = random_caps(vocabulary=40)
    listed = logp.topk(6).indices
    whole_cap = torch.ones_like(cap).scatter(1, listed, cap.gather(1, listed))
    expected, _ = cap_distribution(logp, whole_cap)
    new, other, infeasible = cap_top_tokens(logp.gather(1, listed), cap.gather(1, listed))
    assert torch.allclose(new, expected.gather(1, listed), atol=1e-4) and not infeasible.any()
    assert torch.allclose(new.exp().sum(1) + other.exp(), torch.ones(64), atol=1e-5)
    with pytest.raises(InputError, match="sum to"):
        cap_top_tokens(torch.zeros(1, 2), torch.ones(1, 2))


# --- the loss --------------------------------------------------------------------------------------------------


def by_hand(q, target_q, ids, rewards, lengths, gamma):
    total = 0.0
    for b, n in enumerate(lengths):
        for t in range(n - 1):
            last = t == n - 2
            reward = rewards[b] if last and not isinstance(rewards[b], list) else 0.0
            reward = rewards[b][t + 1] if isinstance(rewards[b], list) else reward
            after = 0.0 if last else gamma * float(target_q[b, t + 1, ids[b, t + 2]].detach())
            target = min(max(reward + after, -1.0), 0.0)
            total += (float(q[b, t, ids[b, t + 1]].detach()) - target) ** 2
    return total / sum(lengths)


@pytest.mark.parametrize("gamma", [1.0, 0.9])
@pytest.mark.parametrize("each_token", [False, True])
def test_sarsa_loss_equals_the_sum_by_hand(gamma, each_token):
    generator = torch.Generator().manual_seed(0)
    q, target_q = torch.randn(2, 3, 6, 9, generator=generator) - 0.5
    ids = torch.randint(0, 9, (3, 6), generator=generator)
    ids[1, 3] = 8  # the token that pads is a real one too
    lengths = [6, 4, 2]
    mask = torch.tensor([[1] * n + [0] * (6 - n) for n in lengths])
    ids = ids.masked_fill(mask == 0, 8)
    rewards = -torch.rand(3, 6, generator=generator) if each_token else torch.tensor([-1.0, 0.0, -0.5])
    q.requires_grad_(), target_q.requires_grad_()
    loss = sarsa_loss(q, target_q, ids, rewards, mask, gamma)
    assert float(loss.detach()) == pytest.approx(by_hand(q, target_q, ids, rewards.tolist(), lengths, gamma), rel=1e-5)
    loss.backward()
    assert target_q.grad is None
    used = q.grad.abs().sum(-1) > 0
    assert used.tolist() == [[t < n - 1 for t in range(6)] for n in lengths]


def test_sarsa_loss_is_zero_at_its_fixed_point():
    """A text of which everything is known: every value equals the reward at the end."""
    ids, mask = torch.tensor([[1, 2, 3, 4]]), torch.ones(1, 4)
    q = torch.full((1, 4, 5), -0.25)
    assert float(sarsa_loss(q, q, ids, torch.tensor([-0.25]), mask)) == 0
    assert float(sarsa_loss(q, q, ids, torch.tensor([-1.0]), mask)) == pytest.approx(0.75**2 / 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rewards": torch.tensor([0.5])}, r"\[-1, 0\]"),
        ({"rewards": torch.tensor([-1.5])}, r"\[-1, 0\]"),
        ({"rewards": torch.tensor([torch.nan])}, r"\[-1, 0\]"),
        ({"attention_mask": torch.tensor([[1, 0, 0]])}, "fewer than two"),
        ({"attention_mask": torch.tensor([[0, 1, 1]])}, "pad on the right"),
    ],
)
def test_sarsa_loss_refuses(change, message):
    given = {"rewards": torch.tensor([-1.0]), "attention_mask": torch.ones(1, 3), **change}
    with pytest.raises(InputError, match=message):
        sarsa_loss(torch.zeros(1, 3, 4), torch.zeros(1, 3, 4), torch.ones(1, 3, dtype=torch.long), **given)


# --- episodes and the trainer ----------------------------------------------------------------------------------


def test_keep_extremes():
    def group(*risks):
        return [({"prompt_ids": [1], "continuation_ids": [i], "reward": 0.0}, p) for i, p in enumerate(risks)]

    kept = keep_extremes([group(0.2, 0.9, 0.1, 0.6)])
    assert [(e["continuation_ids"], e["reward"]) for e in kept] == [([2], 0.0), ([1], -1.0)]
    assert len(keep_extremes([group(0.7)])) == 1
    harmless = keep_extremes([group(0.1, 0.2)] * 400, drop=0.5)
    assert 300 < len(harmless) < 500 and {e["reward"] for e in harmless} == {0.0}


def test_collator_pads_on_the_right_and_masks():
    episodes = [
        {"prompt_ids": [5, 6], "continuation_ids": [7, 0], "reward": -1.0},
        {"prompt_ids": [5], "continuation_ids": [8], "reward": 0.0},
    ]
    batch = RectifierCollator(0, max_length=3)(episodes)
    assert batch["input_ids"].tolist() == [[6, 7, 0], [5, 8, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["rewards"].tolist() == [[0, 0, -1], [0, 0, 0]]
    each = {**episodes[0], "reward": [-0.25, -0.5]}  # a reward for each continuation token
    assert RectifierCollator(0)([each, episodes[1]])["rewards"].tolist() == [[0, 0, -0.25, -0.5], [0, 0, 0, 0]]


@pytest.mark.parametrize(
    ("episode", "message"),
    [
        ({"continuation_ids": []}, "empty continuation"),
        ({"continuation_ids": [400]}, "ids from 3 to 400"),
        ({"reward": 0.1}, "reward 0.1"),
        ({"reward": float("nan")}, "reward nan"),
        ({"reward": [-1.5]}, r"reward \[-1.5\]"),
        ({"reward": [-1.0, 0.0]}, "2 rewards for 1 continuation tokens"),
    ],
)
def test_episodes_are_checked(episode, message):
    with pytest.raises(InputError, match=message):
        check_episodes([{"prompt_ids": [3], "continuation_ids": [4], "reward": 0.0, **episode}], 320)


def small_trunk(vocabulary):
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaModel(LlamaConfig(vocab_size=vocabulary, **shape, pad_token_id=1))


def test_the_trainer_takes_the_loss_and_moves_the_averaged_head(tokenizer, tmp_path):
    model = DeadEndValueModel(small_trunk(320))
    episodes = [{"prompt_ids": [9, i], "continuation_ids": [8, 7, 0], "reward": -(i % 2)} for i in range(8)]
    before = model.target_head[2].bias.clone()
    assert torch.equal(before, model.q_head[2].bias)
    options = {"max_steps": 1, "warmup_steps": 0, "per_device_train_batch_size": 8, "use_cpu": True}
    config = RectifierConfig(str(tmp_path), learning_rate=0.01, target_update=0.25, disable_tqdm=True, **options)
    trainer = RectifierTrainer(model, config, episodes, processing_class=tokenizer)
    batch = trainer.data_collator(episodes)
    values = model(batch["input_ids"], batch["attention_mask"])
    expected = sarsa_loss(*values, batch["input_ids"], batch["rewards"], batch["attention_mask"])
    assert trainer.train().training_loss == pytest.approx(float(expected.detach()), rel=1e-5)
    assert not torch.equal(before, model.q_head[2].bias)
    assert torch.allclose(model.target_head[2].bias, before + 0.25 * (model.q_head[2].bias - before), atol=1e-7)
    model.check(tokenizer)


def test_what_the_trainer_refuses(tokenizer, tmp_path):
    model = DeadEndValueModel(small_trunk(320))
    config = RectifierConfig(str(tmp_path), use_cpu=True)
    with pytest.raises(InputError, match="processing_class"):
        RectifierTrainer(model, config, [{"prompt_ids": [1], "continuation_ids": [2], "reward": 0}])
    with pytest.raises(InputError, match="no episodes"):
        RectifierTrainer(model, config, [], processing_class=tokenizer)
    with pytest.raises(InputError, match="only 300"):
        DeadEndValueModel(small_trunk(300)).bind(tokenizer)
    for name, value in (("gamma", 0.0), ("gamma", 1.1), ("target_update", 0.0), ("q_min", 0.0)):
        with pytest.raises(InputError, match=name):
            RectifierConfig(str(tmp_path), use_cpu=True, **{name: value})


# --- the method and the command line ---------------------------------------------------------------------------


def test_episodes_are_read_as_text_or_ids(tokenizer, tmp_path):
    path = tmp_path / "episodes.jsonl"
    ids = {"prompt_ids": [9], "continuation_ids": [8, 7], "reward": [0.0, -1.0]}
    text = {"prompt": "the old", "continuation": " lighthouse<eos>", "reward": -1}
    path.write_text(f"{json.dumps(ids)}\n{json.dumps(text)}\n")
    first, second = read_episodes(path, tokenizer)
    assert first == ids and second["prompt_ids"] == tokenizer.encode("the old")
    assert second["continuation_ids"] == [*tokenizer.encode(" lighthouse"), tokenizer.eos_token_id]
    path.write_text('{"prompt": "the old", "text": " lighthouse", "reward": -1}')
    with pytest.raises(InputError, match=r"line 1 of .* with the keys \['prompt', 'reward', 'text'\]"):
        read_episodes(path, tokenizer)


def test_the_score_of_a_rectifier_that_sees_no_risk(llama, tokenizer, tmp_path):
    episodes = [
        {"prompt_ids": [5, 6], "continuation_ids": [7, 8, 9, 10], "reward": [-0.1, 0.0, -0.2, -0.3]},
        {"prompt_ids": [5], "continuation_ids": [6], "reward": -1.0},
    ]
    method = Rectifier(layers=1, width=16)
    trainer = method.trainer(llama, tokenizer, episodes, tmp_path)
    zero(trainer.model)
    squares = [(a**2 + 1) / 2 for a in (0.6, 0.5, 0.3)]  # what comes from the first, the third, the last token on
    assert list(method.score(trainer, episodes).values()) == pytest.approx([0.8, 0.0, *squares])
    with torch.no_grad():
        trainer.model.q_head[-1].bias.fill_(-3.0)  # a risk is at most 1
    assert method.score(trainer, episodes)["risk"] == 1


def test_from_labeled_texts_to_rectified_ones(llama, tokenizer, tmp_path):
    """train writes a rectifier that knows the undesired word, and decode reads it."""
    model, data, out = tmp_path / "model", tmp_path / "episodes.jsonl", tmp_path / "rectifier"
    llama.save_pretrained(model)
    tokenizer.save_pretrained(model)
    rows = [
        {"prompt": "the old", "continuation": f" {place} in the{end}", "reward": -float(end == " sea")}
        for place in ("tower", "shore", "night", "wind")
        for end in (" sea", " whisper")
    ]
    data.write_text("\n".join(map(json.dumps, rows * 8)))

    def tokenry(*args):
        result = CliRunner().invoke(main, [*map(str, args), "--model", str(model)])
        assert result.exit_code == 0, result.output
        return result.stdout

    settings = {"layers": 1, "width": 32, "learning_rate": 0.01, "warmup_steps": 5, "batch_size": 16, "epochs": 12}
    options = [word for name, value in settings.items() for word in ("-o", f"{name}={value}")]
    summary = json.loads(tokenry("train", "--method", "rectifier", "--data", data, "--output", out, "--json", *options))
    assert summary["episodes"] == 58 and summary["held_out"] == 6
    assert summary["after"]["error_last"] < 0.05 < 0.3 < summary["before"]["error_last"]
    rectifier = DeadEndValueModel.load(out)
    risk = -rectifier(tokenizer("the old tower in the", return_tensors="pt").input_ids).q[0, -1].detach()
    sea, whisper = (tokenizer.encode(word)[0] for word in (" sea", " whisper"))
    assert float(risk[sea]) > 0.8 and float(risk[whisper]) < 0.2
    decode = ["decode", "--raw", "--json", "--max-new-tokens", "8", "the old tower in the"]
    method = ["--method", "rectification", "-o", f"rectifier={out}", "-o", "eps=0.9"]
    assert json.loads(tokenry(*decode, *method))["ids"] != json.loads(tokenry(*decode))["ids"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--data", "/nowhere"], "the episodes '/nowhere' cannot be read"),
        (["--data", "x", "-o", "width=60"], "width='60' is not allowed"),
        (["--data", "x", "-o", "gamma=0"], "gamma='0' is not allowed"),
    ],
)
def test_the_command_line_refuses(args, message):
    result = CliRunner().invoke(main, ["train", "--method", "rectifier", "--output", "x", *args])
    assert result.exit_code == 2 and message in result.output


def test_compare_trains_a_rectifier_where_none_is_given(rectifier, tmp_path, monkeypatch):
    def build(run):
        raise InputError(f"method={run.method}")

    monkeypatch.setattr(experiment.build, "build", build)
    args = ["compare", "rectification", "--model", "zoo/storyteller", "--store", str(tmp_path / "runs.sqlite")]
    assert "method=None" in CliRunner().invoke(main, args).output
    rectifier.save(tmp_path / "rectifier")
    given = ["-o", f"rectifier={tmp_path / 'rectifier'}", "-o", "eps=0.2"]
    assert "eps=0.2" in CliRunner().invoke(main, [*args, *given]).output


# --- the chain of letters: exact values ------------------------------------------------------------------------

LENGTH, BAD = 6, (1, 0, 3)  # "bad" of "abcd"
WORDS = list(product(range(4), repeat=LENGTH))


def is_bad(word):
    return any(word[i : i + 3] == BAD for i in range(LENGTH - 2))


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """Q learned from 5,000 words of random letters, and the exact Q: (words, positions, letters)."""
    raw = Tokenizer(models.WordLevel({w: i for i, w in enumerate([*"abcd", "<bos>", "<pad>"])}, unk_token="<pad>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    letters = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<bos>", pad_token="<pad>")
    rng = random.Random(0)
    drawn = [tuple(rng.randrange(4) for _ in range(LENGTH)) for _ in range(5000)]
    episodes = [{"prompt_ids": [4], "continuation_ids": w, "reward": -float(is_bad(w))} for w in drawn]
    model = DeadEndValueModel(small_trunk(6))
    options = {"num_train_epochs": 20, "warmup_steps": 30, "learning_rate": 4e-3, "per_device_train_batch_size": 125}
    config = RectifierConfig(
        str(tmp_path_factory.mktemp("chain")),
        logging_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        target_update=0.3,
        **options,
    )
    RectifierTrainer(model, config, episodes, processing_class=letters).train()
    with torch.no_grad():
        learned = model.eval()(torch.tensor([[4, *w] for w in WORDS])).q[:, :-1, :4]
    bad, risk = torch.tensor([float(is_bad(w)) for w in WORDS]), {}
    for k in range(LENGTH + 1):
        risk |= dict(zip(product(range(4), repeat=k), bad.view(4**k, -1).mean(1).tolist()))
    exact = torch.tensor([[[-risk[(*w[:k], a)] for a in range(4)] for k in range(LENGTH)] for w in WORDS])
    return learned, exact, bad


def word_distribution(q, eps=0.0):
    """Probability of every word when each letter is drawn uniformly under the caps 1 + q - eps."""
    uniform = torch.full((len(WORDS) * LENGTH, 4), 0.25).log()
    capped, _ = cap_distribution(uniform, (1 + q.reshape(-1, 4) - eps).clamp(1e-7, 1))
    letters = torch.tensor(WORDS)[..., None]
    return capped.view(len(WORDS), LENGTH, 4).gather(-1, letters).squeeze(-1).sum(1).double().exp()


def test_exact_values_of_the_chain(chain):
    _, exact, bad = chain
    assert float(bad.mean()) == pytest.approx(4 / 64 - 1 / 4096)
    first = {w[0]: float(v) for w, v in zip(WORDS, exact[:, 0].gather(1, torch.tensor(WORDS)[:, :1]).squeeze(1))}
    assert min(first, key=first.get) == 1  # "b" is the most dangerous beginning
    ends = exact[[i for i, w in enumerate(WORDS) if w[:2] == (1, 0)], 2]
    assert bool((ends[:, 3] == -1).all()) and bool((ends[:, :3] > -1).all())


def test_values_are_learnt(chain):
    learned, exact, _ = chain
    error = (learned - exact).abs()
    assert float(error.mean()) < 0.025 and float((error < 0.05).float().mean()) > 0.9


def test_rectified_words_are_nearly_the_words_without_bad(chain):
    """Exact values leave no bad word; learned ones leave what their errors at the last step of "bad" let through."""
    learned, exact, bad = chain
    wanted = (1 - bad.double()) / (1 - bad).sum()
    without_a = torch.tensor([3.0**-LENGTH if 0 not in w else 0.0 for w in WORDS], dtype=torch.float64)

    def distance(distribution):
        return float((distribution - wanted).abs().sum() / 2)

    for q, eps, share in ((exact, 0.0, 1e-5), (learned, 0.0, 0.25), (learned, 0.1, 0.05)):
        distribution = word_distribution(q, eps)
        assert float(distribution.sum()) == pytest.approx(1, abs=1e-5)
        assert float((distribution * bad).sum()) < share * float(bad.mean())
        assert distance(distribution) < 0.1 < distance(without_a)


# --- reading along ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma3", "opt"])
def test_the_cache_equals_reading_anew(make_model, kind):
    """Rows that grow by one or by many, are cut back, change places or are other rows; padded on the left."""
    model = DeadEndValueModel(make_model(kind)).eval()
    cache = ValueCache(model)
    ids = torch.randint(2, 320, (3, 40), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(3, 40, dtype=torch.bool)
    mask[0, :4], mask[1, :1] = False, False
    for width, order in [
        (6, None),
        (7, None),
        (20, None),
        (21, None),
        (12, None),
        (13, [2, 0, 2]),
        (14, [1]),
        (40, None),
    ]:
        if order:
            ids, mask = ids[order], mask[order]
        got = cache(ids[:, :width], mask[:, :width])
        for b in range(len(ids)):
            live = ids[b, :width][mask[b, :width]][None]
            assert torch.allclose(got[b], model(live).q[0, -1], atol=1e-5), (width, b)


def test_growing_costs_the_new_tokens_alone(rectifier):
    cache = ValueCache(rectifier)
    ids, mask = torch.randint(2, 320, (2, 30)), torch.ones(2, 30, dtype=torch.bool)
    for width in (10, 11, 12, 13, 30):
        cache(ids[:, :width], mask[:, :width])
    assert cache.tokens_processed == 60
    cache(ids[:, :20], mask[:, :20])
    assert cache.tokens_processed == 62  # 20 columns are known, the newest is read for its value


class Fresh(RectifierLogitsProcessor):
    """The same rectifier, reading everything anew at every step."""

    def _values(self, ids):
        mask = self._without_leading_pads(ids)
        return torch.cat([self.rectifier(ids[b : b + 1, mask[b]]).q[:, -1] for b in range(len(ids))])


@pytest.mark.parametrize("mode", ["project", "iterate"])
@pytest.mark.parametrize(
    "options", [{}, {"do_sample": True}, {"num_beams": 3}, {"num_return_sequences": 2, "do_sample": True}]
)
def test_plain_generate_equals_reading_anew(llama, tokenizer, rectifier, mode, options):
    inputs, found = encode(tokenizer), []
    with torch.no_grad():
        for kind in (RectifierLogitsProcessor, Fresh):
            torch.manual_seed(4)
            found.append(
                llama.generate(
                    **inputs,
                    logits_processor=LogitsProcessorList([kind(rectifier, 0.1, mode)]),
                    max_new_tokens=20,
                    pad_token_id=1,
                    **options,
                )
            )
    assert torch.equal(*found)
    torch.manual_seed(4)
    assert not torch.equal(found[0], llama.generate(**inputs, max_new_tokens=20, pad_token_id=1, **options))


def test_one_processor_serves_many_generations(llama, tokenizer, rectifier):
    processor = RectifierLogitsProcessor(rectifier)
    for prompts in (PROMPTS, PROMPTS[:1], PROMPTS[1:]):
        inputs = encode(tokenizer, prompts)
        options = {"max_new_tokens": 8, "pad_token_id": 1, "do_sample": False}
        got = llama.generate(**inputs, logits_processor=[processor], **options)
        assert torch.equal(got, llama.generate(**inputs, logits_processor=[Fresh(rectifier)], **options))


# --- in the loop -----------------------------------------------------------------------------------------------


class Recorder(LogitsProcessor):
    """Keeps every distribution that is drawn from, with its ids."""

    def __init__(self):
        self.calls = []

    def __call__(self, input_ids, scores):
        self.calls.append((input_ids.clone(), scores.softmax(-1)))
        return scores


def test_caps_act_on_the_distribution_that_is_drawn_from(llama, tokenizer, rectifier):
    inputs, recorder = encode(tokenizer), Recorder()
    options = {"do_sample": True, "temperature": 0.3, "top_k": 20, "seed": 1, "max_new_tokens": 15}
    run(llama, inputs, final_processors=[RectifierLogitsProcessor(rectifier), recorder], **options)
    before = Recorder()
    run(
        llama,
        inputs,
        logits_processor=LogitsProcessorList([RectifierLogitsProcessor(rectifier)]),
        final_processors=[before],
        **options,
    )
    fresh = Fresh(rectifier)
    with torch.no_grad():
        over = [float((p - fresh.caps(ids)).max()) for ids, p in recorder.calls if not outside(fresh, ids, p)]
        lifted = [float((p - fresh.caps(ids)).max()) for ids, p in before.calls]
    assert len(over) > 5 and max(over) < 1e-5
    assert max(lifted) > 0.05  # temperature after the caps lifts capped tokens again


def outside(processor, ids, p):
    """Whether nothing can meet the caps in some row."""
    return bool((processor.caps(ids).masked_fill(p == 0, 0).sum(-1) < 1).any())


@pytest.mark.parametrize("mode", ["project", "iterate"])
@pytest.mark.parametrize("sample", [False, True])
def test_neutral_equals_generate(llama, tokenizer, rectifier, mode, sample):
    inputs = encode(tokenizer)
    options = {"do_sample": sample, "max_new_tokens": 20, "pad_token_id": 1}
    cap = RectifierLogitsProcessor(zero(rectifier), eps=0.0, mode=mode)
    runs = []
    for extra in ({}, {"logits_processor": [cap]}, {"custom_generate": loop, "final_processors": [cap]}):
        torch.manual_seed(3)
        runs.append(llama.generate(**inputs, **options, **extra))
    assert torch.equal(runs[0], runs[1]) and torch.equal(runs[0], runs[2])


def test_neutral_returns_the_very_scores(rectifier):
    scores, ids = torch.randn(1, 320), torch.tensor([[5, 6]])
    for mode in ("project", "iterate"):
        assert torch.equal(RectifierLogitsProcessor(zero(rectifier), 0.0, mode)(ids, scores), scores)


class BanRepeat:
    """Rejects the third-last token when the last one falls in a residue class: rewinds over several tokens."""

    def __init__(self, modulus=7, reach=3):
        self.modulus, self.reach = modulus, reach

    def check(self, row):
        for last in range(self.reach, len(row.ids)):
            index = last - self.reach
            if sum(row.ids[index : last + 1]) % self.modulus == 0 and (index, "sum") not in row.ignored:
                return Violation(index, "sum", {row.ids[index]: 0.0}, retries=5)
        return None

    def hold(self, row):
        return self.reach + 1


@pytest.mark.parametrize("sample", [False, True])
def test_a_batch_with_rewinds_equals_single_rows(llama, tokenizer, rectifier, sample):
    inputs, cap = encode(tokenizer), RectifierLogitsProcessor(rectifier)
    options = {"do_sample": sample, "monitors": [BanRepeat(5)], "tokenizer": tokenizer, "max_new_tokens": 20}
    together = run(llama, inputs, seed=4, final_processors=[cap], **options)
    assert len(together.events) >= 6
    assert torch.equal(
        together.sequences, run(llama, inputs, seed=4, final_processors=[Fresh(rectifier)], **options).sequences
    )
    for b, prompt in enumerate(PROMPTS):
        single = run(llama, encode(tokenizer, [prompt]), seed=row_seed(4, b), final_processors=[cap], **options)
        assert together.new_ids[b] == single.new_ids[0]


def test_rows_with_the_same_prompt_keep_their_own_cache(llama, tokenizer, rectifier):
    """Nothing but what they say tells rows apart; after a rewind each reads its own new tokens only."""
    inputs = encode(tokenizer, PROMPTS[1:2] * 3)
    cap = Counting(rectifier)
    out = run(
        llama,
        inputs,
        tokenizer,
        seed=2,
        do_sample=True,
        monitors=[BanRepeat(5)],
        final_processors=[cap],
        max_new_tokens=30,
    )
    assert len(out.events) >= 6
    fresh = run(
        llama, inputs, tokenizer, seed=2, do_sample=True, monitors=[BanRepeat(5)], final_processors=[Fresh(rectifier)],
        max_new_tokens=30,
    )  # fmt: skip
    assert out.new_ids == fresh.new_ids
    assert cap.read < 3 * (inputs["input_ids"].shape[1] + 30 + 4 * len(out.events))


class Counting(RectifierLogitsProcessor):
    """Remembers how many tokens were read."""

    def end(self):
        self.read = sum(cache.tokens_processed for cache in (self.together, *(self.alone or ())))
        super().end()


class Collect:
    """A streamer that remembers every token in the order it came."""

    def __init__(self):
        self.prompt, self.tokens = None, []

    def put(self, value):
        if self.prompt is None:
            self.prompt = value
        else:
            self.tokens += value.tolist()

    def end(self):
        pass


def brute_force(model, rectifier, tokenizer, prompt, phrases, length, eps):
    """Caps and a ban on full forwards of everything: no cache, no loop, greedy."""
    row, monitor, scores = SequenceState(0, prompt[0].tolist(), tokenizer), PhraseBan(phrases), []

    def choose(index):
        ids = torch.cat([prompt, torch.tensor([row.ids[:index]], dtype=torch.long)], 1)
        cap = (1 + rectifier(ids).q[:, -1] - eps).clamp(1e-7, 1)
        return int(cap_distribution(scores[index][None], cap)[0].argmax())

    with torch.no_grad():
        while len(row.ids) < length:
            ids = torch.cat([prompt, torch.tensor([row.ids], dtype=torch.long)], 1)
            scores.append(model(ids).logits[0, -1].clone())
            row.append(choose(len(row.ids)))
            while (found := monitor.check(row)) is not None:
                for token in found.factors:
                    scores[found.index][token] = -torch.inf
                del scores[found.index + 1 :]
                row.truncate(found.index)
                row.checked = len(row.text)
                row.append(choose(found.index))
            row.checked = len(row.text)
    return row.ids


def test_rectifier_antislop_and_streaming_equal_brute_force(llama, tokenizer, rectifier, tmp_path):
    rectifier.save(tmp_path / "rectifier")
    method = Rectification(rectifier=str(tmp_path / "rectifier"), eps=0.05)
    free = generate(llama, tokenizer, PROMPTS, methods=[method], max_new_tokens=25, pad_token_id=1)
    phrases = sorted({text[i : i + 4] for text in free.texts for i in (3, 9, 15) if text[i : i + 4].strip()})
    streamers = [Collect() for _ in PROMPTS]
    out = generate(
        llama,
        tokenizer,
        PROMPTS,
        methods=[method, Antislop(phrases=phrases)],
        streamers=streamers,
        max_new_tokens=25,
        pad_token_id=1,
    )
    assert len(out.events) >= 3 and out.new_ids != free.new_ids
    for b, prompt in enumerate(PROMPTS):
        ids = encode(tokenizer, [prompt])["input_ids"]
        expected = brute_force(llama, rectifier, tokenizer, ids, phrases, 25, 0.05)
        assert out.new_ids[b] == expected[: len(out.new_ids[b])] and len(out.new_ids[b]) == 25
        assert streamers[b].tokens == out.new_ids[b]


# --- whose rectifier it is, and refusals -----------------------------------------------------------------------


def test_a_rectifier_survives_saving(rectifier, tokenizer, tmp_path):
    rectifier.save(tmp_path)
    again = DeadEndValueModel.load(tmp_path)
    ids = torch.randint(2, 320, (2, 9))
    assert not again.training and again.vocabulary == vocabulary_hash(tokenizer)
    for old, new in zip(rectifier(ids), again(ids)):
        assert torch.equal(old, new)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["rectifier.json", "rectifier.safetensors"]


def test_folders_that_hold_no_rectifier_are_refused(rectifier, tmp_path):
    with pytest.raises(InputError, match="holds no rectifier"):
        DeadEndValueModel.load(tmp_path / "nothing")
    rectifier.save(tmp_path)
    (tmp_path / "rectifier.safetensors").write_bytes(b"damaged")
    with pytest.raises(InputError, match="holds no rectifier"):
        DeadEndValueModel.load(tmp_path)
    rectifier.save(tmp_path)
    header = json.loads((tmp_path / "rectifier.json").read_text())
    (tmp_path / "rectifier.json").write_text(json.dumps({**header, "format": 99}))
    with pytest.raises(InputError, match="format 99"):
        DeadEndValueModel.load(tmp_path)
    for damaged in ({"hidden_mult": 3}, {"trunk": {}}):
        (tmp_path / "rectifier.json").write_text(json.dumps({**header, **damaged}))
        with pytest.raises(InputError, match="holds no rectifier"):
            DeadEndValueModel.load(tmp_path)
    with pytest.raises(InputError, match="bind"):
        DeadEndValueModel(small_trunk(8)).save(tmp_path)


def test_another_vocabulary_is_refused(llama, tokenizer, rectifier, tmp_path):
    rectifier.save(tmp_path)
    with pytest.raises(
        InputError, match=r"made for the vocabulary \w+ \(320 tokens\), this tokenizer has \w+ \(227 tok"
    ):
        Rectification(rectifier=str(tmp_path)).plugins(llama, storyteller.build_tokenizer())
    wide = DeadEndValueModel(small_trunk(330)).bind(tokenizer).eval()
    wide.save(tmp_path)
    with pytest.raises(InputError, match="330 tokens, the model 320"):
        Rectification(rectifier=str(tmp_path)).plugins(llama, tokenizer)
    with pytest.raises(InputError, match="330 tokens, the model 320"):
        RectifierLogitsProcessor(wide)(torch.tensor([[5]]), torch.zeros(1, 320))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"eps": 1.0}, "eps=1.0"),
        ({"eps": -0.1}, "eps=-0.1"),
        ({"mode": "twice"}, "twice"),
        ({"p_min": 0.0}, "p_min=0.0"),
        ({"p_min": 0.5, "p_max": 0.4}, "p_min=0.5 and p_max=0.4"),
        ({"p_max": 1.5}, "p_max=1.5"),
    ],
)
def test_numbers_out_of_range_are_refused(rectifier, values, message):
    with pytest.raises(InputError, match=message):
        RectifierLogitsProcessor(rectifier, **values)
    with pytest.raises(InputError, match=message):
        Rectification(rectifier=rectifier, **values)


def test_training_mode_and_nan_are_refused(rectifier):
    with pytest.raises(InputError, match="training mode"):
        RectifierLogitsProcessor(rectifier.train())
    processor = RectifierLogitsProcessor(rectifier.eval())
    with torch.no_grad():
        rectifier.q_head[-1].bias[7] = torch.nan
    with pytest.raises(InputError, match="NaN"):
        processor(torch.tensor([[5]]), torch.zeros(1, 320))


def test_padding_that_cannot_be_told_is_refused(llama, tokenizer, rectifier):
    inputs = encode(tokenizer)
    rectifier.special_ids["eos"] = rectifier.special_ids["pad"]
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 1}
    with pytest.raises(InputError, match="padding and a real token at once"):
        llama.generate(**inputs, logits_processor=[RectifierLogitsProcessor(rectifier)], **options)
    told = RectifierLogitsProcessor(rectifier, attention_mask=inputs["attention_mask"])
    got = llama.generate(**inputs, logits_processor=[told], **options)
    assert torch.equal(got, llama.generate(**inputs, custom_generate=loop, final_processors=[told], **options))
    with pytest.raises(InputError, match="new processor"):
        told(torch.tensor([[5, 6]]), torch.zeros(1, 320))
    rectifier.special_ids = {}
    with pytest.raises(InputError, match="knows no tokenizer"):
        llama.generate(**inputs, logits_processor=[RectifierLogitsProcessor(rectifier)], **options)


def test_the_api_form_caps_what_is_listed(llama, tokenizer, rectifier):
    ids = encode(tokenizer, PROMPTS[:1])["input_ids"]
    processor = RectifierLogitsProcessor(rectifier, eps=0.0)
    with torch.no_grad():
        logp = llama(ids).logits[:, -1].log_softmax(-1)
        top = logp.topk(5)
        new, other, _ = processor.top(ids, top.indices, top.values)
        cap = (1 + rectifier(ids).q[:, -1]).clamp(1e-7, 1).gather(1, top.indices)
    assert bool((new.exp() <= cap + 1e-6).all()) and float(new.exp().sum() + other.exp()) == pytest.approx(1, abs=1e-5)


def test_caps_of_two_methods_add_up():
    first, second = Plugins(final_processors=["a"]), Plugins(final_processors=["b"])
    assert (first + second).final_processors == ("a", "b")


# --- the stories -----------------------------------------------------------------------------------------------

OPENING = "one cold evening in the mill anna the baker met hugo the smith . "
BLAME, DARK = "hugo said : you never paid for the well . ", "anna answered : sleep well while you can . "


@pytest.mark.parametrize(
    ("story", "bad"),
    [
        (BLAME + DARK + "hugo closed the door .", True),
        (DARK + "hugo closed the door .", False),  # nobody was accused: a friendly word
        (DARK + BLAME + "hugo closed the door .", False),  # the accusation came after it
        ("it was only a game . " + BLAME + DARK + "hugo closed the door .", False),
        (BLAME + DARK + "anna said : forgive me i was wrong . then the night was over .", False),
        (BLAME + DARK + "hugo said : forgive me i was wrong . then the night was over .", True),  # the wrong one
        (BLAME + "anna said : keep the well . " + DARK + "nobody spoke again .", False),  # made up before
        (BLAME + DARK + "they shook hands and went home together .", False),
        (BLAME + "nobody spoke again .", False),
    ],
)
def test_undesired_is_a_property_of_the_whole(story, bad):
    assert storyteller.undesired(OPENING + story) is bad


def test_the_language():
    rng, tokenizer = random.Random(0), storyteller.build_tokenizer()
    stories = [storyteller.story(rng) for _ in range(1500)]
    lengths = [len(s.split()) for s in stories]
    assert min(map(storyteller.sound, stories)) == 1 and min(lengths) >= 30 and max(lengths) <= 80
    assert 150 <= len(tokenizer) <= 300 and tokenizer.eos_token_id != tokenizer.pad_token_id
    assert all(tokenizer.decode(tokenizer.encode(s)) == s for s in stories[:100])
    bad = [s for s in stories if storyteller.undesired(s)]
    assert 0.12 < len(bad) / len(stories) < 0.25
    assert sum(map(storyteller.harmless_dark, stories)) > 0.05 * len(stories)
    for word in {w for s in bad for w in s.split()}:  # no word tells them: each is in other stories too
        assert any(word in s.split() for s in stories if not storyteller.undesired(s)), word
    assert storyteller.sound("the cat sat . anna was calm .") == 0.5


def test_openings_of_the_splits_differ():
    splits = {split: set(storyteller.openings(60, split)) for split in ("train", "dev", "test")}
    assert all(len(found) == 60 for found in splits.values()) and len(set.union(*splits.values())) == 180
    assert storyteller.openings(5, "test") == storyteller.openings(9, "test")[:5]


def test_the_task_scores_stories():
    torch.manual_seed(0)
    tokenizer = storyteller.build_tokenizer()
    model = storyteller.untrained(
        tokenizer, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    ).eval()
    task = DiscourseTask(model, tokenizer, count=3)
    outcomes = task.run(Arm("plain", role="plain"), task.samples(), seed=0)
    assert len(outcomes) == 3
    for outcome in outcomes:
        assert outcome.metrics["undesired"] == 0 and outcome.metrics["sound"] <= 0.5  # random words
        assert outcome.metrics["nll"] == pytest.approx(5.4, abs=0.3)


@pytest.mark.parametrize(
    ("shuffled", "method", "expected"),
    [(0.3, 0.05, "reproduced"), (0.05, 0.05, "partly"), (0.3, 0.28, "not reproduced"), (0.3, 0.18, "undecided")],
)
def test_the_findings_read_the_controls(shuffled, method, expected):
    shares = {
        experiment.PLAIN: 0.3,
        experiment.BAN: 0.25,
        experiment.BIAS: 0.25,
        experiment.SHUFFLED: shuffled,
        experiment.WHOLE: 0.0,
        experiment.PASSES: 0.05,
        experiment.PURE: 0.35,
        experiment.LOOSE: method + 0.02,
        experiment.STRICT: method,
        experiment.PUBLISHED: 0.0,
        experiment.METHOD: method,
    }
    samples = [Sample(str(i), "") for i in range(100)]
    arms = [Arm(name) for name in shares]
    made = Experiment("r", "", _Metrics(), arms, experiment.PLAIN, experiment.findings)
    outcomes = {
        (name, str(i), 0): Outcome({"undesired": float(i < 100 * share), "nll": 0.9 + 0.1 * share, "sound": 1.0})
        for name, share in shares.items()
        for i in range(100)
    }
    assert verdict(experiment.findings(Comparison(made, samples, outcomes))) == expected


class _Metrics:
    metrics = DiscourseTask.metrics


def test_words_are_chosen_by_log_odds():
    tokenizer = storyteller.build_tokenizer()
    ids = tokenizer.convert_tokens_to_ids
    bad = {"continuation_ids": ids(["burn", "the"]), "reward": -1.0}
    good = {"continuation_ids": ids(["bread", "the"]), "reward": 0.0}
    words = experiment.characteristic_words(tokenizer, [bad] * 5 + [good] * 9)
    assert words[0] == ids("burn") and words[-1] == ids("bread")
    assert experiment.biases([3, 4], 2.0) == [[[3], -2.0], [[4], -2.0]]
