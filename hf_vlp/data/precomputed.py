"""The `precomp` folder of SCAN and VSE-infinity: captions, region features and ids of a split.

SCAN, "Stacked Cross Attention for Image-Text Matching" (https://arxiv.org/abs/1803.08024). Files: `<split>_caps.txt`, a caption a line;
`<split>_ims.npy`, float [N, R, F]; `<split>_ids.txt`, an image id a line, which may be missing.
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from hf_vlp.data.record import RecordError
from hf_vlp.data.region_files import region_matrix
from hf_vlp.inputs.regions import RegionFeatures

if TYPE_CHECKING:
    from datasets import Dataset

CAPTIONS_PER_IMAGE = 5


class PrecomputedSplit:
    """One split of a `precomp` folder: M captions over N rows of features, which stay on disk until they are asked for.

    Caption i belongs to row i where there are as many rows as captions (the evaluation files hold each image five times), and to row
    i // 5 otherwise. No number of captions is forced.

    Args:
        folder: with the files.
        split: `train`, `dev`, `test` or `testall`.
        captions_per_image: the five of above.

    Attributes:
        captions: the M captions, stripped.
        features: float [N, R, F], memory-mapped.
        row_of_caption: int64 [M].
        image_ids: M texts, of each caption the id of its image. Without an id file it is the number of the row, of the first where
            each image is there five times.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: numbers of captions, rows and ids that do not fit together.
    """

    def __init__(self, folder: str | os.PathLike, split: str, captions_per_image: int = CAPTIONS_PER_IMAGE):
        folder = Path(folder)
        captions, images, ids = (folder / f"{split}_{name}" for name in ("caps.txt", "ims.npy", "ids.txt"))
        for path in (captions, images):
            if not path.is_file():
                there = sorted(file.name.removesuffix("_caps.txt") for file in folder.glob("*_caps.txt"))
                raise FileNotFoundError(
                    f"there is no {path}; the splits of this folder are: {', '.join(there) or 'none'}"
                )
        with open(captions, encoding="utf-8") as file:
            self.captions = [line.strip() for line in file]
        self.features, names = region_matrix(images)
        count, rows = len(self.captions), len(self.features)
        each = 1 if rows == count else captions_per_image
        self.row_of_caption = np.arange(count) // each
        if not count or self.row_of_caption[-1] >= rows:
            raise ValueError(
                f"{captions} has {count} captions and {images} {rows} images, so that caption {count - 1} has none: give "
                f"captions_per_image= if it is not {captions_per_image}"
            )
        names = np.array(names)
        if rows == count and not ids.is_file() and self._repeats(captions_per_image):
            names = names[np.arange(rows) // captions_per_image * captions_per_image]
        self.image_ids: list[str] = names[self.row_of_caption].tolist()

    def __len__(self) -> int:
        return len(self.captions)

    def regions(self, caption: int) -> RegionFeatures:
        """The regions of the image of a caption, by the caption's number.

        Raises:
            RegionError: bad values.
        """
        return RegionFeatures(self.features[self.row_of_caption[caption]], image_id=self.image_ids[caption])

    def records(self) -> "Dataset":
        """One record an image, in the order of the file: `captions` (all of the image), `image_id`, and `regions`, its key in a
        store that is imported from `<split>_ims.npy`.

        Raises:
            RecordError: an empty caption, by its line from 0.
        """
        from datasets import Dataset

        captions: dict[str, list[str]] = {}
        for position, (caption, image_id) in enumerate(zip(self.captions, self.image_ids)):
            if not caption:
                raise RecordError(
                    position, "captions", "the line of the caption file is empty", "Write a caption into it."
                )
            captions.setdefault(image_id, []).append(caption)
        names = list(captions)
        return Dataset.from_dict({"captions": list(captions.values()), "image_id": names, "regions": names})

    def _repeats(self, times: int) -> bool:
        """Whether the rows are so many copies of each image, by the first region of each."""
        if len(self.features) % times:
            return False
        groups = self.features[:, 0].reshape(-1, times, self.features.shape[2])
        return times > 1 and bool((groups == groups[:, :1]).all())
