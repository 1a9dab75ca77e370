"""A case of VSE-infinity's evaluation of other sizes than the golden one, made here with numpy's plain argsort."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.parity.harness import run

IMAGES, EACH, FOLDS = 12, 3, 4


def numbers(ranks: np.ndarray) -> list[float]:
    recalls = [100.0 * np.mean(ranks < k) for k in (1, 5, 10)]
    return [*recalls, np.floor(np.median(ranks)) + 1, ranks.mean() + 1]


def both_ways(name: str, scores: np.ndarray, each: int) -> dict[str, torch.Tensor]:
    orders = [np.argsort(row)[::-1] for row in scores], [np.argsort(row)[::-1] for row in scores.T]
    own = [range(each * image, each * image + each) for image in range(len(scores))]
    to_text = np.array([min(np.where(order == text)[0][0] for text in own[i]) for i, order in enumerate(orders[0])])
    to_image = np.array([np.where(order == text // each)[0][0] for text, order in enumerate(orders[1])])
    found = numbers(to_text), numbers(to_image)
    values = {"i2t": found[0], "t2i": found[1], "rsum": sum(found[0][:3]) + sum(found[1][:3])}
    values = {key: torch.tensor(value, dtype=torch.float32) for key, value in values.items()}
    values |= {"ranks_i2t": torch.from_numpy(to_text), "ranks_t2i": torch.from_numpy(to_image)}
    values |= {f"top1_{way}": torch.tensor([order[0] for order in lists]) for way, lists in zip(("i2t", "t2i"), orders)}
    return {f"{name}.{key}": value for key, value in values.items()}


def crisscrossed(scores: np.ndarray, positives: list[set[int]], skips: bool = False) -> torch.Tensor:
    ranks = []
    for row, good in zip(scores, positives):
        order = np.argsort(row)[::-1]
        if good or not skips:
            ranks.append(min((np.where(order == target)[0][0] for target in good), default=10**9))
    return torch.tensor(numbers(np.array(ranks))[:3], dtype=torch.float32)


def write_case(folder) -> None:
    random = np.random.default_rng(0)
    first, second = (random.standard_normal((IMAGES, IMAGES * EACH)).astype(np.float32) for _ in range(2))
    first[np.arange(IMAGES).repeat(EACH), np.arange(IMAGES * EACH)] += 1.0
    outputs = both_ways("full", first, EACH)
    outputs |= both_ways("ensemble", (first.astype(np.float64) + second) / 2, EACH)
    outputs |= both_ways("one_caption", first[:, ::EACH], 1)
    size, rows = IMAGES // FOLDS, []
    for fold in range(FOLDS):
        part = first[size * fold : size * (fold + 1), EACH * size * fold : EACH * size * (fold + 1)]
        found = both_ways(f"fold{fold}", part, EACH)
        outputs |= found
        ways = [found[f"fold{fold}.{way}"] for way in ("i2t", "t2i")]
        rows.append(torch.cat([*ways, *(way[:3].mean()[None] for way in ways), found[f"fold{fold}.rsum"][None]]))
    outputs["fold_mean"] = torch.stack(rows).mean(dim=0)

    images, texts = random.standard_normal((IMAGES, 5)), random.standard_normal((IMAGES * EACH, 5))
    images, texts = (side / np.linalg.norm(side, axis=1, keepdims=True) for side in (images, texts))
    image_ids, text_ids = [f"{3 * i}" for i in range(IMAGES)], [f"{500 + 7 * i}" for i in range(IMAGES * EACH)]
    lists = {
        way: {query: [[int(random.choice(targets)), float(random.choice([1.0, 2.5, 3.0, 5.0]))] for _ in range(2)]}
        | {other: [] for other in queries[1:4]}
        | {other: [[int(targets[0]), 3.0], [99999, 5.0]] for other in queries[4:]}
        for way, queries, targets in (
            ("i2t", image_ids, text_ids),
            ("t2i", text_ids, image_ids),
            ("i2i", image_ids, image_ids),
            ("t2t", text_ids, text_ids),
        )
        for query in queries[:1]
    }
    names = {"image": {name: row for row, name in enumerate(image_ids)}, "text": {n: r for r, n in enumerate(text_ids)}}

    def positives(way, queries, targets, least=0.0):
        return [
            {
                names[targets][str(target)]
                for target, score in lists[way][query]
                if score >= least and str(target) in names[targets]
            }
            for query in names[queries]
        ]

    within = {"i2i": images @ images.T, "t2t": texts @ texts.T}
    for scores in within.values():
        np.fill_diagonal(scores, 0.0)
    siblings = [
        good | {text // EACH * EACH + k for k in range(EACH)} - {text}
        for text, good in enumerate(positives("t2t", "text", "text", 3.0))
    ]
    outputs["cxc.i2t"] = crisscrossed(images @ texts.T, positives("i2t", "image", "text"))
    outputs["cxc.t2i"] = crisscrossed(texts @ images.T, positives("t2i", "text", "image"))
    outputs["cxc.i2i"] = crisscrossed(within["i2i"], positives("i2i", "image", "image", 2.5), skips=True)
    outputs["cxc.t2t"] = crisscrossed(within["t2t"], siblings)
    inputs = {"sims": first, "sims_second_model": second, "cxc_img_emb": images, "cxc_cap_emb": texts}
    save_file({name: torch.from_numpy(value) for name, value in inputs.items()}, folder / "inputs.safetensors")
    save_file(outputs, folder / "outputs.safetensors")
    (folder / "config.json").write_text(json.dumps({"npts": IMAGES, "captions_per_image": EACH, "folds": FOLDS}))
    (folder / "cxc.json").write_text(json.dumps({"img_ids": image_ids, "cap_ids": text_ids, **lists}))


def test_a_case_of_another_size(tmp_path):
    write_case(tmp_path)
    case = run("vse", "eval_metrics", tmp_path)
    assert case.passed, "\n".join(str(line) for line in case.lines if line.verdict == "FAIL")
    outputs = load_file(tmp_path / "outputs.safetensors")
    assert {line.name for line in case.lines if line.verdict == "ok"} == set(outputs)


@pytest.mark.parametrize("name", ["fold2.ranks_t2i", "ensemble.top1_i2t", "one_caption.t2i", "fold_mean", "cxc.t2t"])
def test_one_changed_number_fails(tmp_path, name):
    write_case(tmp_path)
    outputs = load_file(tmp_path / "outputs.safetensors")
    outputs[name][1] += 1
    save_file(outputs, tmp_path / "outputs.safetensors")
    case = run("vse", "eval_metrics", tmp_path)
    assert [line.name for line in case.lines if line.verdict == "FAIL"] == [name]
