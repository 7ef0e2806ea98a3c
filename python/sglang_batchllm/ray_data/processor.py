"""The configuration and the builder that `ray.data.llm` knows the stage by."""

from __future__ import annotations

from typing import Any

from pydantic import Field, field_validator
from ray.data import ActorPoolStrategy, Dataset
from ray.data.llm import Processor, SGLangEngineProcessorConfig, build_processor
from ray.llm._internal.batch.processor import ProcessorBuilder
from ray.llm._internal.batch.stages import StatefulStage

from sglang_batchllm.ray_data.partitions import PlanWindow
from sglang_batchllm.ray_data.replica import Replica

ALL_ROWS = 1 << 40
"""A window that no data set fills."""


class BatchLLMProcessorConfig(SGLangEngineProcessorConfig):
    """Ray's configuration of SGLang, for engines that run with ``batchllm=True``.

    concurrency: replicas; of a pair, the larger says how many partitions a window has. batch_size:
    rows of the other stages' batches. max_concurrent_batches: partitions that a replica has at a
    time, where there are windows.
    """

    window: int | None = Field(
        default=None,
        ge=1,
        description="Rows that are planned together; None for the whole data set.",
    )
    num_gpus: float | None = Field(
        default=None,
        ge=0,
        description="GPUs of a replica; None for tp_size times dp_size of engine_kwargs.",
    )
    max_concurrent_batches: int = Field(default=2, ge=1)
    should_continue_on_error: bool = True

    @field_validator("engine_kwargs")
    @classmethod
    def _check_engine(cls, value: dict[str, Any]) -> dict[str, Any]:
        if not value.get("batchllm", True):
            raise ValueError(
                "engine_kwargs has batchllm=False; leave it out, or take Ray's "
                "SGLangEngineProcessorConfig"
            )
        return value | {"batchllm": True}


class PlanStage(StatefulStage):
    """window: rows."""

    window: int

    def get_dataset_map_batches_kwargs(self, batch_size: int, data_column: str) -> dict[str, Any]:
        return super().get_dataset_map_batches_kwargs(self.window, data_column)


class ReplicaStage(StatefulStage):
    def get_dataset_map_batches_kwargs(self, batch_size: int, data_column: str) -> dict[str, Any]:
        return super().get_dataset_map_batches_kwargs(1, data_column)  # a partition


class PlannedProcessor(Processor):
    """`planner` makes partitions of rows; this one's own stages answer them."""

    def __init__(self, planner: Processor, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self._planner = planner

    def __call__(self, dataset: Dataset) -> Dataset:
        # Ray hands out blocks, so each partition is one.
        return super().__call__(self._planner(dataset).repartition(target_num_rows_per_block=1))

    def list_stage_names(self) -> list[str]:
        return [*self._planner.list_stage_names(), *super().list_stage_names()]

    def get_stage_by_name(self, name: str) -> StatefulStage:
        if name in self._planner.stages:
            return self._planner.get_stage_by_name(name)
        return super().get_stage_by_name(name)


def build(
    config: BatchLLMProcessorConfig,
    preprocess: Any = None,
    postprocess: Any = None,
    preprocess_map_kwargs: dict[str, Any] | None = None,
    postprocess_map_kwargs: dict[str, Any] | None = None,
    **more: Any,
) -> Processor:
    """Ray's own stages for texts around ours; called by `ray.data.llm.build_processor`, which says
    what the arguments are."""
    fields = {name: getattr(config, name) for name in SGLangEngineProcessorConfig.model_fields}
    if not config.engine_kwargs.get("skip_tokenizer_init", True):
        fields["detokenize_stage"] = False  # the engine writes texts itself
    stock = build_processor(SGLangEngineProcessorConfig(**fields), builder_kwargs=more)
    stages = [*stock.stages.values()]
    at = stock.list_stage_names().index("SGLangEngineStage")
    engine = stages[at]
    pool: dict[str, Any] = config.get_concurrency(autoscaling_enabled=False)
    # Without windows each replica gets one partition, however late it starts.
    lists = config.max_concurrent_batches if config.window else 1
    plan = PlanStage(
        fn=PlanWindow,
        fn_constructor_kwargs={
            "replicas": max(pool.values()),
            "page_size": config.engine_kwargs.get("page_size") or 1,
        },
        map_batches_kwargs={"compute": ActorPoolStrategy(size=1)},
        window=config.window or ALL_ROWS,
    )
    gpus = engine.map_batches_kwargs["num_gpus"] if config.num_gpus is None else config.num_gpus
    replica = ReplicaStage(
        fn=Replica,
        fn_constructor_kwargs={
            **engine.fn_constructor_kwargs,
            "lists": lists,
            "should_continue_on_error": config.should_continue_on_error,
        },
        map_batches_kwargs={
            **engine.map_batches_kwargs,
            "compute": ActorPoolStrategy(**pool, max_tasks_in_flight_per_actor=lists),
            "max_concurrency": lists,
            "num_gpus": gpus,
        },
    )
    return PlannedProcessor(
        Processor(config, [*stages[:at], plan], preprocess, None, preprocess_map_kwargs),
        config,
        [replica, *stages[at + 1 :]],
        None,
        postprocess,
        postprocess_map_kwargs=postprocess_map_kwargs,
    )


ProcessorBuilder.register(BatchLLMProcessorConfig, build)
