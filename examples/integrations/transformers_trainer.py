"""transformers: a Trainer fine-tunes a small GPT-2 of random weights, accumulates, clips, saves and resumes.

python examples/integrations/transformers_trainer.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
import transformers
from comparing import Trained, compare, weights
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments
from transformers.optimization import Adafactor

import fusedopt

VOCABULARY, LENGTH, STEPS = 31, 12, 8


def gpt2() -> GPT2LMHeadModel:
    """Two blocks, without dropout, and in float64, where equal means equal."""
    sizes = dict(n_layer=2, n_head=2, n_embd=16, vocab_size=VOCABULARY, n_positions=LENGTH)
    off = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(GPT2Config(**sizes, **off)).double()


def sentences(n: int = 32) -> list[dict[str, torch.Tensor]]:
    """Each counts up from somewhere, so there is something to learn."""
    rows = [(torch.arange(LENGTH) + k) % VOCABULARY for k in range(n)]
    return [{"input_ids": row, "labels": row} for row in rows]


class FixedAdafactor(Adafactor):
    """transformers' Adafactor with the rate that it is given.

    And a larger epsilon: the gradient of a bias of keys is 0, and its rounding errors would be made steps.
    """

    def __init__(self, params, lr: float) -> None:
        super().__init__(params, lr=lr, eps=(1e-16, 1e-3), scale_parameter=False, relative_step=False)


def fit(make, folder: str, resume: bool) -> Trainer:
    arguments = TrainingArguments(
        folder,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        max_steps=STEPS,
        learning_rate=5e-3,
        weight_decay=0.1,
        max_grad_norm=1.0,
        warmup_steps=2,
        lr_scheduler_type="cosine",
        save_steps=STEPS // 2,
        logging_steps=1,
        use_cpu=True,
        disable_tqdm=True,
        report_to="none",
        seed=0,
    )
    trainer = Trainer(
        gpt2(), arguments, train_dataset=sentences(), optimizer_cls_and_kwargs=(make, dict(lr=5e-3))
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train(resume_from_checkpoint=f"{folder}/checkpoint-{STEPS // 2}" if resume else None)
    return trainer


def train(make) -> Trained:
    """The weights of two trainings: a whole one, and one that starts from the checkpoint in the middle of that."""
    with tempfile.TemporaryDirectory() as folder:
        whole = fit(make, folder, resume=False)
        assert (Path(folder) / f"checkpoint-{STEPS // 2}" / "optimizer.pt").exists()
        rest = fit(make, folder, resume=True)
    losses = [entry["loss"] for entry in whole.state.log_history if "loss" in entry]
    return Trained(
        losses, weights([*whole.model.parameters(), *rest.model.parameters()]), rest.optimizer.optimizer
    )


def main() -> dict[str, float]:
    """How far the weights are apart, by optimizer."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    pairs = {
        "AdamW": (torch.optim.AdamW, fusedopt.optim.AdamW),
        "Adafactor by fuse()": (FixedAdafactor, fusedopt.fuse(FixedAdafactor)),
    }
    return compare(train, pairs, tolerance=1e-9)


if __name__ == "__main__":
    main()
