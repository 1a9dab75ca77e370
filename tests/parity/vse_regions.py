"""Cases of VSE-infinity's precomputed regions: the original's files as they stand in the folder, collated batches out."""

from collections.abc import Mapping, Sequence

import torch
from transformers import BertTokenizer

from hf_vlp.data.precomputed import PrecomputedSplit
from hf_vlp.inputs.caption_augmentation import CaptionAugmentation
from hf_vlp.inputs.region_feature_extractor import VlpRegionFeatureExtractor
from hf_vlp.inputs.regions import RegionDropping, RegionFeatures
from tests.parity.harness import Case, CaseError

STAYS = 0.9  # every draw of a word in training


def region_dataset(case: Case) -> None:
    """`<split>_caps.txt`, `<split>_ims.npy` and `<split>_ids.txt` to the batch of `indices`; `region_draws` [B, R] thin it out."""
    split = split_of(case)
    facts = {"images_in_file": len(split.features), "captions": len(split)}
    case.expect({f"config.json: {name}": case.config[name] for name in facts if name in case.config})
    case.compare({f"config.json: {name}": value for name, value in facts.items()})

    tokenizer = BertTokenizer(vocab=str(case.path("vocab.txt")))
    indices = case.inputs["indices"].tolist()
    regions = [split.regions(index) for index in indices]
    captions = [split.captions[index] for index in indices]
    texts = tokenizer(captions, split_special_tokens=True, padding=True, return_tensors="pt", verbose=False)
    compare_batch(case, "eval", regions, texts)
    if "region_draws" in case.inputs:
        kept = RegionDropping()(regions, draws=case.inputs["region_draws"].tolist())
        words = tokenizer(captions, add_special_tokens=False, split_special_tokens=True, verbose=False).encodings
        draws = [[STAYS] * len(set(one.word_ids)) for one in words]
        compare_batch(case, "train", kept, CaptionAugmentation(tokenizer)(captions, draws=draws))
    places = {"ids": torch.tensor(indices), "image_index": torch.from_numpy(split.row_of_caption[indices])}
    case.compare({f"{mode}.{name}": value for mode in ("eval", "train") for name, value in places.items()})


def split_of(case: Case) -> PrecomputedSplit:
    """The split whose files the folder holds, its files marked as read.

    Raises:
        CaseError: there is none, or several.
    """
    names = [name for name in case.files if name.endswith("_ims.npy")]
    if len(names) != 1:
        raise CaseError(f"{case.folder} has {len(names)} files <split>_ims.npy, and one is expected")
    start = names[0].removesuffix("ims.npy")
    for name in case.files & {start + "caps.txt", start + "ims.npy", start + "ids.txt"}:
        case.path(name)
    path = case.folder / start.removesuffix("_")
    return PrecomputedSplit(path.parent, path.name)


def compare_batch(case: Case, mode: str, regions: Sequence[RegionFeatures], texts: Mapping[str, torch.Tensor]) -> None:
    """The project's batch of regions and captions, under the original's names."""
    images = VlpRegionFeatureExtractor()(list(regions))
    case.compare(
        {
            f"{mode}.images": images["region_features"],
            f"{mode}.image_lengths": images["region_mask"].sum(dim=1).float(),
            f"{mode}.captions": texts["input_ids"] * texts["attention_mask"],  # padded with 0, whatever [PAD] is
            f"{mode}.caption_lengths": texts["attention_mask"].sum(dim=1),
        }
    )
