"""Cases of ALBEF's training: the learning rate of every step, the weight of the teacher's word in the first epoch, what decays."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from conversion.albef_layouts import BERT_OPTIONS, VIT_OPTIONS, albef_table
from conversion.tables import Table, forward_names
from hf_vlp.models.albef.answering_albef import VlpAlbefForVisualQuestionAnswering
from hf_vlp.models.albef.configuration_albef import VlpAlbefConfig
from hf_vlp.models.albef.pretraining_albef import VlpAlbefForImageTextRetrieval, VlpAlbefForPreTraining
from hf_vlp.models.albef.tasks_albef import (
    VlpAlbefForTextAssignment,
    VlpAlbefForVisualEntailment,
    VlpAlbefForVisualReasoning,
    VlpAlbefOfTwoImages,
)
from hf_vlp.training.optim import optimizer_of, rate_factor
from hf_vlp.training.ramps import ramp_value
from hf_vlp.training.recipe import RampRecipe, ScheduleRecipe, load_recipe
from tests.parity.albef_init import UNREAD
from tests.parity.albef_model import stored_once
from tests.parity.harness import Case

RECIPE = Path(__file__).parents[2] / "examples" / "configs" / "albef_pretrain_4m.yaml"
MODELS = {
    "pretrain": VlpAlbefForPreTraining,
    "retrieval": VlpAlbefForImageTextRetrieval,
    "grounding": VlpAlbefForImageTextRetrieval,
    "vqa": VlpAlbefForVisualQuestionAnswering,
    "ve": VlpAlbefForVisualEntailment,
    "nlvr_pretrain": VlpAlbefForTextAssignment,
    "nlvr": VlpAlbefForVisualReasoning,
}
FROZEN = {"nlvr_pretrain": ("vision_proj.weight", "vision_proj.bias")}  # drawn by, never trained: ours are frozen
GROUPS = ("decay", "no_decay", "not_trained")

UNIT = 100  # steps of the warm-up in one of the original's units
CHANGES = "lr_changes (lr used by the optimizer step of that iteration)"


def schedule(case: Case) -> None:
    """schedule.json: of each run where the rate changes and to what, and alpha at some steps of the first epoch."""
    for name, run in case.json("schedule.json").items():
        numbers, epoch_steps, epochs = run["schedular"], run["steps_per_epoch"], run["schedular"]["epochs"]
        recipe = ScheduleRecipe(
            name="cosine_epochs",
            warmup_steps=UNIT * numbers["warmup_epochs"],
            warmup_unit=UNIT,
            start_factor=numbers["warmup_lr"] / numbers["lr"],
            end_factor=numbers["min_lr"] / numbers["lr"],
        ).numbers(epochs * epoch_steps, epoch_steps)
        rates = [
            numbers["lr"] * rate_factor(step, total_steps=epochs * epoch_steps, **recipe)
            for step in range(epochs * epoch_steps)
        ]
        changes = [step for step, rate in enumerate(rates) if not step or abs(rate / rates[step - 1] - 1) > 1e-9]
        ours = [(0, -1, rates[0])] + [(*divmod(step, epoch_steps), rates[step]) for step in changes]
        start = f"schedule.json: {name}: "
        case.expect({f"{start}places": [[change["epoch"], change["iter"]] for change in run[CHANGES]]})
        case.compare({f"{start}places": [[epoch, step] for epoch, step, _ in ours]})
        case.expect({f"{start}rates": torch.tensor([change["lr"] for change in run[CHANGES]], dtype=torch.float64)})
        case.compare({f"{start}rates": torch.tensor([rate for _, _, rate in ours], dtype=torch.float64)})
        if run["alpha_by_iter_first_epoch"] is not None:
            alpha, rises = (case.config["runs"][name][key] for key in ("alpha", "warm_up"))
            ramp = RampRecipe(at=[0.0, 1.0], values=[0.0 if rises else alpha, alpha], shape="linear")
            case.expect({f"{start}alpha": torch.tensor(run["alpha_by_iter_first_epoch"], dtype=torch.float64)})
            found = [ramp_value(ramp, step / epoch_steps) for step in run["alpha_iters"]]
            case.compare({f"{start}alpha": torch.tensor(found, dtype=torch.float64)})


def optimizer_groups(case: Case) -> None:
    """optimizer_groups.json: of each model the parameters that decay, those that do not and those that are frozen, and AdamW's numbers."""
    file = "optimizer_groups.json"
    for name, wanted in case.json(file).items():
        passed = {*FROZEN.get(name, ()), *UNREAD.get(name, ())}  # of the original's, whose optimizer has them in vain
        for original in sorted(passed & {original for group in GROUPS for original in wanted[group]}):
            case.listed(f"{file}: {name}: {original}", "no loss reaches it: ours is frozen, or there is none")
        wanted = wanted | {group: sorted(set(wanted[group]) - passed) for group in GROUPS}
        case.expect({f"{file}: {name}: {key}": value for key, value in wanted.items()})
        model = MODELS[name](config_of(case.config))
        recipe = replace(
            load_recipe(RECIPE, ["--data.train", "none"]).optimizer, weight_decay=float(case.config["weight_decay"])
        )
        optimizer = optimizer_of(model, recipe, pairs=1)
        group_of = {
            own: "decay" if group["weight_decay"] else "no_decay"
            for group in optimizer.param_groups
            for own in group["names"]
        }
        group_of |= {own: "not_trained" for own, weight in model.named_parameters() if not weight.requires_grad}
        theirs = {original for group in GROUPS for original in wanted[group]}
        table = table_for(model, theirs)
        found: dict[str, list[str]] = {group: [] for group in GROUPS}
        used: set[str] = set()
        for original in sorted(theirs):
            parts = forward_names(stored_once(original, table), table)
            (group,) = {group_of[part] for part in parts}  # all parts of one tensor are treated alike
            found[group].append(original)
            used |= set(parts)
        used |= {part for original in FROZEN.get(name, ()) for part in forward_names(original, table)}
        case.check(
            f"{name}: our parameters beside theirs", torch.tensor(len(group_of.keys() - used)), torch.tensor(0), 0.0
        )
        numbers = {
            "class": f"torch.{type(optimizer).__name__}",
            "betas": list(optimizer.defaults["betas"]),
            "eps": optimizer.defaults["eps"],
            "weight_decay": sorted(group["weight_decay"] for group in optimizer.param_groups),
        }
        case.compare({f"{file}: {name}: {key}": value for key, value in (found | numbers).items()})


def table_for(model: nn.Module, names: set[str]) -> Table:
    """The rows between a model and the original's `names`."""
    return albef_table(
        model.config.text_config.num_hidden_layers,
        model.config.multimodal_config.num_hidden_layers,
        bert="bert." if any(name.startswith("text_encoder.bert.") for name in names) else "",
        images=2 if isinstance(model, VlpAlbefOfTwoImages) else 1,
        answer_layers=model.config.answer_layers,
    )


def config_of(options: Mapping) -> VlpAlbefConfig:
    """Ours of the sizes in config.json, with a momentum copy."""
    bert, vit = options["bert_config"], options["vit"]
    sizes = {name: bert[name] for name in ("hidden_size", "intermediate_size")}
    sizes |= {ours: bert[theirs] for theirs, ours in BERT_OPTIONS.items()}
    tables = {name: bert[name] for name in ("vocab_size", "max_position_embeddings", "type_vocab_size")}
    before = bert["fusion_layer"]
    vision = {ours: vit[theirs] for theirs, ours in VIT_OPTIONS.items()}
    vision |= {"hidden_size": vit["embed_dim"], "num_hidden_layers": vit["depth"], "patch_size": vit["patch_size"]}
    vision |= {"image_size": vit["image_res"], "intermediate_size": int(vit["embed_dim"] * vit["mlp_ratio"])}
    return VlpAlbefConfig(
        vision_config=vision,
        text_config=sizes | tables | {"num_hidden_layers": before},
        multimodal_config=sizes | {"num_hidden_layers": bert["num_hidden_layers"] - before},
        answer_layers=options.get("decoder_layers", 6),
        queue_size=2,
        num_labels=3,
    )
