"""Shows to which parts of a picture the words of a text belong, for a model that reads words and image together.

    python examples/explain.py runs/vilt_emoji --image scene.png --text "a red apple on a table" --output map.png
    python examples/explain.py FOLDER --image scene.png --text "a red apple on a table" --word apple table --output map.png

FOLDER: a folder or Hub id of a model that reads words and image together. The sheet map.png has a cell for each word (or for
those of --word). A table of the patches with the most of each word is printed beside.

Of a model whose words attend to the image (ALBEF), the map is the Grad-CAM of that attention in one layer (--layer), drawn from blue to
red; the first cell is the whole text, and --word takes phrases too ("red apple"). Of one trained with word-patch alignment (ViLT) it is
the transport plan of the paper's figure, found with --beta and --iterations: the picture in colour where the word goes, faint elsewhere.
"""

import argparse
import sys
from pathlib import Path

import torch
from transformers import AutoModel, AutoProcessor

import hf_vlp  # noqa: F401 (registers the architectures)
from hf_vlp.auto import AutoModelForImageTextRetrieval
from hf_vlp.data.record import RecordError, decode_image
from hf_vlp.explain.attention_maps import picture_maps
from hf_vlp.explain.draw import glow, map_sheet, overlay
from hf_vlp.explain.transport_plan import word_maps
from hf_vlp.explain.words import WordMap
from hf_vlp.files import whole_file


def chosen(maps: list[WordMap], words: list[str] | None) -> list[WordMap]:
    """The maps of the words asked for, all if none are; upper and lower case are the same.

    Raises:
        ValueError: a word that the text does not have.
    """
    known = [one.word.casefold() for one in maps]
    unknown = [word for word in words or [] if word.casefold() not in known]
    if unknown:
        raise ValueError(
            f"the text has no word {', '.join(map(repr, unknown))}; it has {', '.join(one.word for one in maps)}"
        )
    wanted = [word.casefold() for word in words or known]
    return [one for one in maps if one.word.casefold() in wanted]


def table(maps: list[WordMap]) -> str:
    """One line a word: the three patches that most of it goes to, counted from the upper left corner."""
    width = max(len(one.word) for one in maps)
    lines = [f"{'word':<{width}}  share of the word at (row, column)"]
    for one in maps:
        shares = one.mass.flatten() / one.mass.sum().clamp(min=torch.finfo(one.mass.dtype).tiny)
        best = shares.topk(min(3, len(shares)))
        places = [divmod(int(place), one.mass.shape[1]) for place in best.indices]
        told = [f"{share:.2f} at ({row}, {column})" for share, (row, column) in zip(best.values.tolist(), places)]
        lines.append(f"{one.word:<{width}}  {'   '.join(told)}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or Hub id")
    parser.add_argument("--image", type=Path, required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--word", nargs="+", help="only these words of the text")
    parser.add_argument("--output", type=Path, required=True, help="the sheet, a picture such as map.png")
    parser.add_argument("--layer", type=int, help="whose attention to the image is shown; the paper's if not given")
    parser.add_argument("--beta", type=float, default=0.1)
    parser.add_argument("--iterations", type=int, default=1000)
    options = parser.parse_args()
    if options.output.suffix.lower() != ".png":
        parser.error(f"--output {options.output} is no .png file")

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        picture = decode_image(options.image)
        model = AutoModel.from_pretrained(options.model).to(device)
        processor = AutoProcessor.from_pretrained(options.model)
        attends = hasattr(model, "cross_attention")
        if attends:
            model, found = AutoModelForImageTextRetrieval.from_pretrained(options.model, output_loading_info=True)
            if found["missing_keys"]:
                parser.error(
                    f"{options.model} has no weights {', '.join(sorted(found['missing_keys'])[:3])}, and the map is of the score of "
                    f"matching: give a folder of pre-training, retrieval or grounding"
                )
            model = model.to(device)
            maps = picture_maps(model, processor, picture, options.text, phrases=options.word, layer=options.layer)
        elif options.layer is not None:
            parser.error("--layer is of models whose words attend to the image, and this one has no such layers")
        else:
            settings = {"beta": options.beta, "iterations": options.iterations}
            maps = chosen(word_maps(model, processor, picture, options.text, **settings), options.word)
    except RecordError as fault:
        sys.exit(f"--image: {fault.reason}")
    except ValueError as fault:
        sys.exit(str(fault))
    print(table(maps))
    titles, heats = [one.word for one in maps], [one.heat for one in maps]
    sheet = map_sheet(picture, titles, heats, draw=glow if attends else overlay)
    with whole_file(options.output) as partial:
        sheet.save(partial)
    print(f"sheet: {options.output}")


if __name__ == "__main__":
    main()
