"""The kinds of ViLT's cases: which procedure runs a folder, and how far floats may be apart."""

from tests.parity.harness import Kind, at_least
from tests.parity.vilt_data import (
    data_coco,
    data_nlvr2,
    data_vqa,
    irtr_recall,
    metrics,
    vqa_normalize,
)
from tests.parity.vilt_init import init_from_pretrain
from tests.parity.vilt_inputs import image_processing, randaugment
from tests.parity.vilt_model import backbone, optimizer, tasks
from tests.parity.vilt_retrieval import irtr_eval
from tests.parity.vilt_text import text_processing
from tests.parity.vilt_wpa import wpa_ipot

OUTPUTS = (("*", at_least(2e-5, 0)),)
BACKBONE, TASKS = Kind(backbone, OUTPUTS), Kind(tasks, OUTPUTS)

KINDS: dict[str, Kind] = {
    "backbone_forward": BACKBONE,
    "backbone_portrait_single": BACKBONE,
    "patch_sampling": BACKBONE,
    "pretrain_mlm_itm": TASKS,
    "pretrain_mpp": TASKS,
    "vqa": TASKS,
    "nlvr2": TASKS,
    "irtr": TASKS,
    "init_from_pretrain": Kind(init_from_pretrain, (("*", at_least(0, 0)),)),
    "irtr_eval": Kind(irtr_eval, OUTPUTS),
    "optimizer_vqa": Kind(optimizer, (("*", at_least(1e-7, 0)),)),
    "image_processing": Kind(
        image_processing,
        (("*", at_least(0, 0)),),
        listed={"processed_*_pillow13": "what one call of a newer Pillow gives, where it differs"},
    ),
    "randaugment": Kind(randaugment),
    "text_processing": Kind(text_processing),
    "wpa_ipot": Kind(wpa_ipot, (("*", at_least(1e-5, 0)),)),
    "data_coco": Kind(data_coco),
    "data_vqa": Kind(data_vqa),
    "data_nlvr2": Kind(data_nlvr2),
    "vqa_normalize": Kind(vqa_normalize),
    "metrics": Kind(metrics, (("*", at_least(1e-6, 0)),)),
    "irtr_recall": Kind(irtr_recall, (("*", at_least(0, 0)),)),
}
