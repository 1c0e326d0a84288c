"""Peak memory of a 4,096-token forward of SmolLM2, plain and under capture.

The capture keeps queries and keys of two layers and, through an observer, the last 8 rows of 4 heads of every
layer. Each run is a fresh process; its number is the high-water mark of resident memory minus the mark right after
loading. Run: `python benchmarks/bench_capture_memory.py`.
"""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys

TOKENS, REPEATS = 4096, 3
QK_LAYERS, HEADS, ROWS = [10, 20], [0, 2, 4, 6], slice(-8, None)


def peak() -> float:
    """High-water mark of this process's resident memory in MiB (Linux gives KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def run(captured: bool) -> None:
    """One forward in this process; prints the MiB above the loaded model."""
    import torch

    import tokenry
    from tokenry.hooks.attention import observe

    torch.set_num_threads(2)
    model, _ = tokenry.load()
    ids = torch.randint(0, model.config.vocab_size, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    loaded, rows = peak(), {}
    with torch.no_grad():
        if captured:
            watch = observe(model, lambda call: rows.update({call.layer: call.rows(ROWS, HEADS)}))
            with tokenry.capture(model, qk=QK_LAYERS), watch:
                model(ids, use_cache=False, logits_to_keep=1)
            assert len(rows) == model.config.num_hidden_layers and rows[0].shape == (1, len(HEADS), 8, TOKENS)
        else:
            model(ids, use_cache=False, logits_to_keep=1)
    print(peak() - loaded)


def measure(kind: str) -> float:
    """Median over fresh processes."""
    return statistics.median(
        float(subprocess.run([sys.executable, __file__, kind], check=True, capture_output=True, text=True).stdout)
        for _ in range(REPEATS)
    )


def main() -> None:
    plain, captured = measure("plain"), measure("captured")
    print(f"plain     {plain:8.1f} MiB")
    print(f"captured  {captured:8.1f} MiB")
    print(f"ratio     {captured / plain:8.3f}  (aim: under 1.2; one float32 map of all heads would be 576 MiB)")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        run(sys.argv[1] == "captured")
    else:
        main()
