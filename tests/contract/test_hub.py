"""A folder pushed to a Hub on 127.0.0.1 and loaded from it by its id, each in a process of its own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoProcessor

import hf_vlp  # noqa: F401 (registers the architectures)
from hf_vlp.export.hub import write_card
from tests.contract.loopback_hub import Hub, environment
from tests.contract.tiny import save_tiny_clip

ROOT = Path(__file__).parents[2]

PUSH = """
import hf_vlp
from transformers import AutoModelForPreTraining, AutoProcessor
from hf_vlp.export.hub import push_to_hub

print(push_to_hub("tiny", "me/tiny", license="mit"))
AutoModelForPreTraining.from_pretrained("tiny").push_to_hub("me/parts")
AutoProcessor.from_pretrained("tiny").push_to_hub("me/parts")
"""

LOAD = """
import sys, torch, hf_vlp
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoProcessor

for repository in ("me/tiny", "me/parts"):
    model, processor = AutoModel.from_pretrained(repository), AutoProcessor.from_pretrained(repository)
    given = load_file("given.safetensors")
    batch = processor(images=given["pictures"], text=["a red apple", "two dogs"])
    with torch.no_grad():
        logits = model(**batch).logits_per_image
    save_file({"logits": logits, **batch}, repository.replace("/", "-") + ".safetensors")
try:
    AutoModel.from_pretrained("me/absent")
except OSError as error:
    print("refused:", error)
"""


class Client:
    """Runs programs in a folder against the loopback Hub, each in its own process with its own empty cache."""

    def __init__(self, address: str, folder: Path):
        self.address, self.folder, self.runs = address, folder, 0

    def run(self, program: str) -> str:
        self.runs += 1
        variables = environment(self.address, self.folder / f"home{self.runs}") | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [sys.executable, "-c", program], cwd=self.folder, env=variables, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        return done.stdout


@pytest.fixture(scope="module")
def round_trip(tmp_path_factory):
    """The Hub after both pushes and both loads, the client's folder, and what the programs printed."""
    folder = tmp_path_factory.mktemp("hub")
    tiny = save_tiny_clip(folder / "tiny")
    (tiny / "checkpoints" / "step-00000001").mkdir(parents=True)
    (tiny / "checkpoints" / "step-00000001" / "state.json").write_text("{}")
    (tiny / ".secret.json").write_text("{}")
    (tiny / "notes.pt").write_bytes(b"not to be published")
    result = {"task": "retrieval", "data": "pairs.jsonl", "metrics": {"rsum": 123.4375}}
    (tiny / "results.json").write_text(json.dumps([result]))
    pictures = torch.randint(0, 256, (3, 3, 40, 48), dtype=torch.uint8)
    save_file({"pictures": pictures}, folder / "given.safetensors")
    hub = Hub()
    with hub.serve() as address:
        client = Client(address, folder)
        yield hub, folder, (client.run(PUSH), client.run(LOAD))


@pytest.mark.parametrize("repository", ["me/tiny", "me/parts"])
def test_what_is_loaded_by_id_is_what_was_pushed(round_trip, repository):
    _, folder, _ = round_trip
    model, processor = AutoModel.from_pretrained(folder / "tiny"), AutoProcessor.from_pretrained(folder / "tiny")
    batch = processor(images=load_file(folder / "given.safetensors")["pictures"], text=["a red apple", "two dogs"])
    with torch.no_grad():
        wanted = {"logits": model(**batch).logits_per_image, **batch}
        other = model(**batch | {"pixel_values": batch["pixel_values"].flip(0)}).logits_per_image
    found = load_file(folder / f"{repository.replace('/', '-')}.safetensors")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in ("pixel_values", "input_ids", "attention_mask"))
    torch.testing.assert_close(found["logits"], wanted["logits"])
    assert not torch.allclose(found["logits"], other)


def test_model_processor_and_card_go_up_in_one_commit(round_trip):
    hub, folder, (pushed, _) = round_trip
    assert hub.commits["me/tiny"] == 1
    assert f"/me/tiny/commit/{hub.sha('me/tiny')}" in pushed
    names = set(hub.files["me/tiny"])
    assert {"config.json", "model.safetensors", "processor_config.json", "tokenizer.json", "README.md"} <= names
    assert names == {file.name for file in (folder / "tiny").iterdir()} - {"checkpoints", ".secret.json", "notes.pt"}
    assert hub.files["me/tiny"]["model.safetensors"] == (folder / "tiny" / "model.safetensors").read_bytes()


def test_the_card_on_the_hub_is_the_generated_one(round_trip):
    hub, folder, _ = round_trip
    card = hub.files["me/tiny"]["README.md"].decode()
    assert card == write_card(folder / "tiny", "me/tiny").read_text()
    assert card != write_card(folder / "tiny", "me/other").read_text()
    assert 'AutoModel.from_pretrained("me/tiny")' in card and "123.44" in card and "license: mit" in card
    assert "hf_vlp" not in hub.files["me/parts"]["README.md"].decode()


def test_an_id_that_is_not_there_is_an_error(round_trip):
    _, _, (_, loaded) = round_trip
    assert "refused:" in loaded and "me/absent" in loaded
