"""TiDAR's loss against its definition, what its masks let through, and the trainer."""

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

import tokenry
from tokenry import decode
from tokenry.core.errors import InputError
from tokenry.train import TiDARTrainer, tidar_loss
from tokenry.zoo import tidar, tidar_twin

VOCABULARY, MASK, PAD = 24, 23, 22
KERNELS = ["sdpa", "eager"]


def model_of(kernel="sdpa", layers=2):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        pad_token_id=PAD,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM._from_config(config, attn_implementation=kernel)


def batch(rows=3, time=12):
    return torch.randint(0, 20, (rows, time), generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def logits_in(model, ids, block_size=4, embedding=None):
    """The logits of the forward of the loss: those of the text, and those of its masks."""
    seen = []
    hook = model.register_forward_hook(lambda module, args, output: seen.append(output.logits))
    if embedding is not None:
        model.get_input_embeddings().weight[MASK] = embedding
    tidar_loss(model, ids, MASK, block_size)
    hook.remove()
    return seen[0].split(ids.shape[1], dim=1)


# --- the loss ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_loss_is_its_definition(kernel):
    """Next tokens from the text alone; each block from a forward of its own on [text before it | masks]."""
    model, ids, size = model_of(kernel), batch(1), 4
    with torch.no_grad():
        found = tidar_loss(model, ids, MASK, size, alpha=0.5)
        following = cross_entropy(model(ids).logits[0, :-1], ids[0, 1:])
        own = []
        for start in range(size, ids.shape[1], size):
            whole = torch.cat([ids[:, :start], torch.full((1, size), MASK)], 1)
            sees = torch.ones(start + size, start + size, dtype=torch.bool).tril()
            sees[start:] = True
            added = torch.zeros(sees.shape).masked_fill(~sees, torch.finfo(torch.float32).min)
            logits = model(whole, attention_mask=added[None, None]).logits[0, start:]
            own.append(cross_entropy(logits, ids[0, start : start + size]))
    assert found.autoregressive.item() == pytest.approx(following.item(), rel=1e-5)
    assert found.diffusion.item() == pytest.approx(torch.stack(own).mean().item(), rel=1e-5)
    assert found.loss.item() == pytest.approx((0.5 * following + sum(own) / len(own)).item() / 1.5, rel=1e-5)


def test_prompts_and_padding_are_not_learnt():
    model, ids, size = model_of(), batch(2), 4
    labels, present = ids.clone(), torch.ones_like(ids)
    labels[0, :5], present[1, 7:] = -100, 0
    with torch.no_grad():
        found = tidar_loss(model, ids, MASK, size, labels=labels, attention_mask=present)
        text, masks = logits_in(model, ids, size)
        learned = [(0, i) for i in range(5, 12)] + [(1, i) for i in range(7)]
        following = [cross_entropy(text[r, i - 1], ids[r, i]) for r, i in learned if i]
        own = [cross_entropy(masks[r, i], ids[r, i]) for r, i in learned if i >= size]
    assert found.autoregressive.item() == pytest.approx(torch.stack(following).mean().item(), rel=1e-5)
    assert found.diffusion.item() == pytest.approx(torch.stack(own).mean().item(), rel=1e-5)


def test_what_stands_in_padding_does_not_matter():
    model, ids = model_of(), batch(2)
    present = torch.ones_like(ids)
    present[1, 6:] = 0
    other = ids.clone()
    other[1, 6:] = PAD
    first, second = (tidar_loss(model, x, MASK, 4, attention_mask=present).loss for x in (ids, other))
    assert torch.equal(first, second)


def gradient(model, loss):
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def test_with_a_large_alpha_only_next_tokens_count():
    model, ids = model_of(), batch()
    plain = gradient(model, model(ids, labels=ids).loss)
    assert torch.allclose(gradient(model, tidar_loss(model, ids, MASK, 4, alpha=1e8).loss), plain, atol=1e-6)
    diffusion = gradient(model, tidar_loss(model, ids, MASK, 4).diffusion)
    assert torch.allclose(gradient(model, tidar_loss(model, ids, MASK, 4, alpha=0).loss), diffusion, atol=1e-7)


# --- what the masks let through --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("size", [2, 4])
def test_a_token_is_seen_by_later_text_and_by_the_masks_of_later_blocks(kernel, size):
    model, ids = model_of(kernel), batch(1)
    text, masks = logits_in(model, ids, size)
    for place in range(ids.shape[1]):
        other = ids.clone()
        other[0, place] = 21
        new_text, new_masks = logits_in(model, other, size)
        changed = (new_masks != masks)[0].any(-1)
        after = torch.arange(ids.shape[1]) // size > place // size
        assert torch.equal(changed, after)
        assert torch.equal((new_text != text)[0].any(-1), torch.arange(ids.shape[1]) >= place)


@pytest.mark.parametrize("kernel", KERNELS)
def test_text_does_not_see_masks(kernel):
    model, ids = model_of(kernel), batch(1)
    text, masks = logits_in(model, ids)
    new_text, new_masks = logits_in(model, ids, embedding=torch.ones(32))
    assert torch.equal(new_text, text) and not torch.equal(new_masks, masks)


# --- the trainer ---------------------------------------------------------------------------------------------------


def trainer_of(model, tmp_path, rows, **options):
    args = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=150,
        per_device_train_batch_size=16,
        learning_rate=5e-3,
        report_to=[],
        save_strategy="no",
        logging_steps=150,
        use_cpu=True,
        disable_tqdm=True,
        seed=0,
        remove_unused_columns=False,
    )
    return TiDARTrainer(model, args, train_dataset=rows, mask_token_id=MASK, **{"block_size": 4, **options})


def test_it_learns_to_draft_and_keeps_to_its_text(tmp_path):
    """Rows that count up from a random digit: all of a block can be known from what is before it."""
    starts = torch.randint(0, 10, (256,), generator=torch.Generator().manual_seed(0))
    rows = [{"input_ids": (start + torch.arange(16)) % 10} for start in starts]
    model = model_of()
    trainer = trainer_of(model, tmp_path, rows)
    trainer.train()
    assert (model.config.mask_token_id, model.config.tidar_block_size) == (MASK, 4)
    model.eval()
    prompt = torch.tensor([[3, 4, 5, 6]])
    options = {"max_new_tokens": 11, "do_sample": False, "return_dict_in_generate": True}
    out = model.generate(prompt, custom_generate=decode.tidar_generate, **options)
    assert out.new_ids == [[7, 8, 9, 0, 1, 2, 3, 4, 5, 6, 7]]
    assert out.stats.block_efficiency > 3 and out.forward_calls <= 4


def test_the_trainer_takes_the_loss_of_its_settings(tmp_path):
    model = model_of()
    trainer = trainer_of(model, tmp_path, [], alpha=3.0, block_size=2)
    ids, labels, present = batch(), batch(), torch.ones(3, 12)
    labels[:, :4] = -100
    inputs = {"input_ids": ids, "labels": labels, "attention_mask": present}
    loss, outputs = trainer.compute_loss(model, inputs, return_outputs=True)
    assert torch.equal(loss, tidar_loss(model, ids, MASK, 2, alpha=3.0, labels=labels).loss)
    assert set(outputs) == {"loss", "autoregressive", "diffusion"}
    assert trainer.model_accepts_loss_kwargs is False  # accumulated batches count as means


# --- the recipe ----------------------------------------------------------------------------------------------------


def test_lessons_are_whole_blocks_and_prompts_are_not_learnt():
    _, tokenizer = tidar.untrained()
    for batch, _ in zip(tidar.lessons(tokenizer, 1), range(20)):
        ids, learned = batch["input_ids"], batch["labels"] != -100
        assert ids.shape[1] % tidar.BLOCK == 0 and not (learned & (batch["attention_mask"] == 0)).any()
        assert not learned[:, :3].any() and not (ids == tokenizer.mask_token_id).any()
        assert torch.equal(batch["labels"][learned], ids[learned])


@pytest.mark.parametrize("recipe", [tidar, tidar_twin])
def test_teaching_repeats_itself_from_the_seed_and_goes_on_from_the_reasoner(recipe, monkeypatch):
    monkeypatch.setattr(recipe, "PHASES", ((1, 1e-3), (2, 1e-3)))
    monkeypatch.setattr(tidar, "BATCH_TOKENS", 200)
    start = dict(tokenry.load("zoo/reasoner").model.named_parameters())
    first, tokenizer = recipe.train(3)
    for (name, a), b in zip(first.named_parameters(), recipe.train(3)[0].parameters()):
        assert torch.equal(a, b) and torch.allclose(a[: len(start[name])], start[name], atol=1e-2)
    assert len(tokenizer) == first.config.vocab_size == 28 and tokenizer.mask_token_id == 27


def test_the_zoo_model_drafts_its_own_text():
    model, tokenizer = tokenry.load("zoo/tidar")
    question = "12+35-8*3="
    plain = decode.generate(model, tokenizer, question)
    drafted = decode.generate(model, tokenizer, question, methods=[decode.TiDAR()])
    assert drafted.texts == plain.texts == ["8*3=24\n12+35=47\n47-24=23\n</think>\n23"]
    assert drafted.forward_calls <= 12 and drafted.stats.block_efficiency > 2.5


# --- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_size": 1}, "block_size=1"),
        ({"block_size": 5}, "12 tokens are no multiple of block_size=5"),
        ({"block_size": 12}, "no token to learn after the first block"),
        ({"alpha": -1.0}, "alpha=-1.0"),
        ({"alpha": float("nan")}, "alpha=nan"),
        ({"input_ids": torch.tensor([[1, 2, MASK, 3]]), "block_size": 2}, "contain the mask token 23"),
        ({"attention_mask": torch.tensor([[0] * 4 + [1] * 8] * 3)}, "padded on the left"),
        ({"labels": torch.full((3, 12), -100)}, "no token to learn"),
    ],
)
def test_the_loss_refuses(change, message):
    with pytest.raises(InputError, match=message):
        tidar_loss(model_of(), **{"input_ids": batch(), "mask_token_id": MASK, "block_size": 4, **change})


def test_the_trainer_refuses(tmp_path):
    with pytest.raises(InputError, match="mask_token_id=24 is outside the vocabulary of 24"):
        TiDARTrainer(model_of(), mask_token_id=24)
    with pytest.raises(InputError, match="block_size=1 is not allowed"):
        TiDARTrainer(model_of(), mask_token_id=MASK, block_size=1)
    flash = model_of()
    flash.config._attn_implementation = "flash_attention_2"
    with pytest.raises(InputError, match="flash_attention_2 does not take a structured mask"):
        TiDARTrainer(flash, mask_token_id=MASK)
    deaf = model_of()
    plain = deaf.forward
    deaf.forward = lambda attention_mask=None, **kw: plain(**kw)
    with pytest.raises(InputError, match=r"attention mask|hides token"):
        TiDARTrainer(deaf, mask_token_id=MASK)
