"""The loss of masked-diffusion training against its definition, and the trainer."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

from tokenry.core.errors import InputError
from tokenry.models.masks import make_bidirectional, own_position
from tokenry.train.masked_diffusion import MaskedDiffusionTrainer, hide_tokens, masked_diffusion_loss

V, MASK, PAD = 24, 23, 22


def model_of(seed=0):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return make_bidirectional(LlamaForCausalLM(LlamaConfig(vocab_size=V, pad_token_id=PAD, **sizes)))


def batch(rows=6, time=10):
    return torch.randint(0, 20, (rows, time), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("padded", [None, "left", "right"])
def test_the_loss_is_its_definition(shift, padded):
    model, ids = model_of(), batch()
    present = torch.ones_like(ids)
    prompts = torch.tensor([3, 4, 1, 2, 5, 3])
    if padded:
        present[1, : 3 if padded == "left" else None] = 0 if padded == "left" else 1
        if padded == "right":
            present[1, 7:] = 0
    options = {"prompt_lengths": prompts, "attention_mask": present, "shift": shift}
    torch.manual_seed(5)
    found = masked_diffusion_loss(model, ids, MASK, **options)
    torch.manual_seed(5)
    t = torch.rand(6, 1)
    u = torch.rand(6, 10)
    p = (1 - 1e-3) * t + 1e-3
    total = 0.0
    hidden = torch.zeros_like(ids, dtype=torch.bool)
    sizes = []
    for row in range(6):
        columns = present[row].nonzero().flatten()[int(prompts[row]) :]
        sizes.append(len(columns))
        hidden[row, columns] = u[row, columns] < p[row]
    logits = own_position(model(input_ids=ids.masked_fill(hidden, MASK), attention_mask=present).logits, shift)
    for row in range(6):
        for column in hidden[row].nonzero().flatten():
            total -= logits[row, column].log_softmax(-1)[ids[row, column]] / p[row, 0] / sizes[row]
    assert found.item() == pytest.approx(total.item() / 6, rel=1e-5)


def test_without_prompts_it_is_the_pretraining_loss():
    model, ids = model_of(), batch()
    torch.manual_seed(1)
    found = masked_diffusion_loss(model, ids, MASK)
    torch.manual_seed(1)
    hidden, p = hide_tokens(torch.ones_like(ids, dtype=torch.bool))
    logits = model(input_ids=ids.masked_fill(hidden, MASK)).logits
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids, reduction="none") * hidden / p
    assert found.item() == pytest.approx((losses.sum() / ids.numel()).item(), rel=1e-5)


def test_shares_of_hidden_tokens():
    learned = torch.ones(2000, 50, dtype=torch.bool)
    learned[:, :10] = False
    torch.manual_seed(0)
    for stratified in (False, True):
        hidden, p = hide_tokens(learned, eps=0.2, stratified=stratified)
        assert not hidden[:, :10].any() and p.min() >= 0.2 and p.max() <= 1
        assert hidden[:, 10:].float().mean().item() == pytest.approx(0.6, abs=0.02)
        assert (hidden[:, 10:].float().mean(1) - p[:, 0]).abs().mean() < 0.08
    gaps = p.flatten().sort().values.diff()
    assert gaps.max() < 0.8 / 2000 * 1.01  # spread evenly


def test_stratified_draws_have_the_same_mean_and_less_variance():
    model, ids = model_of(), batch(8)
    torch.manual_seed(0)
    with torch.no_grad():
        losses = {
            s: torch.stack([masked_diffusion_loss(model, ids, MASK, stratified=s) for _ in range(300)]) for s in (0, 1)
        }
    assert losses[0].mean().item() == pytest.approx(losses[1].mean().item(), rel=0.1)
    assert losses[1].var() < losses[0].var()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"eps": 0.0}, "eps=0.0"),
        ({"eps": 1.0}, "eps=1.0"),
        ({"input_ids": torch.tensor([[1, MASK]])}, "contain the mask token 23"),
        ({"prompt_lengths": torch.tensor([10] * 6)}, "no token to learn"),
    ],
)
def test_the_loss_refuses(change, message):
    values = {"input_ids": batch(), "mask_token_id": MASK, **change}
    with pytest.raises(InputError, match=message):
        masked_diffusion_loss(model_of(), **values)


def trainer_of(model, tmp_path, rows):
    args = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=250,
        per_device_train_batch_size=16,
        learning_rate=5e-3,
        report_to=[],
        save_strategy="no",
        logging_steps=250,
        use_cpu=True,
        disable_tqdm=True,
        seed=0,
        remove_unused_columns=False,
    )
    return MaskedDiffusionTrainer(model, args, train_dataset=rows, mask_token_id=MASK)


def test_the_trainer_learns_what_stands_to_the_right(tmp_path):
    """Rows "a 20 a": the first token can only be read from the last one."""
    digits = torch.randint(0, 6, (256,), generator=torch.Generator().manual_seed(0)).tolist()
    model = model_of()
    trainer = trainer_of(model, tmp_path, [{"input_ids": torch.tensor([a, 20, a])} for a in digits])
    trainer.train()
    model.eval()
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[MASK, 20, a] for a in range(6)])).logits
    assert logits[:, 0].argmax(-1).tolist() == list(range(6))


def test_accumulated_batches_count_as_means(tmp_path):
    assert trainer_of(model_of(), tmp_path, []).model_accepts_loss_kwargs is False


def test_the_trainer_uses_labels_as_prompts(tmp_path):
    model = model_of()
    trainer = trainer_of(model, tmp_path, [])
    ids = batch()
    labels = ids.clone()
    labels[:, :4] = -100
    torch.manual_seed(3)
    found = trainer.compute_loss(model, {"input_ids": ids, "labels": labels})
    torch.manual_seed(3)
    expected = masked_diffusion_loss(model, ids, MASK, prompt_lengths=torch.full((6,), 4))
    assert torch.equal(found, expected)


def test_the_trainer_makes_the_model_bidirectional_and_checks_the_mask(tmp_path):
    model = model_of()
    model.config.is_causal = True
    trainer_of(model, tmp_path, [])
    assert model.config.is_causal is False
    with pytest.raises(InputError, match="mask_token_id=99 is outside the vocabulary of 24"):
        MaskedDiffusionTrainer(model, mask_token_id=99)
