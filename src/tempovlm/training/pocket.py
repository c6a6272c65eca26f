"""Train the pocket model on scenes that are generated while it trains.

First the vision side alone on dense labels, then everything, under a random tier, top-k and depth at each step.
Resumable: a run that stops, by a limit or a kill, continues from its last state when it is started again.

    python -m tempovlm.training.pocket --output_dir runs/pocket --device cuda
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from string import ascii_uppercase
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tempovlm.core.errors import UserError
from tempovlm.core.files import writing_to
from tempovlm.core.knobs import KNOBS, KnobConfig, KnobSpace
from tempovlm.core.plan import Ranking
from tempovlm.core.units import now_ms, s_from_ms
from tempovlm.data.registry import DATASETS, GENERATED
from tempovlm.engine.threads import pick_device
from tempovlm.lab.options import DeviceFlags
from tempovlm.lab.script import FlagParser, flag, options_from, required, run
from tempovlm.model.config import POCKET, ModelConfig
from tempovlm.model.prompt import CONTROL_TOKENS, Tokenizer
from tempovlm.model.vlm import Molmo
from tempovlm.model.weights import load_model, save_model, weights_hash
from tempovlm.testbed.words import alphabet, vocabulary
from tempovlm.training.dense import DenseHead, dense_labels
from tempovlm.training.elastic import read, sample_plan, sample_setting, see
from tempovlm.training.model_card import write_card
from tempovlm.training.muon import Muon
from tempovlm.training.pictures import IGNORE, PictureBatch, Pictures, picture_loader
from tempovlm.training.pocket_eval import outcomes, tabulate, validation_batches
from tempovlm.training.tokenizer import build_tokenizer


@dataclass(frozen=True, slots=True)
class Recipe:
    """All options of a run; written beside its results."""

    steps: int = flag(9700, "steps in all")
    decay_steps: int = flag(3000, "last steps, in which the learning rate falls to zero")
    vision_steps: int = flag(1000, "first steps, which train the vision side alone")
    batch: int = flag(256, "pictures of a step")
    passes: int = flag(2, "steps on each batch of pictures")
    lr: float = flag(1.2e-3, "learning rate of Muon")
    decay: float = flag(0.05, "weight decay")
    warmup: int = flag(300, "steps in which the learning rate rises")
    dense_weight: float = flag(0.25, "weight of the loss of dense labels")
    balance_weight: float = flag(0.01, "weight of the loss that balances the experts")
    elastic_after: int = flag(5000, "step from which settings are drawn at random")
    seed: int = flag(0, "seed of the weights and of the training pictures")
    validation_seed: int = flag(20_000, "seed of the validation pictures")
    validation_batches: int = flag(8, "batches of a validation")


class Pupil(nn.Module):
    """The model with the read-outs that only training needs."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.model = Molmo(config)
        self.head = DenseHead(config)


def working_copy(pupil: Pupil) -> Pupil:
    """Return a bfloat16 copy, which computes; the float32 weights take the updates."""
    copy = deepcopy(pupil).bfloat16()
    copy.model.decoder.rotary.reset()
    return copy


def hand_over(working: Pupil, pupil: Pupil) -> None:
    """Copy the gradients of the working copy, in float32, to the weights that take the updates."""
    pairs = [*zip(working.parameters(), pupil.parameters(), strict=True)]
    for _, own in pairs:
        own.grad = None
    used = [(worked.grad, own) for worked, own in pairs if worked.grad is not None]
    gradients = [torch.empty_like(own) for _, own in used]
    torch._foreach_copy_(gradients, [gradient for gradient, _ in used])
    for (_, own), gradient in zip(used, gradients, strict=True):
        own.grad = gradient


def initialise(model: Molmo, seed: int) -> None:
    """Draw the weights: scaled by their inputs, and those that write to the residual stream by the depth too."""
    generator = torch.Generator().manual_seed(seed)
    config = model.config
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() < 2:
                parameter.fill_(1.0 if name.endswith("norm.weight") else 0.0)
                continue
            std = 0.02 if "embedding" in name or "positions" in name else parameter.shape[-1] ** -0.5
            if name.endswith(("out.weight", "moe.down", "down.weight")) and "blocks" in name:
                blocks = config.vision.num_blocks if name.startswith("vision") else config.num_blocks
                std *= (2 * blocks) ** -0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)


def optimisers(pupil: Pupil, recipe: Recipe) -> tuple[torch.optim.Optimizer, ...]:
    """Return Muon for the matrices inside the network, AdamW for the rest: norms, embeddings, routers, read-outs.

    The decoder's parameters are separate groups (`late`), so that their warm-up can start later.
    """
    muon: dict[bool, list[nn.Parameter]] = {False: [], True: []}
    adam: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in pupil.named_parameters():
        late, matrix = ".decoder." in name, parameter.dim() >= 2
        edge = any(part in name for part in ("embedding", "positions", "router", "head."))
        if matrix and not edge:
            muon[late].append(parameter)
        else:
            decays = matrix and "embedding" not in name and "positions" not in name
            adam.setdefault((late, decays), []).append(parameter)
    decay = recipe.decay
    return (
        Muon([{"params": p, "weight_decay": decay, "late": late} for late, p in muon.items()], recipe.lr),
        torch.optim.AdamW(
            [{"params": p, "weight_decay": decay * decays, "late": late} for (late, decays), p in adam.items()],
            lr=recipe.lr,
            betas=(0.9, 0.98),
            fused=next(pupil.parameters()).is_cuda,
        ),
    )


def learning_rate(step: int, late: bool, recipe: Recipe) -> float:
    """Return the rate's factor: warm-up, plateau, linear fall to zero (Hu et al. 2024, arXiv 2404.06395).

    `late` parts warm up when the joint phase begins. Before the fall begins nothing depends on `steps`, so a run
    may be made longer or shorter until then.
    """
    begin = recipe.vision_steps if late else 0
    warm = min(max((step - begin + 1) / recipe.warmup, 0.0), 1.0)
    return recipe.lr * warm * min((recipe.steps - step) / recipe.decay_steps, 1.0)


class Trainer:
    """One run: state on disk in `out`, a line of JSON for every logged step."""

    def __init__(self, out: Path, recipe: Recipe, config: ModelConfig, device: torch.device) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.out, self.recipe, self.device = out, recipe, device
        words = {*vocabulary(), *(DATASETS[name].style for name in GENERATED), "user", "assistant"}
        letters = {*alphabet(), "_"}
        size = 1 + 2 * len(letters) + len(words) + len(CONTROL_TOKENS)
        config = replace(config, embedding_size=-(-size // 64) * 64)
        build_tokenizer(words, letters, config.embedding_size).save(str(out / "tokenizer.json"))
        keep_recipe(out / "recipe.json", recipe)
        self.tokenizer = Tokenizer.load(out / "tokenizer.json")
        self.pupil = Pupil(config)
        initialise(self.pupil.model, recipe.seed)
        self.pupil.to(device)
        self.working = working_copy(self.pupil) if device.type == "cuda" else self.pupil
        self.model, self.config = self.pupil.model, config
        self.space = KnobSpace.for_model(config.shape)
        self.ranking = Ranking.evenly_spaced(config.num_blocks)
        self.optimisers = optimisers(self.pupil, recipe)
        self.draws = torch.Generator().manual_seed(recipe.seed)
        self.step = 0
        self.resume()

    def resume(self) -> None:
        """Load the last saved state, if there is one."""
        path = self.out / "state.pt"
        if path.exists():
            state = torch.load(path, map_location=self.device, weights_only=True)
            self.pupil.load_state_dict(state["pupil"])
            for optimiser, saved in zip(self.optimisers, state["optimisers"], strict=True):
                optimiser.load_state_dict(saved)
            self.draws.set_state(state["draws"].cpu())
            self.step = state["step"]
            if state["steps"] != self.recipe.steps and self.step > state["steps"] - self.recipe.decay_steps:
                raise UserError(
                    f"--steps {self.recipe.steps}: the rate is already falling to {state['steps']} steps"
                )

    def save(self) -> None:
        """Write the state beside the old one and swap, so that after a kill one of them is whole."""
        state = {
            "pupil": self.pupil.state_dict(),
            "optimisers": [optimiser.state_dict() for optimiser in self.optimisers],
            "draws": self.draws.get_state(),
            "step": self.step,
            "steps": self.recipe.steps,
        }
        torch.save(state, self.out / "state.tmp")
        (self.out / "state.tmp").replace(self.out / "state.pt")

    def setting(self) -> KnobConfig:
        """Return the setting of this step: native depth and top-k until the decoder has learned enough."""
        knobs = sample_setting(self.space, torch.rand(1 + len(KNOBS), generator=self.draws))
        if self.step < self.recipe.elastic_after:
            native = self.space.native
            return replace(native, tier=knobs.tier)
        return knobs

    def losses(self, batch: PictureBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of one batch and the figures to log."""
        knobs = self.setting()
        seen = see(self.working.model, batch, knobs.tier)
        alone = self.step < self.recipe.vision_steps
        # Once the answers teach too, labels of every fourth picture are enough, and much cheaper.
        every = 1 if alone else min(4, len(batch.images))
        some = slice(int(torch.randint(every, (), generator=self.draws)), None, every)
        labels = dense_labels(batch, seen.grid, self.config.vision, some)
        features, tokens = seen.features[some].flatten(0, 1), seen.distinct[some].flatten(0, 1)
        patch, pooled, chars = self.working.head(features, tokens, labels)
        figures = {"patch": patch, "pooled": pooled, "chars": chars}
        if alone:
            return patch + pooled, figures
        plan = sample_plan(knobs, self.ranking, self.config, self.draws)
        logits, targets, _, balance = read(self.working.model, batch, seen, plan, self.tokenizer)
        answer = F.cross_entropy(logits.float(), targets)
        figures |= {"answer": answer, "balance": balance, "tokens": (logits.argmax(-1) == targets).float().mean()}
        dense = self.recipe.dense_weight * (patch + pooled)
        return answer + dense + self.recipe.balance_weight * balance, figures

    def train(self, workers: int, max_minutes: float, log_every: int) -> bool:
        """Run until the steps are done or the time is over; return True when all steps are done."""
        recipe, began = self.recipe, now_ms()
        first, last = self.step // recipe.passes, -(-recipe.steps // recipe.passes)
        pictures = Pictures(self.out / "tokenizer.json", "train", recipe.batch, recipe.seed, first, last - first)
        sums: dict[str, Tensor] = {}
        mark, since = began, self.step
        for made in picture_loader(pictures, workers):
            batch = made.to(self.device)
            for _ in range(recipe.passes):
                self.advance(batch, sums)
            if self.step - since >= log_every:
                now = now_ms()
                rate = (self.step - since) * recipe.batch / s_from_ms(now - mark)
                self.log({name: value.item() for name, value in sums.items()}, rate, now - began)
                sums.clear()
                mark, since = now, self.step
                if s_from_ms(now - began) > max_minutes * 60:
                    break
        self.save()
        return self.step >= recipe.steps

    def advance(self, batch: PictureBatch, sums: dict[str, Tensor]) -> None:
        """Take one optimiser step; running means of its figures go to `sums`, without waiting for the device."""
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = learning_rate(self.step, group["late"], self.recipe)
        self.working.zero_grad(set_to_none=True)
        if self.working is not self.pupil:
            with torch.no_grad():
                torch._foreach_copy_([*self.working.parameters()], [*self.pupil.parameters()])
        loss, figures = self.losses(batch)
        loss.backward()
        if self.working is not self.pupil:
            hand_over(self.working, self.pupil)
        nn.utils.clip_grad_norm_(self.pupil.parameters(), 1.0)
        for optimiser in self.optimisers:
            optimiser.step()
        self.step += 1
        for name, value in figures.items():
            sums[name] = value.detach() if name not in sums else 0.9 * sums[name] + 0.1 * value.detach()

    def log(self, figures: dict[str, float], rate: float, elapsed_ms: float) -> None:
        """Append a line to `log.jsonl` and show it."""
        left = (self.recipe.steps - self.step) * self.recipe.batch / max(rate, 1e-9)
        line = {
            "step": self.step,
            **{name: round(value, 4) for name, value in figures.items()},
            "pictures_per_s": round(rate, 1),
            "elapsed_ms": round(elapsed_ms),
        }
        with (self.out / "log.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        show(f"{json.dumps(line)}  {left / 60:.1f} min left")

    def evaluate(self, settings: Iterable[KnobConfig], batches: int) -> list[dict[str, Any]]:
        """Measure accuracy on validation scenes, the same ones at every call."""
        recipe = self.recipe
        pictures = Pictures(self.out / "tokenizer.json", "val", recipe.batch, recipe.validation_seed, 0, batches)
        scenes = validation_batches(pictures, batches, self.device)
        results = outcomes(self.model, scenes, settings, self.ranking, self.tokenizer)
        return tabulate(results, self.space)

    def export(self) -> None:
        """Write weights in bfloat16 and the accuracy of every setting, measured on those weights."""
        folder = self.out / "pocket"
        save_model(self.model, folder)
        (folder / "tokenizer.json").write_bytes((self.out / "tokenizer.json").read_bytes())
        self.model.load_state_dict(load_model(folder, self.device, torch.float32).state_dict())
        table = self.evaluate(self.space.settings, self.recipe.validation_batches)
        card = {
            "weights": weights_hash(folder),
            "knob_space": self.space.fingerprint,
            "measure": "exact match of the canonical answer, mean over the four data sets, validation split",
            "data_source": "synthetic",
            "ranking": list(self.ranking.order),
            "output_tokens": self.output_tokens(),
            "option_letters": ascii_uppercase,
            "steps": self.step,
            "recipe": asdict(self.recipe),
            "hardware": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu",
            "settings": table,
        }
        (folder / "accuracy.json").write_text(json.dumps(card, indent=1) + "\n")
        write_card(folder)

    def output_tokens(self) -> dict[str, Any]:
        """Return the lengths of the validation answers with the end token; `counts` starts at one token."""
        pictures = Pictures(self.out / "tokenizer.json", "val", 128, self.recipe.validation_seed, 0, 4)
        lengths, datasets = [], []
        for batch in validation_batches(pictures, 4, torch.device("cpu")):
            places = batch.targets != IGNORE
            numbers, counts = (places.nonzero()[:, 0] * 64 + batch.segments[places]).unique(return_counts=True)
            lengths.append(counts)
            datasets.append(batch.datasets[numbers // 64])
        every, of = torch.cat(lengths).float(), torch.cat(datasets)
        names = {"p50": 0.5, "p97": 0.97, "max": 1.0}
        quantiles = {name: math.ceil(every.quantile(q).item()) for name, q in names.items()}
        by_style = {
            DATASETS[name].style: every[of == i].long().bincount()[1:].tolist() for i, name in enumerate(GENERATED)
        }
        counts = every.long().bincount()[1:].tolist()
        return {"mean": round(every.mean().item(), 3), **quantiles, "counts": counts, "by_style": by_style}


def keep_recipe(path: Path, recipe: Recipe) -> None:
    """Write the recipe of a new run; a resumed run must have the same one, except for `steps`.

    Raises:
        UserError: a field differs from the earlier run's; names it.
    """
    ours = asdict(recipe)
    theirs = json.loads(path.read_text()) if path.exists() else ours
    path.write_text(json.dumps({**theirs, "steps": recipe.steps}, indent=2) + "\n")
    for name, value in ours.items():
        if name != "steps" and theirs.get(name) != value:
            raise UserError(
                f"--{name} {value}: the run in {path.parent} has {theirs.get(name)}; give that, or another folder"
            )


def show(text: str) -> None:
    """Print a line to standard error at once."""
    import sys

    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def corners(space: KnobSpace) -> list[KnobConfig]:
    """Return native, cheapest, and native with each single knob at its lowest: a quick look at a run."""
    native = space.native
    return [
        *(replace(native, tier=tier) for tier in reversed(space.tiers)),
        *(replace(native, **{name: getattr(space.cheapest, name)}) for name in KNOBS if name != "tier"),
        space.cheapest,
    ]


@dataclass(frozen=True, kw_only=True)
class Flags(DeviceFlags, Recipe):
    """The command's flags: those of a run's process, and any field of the recipe."""

    output_dir: Path = required("folder of the run; an earlier run there goes on", "--output_dir", "--out")
    workers: int = flag(2, "processes that draw pictures")
    max_minutes: float = flag(1e9, "minutes after which to stop, to go on later")
    log_every: int = flag(50, "steps between two lines of the log")
    export: bool = flag(False, "write the model even if steps are left")


def flags() -> FlagParser:
    """Make the command's parser."""
    return FlagParser(__doc__, Flags)


def main(argv: list[str]) -> None:
    """Train, then export when all steps are done.

    Raises:
        UserError: a flag makes no sense, or the folder cannot be written or has a run of another recipe.
    """
    args = flags().parse_args(argv)
    recipe = options_from(Recipe, vars(args))
    torch.set_float32_matmul_precision("high")
    device = pick_device(args.device)
    if device.type == "cuda":  # else the thread that pins pictures would take memory of the first device
        torch.cuda.set_device(device)
    with writing_to(args.output_dir):
        trainer = Trainer(args.output_dir, recipe, POCKET, device)
        done = trainer.train(args.workers, args.max_minutes, args.log_every)
        for row in trainer.evaluate(corners(trainer.space), 2):
            show(json.dumps(row))
        if done or args.export:
            trainer.export()


if __name__ == "__main__":
    run(main)
