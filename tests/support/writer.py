"""A small Llama that has learned a text by heart, and so writes words."""

import torch
from support.families import TEXT, build

STEPS, WIDTH = 120, 48


def writer(tokenizer):
    model = build("llama")
    ids = torch.tensor(tokenizer.encode(TEXT + "<eos>"))
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(STEPS):
        starts = torch.randint(len(ids) - WIDTH + 1, (8,), generator=generator)
        batch = torch.stack([ids[start : start + WIDTH] for start in starts])
        optimizer.zero_grad()
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
    return model.eval()
