"""Training on two processes: what one of them decides, all do."""

import json
import os
import subprocess
import sys

SCRIPT = """
import copy
import json
import os
import sys
from pathlib import Path
import torch
from torch.utils.data import SequentialSampler
from transformers import LlamaConfig, LlamaForCausalLM
from peft import LoraConfig
from transformers import TrainingArguments
from datasets import Dataset
import tokenry
from tokenry.train import FTPOConfig, FTPOTrainer, MaskedDiffusionTrainer, SkipDecodeConfig, SkipDecodeTrainer

class Noted(MaskedDiffusionTrainer):
    def compute_loss(self, *args, **options):
        state = torch.get_rng_state()
        drawn.append(float(torch.rand(1)))
        torch.set_rng_state(state)
        return super().compute_loss(*args, **options)

class InOrder(FTPOTrainer):
    def _get_train_sampler(self, dataset=None):
        return SequentialSampler(self.train_dataset)

torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(vocab_size=40, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                                     num_attention_heads=2, pad_token_id=1))
logits = model(torch.tensor([[5]])).logits[0, -1]
best, worst = int(logits.argmax()), int(logits.argmin())
won = {"prompt_ids": [5], "chosen_ids": [best], "rejected_id": worst}
lost = {"prompt_ids": [5], "chosen_ids": [worst], "rejected_id": best}
found = {}
for threshold in (0.75, 0.5):
    args = FTPOConfig(sys.argv[1], use_cpu=True, per_device_train_batch_size=1, num_train_epochs=1, logging_steps=1,
                      learning_rate=1e-9, early_stop_choice_win=threshold, disable_tqdm=True, ddp_timeout=30)
    lora = LoraConfig(r=2, target_modules=["v_proj"], task_type="CAUSAL_LM")
    trainer = InOrder(copy.deepcopy(model), args, [won, lost] * 3, [won, lost], peft_config=lora)
    trainer.train()
    logged = [entry["choice_win"] for entry in trainer.state.log_history if "choice_win" in entry]
    found[threshold] = [trainer.state.global_step, logged, trainer.evaluate()["eval_choice_win"]]
drawn = []
args = TrainingArguments(sys.argv[1], use_cpu=True, per_device_train_batch_size=1, max_steps=2, report_to="none",
                         save_strategy="no", disable_tqdm=True, ddp_timeout=30)
Noted(copy.deepcopy(model), args, train_dataset=[{"input_ids": [5, 6, 7, 8]}] * 4, mask_token_id=39).train()
reader = tokenry.load("zoo/reasoner").tokenizer
deep = LlamaForCausalLM(LlamaConfig(vocab_size=len(reader), hidden_size=8, intermediate_size=8, num_hidden_layers=4,
                                    num_attention_heads=2, pad_token_id=reader.pad_token_id))
args = SkipDecodeConfig(sys.argv[1], use_cpu=True, bf16=False, e_max=3, e_min=3, warmup=1, planned_new_tokens=3,
                        per_device_train_batch_size=1, max_steps=2, report_to="none", save_strategy="no",
                        disable_tqdm=True, ddp_timeout=30)
rows = Dataset.from_list([{"input_ids": [5, 6, 7, 8], "labels": [-100, 6, 7, 8]}] * 4)
skipping = SkipDecodeTrainer(deep, args, train_dataset=rows, processing_class=reader)
skipping.train()  # a layer that never runs has no gradient on any rank
found["skipping"] = skipping.state.global_step
Path(sys.argv[1], f"drawn{args.process_index}.json").write_text(json.dumps(drawn))
Path(sys.argv[1], f"rank{args.process_index}.json").write_text(json.dumps(found))
torch.distributed.barrier()
os._exit(0)  # gloo's threads may outlive the interpreter that finalizes, which aborts the process now and then
"""


def test_two_ranks_stop_together(tmp_path):
    """One rank has won pairs alone, the other lost ones: half of all are won, which is not enough, and then enough.

    Each of them hides other tokens of its texts than the other.
    """
    (tmp_path / "train.py").write_text(SCRIPT)
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    arguments = [*run, str(tmp_path / "train.py"), str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(arguments, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        _, error = process.communicate(timeout=150)
    finally:
        process.terminate()  # and with it the ranks, should they hang
        process.wait(30)
    files = [tmp_path / f"rank{rank}.json" for rank in (0, 1)]
    assert all(file.exists() for file in files), error[-3000:]
    told = [json.loads(file.read_text()) for file in files]
    assert told == [{"0.75": [3, [0.5] * 3, 0.5], "0.5": [1, [0.5], 0.5], "skipping": 2}] * 2
    drawn = [json.loads((tmp_path / f"drawn{rank}.json").read_text()) for rank in (0, 1)]
    assert len(drawn[0]) == len(drawn[1]) == 2 and not set(drawn[0]) & set(drawn[1])
