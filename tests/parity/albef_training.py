"""Cases of ALBEF's training: the learning rate of every step, and the weight of the teacher's word in the first epoch."""

import torch

from hf_vlp.training.optim import rate_factor
from hf_vlp.training.ramps import ramp_value
from hf_vlp.training.recipe import RampRecipe, ScheduleRecipe
from tests.parity.harness import Case

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
