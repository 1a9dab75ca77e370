"""The kinds of ALBEF's cases: which procedure runs a folder, and how far floats may be apart."""

from tests.parity.albef_data import datasets, metrics
from tests.parity.albef_explain import gradcam
from tests.parity.albef_init import init_from_pretrain, init_nlvr_from_ta
from tests.parity.albef_inputs import image_transform, text_processing
from tests.parity.albef_model import backbone, interpolation, training, training_on_ranks, training_steps
from tests.parity.albef_retrieval import rerank
from tests.parity.albef_tasks import answering, entailment, ranking, reasoning, text_assignment
from tests.parity.albef_training import optimizer_groups, schedule
from tests.parity.harness import Kind, at_least

# of float32 against float64 the released code differs by up to 1.5e-5; gradients of keys' biases are 0 but for rounding
TRAINING = Kind(training, gradient_floor=1e-5)

KINDS: dict[str, Kind] = {
    "backbone": Kind(backbone),
    "pos_embed_interpolation": Kind(interpolation),
    "pretrain_alpha0": TRAINING,
    "pretrain_alpha04": TRAINING,
    "retrieval_rerank": Kind(rerank),
    "retrieval_finetune": TRAINING,
    "retrieval_finetune_nodistill": TRAINING,
    "pretrain_two_ranks": Kind(training_on_ranks, gradient_floor=1e-5),
    "pretrain_two_steps": Kind(training_steps, gradient_floor=1e-5),
    "ve": Kind(entailment, gradient_floor=1e-5),
    "nlvr_pretrain_ta": Kind(text_assignment, gradient_floor=1e-5),
    "nlvr_finetune": Kind(reasoning, gradient_floor=1e-5),
    "vqa_train": Kind(answering, gradient_floor=1e-5),
    "vqa_rank_answer": Kind(ranking),
    "init_from_pretrain": Kind(init_from_pretrain),
    "init_nlvr_from_ta": Kind(init_nlvr_from_ta),
    "optimizer_groups": Kind(optimizer_groups),
    "image_transform": Kind(
        image_transform,
        (("*", at_least(1e-6, 0)),),
        listed={"alt_pillow13.*": "what one call of a newer Pillow gives, where it differs"},
    ),
    "text_processing": Kind(text_processing),
    "datasets": Kind(datasets),
    "metrics": Kind(
        metrics, (("itm.*", at_least(1e-6, 1e-6)), ("iou_*", at_least(1e-6, 0)), ("grounding.*", at_least(1e-6, 0)))
    ),
    "schedule": Kind(schedule, (("*", at_least(0, 1e-6)),)),
    "gradcam": Kind(gradcam, tuple((name, at_least(1e-6, 1e-4)) for name in ("gradcam_*", "per_token_*"))),
}
