"""Cases of VSE-infinity's inputs: captions and raw pictures as they stand in the folder, token ids and pixels out."""

import torch
from transformers import BertTokenizer

from hf_vlp.inputs.caption_augmentation import CaptionAugmentation
from hf_vlp.inputs.image_augmentations import TrainingTransform
from hf_vlp.inputs.image_transforms import picture_from_array
from hf_vlp.inputs.word_tokenizer import VlpWordTokenizer, split_words, train_word_tokenizer
from hf_vlp.models.vse.image_processing_vse import (
    VlpVseImageProcessor,
    VlpVseImageProcessorPil,
    backbone_colours,
)
from hf_vlp.models.vse.processing_vse import VlpVseProcessor
from tests.parity.harness import Case

BASE_SIDE = 256  # of the released code, before the scale


def caption_processing_bert(case: Case) -> None:
    """vocab.txt; eval.json and train.json: each `caption` to tokens and ids, in training with the recorded draws."""
    tokenizer = BertTokenizer(vocab=str(case.path("vocab.txt")))
    size(case, "vocab_size", tokenizer)
    processor = VlpVseProcessor(VlpVseImageProcessorPil(), tokenizer)
    for prefix, entry in entries(case, "eval.json"):
        ids = processor(text=entry["caption"])["input_ids"][0].tolist()
        pieces = words_of_pieces(tokenizer, entry["caption"])
        backend = tokenizer.backend_tokenizer
        words = backend.pre_tokenizer.pre_tokenize_str(backend.normalizer.normalize_str(entry["caption"]))
        case.compare(
            {
                prefix + "basic_tokens": [word for word, _ in words],
                prefix + "wordpieces": pieces,
                prefix + "ids": ids,
            }
        )
        case.check(prefix + "the augmentation without draws", unaugmented(tokenizer, entry), torch.tensor(ids), 0.0)
    replay(case, tokenizer, lambda entry: tokenizer.convert_tokens_to_ids(entry.get("random_tokens", [])))


def caption_processing_bigru(case: Case) -> None:
    """train_caps.txt to vocab.json; eval.json and train.json as for BERT; `collated.*`, a batch in the order of the original."""
    tokenizer = VlpWordTokenizer.from_vocabulary_json(case.path("vocab.json"))
    size(case, "vocab_size_with_mask", tokenizer)
    if "train_caps.txt" in case.files:
        # splitlines also cuts at U+2028 and its like
        lines = case.path("train_caps.txt").read_text("utf-8").split("\n")
        captions = [line.strip() for line in (lines if lines[-1] else lines[:-1])]
        trained = train_word_tokenizer(captions, case.config.get("threshold", 4))
        words = [
            word for word in trained.get_vocab() if word != trained.mask_token
        ]  # the original adds it after loading
        ours = {"word2idx": dict(zip(words, range(len(words)))), "idx": len(words)}
        ours["idx2word"] = {str(index): word for index, word in enumerate(words)}
        case.expect({f"vocab.json: {name}": value for name, value in case.json("vocab.json").items()})
        case.compare({f"vocab.json: {name}": value for name, value in ours.items()})
    processor = VlpVseProcessor(VlpVseImageProcessorPil(), tokenizer)
    captions = []
    for prefix, entry in entries(case, "eval.json"):
        captions.append(entry["caption"])
        ids = processor(text=entry["caption"])["input_ids"][0].tolist()
        case.compare({prefix + "tokens": split_words(entry["caption"]), prefix + "ids": ids})
        case.check(prefix + "the augmentation without draws", unaugmented(tokenizer, entry), torch.tensor(ids), 0.0)
    replay(case, tokenizer, lambda entry: entry.get("random_ids", []))
    if any(name.startswith("collated.") for name in case.stored):
        collated(case, processor(text=captions))


def collated(case: Case, batch) -> None:
    """The batch of all captions; the original sorts it by length, the longest first, and what belongs to the captions with it."""
    lengths = batch["attention_mask"].sum(dim=1)
    order = lengths.argsort(descending=True, stable=True)
    ours = {"captions": batch["input_ids"], "caption_lengths": lengths, "ids": torch.arange(len(lengths))}
    if "image_lengths" in case.config:
        ours["image_lengths"] = torch.tensor(case.config["image_lengths"], dtype=torch.float32)
    case.compare({f"collated.{name}": value[order] for name, value in ours.items()})


def image_processing(case: Case) -> None:
    """`raw.N` to `eval.BACKBONE.N`, and with `draws.N` to `train.BACKBONE.N`, by both backends."""
    scale = case.config.get("input_scale_factor", 1)
    side = case.config.get("base_target_size") or int(BASE_SIDE * scale)
    for name in sorted(case.outputs):
        mode, source, number = name.split(".")
        raw = case.inputs[f"raw.{number}"].to(torch.uint8)
        options = {"size": {"height": side, "width": side}, **backbone_colours(source)}
        if mode == "eval":
            for backend in (VlpVseImageProcessor, VlpVseImageProcessorPil):
                pixels = backend(**options)(raw, return_tensors="pt")["pixel_values"][0]
                case.compare({name: pixels}, label=f"{backend.__name__}: ")
        else:
            transform = TrainingTransform(VlpVseImageProcessor(**options), "random_crop_squash")
            prepared = transform.prepare(picture_from_array(raw))
            draws = [case.inputs[f"draws.{number}"].double().tolist()]
            case.compare({name: transform.augment([prepared], draws=draws)[0]})


def size(case: Case, name: str, tokenizer) -> None:
    """The number of entries, where config.json has it."""
    if name in case.config:
        case.expect({f"config.json: {name}": case.config[name]})
        case.compare({f"config.json: {name}": len(tokenizer)})


def entries(case: Case, name: str):
    """(prefix, object) of the entries of a JSON list, all they hold being expected; none without the file."""
    for number, entry in enumerate(case.json(name) if name in case.files else ()):
        prefix = f"{name}: {number}: "
        case.expect({prefix + key: value for key, value in entry.items()})
        yield prefix, entry


def replay(case: Case, tokenizer, random_ids) -> None:
    """train.json with its draws; `random_ids` of an entry gives the ids that stood in."""
    augmentation = CaptionAugmentation(tokenizer)
    for prefix, entry in entries(case, "train.json"):
        batch = augmentation([entry["caption"]], draws=[entry["uniform_draws"]], random_ids=[random_ids(entry)])
        case.compare({prefix + "ids": batch["input_ids"][0].tolist()})


def unaugmented(tokenizer, entry) -> torch.Tensor:
    """The ids of a caption by the augmentation that changes nothing."""
    return CaptionAugmentation(tokenizer, rate=0.0)([entry["caption"]])["input_ids"][0]


def words_of_pieces(tokenizer: BertTokenizer, caption: str) -> list[list[str]]:
    """The word pieces of each basic token."""
    encoded = tokenizer(caption, add_special_tokens=False, split_special_tokens=True)
    pieces: list[list[str]] = []
    for token, word in zip(encoded.tokens(), encoded.word_ids(), strict=True):
        if word == len(pieces):
            pieces.append([])
        pieces[word].append(token)
    return pieces
