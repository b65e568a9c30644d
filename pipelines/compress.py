"""The whole flow as a Kubeflow pipeline: prepare → finetune → prune → distill → evaluate → register.

Rewrite the compiled pipeline beside this file: `python -m minitron.pipelines.compress`.
"""

from pathlib import Path
from typing import Any, Optional

from kfp import compiler, dsl, kubernetes

from minitron.components import distill, evaluate, finetune, prepare, prune, register
from minitron.components.images import TOOLS, TRAINER
from minitron.config import ClusterConfig

COMPILED = Path(__file__).with_suffix(".yaml")
CLUSTER = ClusterConfig()

VOLUME = "/workspace"
"""Where every task has the shared volume: results by key, fetched models, checkpoints of work in progress. It outlives
the run, so that the next one finds them."""

CACHE = f"{VOLUME}/cache"
"""Where the tasks keep what they fetched from a workspace in a bucket, and their work in progress."""

RETRY_PERIOD = "2592000s"
"""30 days. What Kubeflow calls the maximum back-off is Argo's maxDuration, counted from the start of the first attempt:
with the default of an hour, a stage lost in its second hour is not tried again."""

CREDENTIALS = ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "HF_TOKEN", "NGC_API_KEY")
"""Keys of the optional secret that the tasks get as environment variables."""


def give(task: dsl.PipelineTask, gpus: Any, cpu: Any, memory: Any) -> None:
    """Say what a task gets. prepare and register ask for 0 GPUs by default: nobody pays for one that idles."""
    task.set_accelerator_type("nvidia.com/gpu").set_accelerator_limit(gpus)
    task.set_cpu_request(cpu).set_cpu_limit(cpu).set_memory_request(memory).set_memory_limit(memory)
    # /dev/shm, through which data loaders and NCCL pass tensors: the default of 64 MB ends in a bus error.
    kubernetes.empty_dir_mount(task, "shared-memory", "/dev/shm", medium="Memory", size_limit=CLUSTER.shared_memory)


def protect(task: dsl.PipelineTask) -> None:
    """Say what happens to a task whose node is lost: it resumes from its checkpoint in the workspace."""
    task.set_retry(CLUSTER.retries, backoff_duration="60s", backoff_factor=2, backoff_max_duration=RETRY_PERIOD)
    kubernetes.set_timeout(task, CLUSTER.timeout_hours * 3600)
    # Kubeflow's own cache compares addresses, not what lies there; the stages compare content (`caching`).
    task.set_caching_options(False)


def connect(task: dsl.PipelineTask, stage: str, image: Any, pull_secret: Any, secret: Any, claim: Any) -> None:
    """Say what a task is made of: its image, the volume that all share, its credentials, its labels."""
    task.set_container_image(image)
    kubernetes.set_image_pull_secrets(task, [pull_secret])
    kubernetes.mount_pvc(task, claim, VOLUME)
    task.set_env_variable("MINITRON_CACHE", CACHE)
    task.set_env_variable("HF_HOME", f"{CACHE}/huggingface")  # fetched by the first task, before a GPU waits for it
    kubernetes.use_secret_as_env(task, secret, {name: name for name in CREDENTIALS}, optional=True)
    kubernetes.add_pod_label(task, "app.kubernetes.io/part-of", "minitron")
    kubernetes.add_pod_label(task, "app.kubernetes.io/component", stage)


# fmt: off
@dsl.pipeline(
    name="compress",
    description="Compress a large language model: prune it in width or depth and distil it back.",
    pipeline_config=dsl.PipelineConfig(ttl_seconds_after_finished=CLUSTER.ttl_hours * 3600),
)
def compress(
    teacher: str,
    corpus: str,
    sequence_length: int = 8192,
    seed: int = 1234,
    engine: str = "nemo",
    tracking_uri: Optional[str] = None,
    experiment: str = "minitron",
    caching: bool = True,
    prepare_text_field: str = "text",
    prepare_validation_fraction: float = 0.01,
    prepare_test_fraction: float = 0.01,
    prepare_licence: str = "unknown",
    prepare_gpus: int = 0,
    prepare_cpu: str = "8",
    prepare_memory: str = "32Gi",
    finetune_micro_batch_size: int = 4,
    finetune_max_steps: int = 30,
    finetune_global_batch_size: int = 128,
    finetune_learning_rate: float = 0.0001,
    finetune_min_learning_rate: float = 1e-05,
    finetune_warmup_steps: int = 2,
    finetune_weight_decay: float = 0.1,
    finetune_adam_beta1: float = 0.9,
    finetune_adam_beta2: float = 0.95,
    finetune_gradient_clipping: float = 1.0,
    finetune_gradient_checkpointing: bool = False,
    finetune_validation_interval: int = 10,
    finetune_validation_sequences: int = 640,
    finetune_checkpoint_interval: int = 10,
    finetune_tensor_parallel_size: int = 1,
    finetune_pipeline_parallel_size: int = 1,
    finetune_context_parallel_size: int = 1,
    finetune_sequence_parallel: bool = False,
    finetune_num_nodes: int = 1,
    finetune_gpus_per_node: int = 8,
    finetune_enabled: bool = True,
    finetune_gpus: int = 1,
    finetune_cpu: str = "8",
    finetune_memory: str = "64Gi",
    prune_micro_batch_size: int = 4,
    prune_hidden_size: Optional[int] = None,
    prune_intermediate_size: Optional[int] = None,
    prune_num_attention_heads: Optional[int] = None,
    prune_num_key_value_heads: Optional[int] = None,
    prune_num_hidden_layers: Optional[int] = None,
    prune_drop_layers: Optional[list[int]] = None,
    prune_calibration_sequences: int = 1024,
    prune_gpus: int = 1,
    prune_cpu: str = "8",
    prune_memory: str = "64Gi",
    distill_micro_batch_size: int = 4,
    distill_max_steps: int = 30,
    distill_global_batch_size: int = 128,
    distill_learning_rate: float = 0.0001,
    distill_min_learning_rate: float = 1e-05,
    distill_warmup_steps: int = 2,
    distill_weight_decay: float = 0.1,
    distill_adam_beta1: float = 0.9,
    distill_adam_beta2: float = 0.95,
    distill_gradient_clipping: float = 1.0,
    distill_gradient_checkpointing: bool = False,
    distill_validation_interval: int = 10,
    distill_validation_sequences: int = 640,
    distill_checkpoint_interval: int = 10,
    distill_tensor_parallel_size: int = 1,
    distill_pipeline_parallel_size: int = 1,
    distill_context_parallel_size: int = 1,
    distill_sequence_parallel: bool = False,
    distill_num_nodes: int = 1,
    distill_gpus_per_node: int = 8,
    distill_temperature: float = 1.0,
    distill_kl_weight: float = 1.0,
    distill_cross_entropy_weight: float = 0.0,
    distill_intermediate_layers: list = [],
    distill_gpus: int = 1,
    distill_cpu: str = "8",
    distill_memory: str = "64Gi",
    evaluate_micro_batch_size: int = 4,
    evaluate_evaluation_sequences: int = 640,
    evaluate_tasks: list[str] = [],
    evaluate_task_directory: Optional[str] = None,
    evaluate_task_limit: Optional[int] = None,
    evaluate_prompts: list[str] = ["The history of the city began", "In physics, energy is"],
    evaluate_generation_tokens: int = 48,
    evaluate_out_of_domain: Optional[str] = None,
    evaluate_champion: Optional[str] = None,
    evaluate_gates: list[dict] = [],
    evaluate_gpus: int = 1,
    evaluate_cpu: str = "8",
    evaluate_memory: str = "64Gi",
    register_name: str = "minitron",
    register_alias: str = "challenger",
    register_gpus: int = 0,
    register_cpu: str = "2",
    register_memory: str = "8Gi",
    image: str = TRAINER,
    tools_image: str = TOOLS,
    image_pull_secret: Optional[str] = None,
    secret: str = "minitron",
    workspace: str = VOLUME,
    workspace_claim: str = "minitron-workspace",
    gpu_tolerations: Optional[list] = None,
    gpu_node_selector: Optional[dict] = None,
) -> int:
    """Compress a large language model: correct the teacher, prune it, distil it back, evaluate, register.

    Returns:
        The version in the MLflow registry.

    Args:
        teacher: Base model: a directory every task can read (Hugging Face's or NeMo 2's), hf://org/name,
            gs://bucket/path, models:/NAME@alias or ngc://org/team/model:version.
        corpus: Text: .txt, .jsonl(.gz/.zst), .json or .parquet, a directory of them, or
            hf://dataset[/config].
        sequence_length: Tokens per packed sequence.
        seed: Seed of every random choice.
        engine: Who finetunes, prunes and distils: nemo (NeMo and Megatron, one process per GPU) or hf
            (transformers, one process).
        tracking_uri: MLflow server; none: no logging.
        experiment: MLflow experiment.
        caching: Reuse a finished result that has the same inputs' content and settings.
        prepare_text_field: Field of a JSON or Parquet record that holds the text.
        prepare_validation_fraction: Share of the documents kept for validation.
        prepare_test_fraction: Share of the documents kept for the test.
        prepare_licence: Licence of the corpus, carried into manifest and model card.
        prepare_gpus: GPUs of the prepare task.
        prepare_cpu: CPU cores of the prepare task.
        prepare_memory: Memory of the prepare task, /dev/shm included.
        finetune_micro_batch_size: Sequences per forward pass.
        finetune_max_steps: Optimizer steps.
        finetune_global_batch_size: Sequences per optimizer step.
        finetune_learning_rate: Peak learning rate.
        finetune_min_learning_rate: Learning rate at the end of the cosine.
        finetune_warmup_steps: Steps of linear warm-up.
        finetune_weight_decay: Weight decay (not on norms and biases).
        finetune_adam_beta1: AdamW's beta 1.
        finetune_adam_beta2: AdamW's beta 2.
        finetune_gradient_clipping: Largest gradient norm.
        finetune_gradient_checkpointing: Recompute activations: less memory, a third more time.
        finetune_validation_interval: Steps between validations; there is one at step 0 too.
        finetune_validation_sequences: Sequences per validation, or all there are.
        finetune_checkpoint_interval: Steps between checkpoints to resume from.
        finetune_tensor_parallel_size: GPUs that share every layer (engine nemo).
        finetune_pipeline_parallel_size: GPUs that have a part of the layers each (engine nemo).
        finetune_context_parallel_size: GPUs that share every sequence (engine nemo).
        finetune_sequence_parallel: Split the activations between layers too, over the tensor-parallel GPUs.
        finetune_num_nodes: Nodes to train on; several: the task starts a TrainJob and waits (engine nemo).
        finetune_gpus_per_node: GPUs of each node, if there are several; finetune_gpus is 0 then.
        finetune_enabled: False: pass the base model on as it is.
        finetune_gpus: GPUs of the finetune task.
        finetune_cpu: CPU cores of the finetune task.
        finetune_memory: Memory of the finetune task, /dev/shm included.
        prune_micro_batch_size: Sequences per forward pass.
        prune_hidden_size: Width of the residual stream.
        prune_intermediate_size: Width of the MLP.
        prune_num_attention_heads: Query heads per layer.
        prune_num_key_value_heads: Key-value heads (groups) per layer.
        prune_num_hidden_layers: Layers to keep; those of the lowest block influence are dropped.
        prune_drop_layers: Layers to drop, counted from 1, by hand.
        prune_calibration_sequences: Training sequences that importance is read on.
        prune_gpus: GPUs of the prune task.
        prune_cpu: CPU cores of the prune task.
        prune_memory: Memory of the prune task, /dev/shm included.
        distill_micro_batch_size: Sequences per forward pass.
        distill_max_steps: Optimizer steps.
        distill_global_batch_size: Sequences per optimizer step.
        distill_learning_rate: Peak learning rate.
        distill_min_learning_rate: Learning rate at the end of the cosine.
        distill_warmup_steps: Steps of linear warm-up.
        distill_weight_decay: Weight decay (not on norms and biases).
        distill_adam_beta1: AdamW's beta 1.
        distill_adam_beta2: AdamW's beta 2.
        distill_gradient_clipping: Largest gradient norm.
        distill_gradient_checkpointing: Recompute activations: less memory, a third more time.
        distill_validation_interval: Steps between validations; there is one at step 0 too.
        distill_validation_sequences: Sequences per validation, or all there are.
        distill_checkpoint_interval: Steps between checkpoints to resume from.
        distill_tensor_parallel_size: GPUs that share every layer (engine nemo).
        distill_pipeline_parallel_size: GPUs that have a part of the layers each (engine nemo).
        distill_context_parallel_size: GPUs that share every sequence (engine nemo).
        distill_sequence_parallel: Split the activations between layers too, over the tensor-parallel GPUs.
        distill_num_nodes: Nodes to train on; several: the task starts a TrainJob and waits (engine nemo).
        distill_gpus_per_node: GPUs of each node, if there are several; distill_gpus is 0 then.
        distill_temperature: Softens both distributions; the KL is scaled by its square.
        distill_kl_weight: Weight of the forward KL divergence.
        distill_cross_entropy_weight: Weight of the cross-entropy on the corpus.
        distill_intermediate_layers: Pairs of student and teacher layers, from 1, whose outputs are
            matched too (engine nemo).
        distill_gpus: GPUs of the distill task.
        distill_cpu: CPU cores of the distill task.
        distill_memory: Memory of the distill task, /dev/shm included.
        evaluate_micro_batch_size: Sequences per forward pass.
        evaluate_evaluation_sequences: Sequences per split, or all there are.
        evaluate_tasks: lm-eval tasks.
        evaluate_task_directory: Directory of local lm-eval task files.
        evaluate_task_limit: Questions per task; none: all of them.
        evaluate_prompts: Beginnings that every model continues.
        evaluate_generation_tokens: New tokens per prompt.
        evaluate_out_of_domain: Text of another kind than the corpus: what compression lost elsewhere.
        evaluate_champion: Model in production to compare with: models:/NAME@champion.
        evaluate_gates: What the student must meet to be promoted: {metric, against, by, at_most or
            at_least} each.
        evaluate_gpus: GPUs of the evaluate task.
        evaluate_cpu: CPU cores of the evaluate task.
        evaluate_memory: Memory of the evaluate task, /dev/shm included.
        register_name: Registered model.
        register_alias: Alias that the new version gets.
        register_gpus: GPUs of the register task.
        register_cpu: CPU cores of the register task.
        register_memory: Memory of the register task, /dev/shm included.
        image: Container image of every task but register.
        tools_image: Container image of register.
        image_pull_secret: Secret to pull the images with, if they are private.
        secret: Secret with credentials, all optional: HF_TOKEN, NGC_API_KEY, MLFLOW_TRACKING_USERNAME,
            MLFLOW_TRACKING_PASSWORD.
        workspace: Where results are kept: a directory of the claim, or gs://bucket/path (work in progress
            stays in the claim).
        workspace_claim: Persistent volume claim that all tasks share; ReadWriteMany, if they run on several nodes.
        gpu_tolerations: Tolerations of finetune, prune, distill and evaluate, as in a pod: for spot nodes, say.
        gpu_node_selector: Labels of the nodes that these run on.
    """
    common: Any = {
        "workspace": workspace,
        "tracking_uri": tracking_uri,
        "experiment": experiment,
        "pipeline_run_id": dsl.PIPELINE_JOB_ID_PLACEHOLDER,
        "caching": caching,
    }
    prepare_task = prepare(
        corpus=corpus, teacher=teacher, seed=seed, text_field=prepare_text_field,
        validation_fraction=prepare_validation_fraction, test_fraction=prepare_test_fraction,
        licence=prepare_licence, gpus=prepare_gpus, **common,
    )
    dataset = prepare_task.outputs["dataset"]
    finetune_task = finetune(
        dataset=dataset, teacher=teacher, seed=seed, sequence_length=sequence_length,
        micro_batch_size=finetune_micro_batch_size, engine=engine, max_steps=finetune_max_steps,
        global_batch_size=finetune_global_batch_size, learning_rate=finetune_learning_rate,
        min_learning_rate=finetune_min_learning_rate, warmup_steps=finetune_warmup_steps,
        weight_decay=finetune_weight_decay, adam_beta1=finetune_adam_beta1, adam_beta2=finetune_adam_beta2,
        gradient_clipping=finetune_gradient_clipping, gradient_checkpointing=finetune_gradient_checkpointing,
        validation_interval=finetune_validation_interval, validation_sequences=finetune_validation_sequences,
        checkpoint_interval=finetune_checkpoint_interval, tensor_parallel_size=finetune_tensor_parallel_size,
        pipeline_parallel_size=finetune_pipeline_parallel_size,
        context_parallel_size=finetune_context_parallel_size, sequence_parallel=finetune_sequence_parallel,
        num_nodes=finetune_num_nodes, gpus_per_node=finetune_gpus_per_node,
        enabled=finetune_enabled, gpus=finetune_gpus, **common,
    )
    corrected = finetune_task.outputs["corrected"]
    prune_task = prune(
        dataset=dataset, teacher=corrected, seed=seed, engine=engine, sequence_length=sequence_length,
        micro_batch_size=prune_micro_batch_size, hidden_size=prune_hidden_size,
        intermediate_size=prune_intermediate_size, num_attention_heads=prune_num_attention_heads,
        num_key_value_heads=prune_num_key_value_heads, num_hidden_layers=prune_num_hidden_layers,
        drop_layers=prune_drop_layers, calibration_sequences=prune_calibration_sequences, gpus=prune_gpus, **common,
    )
    pruned = prune_task.outputs["pruned"]
    distill_task = distill(
        dataset=dataset, teacher=corrected, student=pruned, seed=seed, sequence_length=sequence_length,
        micro_batch_size=distill_micro_batch_size, engine=engine, max_steps=distill_max_steps,
        global_batch_size=distill_global_batch_size, learning_rate=distill_learning_rate,
        min_learning_rate=distill_min_learning_rate, warmup_steps=distill_warmup_steps,
        weight_decay=distill_weight_decay, adam_beta1=distill_adam_beta1, adam_beta2=distill_adam_beta2,
        gradient_clipping=distill_gradient_clipping, gradient_checkpointing=distill_gradient_checkpointing,
        validation_interval=distill_validation_interval, validation_sequences=distill_validation_sequences,
        checkpoint_interval=distill_checkpoint_interval, tensor_parallel_size=distill_tensor_parallel_size,
        pipeline_parallel_size=distill_pipeline_parallel_size,
        context_parallel_size=distill_context_parallel_size, sequence_parallel=distill_sequence_parallel,
        num_nodes=distill_num_nodes, gpus_per_node=distill_gpus_per_node,
        temperature=distill_temperature,
        kl_weight=distill_kl_weight, cross_entropy_weight=distill_cross_entropy_weight,
        intermediate_layers=distill_intermediate_layers, gpus=distill_gpus, **common,
    )
    distilled = distill_task.outputs["distilled"]
    evaluate_task = evaluate(
        dataset=dataset, teacher=corrected, pruned=pruned, student=distilled, teacher_before=teacher, seed=seed,
        sequence_length=sequence_length, micro_batch_size=evaluate_micro_batch_size,
        evaluation_sequences=evaluate_evaluation_sequences, tasks=evaluate_tasks,
        task_directory=evaluate_task_directory, task_limit=evaluate_task_limit, prompts=evaluate_prompts,
        generation_tokens=evaluate_generation_tokens, out_of_domain=evaluate_out_of_domain,
        champion=evaluate_champion, gates=evaluate_gates, gpus=evaluate_gpus, **common,
    )
    evaluation = evaluate_task.outputs["evaluation"]
    register_task = register(
        dataset=dataset, student=distilled, evaluation=evaluation, seed=seed, name=register_name,
        alias=register_alias, gpus=register_gpus, **common,
    )
    give(prepare_task, prepare_gpus, prepare_cpu, prepare_memory)
    give(finetune_task, finetune_gpus, finetune_cpu, finetune_memory)
    give(prune_task, prune_gpus, prune_cpu, prune_memory)
    give(distill_task, distill_gpus, distill_cpu, distill_memory)
    give(evaluate_task, evaluate_gpus, evaluate_cpu, evaluate_memory)
    give(register_task, register_gpus, register_cpu, register_memory)
    for task in (finetune_task, prune_task, distill_task, evaluate_task):
        kubernetes.add_toleration_json(task, gpu_tolerations)
        kubernetes.add_node_selector_json(task, gpu_node_selector)
    tasks = {
        "prepare": prepare_task, "finetune": finetune_task, "prune": prune_task,
        "distill": distill_task, "evaluate": evaluate_task, "register": register_task,
    }
    for stage, task in tasks.items():
        protect(task)
        task_image = tools_image if stage == "register" else image
        connect(task, stage, task_image, image_pull_secret, secret, workspace_claim)
    return register_task.outputs["Output"]
# fmt: on


if __name__ == "__main__":
    compiler.Compiler().compile(compress, str(COMPILED))
