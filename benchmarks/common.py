"""What the benchmarks share: interleaved timing and a line per number."""

from __future__ import annotations

import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

THREADS = int(os.environ.get("OMP_NUM_THREADS", "2"))
torch.set_num_threads(THREADS)
KEPT = ("GGUF.", "general.architecture", "general.file_type")  # the writer has its own


def as_f32(source: Path) -> Path:
    """The file with its weights in F32."""
    import gguf

    from tokenry.models.folders import cache_folder

    target = cache_folder() / "gguf" / f"{source.stem}.F32.gguf"
    if target.is_file():
        return target
    reader, work = gguf.GGUFReader(source), target.with_suffix(".part")
    work.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(str(work), reader.fields["general.architecture"].contents())
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    for name, field in reader.fields.items():
        if not name.startswith(KEPT):
            inner = field.types[1] if len(field.types) > 1 else None
            writer.add_key_value(name, field.contents(), field.types[0], sub_type=inner)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype("float32"))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return work.rename(target)


def interleaved(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every run, taken in turns, after one warm-up each."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(seconds: dict[str, list[float]], first: str, second: str) -> float:
    """Median over rounds of the time of `second` / the time of `first` in the same round."""
    return statistics.median(b / a for a, b in zip(seconds[first], seconds[second]))


def report(what: str, value: float, goal: str, holds: bool) -> None:
    """One number, its goal, and whether it is reached."""
    print(f"{what:<78} {value:7.3f}   goal {goal:<10} {'reached' if holds else 'NOT REACHED'}", flush=True)


def heading(text: str) -> None:
    print(f"\n{text} (torch {torch.__version__}, {THREADS} threads, python {sys.version.split()[0]})", flush=True)


@contextmanager
def served(model: str, *options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`tokenry serve` in a process of its own, and where it listens."""
    command = [sys.executable, "-m", "tokenry", "serve", "--model", model, "--port", "0", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            found = re.search(r"http://127\.0\.0\.1:\d+", server.stdout.readline())
            if found is None:
                raise SystemExit("the server has not started; it said why above")
            yield server, found[0]
        finally:
            server.kill()
