"""Makes src/tokenry/evidence/data/token_prepending_dev.json: what every setting of Token Prepending scores on dev.

    python tools/choose_token_prepending.py OUTPUT [--model smollm2] [--pairs 500]

`tokenry compare token-prepending` takes its exit layer, BOS and output layers from this file.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import tokenry
from tokenry.evidence.token_prepending import DEV_PAIRS, score_on_dev
from tokenry.measure.tasks.sts import load_pairs, spread


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--pairs", type=int, default=DEV_PAIRS)
    arguments = parser.parse_args()
    model, tokenizer = tokenry.load(arguments.model)
    scores = score_on_dev(
        model, tokenizer, spread(load_pairs("dev"), arguments.pairs), lambda what: print(what, flush=True)
    )
    scores.save(arguments.output)
    for row in scores.rows:
        print(f"exit {row.exit_layer} {'BOS' if row.add_bos else '   '} layer {row.best}: {max(row.layers):.2f}")


if __name__ == "__main__":
    main()
