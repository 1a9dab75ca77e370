"""Maps of words over a picture: of a model whose plan is known, of ViLT, and examples/explain.py as a user runs it."""

import runpy
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn
from transformers import AutoModel, AutoProcessor

from hf_vlp.explain.attention_maps import picture_maps
from hf_vlp.explain.draw import glow, map_sheet, overlay
from hf_vlp.explain.transport_plan import heat_map, patch_masses, real_patches, word_maps
from hf_vlp.inputs.vocabulary import train_wordpiece_tokenizer, without_end_mark
from hf_vlp.models.albef.configuration_albef import VlpAlbefConfig
from hf_vlp.models.albef.image_processing_albef import VlpAlbefImageProcessor
from hf_vlp.models.albef.pretraining_albef import VlpAlbefForImageTextRetrieval
from hf_vlp.models.albef.processing_albef import VlpAlbefProcessor
from hf_vlp.models.vilt.configuration_vilt import VlpViltConfig
from hf_vlp.models.vilt.image_processing_vilt import VlpViltImageProcessor
from hf_vlp.models.vilt.modeling_vilt import VlpViltForPreTraining
from hf_vlp.models.vilt.processing_vilt import VlpViltProcessor
from hf_vlp.outputs import FusionOutput
from tests.contract.tiny import save_tiny_clip

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "explain.py"
PATCH = 8
TEXTS = "red red blue blue blue sky sky redsky red, sky.".split()
COLOURS = {"red": (1.0, 0.0, 0.0), "blue": (0.0, 0.0, 1.0)}


def processor() -> VlpViltProcessor:
    pictures = VlpViltImageProcessor(size={"shortest_edge": 32, "longest_edge": 53}, size_divisor=PATCH)
    return VlpViltProcessor(pictures, train_wordpiece_tokenizer(TEXTS, 40, 16))


def flag() -> Image.Image:
    """Red on the left quarter, blue elsewhere: patches of 4 x 4."""
    picture = Image.new("RGB", (32, 32), "blue")
    picture.paste("red", (0, 0, 8, 32))
    return picture


class ColourModel(nn.Module):
    """A model whose word states are colours and whose patch states are those of the picture."""

    def __init__(self, tokenizer):
        super().__init__()
        rows = [COLOURS.get(token, (0.0, 1.0, 0.0)) for token in tokenizer.convert_ids_to_tokens(range(len(tokenizer)))]
        self.colours = nn.Parameter(torch.tensor(rows))
        self.dropout = nn.Dropout(0.9)
        self.permuted = False

    def forward(self, input_ids, attention_mask, pixel_values, pixel_mask):
        patches = nn.functional.avg_pool2d(pixel_values * 0.5 + 0.5, PATCH)  # [B, 3, h, w]
        grid = tuple(patches.shape[-2:])
        patches, mask = patches.flatten(2).transpose(1, 2), pixel_mask[:, ::PATCH, ::PATCH].flatten(1)
        index = torch.arange(mask.shape[1]).expand_as(mask)
        if self.permuted:
            index = torch.randperm(mask.shape[1], generator=torch.Generator().manual_seed(0)).expand_as(mask)
            patches, mask = patches[:, index[0]], mask[:, index[0]]
        return FusionOutput(
            text_hidden_states=self.dropout(self.colours[input_ids]),
            image_hidden_states=nn.functional.pad(patches, (0, 0, 1, 0), value=1.0),
            image_mask=nn.functional.pad(mask, (1, 0), value=1),
            patch_index=index,
            patch_grid=grid,
        )


@pytest.mark.parametrize("permuted", [False, True])
def test_a_word_goes_to_the_patches_of_its_colour(permuted):
    tools = processor()
    model = ColourModel(tools.tokenizer)
    model.permuted = permuted
    model.train()
    red, blue = word_maps(model, tools, flag(), "Red blue")
    assert (red.word, blue.word) == ("Red", "blue")
    assert model.training and model.dropout.training  # given back as it was, and not used in that mode
    # both have half of the mass; red's fills the red quarter before it spills over
    expected = torch.full((4, 4), 1 / 16 * 1 / 3)
    expected[:, 0] = 1 / 16
    torch.testing.assert_close(red.mass, expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(red.mass + blue.mass, torch.full((4, 4), 1 / 16), atol=1e-4, rtol=0)
    assert red.heat[:, 0].eq(1).all() and red.heat[:, 1:].eq(0).all()
    swapped = word_maps(model, tools, flag().rotate(180), "Red blue")[0]
    assert swapped.heat[:, 3].eq(1).all() and swapped.heat[:, :3].eq(0).all()


def test_pieces_of_a_word_are_one_map_and_marks_are_words():
    tools = processor()
    model = ColourModel(tools.tokenizer)
    text = "blues, red"
    assert tools.tokenizer.tokenize(text) == ["blue", "##s", ",", "red"]
    maps = word_maps(model, tools, flag(), text)
    assert [one.word for one in maps] == ["blues", ",", "red"]
    assert [round(float(one.mass.sum()), 4) for one in maps] == [0.5, 0.25, 0.25]
    batch = tools(flag(), text)
    masses = patch_masses(model.eval()(**batch), batch["attention_mask"])
    torch.testing.assert_close(maps[0].mass, masses[0, 1] + masses[0, 2])
    assert not masses[0, [0, -1]].any()
    assert masses[0, 1].sum() < 0.26


def test_a_text_that_is_cut_has_maps_of_what_is_left():
    tools = processor()
    with pytest.warns(UserWarning, match="were cut"):
        maps = word_maps(ColourModel(tools.tokenizer), tools, flag(), "red " * 20 + "sky")
    assert [one.word for one in maps] == ["red"] * 14
    assert sum(float(one.mass.sum()) for one in maps) == pytest.approx(1, abs=1e-4)


def test_masses_of_a_batch_lie_on_the_canvas_and_leave_its_padding():
    tools = processor()
    model = ColourModel(tools.tokenizer).eval()
    wide = flag().resize((48, 32))
    batch = tools([flag(), wide], ["red blue", "red blue sky"])
    assert batch["pixel_values"].shape[-2:] == (32, 48)
    with torch.no_grad():
        outputs = model(**batch)
    masses = patch_masses(outputs, batch["attention_mask"])
    assert masses.shape == (2, 5, 4, 6)
    assert not masses[0, :, :, 4:].any() and not masses[0, 3:].any()
    real = real_patches(outputs)
    assert real[0, :, :4].all() and not real[0, :, 4:].any() and real[1].all()
    for row, words in ((0, 2), (1, 3)):
        assert masses[row].sum(dim=(1, 2))[1 : 1 + words].tolist() == pytest.approx([1 / words] * words, abs=1e-4)
    alone = word_maps(model, tools, flag(), "red blue")
    torch.testing.assert_close(torch.stack([one.mass for one in alone]), masses[0, 1:3, :, :4], atol=1e-5, rtol=0)


def test_a_heat_map_worked_by_hand():
    """(0, 0, 0, 0, 10) has mean 2 and deviation 4: the 10 is 2 above, the zeros are cut to 1, and 1..2 becomes 0..1."""
    assert heat_map(torch.tensor([[0.0, 0, 0, 0, 10]])).tolist() == [[0, 0, 0, 0, 1]]
    # 4 and 6 among fourteen zeros are 2.0 and 3.2 above: the second is cut to 3, and of 1..3 the first is half
    mass = torch.zeros(4, 4)
    mass[0, 0], mass[3, 1] = 4, 6
    heights = (mass - mass.mean()) / mass.std(correction=0)
    heat = heat_map(mass)
    assert heat[3, 1] == 1 and heat[0, 0].item() == pytest.approx((float(heights[0, 0]) - 1) / 2, abs=1e-6)
    assert heights[3, 1] > 3 and 0.45 < heat[0, 0] < 0.55 and heat.gt(0).sum() == 2
    torch.testing.assert_close(heat_map(mass * 1e-3 + 5), heat, atol=1e-3, rtol=0)
    for even in (torch.full((3, 3), 1 / 9), torch.zeros(2, 2), torch.ones(1, 1)):
        assert not heat_map(even).any()


def test_an_overlay_shows_the_picture_where_it_is_hot():
    picture, heat = Image.new("RGB", (40, 20), (200, 30, 30)), torch.tensor([[1.0, 0.0], [0.0, 0.5]])
    drawn = overlay(picture, heat)
    assert drawn.size == (40, 20) and drawn.mode == "RGB"
    assert drawn.getpixel((0, 0)) == drawn.getpixel((19, 9)) == (200, 30, 30)
    cold = drawn.getpixel((20, 9))
    assert len(set(cold)) == 1 and cold[0] > 200
    half = drawn.getpixel((39, 19))
    assert half == tuple(pytest.approx((a + b) / 2, abs=2) for a, b in zip((200, 30, 30), cold))
    transparent = Image.new("RGBA", (40, 20), (200, 30, 30, 0))
    assert overlay(transparent, heat).getpixel((0, 0)) == (255, 255, 255)


def test_a_sheet_has_a_cell_a_map():
    picture, heats = Image.new("RGB", (30, 10), "red"), [torch.ones(1, 1)] * 5
    sheet = map_sheet(picture, list("abcde"), heats, columns=2, side=60)
    width, height = sheet.size
    assert (width, height) == (2 * 68 + 8, 3 * (20 + 22 + 8) + 8)
    red = sum(sheet.getpixel((x, y)) == (255, 0, 0) for x in range(width) for y in range(height))
    assert red == 5 * 60 * 20
    for titles in ([], ["a"]):
        with pytest.raises(ValueError, match=f"{len(titles)} titles for 5 maps"):
            map_sheet(picture, titles, heats)
    thin = map_sheet(Image.new("RGB", (400, 2), "red"), ["a"], heats[:1])
    assert thin.size[1] == 8 + 22 + 8 + 1


def test_faults_are_named(tmp_path):
    tools = processor()
    model = ColourModel(tools.tokenizer)
    with pytest.raises(ValueError, match="'' has no words"):
        word_maps(model, tools, flag(), "")
    with pytest.raises(ValueError, match="beta and iterations must be above 0, got 0 and 1000"):
        word_maps(model, tools, flag(), "red", beta=0)
    towers = save_tiny_clip(tmp_path / "clip")
    clip = AutoModel.from_pretrained(towers), AutoProcessor.from_pretrained(towers)
    with pytest.raises(ValueError, match="no text_hidden_states.*reads words and image together"):
        word_maps(*clip, flag(), "a red apple")
    cleaned = lambda images, text, return_tensors: tools(images, text.replace("sky", "blue"))  # noqa: E731
    cleaned.tokenizer = tools.tokenizer
    with pytest.raises(ValueError, match="makes other tokens of 'red sky'"):
        word_maps(model, cleaned, flag(), "red sky")
    assert len(word_maps(model, cleaned, flag(), "red blue")) == 2


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A tiny ViLT as pre-training saves it."""
    folder, tools = tmp_path_factory.mktemp("vilt"), processor()
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    tables = {"vocab_size": len(tools.tokenizer), "max_position_embeddings": 16, "image_size": 32, "patch_size": PATCH}
    torch.manual_seed(0)
    VlpViltForPreTraining(VlpViltConfig(**sizes, **tables, initializer_range=0.2)).save_pretrained(folder)
    tools.save_pretrained(folder)
    return folder


@pytest.fixture
def explain(saved, tmp_path, monkeypatch):
    """Runs the script in a folder with a picture."""
    monkeypatch.chdir(tmp_path)
    flag().resize((90, 60)).save("a.png")

    def run(*words) -> None:
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), str(saved), *words])
        runpy.run_path(str(SCRIPT), run_name="__main__")

    return run


def test_the_script_writes_a_sheet_of_the_words(explain, saved, capsys):
    explain("--image", "a.png", "--text", "Red blue, sky", "--output", "out/map.png")
    assert sorted(file.name for file in Path("out").iterdir()) == ["map.png"]
    with Image.open("out/map.png") as sheet:
        assert sheet.format == "PNG" and sheet.size == (4 * 248 + 8, 160 + 22 + 8 + 8)
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed[1:-1]] == ["Red", "blue", ",", "sky"]
    assert printed[-1] == f"sheet: {Path('out/map.png')}"
    explain("--image", "a.png", "--text", "Red blue, sky", "--word", "red", "SKY", "--output", "two.png")
    with Image.open("two.png") as sheet:
        assert sheet.size[0] == 2 * 248 + 8
    model = VlpViltForPreTraining.from_pretrained(saved)
    maps = word_maps(model, processor(), Image.open("a.png"), "Red blue, sky")
    assert maps[0].mass.shape == (4, 6) and maps[0].heat.max() == 1
    shares = maps[0].mass / maps[0].mass.sum()
    assert f"{shares.max():.2f} at {tuple(divmod(int(shares.argmax()), 6))}" in printed[1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--image", "a.png", "--text", "red sky", "--word", "blue"), "no word 'blue'; it has red, sky"),
        (("--image", "a.png", "--text", " "), "' ' has no words"),
        (("--image", "absent.png", "--text", "red"), "--image: no file absent.png"),
        (("--image", "a.png", "--text", "red", "--beta", "-1"), "above 0, got -1.0"),
    ],
)
def test_the_script_says_what_is_wrong_and_writes_nothing(explain, words, message):
    with pytest.raises(SystemExit) as end:
        explain(*words, "--output", "map.png")
    assert message in str(end.value.code)
    assert [file.name for file in Path().iterdir()] == ["a.png"]


def test_the_sheet_is_a_png(explain, capsys):
    with pytest.raises(SystemExit):
        explain("--image", "a.png", "--text", "red", "--output", "map.gif")
    assert "--output map.gif is no .png file" in capsys.readouterr().err


@pytest.fixture(scope="module")
def attending(tmp_path_factory) -> Path:
    """A tiny model whose words attend to the image, as fine-tuning on retrieval saves it."""
    folder = tmp_path_factory.mktemp("albef")
    tokenizer = without_end_mark(train_wordpiece_tokenizer(TEXTS, 40, 16))
    tools = VlpAlbefProcessor(VlpAlbefImageProcessor(size={"height": 32, "width": 32}), tokenizer)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes["initializer_range"] = 0.2
    config = VlpAlbefConfig(
        vision_config={**sizes, "image_size": 32, "patch_size": PATCH},
        text_config={**sizes, "vocab_size": len(tokenizer), "max_position_embeddings": 16},
        multimodal_config={**sizes, "num_hidden_layers": 3},
        projection_dim=8,
        queue_size=4,
    )
    torch.manual_seed(0)
    VlpAlbefForImageTextRetrieval(config).save_pretrained(folder)
    tools.save_pretrained(folder)
    return folder


def test_a_folder_of_another_task_has_no_map(explain, attending, tmp_path, capsys, monkeypatch):
    VlpAlbefForImageTextRetrieval.from_pretrained(attending).albef.save_pretrained(tmp_path)
    AutoProcessor.from_pretrained(attending).save_pretrained(tmp_path)
    words = ["--image", "a.png", "--text", "red", "--output", "a_map.png"]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), str(tmp_path), *words])
    with pytest.raises(SystemExit):
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert "has no weights itm_head.bias, itm_head.weight" in capsys.readouterr().err
    assert not Path("a_map.png").exists()


def test_the_script_shows_what_words_attend_to(explain, attending, capsys, monkeypatch):
    def run(*words) -> list[str]:
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), str(attending), "--image", "a.png", *words])
        runpy.run_path(str(SCRIPT), run_name="__main__")
        return [line.split("  ")[0] for line in capsys.readouterr().out.splitlines()[1:-1]]

    assert run("--text", "red blue sky", "--output", "all.png") == ["red blue sky", "red", "blue", "sky"]
    assert run("--text", "red blue sky", "--word", "Blue sky", "red", "--output", "two.png") == ["Blue sky", "red"]
    assert len(run("--text", "red blue sky", "--layer", "2", "--output", "other.png")) == 4
    with Image.open("all.png") as sheet, Image.open("two.png") as two, Image.open("other.png") as other:
        assert sheet.size == (4 * 248 + 8, 160 + 22 + 8 + 8) and two.size[0] == 2 * 248 + 8
        assert sheet.tobytes() != other.tobytes()
    model = VlpAlbefForImageTextRetrieval.from_pretrained(attending)
    maps = picture_maps(model, AutoProcessor.from_pretrained(attending), Image.open("a.png"), "red blue sky")
    drawn = map_sheet(Image.open("a.png"), [one.word for one in maps], [one.heat for one in maps], draw=glow)
    with Image.open("all.png") as sheet:
        assert drawn.tobytes() == sheet.tobytes()
    for words, message in (
        (("--text", "red sky", "--layer", "1"), "layer 1 has no attention to the image: choose one of 2 to 4"),
        (("--text", "red sky", "--word", "sky red"), "no 'sky red'; it has red, sky"),
    ):
        with pytest.raises(SystemExit) as end:
            run(*words, "--output", "absent.png")
        assert message in str(end.value.code) and not Path("absent.png").exists()


def test_a_model_without_attention_to_the_image_has_no_layers_of_it(explain, capsys):
    with pytest.raises(SystemExit):
        explain("--image", "a.png", "--text", "red", "--layer", "2", "--output", "map.png")
    assert "--layer is of models whose words attend to the image" in capsys.readouterr().err
