"""The kinds of CLIP's cases: which procedure runs a folder, and how far floats may be apart.

Bounds follow the Tolerance section of the cases' READMEs: 2e-5, or four times the difference between the original's
float32 and float64 runs where that is larger. Fourfold, it is at most 6.7e-6 of the tensor's largest magnitude in eval
mode (`vision.block.1` of vit_multihead) and 1.1e-5 in train mode, where batch norm divides by statistics of few rows:
train mode keeps the default.
"""

from tests.parity.clip_inputs import image_preprocess, tokenizer
from tests.parity.clip_loss import contrastive_loss, linear_probe
from tests.parity.clip_model import initialisation, model, zeroshot
from tests.parity.harness import Kind, at_least, sum_of

FORWARD = (("fp16.*", sum_of(0.01, 0.002)), ("train.*", at_least(2e-5, 2e-5)), ("*", at_least(2e-5, 7e-6)))

MODEL = Kind(model, FORWARD, gradient_floor=1e-5)
INITIALISATION = Kind(initialisation)
TOKENIZER = Kind(
    tokenizer,
    listed={
        "cases.json: *: hf_*": "transformers' own tokenizer, stored for comparison only",
        "cases.json: *: name": "a label",
        "cases.json: *: text": "an input",
    },
)

KINDS = {
    "vit": MODEL,
    "vit_multihead": MODEL,
    "text_multihead": MODEL,
    "resnet": MODEL,
    "vit_fp32_checkpoint": MODEL,
    "resnet_fp32_checkpoint": MODEL,
    "zeroshot": Kind(zeroshot, FORWARD, gradient_floor=1e-5),
    "contrastive_loss": Kind(contrastive_loss, (("*", at_least(2e-5, 1e-5)),)),
    "init_vit": INITIALISATION,
    "init_resnet": INITIALISATION,
    "linear_probe": Kind(
        linear_probe,
        (("accuracy_percent", at_least(1e-3, 0)), ("coef", at_least(1e-2, 0)), ("intercept", at_least(1e-2, 0))),
    ),
    "tokenizer_full": TOKENIZER,
    "tokenizer_small": TOKENIZER,
    "image_preprocess": Kind(
        image_preprocess,
        (("pixels.*", at_least(2e-5, 0)),),
        listed={
            "cases.json: *: max_abs_diff_*": "distance to another order of operations, stored for comparison only",
            "cases.json: *: file": "an input",
            "cases.json: *: n_px": "an input",
        },
    ),
}
