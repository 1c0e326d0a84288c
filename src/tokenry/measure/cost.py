"""What a run costs: seconds and peak memory."""

from __future__ import annotations

import time
from pathlib import Path

import torch

__all__ = ["Meter"]


class Meter:
    """Context manager that measures wall-clock seconds and the peak memory above the start.

    On CUDA the peak is torch's; on Linux it is the resident-set high-water mark, which is reset on entry. Elsewhere
    it is NaN.
    """

    seconds = float("nan")
    peak_bytes = float("nan")
    start_bytes: int | None = None  # unknown where it cannot be measured

    def __enter__(self) -> Meter:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.start_bytes = torch.cuda.memory_allocated()
        else:
            self.start_bytes = _resident("VmRSS") if _reset_high_water() else None
        self.started = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds = time.perf_counter() - self.started
        if torch.cuda.is_available():
            self.peak_bytes = torch.cuda.max_memory_allocated() - (self.start_bytes or 0)
        elif self.start_bytes is not None:
            self.peak_bytes = max(_resident("VmHWM") - self.start_bytes, 0)


def _reset_high_water() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _resident(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    return 0
