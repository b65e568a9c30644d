"""The worker of engine nemo; torchrun starts one per process: `python -m minitron.engines.nemo.worker JOB.json`.

Jobs: score (the teacher), import (Hugging Face → NeMo checkpoint), train (llm.finetune or llm.distill), prune
(llm.prune), export (→ Hugging Face). Megatron saves checkpoints in a spawned process, which imports this module again:
hence the guard at the end, and no slow import at the top.
"""

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

SIZES = {
    "hidden_size": "target_hidden_size",
    "intermediate_size": "target_ffn_hidden_size",
    "num_attention_heads": "target_num_attention_heads",
    "num_key_value_heads": "target_num_query_groups",
    "num_hidden_layers": "target_num_layers",
}
"""NeMo's names of the sizes in config.json."""


def main() -> None:
    """Run the job in the file that the argument names."""
    from minitron.engines.launcher import end_with_parent, leave_group, report_failure

    end_with_parent()
    os.register_at_fork(after_in_child=end_with_parent)  # the writers of checkpoints
    path = Path(sys.argv[1]).absolute()
    job = json.loads(path.read_text())
    try:
        JOBS[job["job"]](job, Path(job["work"]))
        leave_group()
    except BaseException as error:
        report_failure(path, error)
        raise


def import_models(job: dict[str, Any], work: Path) -> None:
    """Convert Hugging Face directories to NeMo checkpoints, and mark each as complete."""
    from nemo.collections import llm
    from nemo.lightning.io import ModelConnector

    from minitron.engines.checkpoints import mark_complete

    for name, source in job["models"].items():
        shutil.rmtree(work / name, ignore_errors=True)
        with tempfile.TemporaryDirectory() as directory:
            # by default NeMo copies every tokenizer through one directory, where two imports would mix theirs
            ModelConnector.save_hf_tokenizer_assets.__defaults__ = (f"{directory}/nemo_tokenizer",)
            # the importer reads the real sizes from config.json; this only selects the importer
            llm.import_ckpt(
                llm.LlamaModel(llm.LlamaConfig(num_layers=1, num_attention_heads=1, hidden_size=1)),
                f"hf://{source}",
                work / name,
            )
        mark_complete(work / name)


def export_models(job: dict[str, Any], work: Path) -> None:
    """Convert NeMo checkpoints to Hugging Face directories, with the config of the model `like` if it is given."""
    from nemo.collections import llm
    from nemo.collections.llm.api import load_connector_from_trainer_ckpt
    from nemo.lightning.io import load_context

    from minitron.models.checks import read_config

    for export in job["exports"]:

        def make_exporter(path: Path, target: str, like: str | None = export["like"]) -> Any:
            connector = load_connector_from_trainer_ckpt(path, target)
            sizes = connector.config
            if like is None:  # else NeMo cuts the embedding to the tokenizer's size
                source = load_context(path / "context", subpath="model.config")
                sizes.vocab_size = source.vocab_size or sizes.vocab_size
                return type("Exporter", (type(connector),), {"config": sizes})(path)
            config = read_config(Path(like))
            for size in (*SIZES, "head_dim"):
                setattr(config, size, getattr(sizes, size))
            return type("Exporter", (type(connector),), {"config": config, "tokenizer": None})(path)

        llm.export_ckpt(Path(export["checkpoint"]), "hf", Path(export["output"]), load_connector=make_exporter)


def prune(job: dict[str, Any], work: Path) -> None:
    """Prune the teacher; save the importance that Model-Optimizer measured."""
    import torch
    from modelopt.torch.prune.plugins.mcore_minitron import MCoreMinitronSearcher
    from nemo.collections import llm
    from nemo.collections.llm.modelopt import PruningConfig

    from minitron.config.parse import parse
    from minitron.data.packed import PackedDataset
    from minitron.engines.nemo.engine import SCORES, split_calibration
    from minitron.engines.nemo.training import Batches, make_data_module

    config: Any = parse("prune", job["config"])
    run_search, scores = MCoreMinitronSearcher.run_search, (work / SCORES).absolute()

    def search_and_save(searcher: Any) -> None:
        run_search(searcher)
        torch.save({"activations": searcher.activations_per_rank, "layers": searcher.layer_scores}, scores)

    MCoreMinitronSearcher.run_search = search_and_save
    _rank_groups_by_their_own_heads()
    shutil.rmtree(work / "pruned", ignore_errors=True)
    sequences, size = split_calibration(config)
    if config.drop_layers:
        target, data = PruningConfig(drop_layers=config.drop_layers), None
    else:
        target = PruningConfig(**{SIZES[name]: size for name, size in job["sizes"].items()})
        train = PackedDataset(config.dataset / "train", config.sequence_length, config.seed)
        data = make_data_module(
            config.model_copy(update={"micro_batch_size": size}), Batches(train, sequences), None, size
        )
    teacher, pruned = (str((work / name).absolute()) for name in ("teacher", "pruned"))
    os.chdir(work)  # llm.prune logs into the working directory
    llm.prune(teacher, pruned, target, num_train_samples=sequences, data=data)


def _rank_groups_by_their_own_heads() -> None:
    """Correct a group's score in Model-Optimizer 0.37, which reads the channels as [heads per group, groups, D].

    They are stored group by group, as Model-Optimizer reads them when it ranks heads; its group score mixes groups.
    """
    import torch
    from modelopt.torch.nas.plugins.megatron import _DynamicSelfAttention

    def estimate_importance(attention: Any) -> torch.Tensor:
        groups = attention.get_hparam("num_query_groups").max
        return torch.linalg.vector_norm(attention._activations.sqrt().view(groups, -1), dim=1)

    _DynamicSelfAttention._estimate_query_group_importance = estimate_importance


def train(job: dict[str, Any], work: Path) -> None:
    """Fine-tune or distill, from the last checkpoint if there is one, also after Kueue has suspended the job."""
    import torch.distributed

    from minitron.config.parse import parse
    from minitron.engines.nemo import training
    from minitron.engines.progress import Start, find_start

    store, rank, _ = next(torch.distributed.rendezvous("env://"))
    if rank == 0:  # the other workers wait for its answer
        store.set("minitron_start", json.dumps(find_start(work)))
    start = Start(*json.loads(store.get("minitron_start")))
    training.train(parse(job["stage"], job["config"]), work, Path(job["model"]), start)


def score_teacher_job(job: dict[str, Any], work: Path) -> None:
    """Score the teacher of a distillation."""
    from minitron.config.parse import parse
    from minitron.engines.checkpoints import mark_complete
    from minitron.engines.nemo.engine import TEACHER, score_teacher

    config: Any = parse("distill", job["config"])
    (work / TEACHER).mkdir(exist_ok=True)
    mark_complete(work / TEACHER, score_teacher(config, Path(job["teacher"])))


JOBS = {"score": score_teacher_job, "import": import_models, "train": train, "prune": prune, "export": export_models}

if __name__ == "__main__":
    main()
