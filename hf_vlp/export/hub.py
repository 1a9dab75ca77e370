"""A saved folder's card, and the upload of model, processor and card in one commit."""

from pathlib import Path
from typing import Any

from hf_vlp.export.card import CardError, card_text
from hf_vlp.files import write_text

PUBLISHED = {".json", ".jsonl", ".safetensors", ".txt", ".model", ".yaml", ".md", ".png"}
KEPT_METADATA = ("license", "license_name", "license_link", "language", "datasets", "base_model")


def write_card(folder: str | Path, repo_id: str | None = None, **metadata: Any) -> Path:
    """Write README.md of a saved folder from its config.json, weights, results.json and recipe.yaml; no network.

    Args:
        folder: what `save_pretrained` or a training run wrote.
        repo_id: the name that the loading lines use; the folder's path if not given.
        metadata: fields of `huggingface_hub.ModelCardData` that the files do not tell (`license`, `language`, `datasets`,
            `base_model`). Those of an earlier card of the folder are kept.

    Raises:
        FileNotFoundError: no config.json, or no weights.
        CardError: an architecture of another package, or a file that is damaged or not as documented.
    """
    path = Path(folder) / "README.md"
    if path.is_file():
        earlier = _metadata_of(path)
        metadata = {name: earlier[name] for name in KEPT_METADATA if name in earlier} | metadata
    return write_text(path, card_text(folder, repo_id, **metadata))


def _metadata_of(path: Path) -> dict[str, Any]:
    from huggingface_hub import ModelCard
    from yaml import YAMLError

    try:
        return ModelCard(path.read_text(encoding="utf-8"), ignore_metadata_errors=True).data.to_dict()
    except (ValueError, YAMLError) as error:
        raise CardError(f"the head of {path} cannot be read ({error}): repair or delete it") from error


def push_to_hub(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    commit_message: str = "Upload model, processor and card",
    **metadata: Any,
) -> str:
    """Write the card under the repository's name and upload the folder in one commit; returns the commit's address.

    The files directly in the folder go: weights, configuration, processor, results, recipe, pictures, card. Checkpoints
    and hidden files stay. The repository is made if it is not there.

    Args:
        folder, metadata: as for `write_card`.
        repo_id: "owner/name".
        private: for a new repository.
        token: the one that `hf auth login` saved if not given.

    Raises:
        FileNotFoundError, CardError: as `write_card`; nothing has been sent then.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    folder = Path(folder)
    write_card(folder, repo_id, **metadata)
    files = [file for file in sorted(folder.iterdir()) if file.suffix in PUBLISHED and file.is_file()]
    operations = [CommitOperationAdd(file.name, file) for file in files if not file.name.startswith(".")]
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    return api.create_commit(repo_id, operations, commit_message=commit_message).commit_url
