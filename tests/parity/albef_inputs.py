"""Cases of ALBEF's pictures and texts: arrays and strings as they stand in the folder, pixels and ids out."""

import torch
from transformers import BertTokenizer

from hf_vlp.inputs.image_augmentations import RandomAugmentCrop
from hf_vlp.inputs.image_transforms import normalised, picture_from_array
from hf_vlp.inputs.random_augment import FILL, MOST, OPERATIONS, RandomAugment
from hf_vlp.inputs.text_cleaning import clean_caption, clean_question
from hf_vlp.inputs.vocabulary import without_end_mark
from hf_vlp.models.albef.image_processing_albef import VlpAlbefImageProcessor, VlpAlbefImageProcessorPil
from hf_vlp.models.albef.processing_albef import VlpAlbefProcessor
from tests.parity.harness import Case

FAST_BOUND = 2.02 / 255 / 0.26  # of the fast backend: two grey levels, normalised by the smallest deviation
LIMIT = 512  # positions of BERT
EXTREMES = (0.0, 0.9)  # a draw that applies an operation or keeps its sign, and one that does not


def image_transform(case: Case) -> None:
    """`imageN_uint8` to `evalN` and, by the windows and steps of config.json, to TRANSFORMN; `op_image_uint8` by each operation."""
    options = {"size": case.config["image_res"]}
    options |= {f"image_{name}": case.config[name] for name in ("mean", "std") if name in case.config}
    exact, fast = VlpAlbefImageProcessorPil(**options), VlpAlbefImageProcessor(**options)
    policy = RandomAugment(case.config.get("n_ops", 2), case.config.get("magnitude", 7))
    for name, pixels in case.inputs.items():
        if not name.startswith("image"):
            continue
        number = name.removeprefix("image").removesuffix("_uint8")
        picture = picture_from_array(pixels, channels_first=False)
        values = exact(picture, return_tensors="pt")["pixel_values"][0]
        raw = exact(picture, do_rescale=False, do_normalize=False, return_tensors="pt")["pixel_values"][0]
        case.compare({f"eval{number}": values, f"eval{number}_resized_uint8": raw.permute(1, 2, 0).to(torch.uint8)})
        case.check(f"eval{number} of the fast backend", fast(picture)["pixel_values"][0], values, FAST_BOUND)
    settings(case, policy)
    for row in case.config.get("cases", ()):
        training(case, policy, exact, row)
    for name, arguments in case.config.get("ops", {}).items():
        operation(case, name, arguments)


def settings(case: Case, policy: RandomAugment) -> None:
    """The operations to draw from, their order included, and the largest magnitude."""
    ours = {"max_level": MOST, "used_ops": list(policy.operations)}
    for name in ours.keys() & case.config.keys():
        case.expect({f"config.json: {name}": case.config[name]})
        case.compare({f"config.json: {name}": ours[name]})


def training(case: Case, policy: RandomAugment, processor: VlpAlbefImageProcessorPil, row: dict) -> None:
    """One picture of a training transform, after each of its steps."""
    label = f"{row['transform']}{row['image']}"
    image = case.inputs[f"image{row['image']}_uint8"].permute(2, 0, 1)
    names, numbers = [name for name, _, _ in row["steps"]], []
    for name, applied, arguments in row["steps"]:
        numbers.append(EXTREMES[not applied])
        turns = OPERATIONS[name].turns
        if applied and turns:
            numbers.append(next(draw for draw in EXTREMES if turns(draw) == (arguments[0] < 0)))
    wanted = [[name, *values(arguments)] for name, applied, arguments in row["steps"] if applied]
    steps = policy.steps(names, numbers)
    case.expect({f"config.json: {label}: steps": wanted})
    case.compare(
        {f"config.json: {label}: steps": [[name, *([value] if has_value(name) else [])] for name, value in steps]}
    )
    augment = RandomAugmentCrop(
        case.config["image_res"],
        processor.image_mean,
        processor.image_std,
        count=policy.count,
        magnitude=policy.magnitude,
    )
    window = row.get("crop_top_left_h_w")
    for stage, given in (("crop_resize", ((), ())), ("randaugment", (names, numbers))):
        final = augment([image], draws=[(window, row["flip"], *given)])[0]
        pixels = unnormalised(final, augment)
        case.compare({f"{label}.after_{stage}_uint8": unflipped(pixels, stage, row["flip"])})
    case.compare({f"{label}.final": final})


def unflipped(pixels: torch.Tensor, stage: str, flip: bool) -> torch.Tensor:
    """uint8 [h, w, 3]; what is stored after the resizing is not mirrored yet."""
    return pixels.flip(1) if flip and stage == "crop_resize" else pixels


def unnormalised(final: torch.Tensor, augment: RandomAugmentCrop) -> torch.Tensor:
    """float32 [3, R, R] back to uint8 [R, R, 3]; that nothing is lost by it is checked."""
    mean, std = (torch.tensor(part).view(-1, 1, 1) for part in (augment.mean, augment.std))
    pixels = ((final * std + mean) * 255).round().to(torch.uint8)
    if not torch.equal(normalised(pixels, augment.mean, augment.std), final):
        raise AssertionError("what the augmentation gave is no normalised picture of 8 bits")
    return pixels.permute(1, 2, 0)


def operation(case: Case, name: str, arguments: list) -> None:
    """`op.NAME.M7`, and with `.neg` at the end the value turned round; its arguments are value and fill."""
    kind, magnitude, *sign = name.removeprefix("op.").split(".")
    value = OPERATIONS[kind].value(float(magnitude.removeprefix("M")))
    value = -value if sign else value
    case.expect({f"config.json: {name}": values(arguments)})
    case.compare({f"config.json: {name}": [type(arguments[0])(value)] if has_value(kind) else []})
    if arguments[1:]:
        case.expect({f"config.json: {name}: fill": arguments[1]})
        case.compare({f"config.json: {name}: fill": [FILL] * 3})
    changed = torch.from_numpy(OPERATIONS[kind].apply(case.inputs["op_image_uint8"].numpy(), value))
    if kind != "Color" or changed.shape != case.stored[name].shape:
        case.compare({name: changed})
        return
    difference = (changed.int() - case.stored[name].int()).abs().max().item()
    case.settle(name, difference <= 1, difference, 1.0, note="the order of sums in float32")


def has_value(name: str) -> bool:
    return name not in ("Identity", "AutoContrast", "Equalize")


def values(arguments: list | None) -> list:
    """The first argument, if there is one."""
    return list(arguments or ())[:1]


def text_processing(case: Case) -> None:
    """`raw` cleaned as captions and questions at each limit of words; both and `answers_raw` to ids and masks."""
    text = case.json("text.json")
    for name, clean in (("pre_caption", clean_caption), ("pre_question", clean_question)):
        for limit, stored in text.get(name, {}).items():
            entry = f"text.json: {name}: {limit}"
            case.expect({entry: stored})
            case.compare({entry: [clean(raw, int(limit)) for raw in text["raw"]]})
    tokenizer = without_end_mark(BertTokenizer(vocab=str(case.path("vocab.txt")), model_max_length=LIMIT))
    captions = VlpAlbefProcessor(VlpAlbefImageProcessor(), tokenizer)
    questions = VlpAlbefProcessor(VlpAlbefImageProcessor(), tokenizer, text_cleaning="question")
    ids = {"pad": "pad_token_id", "unk": "unk_token_id", "cls": "cls_token_id", "sep": "sep_token_id"}
    for name, ours in (ids | {"mask": "mask_token_id"}).items():
        if name in case.config.get("token_ids", {}):
            case.expect({f"config.json: token_ids: {name}": case.config["token_ids"][name]})
            case.compare({f"config.json: token_ids: {name}": getattr(tokenizer, ours)})
    if "tokens" in text:
        case.expect({"text.json: tokens": text["tokens"]})
        case.compare({"text.json: tokens": [tokenizer.tokenize(clean_caption(raw)) for raw in text["raw"]]})
    for name in [name for name in text if " (" in name]:
        if name.startswith("vqa_answers"):
            encoded = questions.encode_answers(text["answers_raw"])
            encoded = {
                key.replace("answer_ids", "input_ids").replace("answer_mask", "attention_mask"): value
                for key, value in encoded.items()
            }
        elif name.startswith("vqa_eval_question"):
            encoded = questions(text=text["raw"], max_words=50, truncation=False)
        else:
            encoded = captions(text=text["raw"], **tokenizing(name))
        for kind, rows in text[name].items():
            case.expect({f"text.json: {name}: {kind}": rows})
            case.compare({f"text.json: {name}: {kind}": encoded[kind].tolist()})


def tokenizing(name: str) -> dict:
    """The options that stand in brackets after a name: padding, "truncation" and max_length, which counts with one of both only."""
    said = name.partition("(")[2]
    length = int(said.partition("max_length=")[2].partition(" ")[0].rstrip("),")) if "max_length=" in said else None
    padded, cut = "padding=max_length" in said, "truncation" in said and "no truncation" not in said
    options = {"padding": "max_length" if padded else True, "truncation": cut}
    return options | ({"max_length": length} if padded or cut else {})
