"""The one list of architectures, and how they reach transformers' Auto classes.

`import hf_vlp` makes every architecture known without loading any: each configuration is handed to an Auto class at the moment
transformers loads the module that holds it (or at once where it is loaded already), models and processors by name, to be
imported when first asked for. Loading modelling code takes seconds, and a program that only tokenises should not pay for it;
importing it while transformers itself is half loaded would go in a circle.
"""

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections import UserDict
from dataclasses import dataclass, field

AUTO = "transformers.models.auto"


@dataclass(frozen=True)
class Row:
    """One configuration and everything registered under it.

    Every name is "module:Class" below `hf_vlp.models`; ".inputs.module:Class" is beside it, below `hf_vlp`.
    """

    config: str
    models: dict[str, str] = field(default_factory=dict)
    processor: str | None = None
    image_processors: dict[str, str] = field(default_factory=dict)
    feature_extractor: str | None = None
    tokenizer: str | None = None

    def names(self) -> tuple[str, ...]:
        """Every "module:Class" of the row."""
        inputs = (self.processor, *self.image_processors.values(), self.feature_extractor, self.tokenizer)
        return (self.config, *self.models.values(), *(name for name in inputs if name))


TABLE = {
    "vlp_clip_text_model": Row(
        "clip.configuration_clip:VlpClipTextConfig", {"AutoModel": "clip.modeling_clip:VlpClipTextModel"}
    ),
    "vlp_clip_vision_model": Row(
        "clip.configuration_clip:VlpClipVisionConfig", {"AutoModel": "clip.modeling_clip:VlpClipVisionModel"}
    ),
    "vlp_clip_resnet_model": Row(
        "clip.configuration_clip:VlpClipResNetConfig", {"AutoModel": "clip.modeling_clip:VlpClipResNetModel"}
    ),
    "vlp_clip": Row(
        "clip.configuration_clip:VlpClipConfig",
        {
            "AutoModel": "clip.modeling_clip:VlpClipModel",
            "AutoModelForPreTraining": "clip.modeling_clip:VlpClipForPreTraining",
            "AutoModelForZeroShotImageClassification": "clip.modeling_clip:VlpClipModel",
            "AutoModelForImageClassification": "clip.tasks_clip:VlpClipForImageClassification",
        },
        processor="clip.processing_clip:VlpClipProcessor",
        image_processors={
            "torchvision": "clip.image_processing_clip:VlpClipImageProcessor",
            "pil": "clip.image_processing_clip:VlpClipImageProcessorPil",
        },
    ),
    "vlp_vse_grid_model": Row(
        "vse.configuration_vse:VlpVseGridConfig", {"AutoModel": "vse.modeling_vse:VlpVseGridModel"}
    ),
    "vlp_vse_gru_model": Row("vse.configuration_vse:VlpVseGruConfig", {"AutoModel": "vse.modeling_vse:VlpVseGruModel"}),
    "vlp_vse": Row(
        "vse.configuration_vse:VlpVseConfig",
        {
            "AutoModel": "vse.modeling_vse:VlpVseModel",
            "AutoModelForPreTraining": "vse.modeling_vse:VlpVseForPreTraining",
        },
        processor="vse.processing_vse:VlpVseProcessor",
        image_processors={
            "torchvision": "vse.image_processing_vse:VlpVseImageProcessor",
            "pil": "vse.image_processing_vse:VlpVseImageProcessorPil",
        },
        feature_extractor=".inputs.region_feature_extractor:VlpRegionFeatureExtractor",
        tokenizer=".inputs.word_tokenizer:VlpWordTokenizer",
    ),
    "vlp_albef_text_model": Row(
        "albef.configuration_albef:VlpAlbefTextConfig", {"AutoModel": "albef.modeling_albef:VlpAlbefTextModel"}
    ),
    "vlp_albef_vision_model": Row(
        "albef.configuration_albef:VlpAlbefVisionConfig", {"AutoModel": "albef.modeling_albef:VlpAlbefVisionModel"}
    ),
    "vlp_albef": Row(
        "albef.configuration_albef:VlpAlbefConfig",
        {
            "AutoModel": "albef.modeling_albef:VlpAlbefModel",
            "AutoModelForPreTraining": "albef.pretraining_albef:VlpAlbefForPreTraining",
            "AutoModelForTextAssignment": "albef.tasks_albef:VlpAlbefForTextAssignment",
            "AutoModelForMaskedLM": "albef.tasks_albef:VlpAlbefForMaskedLM",
            "AutoModelForImageTextRetrieval": "albef.pretraining_albef:VlpAlbefForImageTextRetrieval",
            "AutoModelForVisualQuestionAnswering": "albef.answering_albef:VlpAlbefForVisualQuestionAnswering",
            "AutoModelForVisualReasoning": "albef.tasks_albef:VlpAlbefForVisualReasoning",
            "AutoModelForVisualEntailment": "albef.tasks_albef:VlpAlbefForVisualEntailment",
        },
        processor="albef.processing_albef:VlpAlbefProcessor",
        image_processors={
            "torchvision": "albef.image_processing_albef:VlpAlbefImageProcessor",
            "pil": "albef.image_processing_albef:VlpAlbefImageProcessorPil",
        },
    ),
    "vlp_vilt": Row(
        "vilt.configuration_vilt:VlpViltConfig",
        {
            "AutoModel": "vilt.modeling_vilt:VlpViltModel",
            "AutoModelForPreTraining": "vilt.modeling_vilt:VlpViltForPreTraining",
            "AutoModelForMaskedLM": "vilt.tasks_vilt:VlpViltForMaskedLM",
            "AutoModelForImageTextRetrieval": "vilt.tasks_vilt:VlpViltForImageTextRetrieval",
            "AutoModelForVisualQuestionAnswering": "vilt.tasks_vilt:VlpViltForVisualQuestionAnswering",
            "AutoModelForVisualReasoning": "vilt.tasks_vilt:VlpViltForVisualReasoning",
        },
        processor="vilt.processing_vilt:VlpViltProcessor",
        image_processors={
            "torchvision": "vilt.image_processing_vilt:VlpViltImageProcessor",
            "pil": "vilt.image_processing_vilt:VlpViltImageProcessorPil",
        },
    ),
}

OWN_AUTO_CLASSES = (
    "AutoModelForImageTextRetrieval",
    "AutoModelForVisualReasoning",
    "AutoModelForVisualEntailment",
    "AutoModelForReferringExpression",
    "AutoModelForTextAssignment",
)


def _module(name: str) -> str:
    module = name.partition(":")[0]
    return importlib.util.resolve_name(module if module.startswith(".") else f".models.{module}", __package__)


def resolve(name: str) -> type:
    """The class behind a name of a `Row`."""
    return getattr(importlib.import_module(_module(name)), name.partition(":")[2])


class _Classes(UserDict):
    """What an Auto class holds beyond transformers' own: configuration -> class, or -> {backend: class}; ours wait as names."""

    def __getitem__(self, config):
        value = self.data[config]
        if isinstance(value, str):
            self.data[config] = resolve(value)
        elif isinstance(value, dict):
            self.data[config] = {key: resolve(name) if isinstance(name, str) else name for key, name in value.items()}
        return self.data[config]


def _add(mapping, row: Row, value: str | dict[str, str]) -> None:
    """Register `value` under the configuration of `row`: what `AutoModel.register` does, for a class not yet imported."""
    if not isinstance(mapping._extra_content, _Classes):
        mapping._extra_content = _Classes(mapping._extra_content)
    if resolve(row.config) not in mapping._extra_content:
        mapping._extra_content[resolve(row.config)] = value


def _register_configs() -> None:
    from transformers.models.auto.configuration_auto import AutoConfig

    for model_type, row in TABLE.items():
        AutoConfig.register(model_type, resolve(row.config), exist_ok=True)


def _register_models() -> None:
    auto = importlib.import_module(f"{AUTO}.modeling_auto")
    for row in TABLE.values():
        for auto_class, model in row.models.items():
            owner = getattr(auto, auto_class, None) or globals().get(auto_class) or __getattr__(auto_class)
            _add(owner._model_mapping, row, model)


def _register_processors() -> None:
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

    for row in TABLE.values():
        if row.processor:
            _add(PROCESSOR_MAPPING, row, row.processor)


def _register_image_processors() -> None:
    from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING

    for row in TABLE.values():
        if row.image_processors:
            _add(IMAGE_PROCESSOR_MAPPING, row, row.image_processors)


def _register_feature_extractors() -> None:
    from transformers.models.auto.feature_extraction_auto import FEATURE_EXTRACTOR_MAPPING

    for row in TABLE.values():
        if row.feature_extractor:
            _add(FEATURE_EXTRACTOR_MAPPING, row, row.feature_extractor)


def _register_tokenizers() -> None:
    from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING

    for row in TABLE.values():
        if row.tokenizer:
            _add(TOKENIZER_MAPPING, row, row.tokenizer)


REGISTRATIONS = {
    f"{AUTO}.configuration_auto": _register_configs,
    f"{AUTO}.modeling_auto": _register_models,
    f"{AUTO}.processing_auto": _register_processors,
    f"{AUTO}.image_processing_auto": _register_image_processors,
    f"{AUTO}.feature_extraction_auto": _register_feature_extractors,
    f"{AUTO}.tokenization_auto": _register_tokenizers,
}


_CONFIGS = {_module(row.config) for row in TABLE.values()}
_LOADED: set[str] = set()  # Auto modules and configuration modules that are loaded to the end


class _RegisterAfterLoading(importlib.abc.Loader):
    """Runs a module's own loader, then whatever registration has become possible."""

    def __init__(self, loader: importlib.abc.Loader):
        self.loader = loader

    def create_module(self, spec):
        return self.loader.create_module(spec)

    def exec_module(self, module):
        self.loader.exec_module(module)
        module.__spec__.loader = module.__loader__ = self.loader
        _LOADED.add(module.__name__)
        register()


class _AutoModuleFinder(importlib.abc.MetaPathFinder):
    """Finds the modules of `REGISTRATIONS` and our configurations as Python does, and adds the registration to their loading."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname not in REGISTRATIONS and fullname not in _CONFIGS:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _RegisterAfterLoading(spec.loader)
        return spec


def register() -> None:
    """Make every architecture of `TABLE` known to transformers; called by `import hf_vlp`, harmless when repeated."""
    if not any(isinstance(finder, _AutoModuleFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AutoModuleFinder())
        _LOADED.update(module for module in REGISTRATIONS if module in sys.modules)
    if any(module in sys.modules and module not in _LOADED for module in _CONFIGS):
        return  # a configuration is being imported and has brought transformers along: its end calls again
    for module, registration in REGISTRATIONS.items():
        if module in _LOADED:
            registration()


def __getattr__(name: str) -> type:
    """Our own Auto classes, for tasks that transformers has none for; built when first asked for."""
    if name not in OWN_AUTO_CLASSES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from collections import OrderedDict

    from transformers.models.auto.auto_factory import _BaseAutoModelClass, _LazyAutoMapping
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    mapping = _LazyAutoMapping(CONFIG_MAPPING_NAMES, OrderedDict())
    doc = f"`from_pretrained` and `from_config` for every registered class of the task: {name.removeprefix('AutoModelFor')}."
    globals()[name] = type(
        name, (_BaseAutoModelClass,), {"_model_mapping": mapping, "__doc__": doc, "__module__": __name__}
    )
    return globals()[name]
