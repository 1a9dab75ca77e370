"""What importing the package costs, brings along and leaves alone. Each question needs a fresh interpreter."""

import json
import subprocess
import sys

import pytest

import hf_vlp

HEAVY = ("datasets", "timm", "ot", "torchvision", "matplotlib", "ftfy")
BLOCKED = tuple(
    name for name in HEAVY if name != "torchvision"
)  # which transformers' own modelling code takes where it is installed

TIMED = """
import json, sys, time

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"blocked: {name}", name=name)

import torch, transformers
sys.meta_path.insert(0, Blocked())
before = set(sys.modules)
start = time.process_time()  # other programs on the machine do not count
import hf_vlp
seconds = time.process_time() - start
new = sorted(set(sys.modules) - before)
config = hf_vlp.VlpClipConfig()
model = hf_vlp.VlpClipTextModel(hf_vlp.VlpClipTextConfig(num_hidden_layers=1, vocab_size=9, hidden_size=8, num_attention_heads=1))
print(json.dumps({"seconds": seconds, "new": new, "built": type(model).__name__}))
"""

# One process per way of importing first, forked from one that has loaded what transformers brings along, to save seconds.
ORDERS = """
import json, os, sys, traceback
import torch, torch._dynamo, torchvision, scipy.stats

FIRST = [
    "import transformers; transformers.AutoModel; transformers.AutoProcessor; import hf_vlp",
    "import hf_vlp; from transformers import BertModel",
    "from hf_vlp.layers.blocks import Block",
    "from hf_vlp.models.clip.configuration_clip import VlpClipConfig",
    "from hf_vlp.models.clip.tasks_clip import VlpClipForImageClassification",
    "from hf_vlp.models.clip.processing_clip import VlpClipProcessor",
    "from hf_vlp.models.vse.image_processing_vse import VlpVseImageProcessor",
    "from hf_vlp.inputs.word_tokenizer import VlpWordTokenizer",
]

def check():
    import hf_vlp
    from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForPreTraining, CLIPConfig, CLIPModel
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
    from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING
    from transformers.models.auto.feature_extraction_auto import FEATURE_EXTRACTOR_MAPPING
    from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING

    small = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    config = AutoConfig.for_model("vlp_clip", text_config=dict(small, vocab_size=9), vision_config=small, projection_dim=4)
    assert type(config) is hf_vlp.VlpClipConfig, type(config)
    assert type(AutoModel.from_config(config)) is hf_vlp.VlpClipModel
    assert type(AutoModelForPreTraining.from_config(config)) is hf_vlp.VlpClipForPreTraining
    assert PROCESSOR_MAPPING[type(config)] is hf_vlp.VlpClipProcessor
    assert IMAGE_PROCESSOR_MAPPING[type(config)]["pil"] is hf_vlp.VlpClipImageProcessorPil
    assert PROCESSOR_MAPPING[hf_vlp.VlpVseConfig] is hf_vlp.VlpVseProcessor
    assert FEATURE_EXTRACTOR_MAPPING[hf_vlp.VlpVseConfig] is hf_vlp.VlpRegionFeatureExtractor
    assert TOKENIZER_MAPPING[hf_vlp.VlpVseConfig] is hf_vlp.VlpWordTokenizer
    assert type(AutoConfig.for_model("clip")) is CLIPConfig
    native = CLIPConfig(text_config=dict(small, vocab_size=9), vision_config=dict(small, patch_size=8, image_size=16))
    assert type(AutoModel.from_config(native)) is CLIPModel

for first in FIRST:
    child = os.fork()
    if not child:
        try:
            exec(first)
            check()
            code = 0
        except BaseException:
            print("AFTER", first, file=sys.stderr)
            traceback.print_exc()
            code = 1
        sys.stderr.flush()
        os._exit(code)
    if os.waitpid(child, 0)[1]:
        sys.exit(1)
print(json.dumps(FIRST))
"""


def fresh_interpreter(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()[-1]


def test_importing_is_quick_and_light():
    runs = [json.loads(fresh_interpreter(f"BLOCKED = {BLOCKED!r}\n{TIMED}")) for _ in range(2)]
    assert min(run["seconds"] for run in runs) < 0.3
    for run in runs:
        assert run["built"] == "VlpClipTextModel"
        assert not [name for name in run["new"] if name.partition(".")[0] in HEAVY]
        assert not [name for name in run["new"] if name.startswith("hf_vlp.models.")]


def test_the_auto_classes_know_us_whatever_is_imported_first():
    assert len(json.loads(fresh_interpreter(ORDERS))) == 8


def test_public_names_are_listed_and_there():
    names = dir(hf_vlp)
    assert {"VlpClipModel", "VlpClipConfig", "VlpClipProcessor", "AutoModelForImageTextRetrieval"} <= set(names)
    for name in hf_vlp.__all__:
        assert getattr(hf_vlp, name) is not None
    assert set(hf_vlp.__all__) <= set(names)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="hf_vlp.*'VlpClipModle'"):
        hf_vlp.VlpClipModle  # noqa: B018
    assert hf_vlp.training.__name__ == "hf_vlp.training"


def test_registering_twice_is_harmless():
    from transformers import AutoModel

    before = AutoModel._model_mapping[hf_vlp.VlpClipConfig]
    hf_vlp.auto.register()
    assert AutoModel._model_mapping[hf_vlp.VlpClipConfig] is before is hf_vlp.VlpClipModel


def test_our_own_auto_classes_refuse_what_they_do_not_know():
    with pytest.raises(ValueError, match="Unrecognized configuration class"):
        hf_vlp.AutoModelForImageTextRetrieval.from_config(hf_vlp.VlpClipTextConfig())
