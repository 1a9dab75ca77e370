"""The kinds of VSE-infinity's cases: which procedure runs a folder, and how far floats may be apart.

Bounds follow the Tolerance section of the cases' READMEs: 2e-5, or four times the difference between the original's float32 and
float64 runs where that is larger. Fourfold, it is at most 2.9e-6 of the tensor's largest magnitude (`eval.img.image_encoder.fc` of
grid_wsl_bert). Scores of the pooling are not bounded by their largest magnitude, which is the mark of padding.
"""

from tests.parity.harness import Kind, at_least
from tests.parity.vse_evaluation import eval_metrics
from tests.parity.vse_inputs import caption_processing_bert, caption_processing_bigru, image_processing
from tests.parity.vse_model import gpo, losses, model
from tests.parity.vse_regions import region_dataset
from tests.parity.vse_training import AFTER_BOUND, train_step

MODEL = Kind(model, (("*.gpool.linear", at_least(2e-5, 0)), ("*", at_least(2e-5, 4e-6))), gradient_floor=1e-5)
TRAIN_STEP = Kind(train_step, (("after.*", at_least(AFTER_BOUND, 0)), ("*", at_least(0, 1e-4))))
CAPTION_INPUTS = {
    f"{file}: *: {name}": "an input"
    for file in ("eval.json", "train.json")
    for name in ("caption", "uniform_draws", "random_tokens", "random_ids")
}

KINDS: dict[str, Kind] = {
    "region_bert": MODEL,
    "region_bert_nonorm": MODEL,
    "region_bigru": MODEL,
    "grid_detector_bert": MODEL,
    "grid_wsl_bert": MODEL,
    "grid_detector_bigru": MODEL,
    "gpo": Kind(gpo, (("loss", at_least(0, 1e-5)), ("*", at_least(2e-5, 0))), gradient_floor=1e-5),
    "losses": Kind(losses, (("*", at_least(2e-5, 0)),)),
    "train_step_region": TRAIN_STEP,
    "train_step_grid": TRAIN_STEP,
    "train_step_bigru": TRAIN_STEP,
    "region_dataset": Kind(region_dataset, (("*", at_least(2e-5, 0)),)),
    "caption_processing_bert": Kind(caption_processing_bert, listed=CAPTION_INPUTS),
    "caption_processing_bigru": Kind(caption_processing_bigru, (("*", at_least(2e-5, 0)),), listed=CAPTION_INPUTS),
    "image_processing": Kind(image_processing, (("*.detector.*", at_least(5e-4, 0)), ("*", at_least(2e-5, 0)))),
    "eval_metrics": Kind(eval_metrics, (("*", at_least(1e-3, 0)),)),
}
