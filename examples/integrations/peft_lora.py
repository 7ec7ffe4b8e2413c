"""peft: LoRA on a small GPT-2 whose own weights stay, with a higher rate for one half of the adapters (LoRA+).

python examples/integrations/peft_lora.py
"""

from __future__ import annotations

import tempfile

import torch
import transformers
from comparing import Trained, compare, weights
from peft import LoraConfig, PeftModel, get_peft_model
from transformers_trainer import gpt2, sentences

import fusedopt

STEPS = 8


def train(make) -> Trained:
    """The weights are those of all adapters, as saved and loaded, and of the model that they are merged into."""
    base = gpt2()
    before = weights(base.parameters())
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True, task_type="CAUSAL_LM"
    )
    model = get_peft_model(base, config)
    model.double()
    adapters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    groups = [
        {"params": [p for name, p in adapters.items() if "lora_A" in name], "lr": 1e-2},
        {"params": [p for name, p in adapters.items() if "lora_B" in name], "lr": 4e-2},
    ]
    opt = make(groups, weight_decay=0.01)
    ids = torch.stack([row["input_ids"] for row in sentences(16)])
    losses = []
    for _ in range(STEPS):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        opt.step()
        opt.zero_grad()
        losses.append(loss.item())
    assert all(map(torch.equal, weights(base_parameters(model)), before)), (
        "the model's own weights have moved"
    )
    assert {p for p, state in opt.state.items() if state} == set(adapters.values())
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        merged = PeftModel.from_pretrained(_base(before), folder).double().merge_and_unload()
    return Trained(losses, weights([*adapters.values(), *merged.parameters()]), opt)


def base_parameters(model: torch.nn.Module) -> list[torch.Tensor]:
    """Those that were there before the adapters."""
    return [p for name, p in model.named_parameters() if "lora_" not in name]


def _base(values: list[torch.Tensor]) -> torch.nn.Module:
    """The model before training."""
    model = gpt2()
    with torch.no_grad():
        for p, value in zip(model.parameters(), values, strict=True):
            p.copy_(value)
    return model


def main() -> dict[str, float]:
    """How far the weights are apart, by optimizer."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    pairs = {
        "AdamW": (torch.optim.AdamW, fusedopt.optim.AdamW),
        "torch's Adadelta by fuse()": (torch.optim.Adadelta, fusedopt.fuse(torch.optim.Adadelta)),
    }
    return compare(train, pairs, tolerance=1e-9)


if __name__ == "__main__":
    main()
