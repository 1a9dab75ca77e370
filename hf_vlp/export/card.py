"""The text of a saved folder's model card.

A card says what the folder's own files say: config.json, the headers of the weight files, results.json (what was measured,
as examples/evaluate.py, pretrain.py and finetune.py write it), recipe.yaml. No number is kept anywhere else.
"""

import importlib
import inspect
import json
import math
import re
from pathlib import Path
from typing import Any

from hf_vlp.auto import OWN_AUTO_CLASSES, TABLE, Row, resolve

PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")
BATCH_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
HUB_TASKS = {
    "retrieval": "zero-shot-retrieval",
    "cxc": "zero-shot-retrieval",
    "zero-shot": "zero-shot-image-classification",
    "linear-probe": "image-classification",
}
PIPELINES = {
    "AutoModelForVisualQuestionAnswering": "visual-question-answering",
    "AutoModelForImageClassification": "image-classification",
    "AutoModelForZeroShotImageClassification": "zero-shot-image-classification",
}
REPAIR = "measure again with examples/evaluate.py, or delete the file"
FACTS = {
    "hidden_size": "width",
    "width": "stem width",
    "embedding_size": "embedding width",
    "num_hidden_layers": "blocks",
    "layers": "blocks a stage",
    "depths": "blocks a stage",
    "hidden_sizes": "widths of the stages",
    "graph": "graph",
    "groups": "groups",
    "num_attention_heads": "heads",
    "image_size": "image size",
    "patch_size": "patch",
    "max_position_embeddings": "longest text",
    "vocab_size": "vocabulary",
    "region_size": "numbers of a region",
    "margin": "margin of the loss",
}


class CardError(ValueError):
    """A folder that no card can be written of; the message names the file, the value at fault and the remedy."""


def card_text(folder: str | Path, repo_id: str | None = None, **metadata: Any) -> str:
    """The text of the card that `write_card` writes."""
    from huggingface_hub import ModelCardData

    folder = Path(folder)
    config, row, model_class = _architecture(folder)
    results, recipe = read_results(folder / "results.json"), _read_recipe(folder / "recipe.yaml")
    name = repo_id or str(folder)
    module = inspect.getdoc(importlib.import_module(_modeling_module(row))) or ""
    auto_class, pipeline = _auto_class(row, model_class)
    data = {
        "library_name": "transformers",
        "pipeline_tag": pipeline,
        "tags": ["hf_vlp", config.model_type],
        **({"model_name": name.rpartition("/")[2], "eval_results": _model_index(results)} if results else {}),
        **metadata,
    }
    sections = [
        f"# {name.rpartition('/')[2]}",
        _introduction(module, model_class),
        "## Architecture",
        _architecture_section(folder, config, model_class),
        "## Loading",
        _loading(folder, name, auto_class),
        "## Reading the scores",
        _reading_the_scores(folder, config, model_class),
        "## Training",
        _training_section(recipe),
        "## Measured results",
        *(_result_section(result) for result in results),
        *([] if results else ["No results measured. `python examples/evaluate.py` on this folder adds them."]),
        "## Differences from the released code",
        _differences(module),
        "## Limits",
        "What is not listed above was not measured. The model repeats what its training captions say about pictures, with "
        "their gaps and prejudices; do not use it to identify or judge people, or unattended where a mistake does harm.",
    ]
    return f"---\n{ModelCardData(**data).to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n"


def read_results(path: str | Path) -> list[dict[str, Any]]:
    """The measured results of a folder: objects with `task`, `data`, `metrics` (name -> number) and, where known, `split`,
    `counts`, `protocol`, `command`, `date`; none if there is no such file.

    Raises:
        CardError: the file is not like that.
    """
    path = Path(path)
    if not path.exists():
        return []
    results = _read_json(path)
    if not isinstance(results, list):
        raise CardError(f"{path} holds a {type(results).__name__}, not a list of results: {REPAIR}")
    for position, result in enumerate(results):
        where = f"{path}, result {position}"
        if not isinstance(result, dict):
            raise CardError(f"{where} is a {type(result).__name__}, not an object: {REPAIR}")
        for field, kind in (("task", str), ("data", str), ("metrics", dict)):
            if not isinstance(result.get(field), kind) or not result[field]:
                raise CardError(
                    f"{where}: {field} is {result.get(field)!r}, not a {kind.__name__} with content: {REPAIR}"
                )
        for metric, value in result["metrics"].items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise CardError(f"{where}: the metric {metric} is {value!r}, not a finite number: {REPAIR}")
    return results


# ------------------------------------------------------------------------------------------------ what the files say


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CardError(f"{path} cannot be read as JSON ({error}): write it anew") from error


def _architecture(folder: Path) -> tuple[Any, Row, type]:
    """Configuration, row of the table and saved class."""
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no config.json: give a folder that save_pretrained wrote")
    fields = _read_json(path)
    model_type = fields.get("model_type") if isinstance(fields, dict) else None
    if model_type not in TABLE:
        raise CardError(f"{path}: model_type is {model_type!r}, none of this package's: {', '.join(TABLE)}")
    row = TABLE[model_type]
    classes = {name.partition(":")[2]: name for name in row.models.values()}
    saved = (fields.get("architectures") or [None])[0]
    if saved not in classes:
        raise CardError(f"{path}: architectures is {saved!r}, none of {', '.join(classes)}: save with save_pretrained")
    return resolve(row.config).from_pretrained(folder), row, resolve(classes[saved])


def _modeling_module(row: Row) -> str:
    names = (name.partition(":")[0] for name in row.models.values())
    return "hf_vlp.models." + next(name for name in names if ".modeling_" in name)


def _auto_class(row: Row, model_class: type) -> tuple[str, str | None]:
    """The Auto class that a user of this folder wants, and the Hub's name of its task."""
    autos = [auto for auto, name in row.models.items() if name.endswith(f":{model_class.__name__}")]
    base = resolve(row.models["AutoModel"])
    if autos == ["AutoModelForPreTraining"] and hasattr(base, "score_pairs"):  # its base model is what embeds and scores
        autos = [auto for auto, name in row.models.items() if name == row.models["AutoModel"]]
    return autos[0], next((PIPELINES[auto] for auto in autos if auto in PIPELINES), None)


def _weights(folder: Path) -> dict[str, tuple[Path, list[int], str]]:
    """Name of every tensor -> file, shape and type, from the headers alone."""
    from safetensors import SafetensorError, safe_open

    files = [folder / "model.safetensors"]
    if not files[0].is_file():
        index = folder / "model.safetensors.index.json"
        if not index.is_file():
            raise FileNotFoundError(f"{folder} has no model.safetensors: save the model with save_pretrained")
        files = [folder / name for name in sorted(set(_read_json(index)["weight_map"].values()))]
    found = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 (not a dict)
                    part = tensors.get_slice(name)
                    found[name] = file, part.get_shape(), part.get_dtype()
        except (SafetensorError, OSError) as error:
            raise CardError(f"{file} is damaged ({error}): save the model again") from error
    return found


def _read_recipe(path: Path) -> dict[str, Any] | None:
    import yaml

    if not path.exists():
        return None
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise CardError(f"{path} cannot be read as YAML ({error}): restore or delete it") from error
    if not isinstance(recipe, dict):
        raise CardError(f"{path} holds a {type(recipe).__name__}, not a recipe: restore or delete it")
    return recipe


# ------------------------------------------------------------------------------------------------ sections


def _introduction(module: str, model_class: type) -> str:
    paper = re.search(r'Paper: "(.+?)",\s+(https?://[^\s,]+[^\s,.])', module)
    source = f' Paper: ["{paper[1]}"]({paper[2]}).' if paper else ""
    return f"{module.partition(chr(10))[0]}{source} This folder holds a `{model_class.__name__}`."


def _architecture_section(folder: Path, config: Any, model_class: type) -> str:
    weights = _weights(folder)
    parts: dict[str, int] = {}
    for name, (_, shape, _) in weights.items():
        if not name.endswith(BATCH_STATISTICS):
            part = name.removeprefix(f"{model_class.base_model_prefix}.").partition(".")[0]
            parts[part] = parts.get(part, 0) + math.prod(shape)
    lines = ["| part | parameters |", "|---|---:|"]
    lines += [f"| `{part}` | {size:,} |" for part, size in parts.items()]
    types = sorted({kind for _, _, kind in weights.values() if kind not in ("I64", "BOOL")})
    lines += [f"| all, stored as {', '.join(types)} | {sum(parts.values()):,} |", ""]
    for name in ("", *sorted(config.sub_configs_defaults or ())):
        part = getattr(config, name) if name else config
        unused = "region_size" if getattr(part, "vision_config", None) is not None else None  # it sees pixels
        facts = [f"{word} {getattr(part, key)}" for key, word in FACTS.items() if hasattr(part, key) and key != unused]
        if facts:
            lines.append(f"- {name.removesuffix('_config') or 'model'} (`{part.model_type}`): {', '.join(facts)}")
    if hasattr(config, "projection_dim"):
        lines.append(f"- joint embedding: {config.projection_dim} numbers")
    return "\n".join(lines)


def _loading(folder: Path, name: str, auto_class: str) -> str:
    files = [folder / file for file in PROCESSOR_FILES if (folder / file).exists()]
    extractor = next((found for file in files if (found := _read_json(file).get("feature_extractor"))), None)
    own = auto_class in OWN_AUTO_CLASSES
    theirs = [*([] if own else [auto_class]), *(["AutoProcessor"] if files else [])]
    lines = [f"from hf_vlp import {auto_class}" if own else "import hf_vlp"]
    lines += [f"from transformers import {', '.join(theirs)}"] if theirs else []
    lines += [""]
    lines += [f'model = {auto_class}.from_pretrained("{name}")']
    if files:
        store = ', region_store="my.regions"' if extractor else ""
        lines += [f'processor = AutoProcessor.from_pretrained("{name}"{store})']
    text = "```python\n" + "\n".join(lines) + "\n```\n\n`import hf_vlp` makes the architecture known to transformers."
    if extractor:
        width = extractor.get("feature_size") or "F"
        text += (
            f" The model sees no pixels but regions, rows of {width} numbers from the detector that it was trained with. "
            "`my.regions` is a region store of yours, as `python -m hf_vlp.data.regions import` makes it of a detector's "
            "files: `processor(regions=..., text=...)` takes its keys. Without a store it takes arrays "
            f"[R, {width}], R regions of an image."
        )
    return text


TASK_SCORES = {  # ends of class names -> what their numbers mean
    "ForImageClassification": "The logits are of the classes in `model.config.id2label`; their softmax gives probabilities among these.",
    "ForMaskedLM": "The logits are of the vocabulary at every token; at a [MASK] their softmax gives probabilities of words.",
    "ForVisualQuestionAnswering": (
        "The logits are of the answers in `model.config.id2label`. Answers do not exclude each other in training: a sigmoid, not a "
        "softmax, makes a probability of each."
    ),
    "ForVisualReasoning": "The two logits are of false and true; their softmax gives the probability that the statement is true.",
}
READ_TOGETHER = (
    "`score_pairs` is a logit of each pair, read together: higher is a better match. Sort the texts of one picture, or the pictures of one "
    "text, by it; it is no probability, and `get_image_features` does not exist, as neither side is embedded alone."
)


def _reading_the_scores(folder: Path, config: Any, model_class: type) -> str:
    told = next((text for end, text in TASK_SCORES.items() if model_class.__name__.endswith(end)), None)
    if told is not None:
        return told
    if hasattr(model_class, "score_pairs") and not hasattr(config, "projection_dim"):
        return READ_TOGETHER
    if not hasattr(model_class, "score_pairs"):
        return "This part gives states and embeddings, no scores."
    unit = all(getattr(config, name, True) for name in ("normalize_image", "normalize_text"))
    scale = _logit_scale(_weights(folder))
    kind = "cosines" if unit else "inner products"
    usual = ": a true pair often has no more than 0.2 to 0.4" if unit and scale is not None else ""
    sentences = [
        f"`score_pairs` and the products of `get_image_features` and `get_text_features` are {kind}.",
        "" if unit else "Not all embeddings are of unit length, so that scores have no bounds and are no cosines.",
        f"They are no probabilities{usual}, and where the line lies between true pairs and others differs from model to model.",
        "Compare scores of several texts for one picture, or of several pictures for one text.",
    ]
    if scale is None:
        margin = getattr(config, "margin", None)
        asked = "" if margin is None else f" Training asks that true pairs stand {margin} above others."
        sentences.append(
            f"`logits_per_image` are the same {kind}, no scale is learned.{asked} Sort by them; their softmax is no "
            "probability."
        )
    else:
        sentences.append(
            f"`logits_per_image` are {kind} times the learned scale (here {scale:.2f}); their softmax over the "
            "candidates is a probability among these candidates only."
        )
    return " ".join(filter(None, sentences))


def _logit_scale(weights: dict[str, tuple[Path, list[int], str]]) -> float | None:
    """exp(t) of the stored scale, None without one."""
    from safetensors import safe_open

    for name, (file, _, _) in weights.items():
        if name.endswith("logit_scale.weight"):
            with safe_open(file, framework="pt") as tensors:
                return math.exp(float(tensors.get_tensor(name)))
    return None


def _training_section(recipe: dict[str, Any] | None) -> str:
    if recipe is None:
        return "This folder has no recipe.yaml: the weights were converted, or trained by other means."
    import yaml

    settings = {name: part for name, part in _without_empty(recipe).items() if name != "model"}
    start = (recipe.get("model") or {}).get("from_pretrained")
    script = "finetune" if recipe.get("task") else "pretrain"
    text = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True).rstrip()
    return (
        f"Weights at the start: {f'`{start}`' if start else 'random'}. The recipe, whole in recipe.yaml and repeated by "
        f"`accelerate launch examples/{script}.py --config recipe.yaml`:\n\n```yaml\n{text}\n```"
    )


def _without_empty(tree: Any) -> Any:
    if not isinstance(tree, dict):
        return tree
    pruned = {name: _without_empty(value) for name, value in tree.items()}
    return {name: value for name, value in pruned.items() if value is not None and value != {} and value != []}


def _result_section(result: dict[str, Any]) -> str:
    """One result as a table: what stands before the last / of a metric's name is its row, the rest its column."""
    rows: dict[str, dict[str, float]] = {}
    for metric, value in result["metrics"].items():
        row, _, column = metric.rpartition("/")
        rows.setdefault(row, {})[column] = value
    columns = list(dict.fromkeys(column for cells in rows.values() for column in cells))
    lines = [f"| | {' | '.join(map(_words, columns))} |", "|---|" + "---:|" * len(columns)]
    for row, cells in rows.items():
        values = (f"{cells[column]:.2f}" if column in cells else "" for column in columns)
        lines.append(f"| {_words(row)} | {' | '.join(values)} |")
    split = f", split {result['split']}" if result.get("split") else ""
    facts = [f"Protocol: {result['protocol']}."] if result.get("protocol") else []
    if result.get("counts"):
        facts.append("Counts: " + ", ".join(f"{_words(key)} {value}" for key, value in result["counts"].items()) + ".")
    measured = f"Measured{' on ' + result['date'] if result.get('date') else ''}"
    facts.append(
        f"{measured} by `{result['command']}`." if result.get("command") else f"{measured}; no command recorded."
    )
    return "\n".join([f"### {result['task']} on `{result['data']}`{split}", "", *lines, "", *facts])


def _words(name: str) -> str:
    return name.replace("_", " ").replace("|", "\\|").replace("\n", " ")


def _model_index(results: list[dict[str, Any]]) -> list[Any]:
    from huggingface_hub import EvalResult

    return [
        EvalResult(
            task_type=HUB_TASKS.get(result["task"], result["task"]),
            dataset_type=result["data"],
            dataset_name=result["data"],
            dataset_split=result.get("split"),
            metric_type=metric,
            metric_value=value,
        )
        for result in results
        for metric, value in result["metrics"].items()
    ]


def _differences(module: str) -> str:
    found = re.search(r"Differences from the released code:\n(.*?)(?:\n\n|\Z)", module, re.DOTALL)
    return found[1] if found else "None are known."
