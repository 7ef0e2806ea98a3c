"""The names of SGLang's that the package imports, wraps, overrides or reads, from its text.

Each SGLang release that is supported has a folder below ``edge/seams``, and names of its own.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import sglang_batchllm
from sglang_source import SGLangSource

PACKAGE = Path(sglang_batchllm.__file__).parent
SEAMS = PACKAGE / "edge" / "seams"

READ_FROM_OBJECTS = {
    "srt.managers.schedule_batch.Req": (
        "origin_input_ids output_ids extra_key sampling_params finished_reason to_finish "
        "already_computed cached_tokens last_node input_embeds positional_embed_overrides session "
        "rid full_untruncated_fill_ids finished return_logprob logprob logprob_start_len "
        "input_token_logprobs temp_input_top_logprobs_val temp_input_top_logprobs_idx "
        "temp_input_token_ids_logprobs_val temp_input_token_ids_logprobs_idx is_retracted "
        "inflight_middle_chunks decode_batch_idx seqlen send_token_offset init_next_round_input "
        "finished_output return_hidden_states multimodal_inputs"
    ),
    "srt.managers.schedule_batch.ScheduleBatch": (
        "reqs batch_is_full decoding_reqs forward_mode check_decode_mem filter_batch "
        "prefix_lens extend_lens return_logprob return_hidden_states multimodal_inputs "
        "extend_logprob_start_lens extend_input_logprob_token_ids top_logprobs_nums "
        "token_ids_logprobs model_config out_cache_loc req_to_token_pool"
    ),
    "srt.managers.schedule_batch.ReqLogprob": (
        "top_logprobs_num token_ids_logprob input_token_logprobs_val"
    ),
    "srt.managers.io_struct.TokenizedGenerateReqInput": (
        "input_ids mm_inputs sampling_params time_stats routed_dp_rank extra_key lora_id"
    ),
    "srt.managers.data_parallel_controller.DataParallelController": (
        "server_args workers scheduler_procs _request_dispatcher"
    ),
    "srt.managers.load_snapshot.LoadSnapshot": (
        "timestamp dp_rank num_waiting_reqs num_running_reqs"
    ),
    "srt.managers.utils.GenerationBatchResult": (
        "copy_done logits_output extend_logprob_start_len_per_req"
    ),
    "srt.layers.logits_processor.LogitsProcessorOutput": (
        "input_token_logprobs input_top_logprobs_val input_top_logprobs_idx "
        "input_token_ids_logprobs_val input_token_ids_logprobs_idx next_token_top_logprobs_val "
        "next_token_top_logprobs_idx next_token_token_ids_logprobs_val "
        "next_token_token_ids_logprobs_idx"
    ),
    "srt.layers.logits_processor.LogitsProcessor": "_get_logits",
    "srt.layers.attention.hybrid_attn_backend.HybridAttnBackend": "decode_backend prefill_backend",
    "srt.layers.attention.base_attn_backend.AttentionBackend": "needs_cpu_seq_lens",
    "srt.model_executor.runner.eager_runner.EagerRunner": "model_runner",
    "srt.layers.radix_attention.RadixAttention": (
        "tp_q_head_num tp_k_head_num head_dim v_head_dim scaling layer_id logit_cap k_scale "
        "v_scale k_scale_float v_scale_float sliding_window_size is_cross_attention attn_type "
        "use_irope logit_capping_method"
    ),
    "srt.mem_cache.memory_pool.MHATokenToKVPool": (
        "set_kv_buffer get_kv_buffer dtype size kv_cache_layout is_quantized_kv_cache"
    ),
    "srt.mem_cache.memory_pool.MLATokenToKVPool": (
        "set_kv_buffer get_kv_buffer dtype size kv_lora_rank"
    ),
    "srt.mem_cache.memory_pool.MambaPool": "mamba_cache",
    "srt.mem_cache.memory_pool.MambaPool.State": "conv temporal",
    "srt.mem_cache.radix_cache.RadixKey": "__init__",
    "srt.model_executor.forward_batch_info.ForwardBatch": (
        "forward_mode batch_size input_ids req_pool_indices seq_lens seq_lens_cpu seq_lens_sum "
        "orig_seq_lens out_cache_loc positions extend_num_tokens extend_seq_lens "
        "extend_seq_lens_cpu extend_prefix_lens extend_prefix_lens_cpu extend_start_loc "
        "extend_logprob_start_lens_cpu _attn_output capture_hidden_mode return_logprob "
        "multi_item_delimiter_indices"
    ),
    "srt.model_executor.model_runner.ModelRunner": (
        "server_args req_to_token_pool token_to_kv_pool dtype model model_config"
    ),
    "srt.mem_cache.allocator.swa.SWATokenToKVPoolAllocator": (
        "size_swa swa_available_size full_available_size"
    ),
    "srt.mem_cache.swa_memory_pool.SWAKVPool": "translate_loc_from_full_to_swa full_kv_pool",
    "srt.mem_cache.base_prefix_cache.BasePrefixCache": "supports_swa swa_evictable_size",
    "srt.mem_cache.base_prefix_cache.EvictResult": "num_tokens_evicted swa_num_tokens_evicted",
    "srt.mem_cache.unified_radix_cache.UnifiedRadixCache": "sliding_window_size components",
    "srt.environ.Envs": (
        "SGLANG_SWA_EVICTION_INTERVAL SGLANG_OPT_UNIFIED_CACHE_FREE_OUT_OF_WINDOW_SLOTS"
    ),
    "srt.configs.model_config.ModelConfig": (
        "is_hybrid_swa is_deepseek_v4_arch full_attention_layer_ids"
    ),
    "srt.managers.tokenizer_manager.TokenizerManager": (
        "generate_request get_internal_state flush_cache freeze_gc _send_batch_request "
        "_tokenize_texts _dispatch_to_scheduler load_snapshot_reader"
    ),
    "srt.managers.io_struct.GenerateReqInput": (
        "rid text input_ids sampling_params lora_path is_single batch_size parallel_sample_num "
        "contains_mm_input"
    ),
    "srt.entrypoints.openai.serving_base.OpenAIServingBase": "handle_request",
    "lang.interpreter.StreamExecutor": (
        "variables variable_event meta_info messages_ text_ fork_start_text_pos error_ __init__"
    ),
    **{
        f"srt.models.{name}DecoderLayer": "forward self_attn post_attention_layernorm mlp"
        for name in ("llama.Llama", "qwen2.Qwen2", "qwen3.Qwen3")
    },
    **{
        f"srt.models.{name}Attention": "o_proj"
        for name in ("llama.Llama", "qwen2.Qwen2", "qwen3.Qwen3")
    },
}
"""What is read from objects of SGLang's whose class the text does not show, in every release."""

READ_IN_ONE = {
    "0.5.17": {
        "srt.entrypoints.openai.serving_base.OpenAIServingBase": (
            "_validate_request _convert_to_internal_request"
        ),
        "srt.managers.schedule_batch.Req": (
            "prefix_indices extend_range req_pool_idx cache_protected_len set_extend_range"
        ),
        "srt.managers.schedule_policy.PrefillAdder": "rem_total_token_offset cur_rem_token_offset",
        "srt.mem_cache.radix_cache.TreeNode": (
            "children parent key value lock_ref last_access_time"
        ),
        "srt.mem_cache.base_prefix_cache.MatchResult": (
            "device_indices last_device_node full_kv_hit_length"
        ),
        "srt.mem_cache.kv_cache_configurator.KVCacheConfigurator": (
            "_build_token_to_kv_pool _build_token_to_kv_pool_allocator _build_hybrid_swa_kv_pool "
            "_build_mla_kv_pool is_hybrid_swa use_mla_backend kv_cache_dtype device"
        ),
        "srt.mem_cache.unified_cache.unified_tree_core.UnifiedTreeCore": "node_by_id",
        "srt.mem_cache.unified_cache.unified_tree_core.UnifiedTreeNode": "id parent key children",
        "srt.mem_cache.allocator.PagedTokenToKVPoolAllocator": "free_segment",
        "srt.mem_cache.allocator.BaseTokenToKVPoolAllocator": "free_group_begin free_group_end",
        "srt.server_args.ServerArgs": "override get_model_config get_attention_backends",
        "srt.managers.scheduler.Scheduler": "ipc_channels ps",
        "srt.managers.tokenizer_manager.ReqState": "abort_requested lifecycle_id",
    },
    "0.5.23": {
        "srt.managers.tokenizer_manager.ReqState": "abort_sent",
        "srt.managers.schedule_batch.Req": (
            "prefix_len extend_end kv owned_kv_len beam_group cache_salt token_indices_to_pool"
        ),
        "srt.layers.logits_processor.LogitsProcessorOutput": "finalize_input_logprobs",
        "srt.model_executor.forward_batch_info.ForwardBatch": "token_indices_to_pool",
        "srt.managers.schedule_batch.ReqKvInfo": "req_pool_idx cache_protected_len",
        "srt.managers.schedule_policy.PrefillAdder": "memory_budget",
        "srt.mem_cache.prefill_budget.PrefillBudget": "total_offset current_offset",
        "srt.mem_cache.base_prefix_cache.MatchResult": (
            "device_prefix_len last_device_node full_kv_hit_length"
        ),
        "srt.mem_cache.unified_radix_cache.UnifiedRadixCache": "evict_sliding_windows",
        "srt.mem_cache.base_prefix_cache.TreeLock": "node",
        "srt.mem_cache.unified_cache.unified_tree_core_interface.UnifiedTreeCoreInterface": (
            "collect_path_info"
        ),
        "srt.mem_cache.unified_cache.unified_tree_core_interface.TreePathNodeInfo": (
            "node_id path_start path_end num_children"
        ),
        "srt.mem_cache.rust_tree_core.adapter.RustUnifiedTreeCore": "collect_path_info",
        "srt.layers.layer_boundary.residual.stream.ResidualStream": "residual pending",
        "srt.managers.scheduler.Scheduler": (
            "_release_aborted_request beam_coordinator send_abort_output"
        ),
    },
}
"""What is read besides in one."""


def names_used(release: str, source: SGLangSource) -> set[str]:
    """Dotted names below ``sglang`` that are used with a release of it. `source` says which methods
    of ours override one."""
    seam = SEAMS / f"v{release.replace('.', '_')}"
    trees = {
        path: ast.parse(path.read_text(encoding="utf-8"))
        for path in PACKAGE.rglob("*.py")
        if path.parent in (seam, SEAMS) or SEAMS not in path.parents
    }
    used = {
        f"{owner}.{name}"
        for read in (READ_FROM_OBJECTS, READ_IN_ONE[release])
        for owner, names in read.items()
        for name in names.split()
    }
    classes = _our_classes(trees.values())
    for tree in trees.values():
        imported = _imported(tree)
        used |= {name for name in imported.values() if name.startswith("sglang.")}
        used |= set(_read_from(tree, imported))
    for name in classes:
        used |= set(_inherited(name, classes, source))
    plugin = trees[PACKAGE / "edge" / "plugin.py"]
    for node in ast.walk(plugin):
        text = node.value if isinstance(node, ast.Constant) else None
        if isinstance(text, str) and re.fullmatch(r"(sglang\.)?(srt|lang)(\.\w+)+", text):
            used.add(text)
    return {name.removeprefix("sglang.") for name in used}


def _imported(tree: ast.AST) -> dict[str, str]:
    """The names under which a module knows what it imports, and their dotted names."""
    return {
        alias.asname or alias.name: f"{node.module}.{alias.name}"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }


def _read_from(tree: ast.AST, imported: dict[str, str]) -> Iterator[str]:
    """Attributes of what is imported: functions of modules, members of enums."""
    for node in ast.walk(tree):
        read = isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
        if read and isinstance(node.value, ast.Name):
            owner = imported.get(node.value.id, "")
            if owner.startswith("sglang.") and not node.attr.startswith("__"):
                yield f"{owner}.{node.attr}"


Classes = dict[str, tuple[ast.ClassDef, dict[str, str]]]


def _our_classes(trees: Iterable[ast.AST]) -> Classes:
    """Our classes by name, each with what its module imports."""
    found: Classes = {}
    for tree in trees:
        imported = _imported(tree)
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                found[node.name] = node, imported
    return found


def _bases(name: str, classes: Classes) -> Iterator[str]:
    """SGLang's classes that ours of that name comes from."""
    node, imported = classes[name]
    for base in (ast.unparse(base).removeprefix("seam.") for base in node.bases):
        if imported.get(base, "").startswith("sglang."):
            yield imported[base]
        elif base in classes:
            yield from _bases(base, classes)


def _inherited(name: str, classes: Classes, source: SGLangSource) -> Iterator[str]:
    """What a class of ours overrides, and what it reads of its own that is SGLang's."""
    node, _ = classes[name]
    mentioned = {
        inner.attr
        for inner in ast.walk(node)
        if isinstance(inner, ast.Attribute)
        and (
            (isinstance(inner.value, ast.Name) and inner.value.id in ("self", "cls"))
            or ast.unparse(inner.value) == "super()"
        )
    }
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    mentioned |= {inner.name for inner in node.body if isinstance(inner, functions)}
    for base in _bases(name, classes):
        for member in mentioned:
            if source.find(f"{base}.{member}") is not None:
                yield f"{base}.{member}"
