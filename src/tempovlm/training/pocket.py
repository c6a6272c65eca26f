"""Train the pocket model on scenes that are generated while it trains.

First the vision side alone on dense labels, then everything, under a random tier, top-k and depth at each step.
Resumable: a run that stops, by a limit or a kill, continues from its last state when it is started again. Each
piece of a run leaves `report.json`: accuracy by data set and by template, and what lower knobs lose, step by step.

Examples:
    python -m tempovlm.training.pocket --output_dir runs/pocket --device cuda
    python -m tempovlm.training.pocket --output_dir runs/pilots --recipe 32x24 32x24-spread --minutes 3
    python -m tempovlm.training.pocket --output_dir runs/seed0 --recipe 32x24-spread --minutes 8 --resume
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, fields, replace
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
from tempovlm.engine.threads import physical_cores, pick_device
from tempovlm.lab.options import DeviceFlags
from tempovlm.lab.script import FlagParser, flag, required, run
from tempovlm.model.config import ModelConfig
from tempovlm.model.prompt import CONTROL_TOKENS, Tokenizer
from tempovlm.model.vlm import Molmo
from tempovlm.model.weights import load_model, save_model, weights_hash
from tempovlm.testbed.words import alphabet, vocabulary
from tempovlm.training.elastic import sample_plan, sample_setting
from tempovlm.training.graphs import Graphs
from tempovlm.training.model_card import write_card
from tempovlm.training.muon import Muon
from tempovlm.training.pictures import IGNORE, PictureBatch, Pictures, picture_loader
from tempovlm.training.pocket_eval import Outcome, outcomes, tabulate, validation_batches
from tempovlm.training.recipes import MAX_SIZE_MB, RECIPES, RUN_MINUTES, Recipe, find_recipe
from tempovlm.training.report import Answers, by_cost, corner_settings, make_report, summary
from tempovlm.training.step import Gradients, Pupil, Result, Work, compute, prepare
from tempovlm.training.tokenizer import build_tokenizer

NO_LIMIT = 1e9
"""Minutes of a piece that is a whole run."""

MOST_WORKERS = 8
"""Most processes that draw pictures by default: more of them take time from the one that starts the kernels."""

ENDLESS = 1 << 40
"""More batches than a run whose length is in minutes can draw."""


def working_copy(pupil: Pupil) -> Pupil:
    """Return a bfloat16 copy, which computes; the float32 weights take the updates."""
    copy = deepcopy(pupil).bfloat16()
    copy.model.decoder.rotary.reset()
    return copy


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


def learning_rate(step: float, late: bool, recipe: Recipe, start: int = 0) -> float:
    """Return the rate's factor: warm-up, plateau, linear fall to zero (Hu et al. 2024, arXiv 2404.06395).

    `late` parts warm up when the joint phase begins, the others at `start`. Before the fall begins nothing depends
    on `steps`, so a run may be made longer or shorter until then.
    """
    begin = recipe.vision_steps if late else start
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
        check_size(config)
        self.tokenizer = Tokenizer.load(out / "tokenizer.json")
        with torch.random.fork_rng(devices=()):  # the read-outs are drawn by the library
            torch.manual_seed(recipe.seed)
            self.pupil = Pupil(config)
        initialise(self.pupil.model, recipe.seed)
        self.pupil.to(device)
        self.working = working_copy(self.pupil) if device.type == "cuda" else self.pupil
        self.model, self.config = self.pupil.model, config
        self.space = KnobSpace.for_model(config.shape)
        self.ranking = Ranking.evenly_spaced(config.num_blocks)
        self.optimisers = optimisers(self.pupil, recipe)
        self.gradients = Gradients(self.working, self.pupil)
        self.graphs: Graphs | None = None  # on a CPU nothing is gained
        self.draws = torch.Generator().manual_seed(recipe.seed)
        self.step, self.start, self.spent_ms, self.began_ms = 0, 0, 0.0, now_ms()
        self.teacher: tuple[str, Tensor] | None = None
        if device.type == "cuda":
            self.graphs = Graphs(self.compute, self.gradients, pool=torch.cuda.graph_pool_handle())
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
            self.step, self.start, self.spent_ms = state["step"], state["start"], state["spent_ms"]
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
            "start": self.start,
            "spent_ms": self.spent_ms,
        }
        torch.save(state, self.out / "state.tmp")
        (self.out / "state.tmp").replace(self.out / "state.pt")

    def see_with(self, other: Path) -> None:
        """Start with the vision side of an earlier run, where this one's own vision steps end.

        Raises:
            UserError: there is no state of a run of the same vision side.
        """
        path = other / "state.pt"
        if not path.is_file():
            raise UserError(f"--vision_from {other}: holds no state.pt; give the folder of an earlier run")
        theirs = torch.load(path, map_location=self.device, weights_only=True)["pupil"]
        seen = {name: tensor for name, tensor in theirs.items() if ".decoder." not in name}
        seen = {name: tensor for name, tensor in seen.items() if "embedding" not in name}
        ours = self.pupil.state_dict()
        if wrong := [name for name in seen if name not in ours or ours[name].shape != seen[name].shape]:
            raise UserError(
                f"--vision_from {other}: {wrong[0]} has another shape; give a run of the same vision side"
            )
        self.pupil.load_state_dict(seen, strict=False)
        self.step = self.start = self.recipe.vision_steps

    @property
    def place(self) -> float:
        """Return how far the course has come, in steps of the recipe: by the clock if it has a length in time."""
        total_ms = self.recipe.total_minutes * 60_000
        if not total_ms:
            return self.step
        spent = (self.spent_ms + now_ms() - self.began_ms) / total_ms
        return self.start + min(spent, 1.0) * (self.recipe.steps - self.start)

    def setting(self) -> KnobConfig:
        """Return the setting of this step: native depth and top-k until the decoder has learned enough.

        Where small settings are taught, the first step on each batch of pictures is at the native setting, whose
        answers teach, and the others make up for it.
        """
        recipe = self.recipe
        share = (
            recipe.elastic_share * recipe.passes / max(recipe.passes - 1, 1)
            if self.teaches
            else recipe.elastic_share
        )
        knobs = sample_setting(self.space, torch.rand(1 + len(KNOBS), generator=self.draws), min(share, 1.0))
        if self.place < recipe.elastic_after or (self.teaches and self.teacher is None):
            native = self.space.native
            return replace(native, tier=knobs.tier)
        return knobs

    @property
    def teaches(self) -> bool:
        """Whether the native setting's answers teach smaller ones."""
        return self.recipe.taught_weight > 0 and self.recipe.passes > 1 and self.place >= self.recipe.elastic_after

    def work(self, batch: PictureBatch) -> tuple[KnobConfig, Work]:
        """Draw the setting of this step, and prepare its work."""
        knobs = self.setting()
        alone = self.place < self.recipe.vision_steps
        # Once the answers teach too, labels of every fourth picture are enough, and much cheaper.
        every = 1 if alone else min(4, len(batch.images))
        labelled = slice(int(torch.randint(every, (), generator=self.draws)), None, every)
        plan = None if alone else sample_plan(knobs, self.ranking, self.config, self.draws)
        return knobs, prepare(self.working.model, batch, knobs.tier, plan, labelled, self.tokenizer)

    def compute(self, work: Work) -> Result:
        """Return the loss of a step's work, but for teaching."""
        return compute(self.working, work, self.recipe)

    def learn(self, batch: PictureBatch) -> dict[tuple[str, ...], Tensor]:
        """Take the gradients of one batch; return the figures to log, by their names."""
        knobs, work = self.work(batch)
        teaches = self.teaches and work.course.plan is not None
        if self.graphs is not None and not teaches:
            return dict([self.graphs.run(work)])
        result = self.compute(work)
        loss, figures = result.loss, {result.names: result.figures}
        if teaches and result.logits is not None:
            told = self.told(knobs, result.logits[: len(batch.answers)])
            if told is not None:
                figures[("taught",)] = told.detach().view(1)
                loss = loss + self.recipe.taught_weight * told
        self.gradients.show(self.gradients.take(loss))
        return figures

    def told(self, knobs: KnobConfig, logits: Tensor) -> Tensor | None:
        """Return the divergence of answers (A, V) from the teacher's on the same pictures, or become the teacher.

        In-place distillation (Yu and Huang 2019, arXiv 1903.05134). A teacher that saw less of the picture than
        the setting does teaches nothing.
        """
        if self.teacher is None:
            self.teacher = knobs.tier, logits.detach().float().log_softmax(-1)
            return None
        tier, taught = self.teacher
        small = replace(knobs, tier=self.space.native.tier) != self.space.native
        if not small or self.space.tiers.index(tier) < self.space.tiers.index(knobs.tier):
            return None
        return F.kl_div(logits.float().log_softmax(-1), taught, reduction="batchmean", log_target=True)

    def train(self, workers: int, max_minutes: float, log_every: int) -> bool:
        """Run until the steps are done or the time is over; return True when all steps are done."""
        recipe, self.began_ms = self.recipe, now_ms()
        first = self.step // recipe.passes
        last = ENDLESS if recipe.total_minutes else -(-recipe.steps // recipe.passes)
        pictures = Pictures(
            self.out / "tokenizer.json", "train", recipe.batch, recipe.seed, first, last - first,
            questions=recipe.questions or None,
        )  # fmt: skip
        sums: dict[tuple[str, ...], Tensor] = {}
        mark, since = self.began_ms, self.step
        waiting_ms, ready = 0.0, mark
        for made in picture_loader(pictures, workers):
            waiting_ms += now_ms() - ready
            batch, self.teacher = made.to(self.device), None
            for _ in range(recipe.passes):
                self.advance(batch, sums)
            over = self.place >= recipe.steps
            if self.step - since >= log_every or over:
                now = now_ms()
                rate = (self.step - since) * recipe.batch / s_from_ms(now - mark)
                figures = {
                    name: value
                    for names, values in sums.items()
                    for name, value in zip(names, values.tolist(), strict=True)
                }
                self.log(figures | {"waiting": waiting_ms / (now - mark)}, rate, now - self.began_ms)
                sums.clear()
                mark, since, waiting_ms = now, self.step, 0.0
                if over or s_from_ms(now - self.began_ms) > max_minutes * 60:
                    break
            ready = now_ms()
        done = self.place >= recipe.steps
        self.spent_ms, self.began_ms = self.spent_ms + now_ms() - self.began_ms, now_ms()
        self.save()
        return done

    def advance(self, batch: PictureBatch, sums: dict[tuple[str, ...], Tensor]) -> None:
        """Take one optimiser step; running means of its figures go to `sums`, without waiting for the device."""
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = learning_rate(self.place, group["late"], self.recipe, self.start)
        self.gradients.refresh()
        figures = self.learn(batch)
        nn.utils.clip_grad_norm_(self.pupil.parameters(), 1.0)
        for optimiser in self.optimisers:
            optimiser.step()
        self.step += 1
        for names, values in figures.items():
            sums[names] = sums[names].lerp_(values, 0.1) if names in sums else values.clone()

    def log(self, figures: dict[str, float], rate: float, elapsed_ms: float) -> None:
        """Append a line to `log.jsonl` and show it; `waiting` is the share of time without a batch to train on."""
        left = (self.recipe.steps - self.step) * self.recipe.batch / max(rate, 1e-9)
        if self.recipe.total_minutes:
            left = self.recipe.total_minutes * 60 * (1 - self.place / self.recipe.steps)
        line = {
            "step": self.step,
            "place": round(self.place),
            **{name: round(value, 4) for name, value in figures.items()},
            "pictures_per_s": round(rate, 1),
            "elapsed_ms": round(elapsed_ms),
        }
        with (self.out / "log.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        show(f"{json.dumps(line)}  {left / 60:.1f} min left")

    def answered(self, settings: Iterable[KnobConfig], batches: int) -> Iterator[Outcome]:
        """Answer validation questions at some settings, the same ones at every call."""
        scenes = validation_batches(self.validation(self.recipe.batch, batches), batches, self.device)
        answering = working_copy(self.pupil) if self.device.type == "cuda" else self.pupil
        return outcomes(answering.model, scenes, settings, self.ranking, self.tokenizer)

    def validation(self, batch: int, batches: int) -> Pictures:
        """Describe the validation pictures."""
        path, recipe = self.out / "tokenizer.json", self.recipe
        return Pictures(path, "val", batch, recipe.validation_seed, 0, batches)

    def export(self) -> None:
        """Write weights in bfloat16 and the accuracy of every setting, measured on those weights."""
        folder = self.out / "pocket"
        save_model(self.model, folder)
        (folder / "tokenizer.json").write_bytes((self.out / "tokenizer.json").read_bytes())
        self.model.load_state_dict(load_model(folder, self.device, torch.float32).state_dict())
        found = list(self.answered(self.space.settings, self.recipe.validation_batches))
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
            "settings": tabulate(found, self.space),
            "by_cost": by_cost(Answers(found), corner_settings(self.space)),
        }
        (folder / "accuracy.json").write_text(json.dumps(card, indent=1) + "\n")
        write_card(folder)

    def output_tokens(self) -> dict[str, Any]:
        """Return the lengths of the validation answers with the end token; `counts` starts at one token."""
        pictures = self.validation(128, 4)
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


def check_size(config: ModelConfig) -> None:
    """Raise a `UserError` if the weights would take more than `MAX_SIZE_MB` in bfloat16."""
    with torch.device("meta"):
        size_mb = sum(one.numel() for one in Molmo(config).parameters()) * 2 / 1e6
    if size_mb > MAX_SIZE_MB:
        raise UserError(
            f"--num_experts {config.num_experts} --expert_width {config.expert_width}: makes {size_mb:.1f} MB; at "
            f"most {MAX_SIZE_MB:.0f} go into the package, so choose fewer or narrower experts"
        )


def show(text: str) -> None:
    """Print a line to standard error at once."""
    import sys

    sys.stderr.write(text + "\n")
    sys.stderr.flush()


@dataclass(frozen=True, kw_only=True)
class Flags(DeviceFlags, Recipe):
    """The command's flags: those of a run's process, and any field of the recipe."""

    output_dir: Path = required("folder of the run; an earlier run there goes on", "--output_dir", "--out")
    recipe: Sequence[str] = flag(
        (), f"candidates, each with a run in a folder of its own name: {', '.join(RECIPES)}"
    )
    workers: int | None = flag(None, "processes that draw pictures (default: one for each core, at most 8)")
    max_minutes: float = flag(
        NO_LIMIT, "minutes after which to stop, to go on later", "--minutes", "--max_minutes"
    )
    resume: bool = flag(
        False, f"a piece of a run of --total_minutes, by default {RUN_MINUTES:.0f}; --minutes ends it"
    )
    vision_from: Path | None = flag(None, "folder of an earlier run; a new one starts with its vision side")
    log_every: int = flag(50, "steps between two lines of the log")
    export: bool = flag(False, "write the model even if steps are left, or the run is a pilot")


def flags() -> FlagParser:
    """Make the command's parser."""
    return FlagParser(__doc__, Flags)


def main(argv: list[str]) -> None:
    """Train, report, and export when all steps are done.

    Raises:
        UserError: a flag makes no sense, or the folder cannot be written or has a run of another recipe.
    """
    args = flags().parse_args(argv)
    words = {word.partition("=")[0] for word in argv}
    options = {one.name: getattr(args, one.name) for one in fields(Recipe) if f"--{one.name}" in words}
    pilot = bool(args.recipe) and not args.resume and args.max_minutes < NO_LIMIT
    if pilot or args.resume:
        options.setdefault("total_minutes", args.max_minutes if pilot else RUN_MINUTES)
    torch.set_float32_matmul_precision("high")
    device = pick_device(args.device)
    if device.type == "cuda":  # else the thread that pins pictures would take memory of the first device
        torch.cuda.set_device(device)
    for name in args.recipe or (None,):
        folder = args.output_dir / name if len(args.recipe) > 1 else args.output_dir
        if name and not args.resume and (folder / "state.pt").exists():
            raise UserError(f"--output_dir {folder}: holds a run; --resume goes on with it")
        with writing_to(folder):
            _run(folder, find_recipe(name, options), device, args, pilot)


def _run(folder: Path, recipe: Recipe, device: torch.device, args: Any, pilot: bool) -> None:
    """Train one recipe, write its report, and export it if that is wished, or if it is done and no pilot."""
    trainer = Trainer(folder, recipe, recipe.config, device)
    if args.vision_from and not trainer.step:
        trainer.see_with(args.vision_from)
    workers = min(physical_cores(), MOST_WORKERS) if args.workers is None else args.workers
    done = trainer.train(workers, args.max_minutes, args.log_every)
    if trainer.place > recipe.vision_steps:
        report = make_report(trainer, done)
        (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n")
        show(summary(report))
        if args.export or (done and not pilot):
            trainer.export()


if __name__ == "__main__":
    run(main)
