"""TRL: supervised fine-tuning of a small GPT-2 on sentences of a made-up language, with a tokenizer made here.

python examples/integrations/trl_sft.py
"""

from __future__ import annotations

import tempfile

import datasets
import torch
import transformers
from comparing import Trained, compare, weights
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast
from transformers_trainer import VOCABULARY, gpt2
from trl import SFTConfig, SFTTrainer

import fusedopt


def tokenizer() -> PreTrainedTokenizerFast:
    """One number for each word w0, w1, …"""
    words = {"<end>": 0} | {f"w{k}": k for k in range(1, VOCABULARY)}
    made = Tokenizer(WordLevel(words, unk_token="<end>"))
    made.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>", pad_token="<end>")


def pairs_of_words(n: int = 16) -> Dataset:
    """A prompt counts up, and the answer goes on; losses are the answer's."""

    def count(start: int, of: int) -> str:
        return " ".join(f"w{1 + (start + k) % (VOCABULARY - 1)}" for k in range(of))

    return Dataset.from_list([{"prompt": count(k, 4), "completion": " " + count(k + 4, 4)} for k in range(n)])


def train(make) -> Trained:
    """The optimizer is handed over ready-made; the schedule is the trainer's."""
    with tempfile.TemporaryDirectory() as folder:
        model = gpt2()
        arguments = SFTConfig(
            folder,
            per_device_train_batch_size=4,
            max_steps=8,
            learning_rate=1e-2,
            logging_steps=1,
            save_strategy="no",
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            disable_tqdm=True,
            report_to="none",
            seed=0,
        )
        opt = make(model.parameters(), lr=1e-2)
        trainer = SFTTrainer(
            model,
            arguments,
            train_dataset=pairs_of_words(),
            processing_class=tokenizer(),
            optimizers=(opt, None),
        )
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return Trained(losses, weights(model.parameters()), opt)


def main() -> dict[str, float]:
    """How far the weights are apart, by optimizer."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    pairs = {
        "AdamW": (torch.optim.AdamW, fusedopt.optim.AdamW),
        "torch's RAdam by fuse()": (torch.optim.RAdam, fusedopt.fuse(torch.optim.RAdam)),
    }
    return compare(train, pairs, tolerance=1e-9)


if __name__ == "__main__":
    main()
