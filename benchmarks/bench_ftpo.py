"""Training steps of FTPO against trl's DPOTrainer on the same one-token pairs, same LoRA, same batch."""

from __future__ import annotations

import copy
import tempfile
import warnings

from common import heading, interleaved, ratio, report
from datasets import Dataset
from transformers.trainer_callback import PrinterCallback
from transformers.utils import logging
from trl import DPOConfig, DPOTrainer

import tokenry
from tokenry.train import FTPOConfig, FTPOTrainer, lora_last_layers

STEPS, BATCH, ROUNDS = 2, 8, 3
WORDS = "The keeper of the old lighthouse walked down to the shore where the boats lay in the sand and".split()


def main() -> None:
    logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    model, tokenizer = tokenry.load()
    texts = [" ".join(WORDS[-n:] * 4) for n in range(4, 4 + BATCH)] * STEPS
    chosen, rejected = tokenizer.encode(" sat")[0], tokenizer.encode(" stood")[0]
    pairs = [{"prompt_ids": tokenizer.encode(t), "chosen_ids": [chosen], "rejected_id": rejected} for t in texts]
    rows = [{"prompt": t, "chosen": " sat", "rejected": " stood"} for t in texts]
    shared = {
        "max_steps": STEPS,
        "per_device_train_batch_size": BATCH,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    lora = lora_last_layers(model, rank=64, dropout=0.0, lm_head=False)  # which trl refuses
    with tempfile.TemporaryDirectory() as folder:
        ftpo = FTPOTrainer(copy.deepcopy(model), FTPOConfig(folder, **shared), pairs, peft_config=lora)
        whole = FTPOTrainer(copy.deepcopy(model), FTPOConfig(folder, **shared), pairs, peft_config=lora)
        whole.frozen = 0  # the reference runs all blocks again
        config = DPOConfig(folder, bf16=False, gradient_checkpointing=False, **shared)
        dpo = DPOTrainer(
            copy.deepcopy(model),
            args=config,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            peft_config=lora,
        )
        trainers = {"ftpo": ftpo, "ftpo, whole reference": whole, "trl DPOTrainer": dpo}
        for trainer in trainers.values():
            trainer.remove_callback(PrinterCallback)
        heading(f"FTPO, SmolLM2 with LoRA on the last 6 blocks, {STEPS} steps of {BATCH} pairs")
        seconds = interleaved({name: trainer.train for name, trainer in trainers.items()}, ROUNDS)
    gain = ratio(seconds, "ftpo", "trl DPOTrainer")
    report("speed against trl's DPOTrainer", gain, ">= 1.5", gain >= 1.5)
    gain = ratio(seconds, "ftpo", "ftpo, whole reference")
    report("speed against a reference that runs all blocks", gain, ">= 1.2", gain >= 1.2)


if __name__ == "__main__":
    main()
