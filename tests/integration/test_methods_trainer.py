"""Every method of the table under the stock Trainer: what it optimizes, and checkpoints that resume bit for bit.

The expected loss is computed apart from the library: the task's loss in evaluation mode, where nothing is
added, and each auxiliary loss from its formula, on inputs that hooks catch, row by row without the padding.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from monkeyjump import CenterUpdate
from monkeyjump.methods import METHODS, method
from monkeyjump.moe import RankUpdate
from tiny import LLAMA_TARGETS, left_padded, llama, position_dependent, tokens, trainable

WEIGHTS = {"balance_weight": 0.5, "contrastive_weight": 0.25, "orth_reg_weight": 0.5}
TASKS, PROMPT = 3, 2
ROWS = [{"input_ids": tokens(1, 6 + i % 4, seed=i)[0], "task_ids": i % TASKS} for i in range(8)]
every_method = pytest.mark.parametrize("name", METHODS)


def build(name: str, dropout: float = 0.0, steps: int = 2) -> PeftModel:
    base, row = llama(), method(name)
    fields: dict[str, Any] = {
        "target_modules": list(LLAMA_TARGETS), "task_type": "CAUSAL_LM", "num_experts": [2, 4] if name == "mola" else 4,
        "top_k": 2, "r": 2, "init_r": 3, "target_r": 2, "total_step": steps, "num_tasks": TASKS,
        "lora_dropout": dropout, "prompt_length": 3 if name == "moa" else None, "center_init": "random", **WEIGHTS,
    }  # fmt: skip
    if row.base in ("moa", "more"):
        del fields["balance_weight"]
    torch.manual_seed(1)
    model = get_peft_model(base, row.config(**fields))
    position_dependent(trainable(model).values(), size=0.02 if "propulsion" in name else 0.1)
    return model


def collate(rows: list[dict[str, Any]], told: bool) -> dict[str, Tensor]:
    """Left-padded; neither padding nor the first tokens of a row are supervised."""
    batch = left_padded([row["input_ids"].unsqueeze(0) for row in rows])
    position = batch["attention_mask"].cumsum(1)
    batch["labels"] = batch["input_ids"].masked_fill(position <= PROMPT, -100)
    return {**batch, **({"task_ids": torch.tensor([row["task_ids"] for row in rows])} if told else {})}


class Watched(Trainer):
    """Calls `before` on every micro-batch, and keeps the loss that it was trained on."""

    before: Callable[[dict[str, Tensor]], Any] = staticmethod(lambda batch: None)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        self.seen = [*getattr(self, "seen", []), (self.before(inputs),)]
        loss = super().training_step(model, inputs, *args, **kwargs)
        self.seen[-1] = (loss.item(), *self.seen[-1])
        return loss


def trainer(name: str, model: PeftModel, folder: Path, *callbacks: TrainerCallback, **changes: Any) -> Watched:
    settings = {
        "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 2, "learning_rate": 0.02,
        "lr_scheduler_type": "cosine", "report_to": [], "save_strategy": "no", "use_cpu": True, "disable_tqdm": True,
        "train_sampling_strategy": "sequential", "remove_unused_columns": False, "logging_steps": 1, **changes,
    }  # fmt: skip
    own: list[TrainerCallback] = [CenterUpdate(every=1, until=9)] if name.startswith("mj-") else []
    own += [RankUpdate()] if name == "moe-adalora" else []
    rows = functools.partial(collate, told=name == "more")
    arguments = TrainingArguments(str(folder), **settings)
    return Watched(model, arguments, train_dataset=ROWS, data_collator=rows, callbacks=[*own, *callbacks])


# ---------------------------------------------------------------------- the formulas


def balance(x: Tensor, router: Tensor, top_k: int | None) -> tuple[Tensor, Tensor]:
    """Router probabilities `[n, N]`, and 1 where an expert was chosen."""
    p = (x @ router.T).softmax(-1)
    return p, (p >= p.topk(min(top_k or p.shape[-1], p.shape[-1])).values[:, -1:]).float()


def switch(parts: list[tuple[Tensor, Tensor]], per_token: bool = False) -> float:
    """`N sum f P` over the tokens of all parts; f sums to 1, or to k with `per_token`."""
    p, chosen = (torch.cat(one) for one in zip(*parts))
    f = chosen.mean(0) if per_token else chosen.sum(0) / chosen.sum()
    return float(p.shape[-1] * (f * p.mean(0)).sum())


def supervised_contrast(outputs: list[Tensor], tau: float) -> float:
    """Khosla et al.'s loss in loops; `outputs`: by expert, `[n, d]`."""
    labels = [expert for expert, group in enumerate(outputs) for _ in group]
    z = torch.cat([group / group.norm(dim=-1, keepdim=True) for group in outputs])
    values = []
    for i, row in enumerate((z @ z.T / tau).tolist()):
        total = math.log(sum(math.exp(s) for j, s in enumerate(row) if j != i))
        same = [s for j, s in enumerate(row) if j != i and labels[j] == labels[i]]
        values += [total - sum(same) / len(same)] if same else []
    return sum(values) / len(values)


def not_orthogonal(matrices: list[Tensor]) -> float:
    """Mean of `||M M^T - I||_F` over matrices whose rows should be orthonormal."""
    return float(torch.stack([(m @ m.T - torch.eye(len(m))).norm() for m in matrices]).mean())


@torch.no_grad()
def expected(name: str, model: PeftModel, batch: dict[str, Tensor]) -> tuple[float, dict[str, float]]:
    """The task's loss of a micro-batch, and its auxiliary losses before their weights."""
    seen: dict[str, Tensor] = {}
    wanted = {n: m for n, m in model.named_modules() if type(m).__name__ in KINDS}
    hooks = [
        m.register_forward_pre_hook(lambda _, args, n=n: seen.update({n: args[0].detach()})) for n, m in wanted.items()
    ]
    task = model.eval()(**batch).loss.item()
    model.train()
    for hook in hooks:
        hook.remove()
    if name == "more":
        return task, {"task_contrastive": task_contrast(model, seen, batch)}
    real = batch["attention_mask"].bool()
    return task, losses_of(name, model, wanted, {n: x[real] for n, x in seen.items()})


def losses_of(name: str, model: PeftModel, wanted: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, float]:
    """Auxiliary losses from the modules' inputs `[n, d]`, padding taken out."""
    found: dict[str, float] = {}
    layers = {n: m for n, m in wanted.items() if hasattr(m, "mixture_router") and "default" in m.mixture_router}
    top_k = getattr(model.peft_config["default"], "top_k", None)
    parts = {n: balance(inputs[n], m.mixture_router["default"], top_k) for n, m in layers.items()}
    if name in ("moelora", "mixlora-attn", "hydralora") or name.startswith("moe-"):
        found["load_balance"] = sum(switch([part]) for part in parts.values()) / len(parts)
    if name == "mola":
        blocks = [[part for n, part in parts.items() if f"layers.{i}." in n] for i in range(2)]
        found["load_balance"] = sum(switch(block) for block in blocks)
    if name == "mixlora":
        networks = {n: m.expert_router.mixture_router["default"] for n, m in wanted.items() if n.endswith("mlp")}
        found["load_balance"] = switch([balance(inputs[n], w, top_k) for n, w in networks.items()], per_token=True)
    if name == "moelora":
        found["contrastive"] = sum(contrast_of(m, inputs[n], parts[n][1]) for n, m in layers.items()) / len(layers)
    if name == "moe-adalora":
        halves = [(m.mixture_A["default"], m.mixture_B["default"].T) for m in layers.values()]
        found["orthogonality"] = not_orthogonal([one for pair in halves for w in pair for one in w.split(3)])
    if name == "mj-adalora":
        weights = [(n, p) for n, p in trainable(model).items() if "lora_A" in n or "lora_B" in n]
        found["orthogonality"] = not_orthogonal([p.T if "lora_B" in n else p for n, p in weights])
    return found


KINDS = ("LowRankExperts", "ScalingExperts", "LlamaMLP", "LlamaDecoderLayer")


def contrast_of(layer: Any, x: Tensor, chosen: Tensor) -> float:
    a, b = layer.mixture_A["default"], layer.mixture_B["default"]
    outputs = []
    for n in range(4):
        mine = slice(2 * n, 2 * n + 2)
        outputs.append(x[chosen[:, n].bool()] @ (b[:, mine] @ a[mine]).T)  # its length does not matter: normalized
    return supervised_contrast(outputs, 0.1)


def task_contrast(model: PeftModel, seen: dict[str, Tensor], batch: dict[str, Tensor]) -> float:
    table = model.base_model.model.expert_tasks.mixture_tasks["default"]
    values = []
    for hidden in (x for n, x in seen.items() if n.rpartition(".")[2].isdigit()):
        for row, mask, task in zip(hidden, batch["attention_mask"].bool(), batch["task_ids"]):
            prompt = row[mask][:PROMPT].mean(0)
            cosine = torch.cosine_similarity(prompt.unsqueeze(0), table, dim=-1) / 0.05
            values.append(cosine.logsumexp(0) - cosine[task])
    return float(torch.stack(values).mean())


WEIGHT_OF = {"load_balance": 0.5, "contrastive": 0.25, "task_contrastive": 0.25, "orthogonality": 0.5}


# ---------------------------------------------------------------------- the tests


@every_method
def test_trainer_optimizes_the_tasks_loss_and_the_weighed_auxiliary_ones(name: str, tmp_path: Path) -> None:
    counts = [int((collate(ROWS[i : i + 2], False)["labels"] != -100).sum()) for i in range(0, 8, 2)]
    ends = []
    for checkpointing in (False, True):
        model = build(name)
        run = trainer(
            name, model, tmp_path, gradient_checkpointing=checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False} if checkpointing else None,
        )  # fmt: skip
        if checkpointing:
            model.enable_input_require_grads()
        run.before = functools.partial(expected, name, model)
        run.train()
        assert len(run.seen) == 4
        for number, (loss, (task, auxiliary)) in enumerate(run.seen):
            share = counts[number] / sum(counts[number // 2 * 2 :][:2])
            total = task + sum(WEIGHT_OF[key] * value for key, value in auxiliary.items())
            if name != "adalora":  # PEFT's own adds its loss in full to every micro-batch
                assert loss == pytest.approx(total * share, rel=2e-4), (name, number, auxiliary)
        if METHODS[name].config_class.__module__.startswith("monkeyjump.moe"):
            _, (_, last) = run.seen[-1]
            read = {key: value.item() for key, value in model.auxiliary_losses().items()}
            assert read == pytest.approx(last, rel=2e-4)
        ends.append({n: p.detach() for n, p in trainable(model).items()})
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-3, atol=1e-5)
    assert any(not torch.equal(p, ends[0][n]) for n, p in trainable(build(name)).items())


class Stop(TrainerCallback):
    """Ends a run after two steps, as a crash would: what comes after is another process's."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step == 2


@pytest.mark.slow
@every_method
def test_resumed_checkpoint_of_a_limited_number_equals_the_uninterrupted_run(name: str, tmp_path: Path) -> None:
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 1}
    whole = trainer(name, build(name, 0.1, steps=4), tmp_path / "whole", max_steps=4)
    whole.train()  # at once: Trainer has just seeded the dropout
    trainer(name, build(name, 0.1, steps=4), tmp_path / "begun", Stop(), **settings).train()
    assert [folder.name for folder in (tmp_path / "begun").iterdir()] == ["checkpoint-2"]
    resumed = trainer(name, build(name, 0.1, steps=4), tmp_path / "begun", **settings)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 4
    ends = [run.model.state_dict() for run in (whole, resumed)]
    assert ends[0].keys() == ends[1].keys()
    for key, value in ends[0].items():
        assert torch.equal(ends[1][key], value), key
    assert [loss for loss, _ in resumed.seen] == [loss for loss, _ in whole.seen[4:]]
