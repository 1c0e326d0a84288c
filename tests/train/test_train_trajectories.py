"""The losses of every trainer's first steps, from a fixed seed, are those that are stored in train_trajectories.json.

What a new run gives is stored there by hand, and anew only where a loss is meant to change.
"""

import json
from pathlib import Path

import pytest
import torch
from support.families import build
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel, TrainingArguments

from tokenry.learned.confidence_filter import TraceDataset
from tokenry.learned.dead_end_values import DeadEndValueModel
from tokenry.models.masks import make_bidirectional
from tokenry.train import (
    FTPO,
    CodeFillConfig,
    FinalTokenDPOTrainer,
    FTPOConfig,
    FTPOTrainer,
    GradedQuestion,
    MaskedDiffusionTrainer,
    MultiTaskTrainer,
    Rectifier,
    RectifierConfig,
    RectifierTrainer,
    SkipDecodeConfig,
    SkipDecodeTrainer,
    SoftSharedLM,
    TiDARTrainer,
    TokenValueModel,
    ValueConfig,
    ValueTrainer,
    lora_last_layers,
    train_filter,
    value_examples,
)

STORED = Path(__file__).with_name("train_trajectories.json")
STEPS = 6
PAIRS = [
    {"prompt_ids": [7 + n, *range(9, 12 + n % 4)], "chosen_ids": [20 + n, 40][: 1 + n % 2], "rejected_id": 60 + n % 5}
    for n in range(16)
]
EPISODES = [
    {"prompt_ids": [9, n], "continuation_ids": [8, 7, *range(n % 3)], "reward": -float(n % 2)} for n in range(2, 18)
]
MASK, PAD = 23, 22


def arguments(folder, **options):
    return {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "learning_rate": 3e-3,
        "logging_steps": 1,
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 0,
        **options,
    }


def losses(trainer):
    trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def ftpo(folder, words, trainer=FTPOTrainer, **options):
    model = build("llama")
    lora = lora_last_layers(model, rank=8, last=2, dropout=0.0)
    config = FTPOConfig(**arguments(folder, early_stop_choice_win=2.0, **options))
    return losses(trainer(model, config, PAIRS, peft_config=lora))


def ftpo_method(folder, words):
    method = FTPO(min_chosen=1, function_words=True, rank=8, last_layers=2, batch_size=4, early_stop_choice_win=2.0)
    rows = method.pairs(PAIRS, words)
    return losses(method.trainer(build("llama"), words, rows, folder, max_steps=STEPS, logging_steps=1))


def rectifier(folder, words, **options):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = DeadEndValueModel(LlamaModel(LlamaConfig(vocab_size=320, **sizes, pad_token_id=1)))
    config = RectifierConfig(**arguments(folder, warmup_steps=0, **options))
    return losses(RectifierTrainer(model, config, EPISODES, processing_class=words))


def rectifier_method(folder, words):
    method = Rectifier(layers=1, width=16, batch_size=4, epochs=1, warmup_steps=1)
    trainer = method.trainer(build("llama"), words, EPISODES, folder)
    mean = trainer.train().training_loss
    return [mean, *method.score(trainer, EPISODES).values()]


def token_values(folder, words, **options):
    torch.manual_seed(0)
    model = TokenValueModel.from_language_model(build("llama"), words)
    rows = value_examples(
        [GradedQuestion([9, n], [[50, 60 + n], [50, 61], [50, 60 + n, 7]], [1.0, 0.0, n % 2]) for n in range(2, 8)]
    )
    config = ValueConfig(**arguments(folder, warmup_steps=0, **options))
    return losses(ValueTrainer(model, config, rows, processing_class=words))


def learn2pd(folder, words, **options):
    draw = torch.Generator().manual_seed(0)
    conf, mask = torch.rand(400, 4, generator=draw), torch.rand(400, 4, generator=draw) > 0.3
    traces = TraceDataset(conf, conf.roll(1, 1) > 0.5, mask, torch.arange(400) % 40)
    reports = [train_filter(traces, epochs=n, lr=0.02, **options)[1] for n in (1, 20, 60)]
    return [value for report in reports for value in report.values()]


def skipdecode(folder, words, **options):
    from datasets import Dataset

    rows = [{"input_ids": list(range(5, 13 + n)), "labels": [-100] * 3 + list(range(8, 13 + n))} for n in range(4)]
    torch.manual_seed(0)
    config = SkipDecodeConfig(
        **arguments(folder, report_to="none", bf16=False, save_strategy="no", planned_new_tokens=4, **options)
    )
    return losses(
        SkipDecodeTrainer(build("llama"), config, train_dataset=Dataset.from_list(rows), processing_class=words)
    )


def small():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=24, pad_token_id=PAD, **sizes))


def counting(folder, trainer, model, **options):
    starts = torch.randint(0, 10, (32,), generator=torch.Generator().manual_seed(0))
    rows = [{"input_ids": (start + torch.arange(16)) % 10} for start in starts]
    plain = {"report_to": [], "save_strategy": "no", "remove_unused_columns": False}
    args = TrainingArguments(**arguments(folder, **plain))
    return losses(trainer(model, args, train_dataset=rows, mask_token_id=MASK, **options))


def codefill(folder, words, **options):
    rows = [
        {"task": task, "input_ids": row, "labels": row}
        for task in ("ttp", "tvp", "sc")
        for row in ([(start + i) % 10 for i in range(12)] for start in range(8))
    ]
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    models = {}
    for seed, task in enumerate(("ttp", "tvp", "sc")):
        torch.manual_seed(seed)
        models[task] = LlamaForCausalLM(LlamaConfig(vocab_size=24, **sizes))
    return losses(MultiTaskTrainer(SoftSharedLM(models), CodeFillConfig(**arguments(folder, **options)), rows))


RUNS = {
    "ftpo": ftpo,
    "ftpo, all terms": lambda folder, words: ftpo(
        folder, words, lambda_aggregate=0.5, tau_aggregate=0.01, tau_target=0.01
    ),
    "ftpo, accumulated": lambda folder, words: ftpo(folder, words, gradient_accumulation_steps=2),
    "ftpo, the method": ftpo_method,
    "dpo": lambda folder, words: ftpo(folder, words, FinalTokenDPOTrainer),
    "rectifier": rectifier,
    "rectifier, discounted": lambda folder, words: rectifier(folder, words, gamma=0.9, target_update=0.5, max_length=4),
    "rectifier, the method": rectifier_method,
    "token values": token_values,
    "token values, bce": lambda folder, words: token_values(folder, words, loss="bce"),
    "learn2pd": learn2pd,
    "learn2pd, masked positions": lambda folder, words: learn2pd(
        folder, words, mask_loss=True, hidden=8, split_by="step"
    ),
    "skipdecode": lambda folder, words: skipdecode(folder, words, e_min=2, e_max=3, warmup=1),
    "skipdecode, drawn": lambda folder, words: skipdecode(folder, words, e_min=2, warmup=1, sample_e_min=True),
    "tidar": lambda folder, words: counting(folder, TiDARTrainer, small(), block_size=4),
    "codefill": codefill,
    "codefill, all tasks": lambda folder, words: codefill(folder, words, combine="sum"),
    "masked-diffusion": lambda folder, words: counting(folder, MaskedDiffusionTrainer, make_bidirectional(small())),
}


@pytest.mark.parametrize("name", RUNS)
def test_the_first_losses_are_the_stored_ones(name, tokenizer, tmp_path):
    assert RUNS[name](tmp_path, tokenizer) == pytest.approx(json.loads(STORED.read_text())[name], abs=1e-5, rel=1e-5)
