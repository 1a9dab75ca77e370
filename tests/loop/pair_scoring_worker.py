"""Pairs and questions evaluated on any number of processes; each writes what it found and what it scored itself."""

import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors.torch import save_file

from hf_vlp.distributed import rank, world_size
from hf_vlp.evaluation.fusion_retrieval import Candidates, evaluate_fusion_retrieval, propose
from hf_vlp.evaluation.grounding import evaluate_grounding
from hf_vlp.evaluation.tasks import evaluate_vqa
from tests.objectives.pair_model import PairModel, PairProcessor, TwoStageModel, pair_records
from tests.objectives.test_grounding import Pointer, Reader, phrases
from tests.objectives.test_tasks import Chooser, Numbers, questions


def main(output: str) -> None:
    accelerator = Accelerator(cpu=True)
    progress = Path(f"{output}.progress.safetensors")

    def evaluate(name: str, images: int = 7, stop_after=None, kind: type = PairModel, **options) -> None:
        model = kind(stop_after)
        report = evaluate_fusion_retrieval(
            model, PairProcessor(), pair_records(images), progress=False, pair_batch_size=6, batch_size=2, **options
        )
        found[f"{name}.scores"] = report.scores()
        found[f"{name}.metrics"] = torch.tensor(list(report.metrics.values()))
        found[f"{name}.scored"] = torch.tensor(model.scored).reshape(-1, 2)

    found: dict[str, torch.Tensor] = {}
    evaluate("whole")
    first = torch.randn(7, 21, generator=torch.Generator().manual_seed(5))
    evaluate("two-stage", candidates=Candidates(first, images=3, captions=4))
    evaluate("one-image", images=1)  # one process has none
    nearest = propose(TwoStageModel(), PairProcessor(), pair_records(), 3, 4, progress=False)
    evaluate("own-candidates", kind=TwoStageModel, candidates=nearest)
    evaluate("one-image-apart", kind=TwoStageModel, images=1)
    try:
        # stopped early on the first process, later on the second
        evaluate("stopped", stop_after=2 + rank(), resume=progress)
        raise AssertionError("the run was not stopped")
    except KeyboardInterrupt:
        accelerator.wait_for_everyone()
        found["parts"] = torch.tensor(len(list(progress.parent.glob(f"{progress.stem}*"))))
        accelerator.wait_for_everyone()
    evaluate("resumed", resume=progress)
    accelerator.wait_for_everyone()
    found["files"] = torch.tensor(len(list(progress.parent.glob(f"{progress.stem}*"))))
    found["answers.logits"] = evaluate_vqa(Chooser(), Numbers(), questions(), progress=False).logits
    report = evaluate_grounding(Pointer(), Reader(), phrases()[:3], Pointer.maps, progress=False)
    found["grounding.scores"], found["grounding.chosen"] = torch.cat(report.scores), report.chosen
    found["grounding.metrics"] = torch.tensor(list(report.metrics.values()))
    save_file(found, f"{output}.{rank()}of{world_size()}")
    accelerator.end_training()


if __name__ == "__main__":
    main(sys.argv[1])
