"""How long the features of Python's whole standard library take, and one completion in a file of a megabyte.

python benchmarks/bench_codefill.py
"""

import time

from tokenry.core.errors import InputError
from tokenry.data.corpora import library_source
from tokenry.decode.completion.context import left_of
from tokenry.text.code.views import code_views

LIMIT = 60.0  # seconds


def main() -> None:
    sources = library_source()
    start, tokens, left_out = time.perf_counter(), 0, 0
    for source in sources:
        try:
            tokens += len(code_views(source).values)
        except InputError:  # a file without a statement
            left_out += 1
    seconds = time.perf_counter() - start
    size = sum(map(len, sources)) / 1e6
    print(f"{len(sources) - left_out} files, {size:.1f} MB, {tokens:,} tokens with types and scopes: {seconds:.1f} s")
    print(f"the aim is {LIMIT:.0f} s: {'reached' if seconds < LIMIT else 'missed'}")
    text = "def f(value):\n    return value.attribute\n" * 25_000 + "f.attr"
    start = time.perf_counter()
    left_of(text).visible.scope("f")
    print(f"what stands left of the cursor in {len(text) / 1e6:.2f} MB: {time.perf_counter() - start:.2f} s")


if __name__ == "__main__":
    main()
