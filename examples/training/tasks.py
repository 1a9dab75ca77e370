"""Tasks that a model is fine-tuned for: the class with its head, what a record needs, its batches, how it is evaluated."""

import functools
import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig, PreTrainedConfig

import hf_vlp.auto
from hf_vlp.data.annotation_lists import read_answer_list
from hf_vlp.data.answers import answer_vocabulary, majority_answers
from hf_vlp.data.collate import Collator
from hf_vlp.data.fusion_collate import FusionPretrainingCollator, FusionRetrievalCollator
from hf_vlp.data.pairs import ImageTextPairs
from hf_vlp.data.phrases import Phrases
from hf_vlp.data.prepared import PreparedRecords
from hf_vlp.data.tasks import (
    ENTAILMENT,
    Hypotheses,
    Questions,
    Statements,
    TaskCollator,
    WrittenAnswerCollator,
    WrittenAnswers,
)
from hf_vlp.evaluation.encoding import without_pictures
from hf_vlp.evaluation.fusion_retrieval import evaluate_fusion_retrieval
from hf_vlp.evaluation.grounding import evaluate_grounding
from hf_vlp.evaluation.tasks import evaluate_entailment, evaluate_nlvr2, evaluate_vqa
from hf_vlp.explain.attention_maps import pair_maps
from hf_vlp.training.recipe import AnswersRecipe, Recipe, RecipeError
from hf_vlp.training.results import HeldOut, HeldOutRetrieval, HeldOutTask
from training.batches import finds_false_pairs
from training.inputs import located

FALSE_TEXTS = 15

Labels = dict[str, int] | None


@dataclass(frozen=True)
class Task:
    """What fine-tuning needs to know of a task.

    auto_class: name of the Auto class of the model. text, images: the columns of texts and of pictures. target: the column that training
    needs besides.
    labels: (recipe, records by split, configuration) -> class -> number, or None where the head has none.
    dataset: (records, prepare, labels, options of `PreparedRecords`) -> items. collator: (recipe, processor, configuration, data set,
    augment) -> what makes batches. held_out: of the arguments of `HeldOut`. needs: a method without which a model cannot do the task.
    """

    auto_class: str
    text: str
    images: str
    target: str | None
    labels: Callable[[Recipe, dict[str, Any], PreTrainedConfig], Labels]
    dataset: Callable[..., PreparedRecords]
    collator: Callable[..., Collator]
    held_out: Callable[..., HeldOut]
    needs: str | None = None

    @property
    def model_class(self) -> Any:
        """The Auto class."""
        return getattr(transformers, self.auto_class, None) or getattr(hf_vlp.auto, self.auto_class)

    def required(self, recipe: Recipe, split: str) -> tuple[str, ...]:
        """The fields that records of a split need; held-out questions may lack answers."""
        fields = [self.text] if recipe.data.regions is not None else [self.images, self.text]
        return (*fields, *([self.target] if self.target and (split == "train" or self.target == "label") else []))


# ------------------------------------------------------------------------------------------------ classes


def answers_of(recipe: Recipe, records: dict[str, Any], config: PreTrainedConfig) -> Labels:
    """The answers to choose from: as `data.answers` says; without it those of a saved model that answers, else all of training.

    Raises:
        RecipeError: no such file, or no answer is left.
    """
    chosen = recipe.data.answers
    if chosen is None and answers_already(config):
        return config.label2id
    chosen = chosen or AnswersRecipe()
    if chosen.file is not None:
        return answers_in(chosen.file)
    counted: list[Iterable] = [records["train"]]
    if chosen.count_validation and records["validation"] is not None:
        counted.append(records["validation"])
    answers = (answer for rows in counted for answer in majority_answers(without_pictures(rows)))
    try:
        return answer_vocabulary(answers, minimum=chosen.minimum_seen, most=chosen.top_k)
    except ValueError as error:
        raise RecipeError(f"data.answers.minimum_seen = {chosen.minimum_seen}: {error}") from error


def answers_already(config: PreTrainedConfig) -> bool:
    """Whether a saved configuration is of a model that chooses answers."""
    saved = TASKS["vqa"].model_class._model_mapping.get(type(config), None)
    return saved is not None and saved.__name__ in (config.architectures or ())


def answers_in(file: str) -> dict[str, int]:
    """The answers of a JSON list, or of the configuration of a model's folder.

    Raises:
        RecipeError: it holds none, or an answer twice.
    """
    path = Path(located(file))
    try:
        if path.is_dir():
            return AutoConfig.from_pretrained(path).label2id
        return {answer: number for number, answer in enumerate(read_answer_list(path))}
    except (OSError, ValueError) as error:
        raise RecipeError(f"data.answers.file = {file!r}: {error}") from error


def name_classes(config: PreTrainedConfig, labels: dict[str, int]) -> None:
    """Give a configuration the classes of a head."""
    config.id2label = {number: label for label, number in labels.items()}
    config.label2id = dict(labels)


def list_answers(model, processor, labels: dict[str, int]) -> None:
    """Give a model that writes answers those to choose from, in the order of their numbers.

    Raises:
        RecipeError: an answer longer than the model's list has room for.
    """
    answers = sorted(labels, key=labels.get)
    try:
        model.set_answers(**processor.encode_answers(answers))
    except ValueError as error:
        raise RecipeError(f"data.answers: {error}") from error


def fingerprint_of(labels: Labels) -> str:
    """Of the classes in their order; nothing where there are none."""
    return "" if labels is None else "-" + hashlib.sha256(json.dumps(sorted(labels.items())).encode()).hexdigest()


# ------------------------------------------------------------------------------------------------ tasks


def retrieval_collator(recipe: Recipe, processor, config, pairs: ImageTextPairs, augment) -> Collator:
    """Each image with its text, and with false ones unless the model finds these in its batch.

    Raises:
        RecipeError: a number of false texts for a model that finds its own.
    """
    if finds_false_pairs(config):
        if recipe.data.false_texts is not None:
            raise RecipeError(
                f"data.false_texts = {recipe.data.false_texts}: this model finds false texts in its batch; leave it out"
            )
        return FusionPretrainingCollator(
            processor, None, None, augment, recipe.training.seed, recipe.data.max_tokens, negative_draws=True
        )
    return FusionRetrievalCollator(
        processor,
        pairs,
        augment,
        recipe.training.seed,
        recipe.data.max_tokens,
        false_texts=recipe.data.false_texts or FALSE_TEXTS,
    )


def task_collator(recipe: Recipe, processor, config, dataset: PreparedRecords, augment) -> Collator:
    """Each record with its label."""
    return TaskCollator(processor, augment, recipe.training.seed, recipe.data.max_tokens)


def written_collator(recipe: Recipe, processor, config, dataset: PreparedRecords, augment) -> Collator:
    """Each question with all its answers."""
    return WrittenAnswerCollator(processor, augment, recipe.training.seed, recipe.data.max_tokens)


TASKS = {
    "vqa": Task(
        "AutoModelForVisualQuestionAnswering",
        text="question",
        images="image",
        target="answers",
        labels=answers_of,
        dataset=Questions,
        collator=task_collator,
        held_out=functools.partial(HeldOutTask, task="vqa", answer=evaluate_vqa),
    ),
    "nlvr2": Task(
        "AutoModelForVisualReasoning",
        text="statement",
        images="images",
        target="label",
        labels=lambda recipe, records, config: {"false": 0, "true": 1},
        dataset=lambda records, prepare, labels, **options: Statements(records, prepare, **options),
        collator=task_collator,
        held_out=functools.partial(HeldOutTask, task="nlvr2", answer=evaluate_nlvr2),
    ),
    "entailment": Task(
        "AutoModelForVisualEntailment",
        text="hypothesis",
        images="image",
        target="label",
        labels=lambda recipe, records, config: dict(ENTAILMENT),
        dataset=Hypotheses,
        collator=task_collator,
        held_out=functools.partial(HeldOutTask, task="entailment", answer=evaluate_entailment),
    ),
    "retrieval": Task(
        "AutoModelForImageTextRetrieval",
        text="captions",
        images="image",
        target=None,
        labels=lambda recipe, records, config: None,
        dataset=lambda records, prepare, labels, **options: ImageTextPairs(records, prepare, **options),
        collator=retrieval_collator,
        held_out=functools.partial(HeldOutRetrieval, rank=evaluate_fusion_retrieval),
    ),
}
# weakly supervised: trained as retrieval, the boxes are for held-out phrases alone
TASKS["grounding"] = replace(
    TASKS["retrieval"],
    text="phrase",
    dataset=lambda records, prepare, labels, **options: Phrases(records, prepare, **options),
    held_out=functools.partial(
        HeldOutTask, task="grounding", answer=functools.partial(evaluate_grounding, maps=pair_maps)
    ),
    needs="cross_attention",
)
WRITTEN_ANSWERS = replace(
    TASKS["vqa"],
    dataset=lambda records, prepare, labels, **options: WrittenAnswers(records, prepare, **options),
    collator=written_collator,
)


def task_of(name: str, config: PreTrainedConfig) -> Task:
    """The task as a model does it: one that writes its answers, and is given a list to choose from, learns them as texts.

    Raises:
        RecipeError: a model that cannot do the task.
    """
    task = TASKS[name]
    model = task.model_class._model_mapping.get(type(config), None)
    if task.needs is not None and not hasattr(model, task.needs):
        raise RecipeError(
            f"task = {name}: a {config.model_type} model has no {task.needs}, by which it is evaluated; start from one that has"
        )
    return WRITTEN_ANSWERS if hasattr(model, "set_answers") else task
