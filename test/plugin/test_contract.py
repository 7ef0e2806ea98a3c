# ruff: noqa: E501
"""Every name of SGLang's that the package overrides, wraps or relies on, as it was written against.

A new SGLang release that changes one of them fails here by name, before anything fails at run
time.
"""

import inspect
import pkgutil
from typing import Any

import pytest

SIGNATURES = {
    "managers.scheduler.Scheduler.__init__": "self, server_args, port_args, gpu_id, tp_rank, moe_ep_rank, pp_rank, attn_cp_rank, moe_dp_rank, dp_rank",
    "managers.scheduler.Scheduler.init_schedule_policy": "self",
    "managers.scheduler.Scheduler.init_request_dispatcher": "self",
    "managers.io_struct.hook_custom_types": "new_types",
    "managers.scheduler.Scheduler.handle_batch_generate_request": "self, recv_req",
    "managers.scheduler.Scheduler._add_request_to_queue": "self, req, is_retracted",
    "managers.scheduler.Scheduler.abort_request": "self, recv_req",
    "managers.scheduler.Scheduler._abort_on_waiting_timeout": "self",
    "managers.scheduler.Scheduler.get_new_batch_prefill": "self, running_batch",
    "managers.scheduler.Scheduler.get_num_allocatable_reqs": "self, running_bs",
    "managers.scheduler.Scheduler.update_running_batch": "self, batch",
    "managers.scheduler.Scheduler.get_internal_state": "self, recv_req",
    "managers.schedule_batch.ScheduleBatch.check_decode_mem": "self, selected_indices",
    "managers.schedule_batch.ScheduleBatch.new_tokens_required_next_decode": "self, selected_indices",
    "managers.schedule_policy.PrefillAdder.__init__": "self, page_size, tree_cache, token_to_kv_pool_allocator, running_batch, new_token_ratio, rem_input_tokens, rem_chunk_tokens, num_mixed_decode_tokens, priority_scheduling_preemption_threshold, max_prefill_bs, max_running_requests, prefill_max_requests, prefill_delayer_single_pass, dllm_config, waiting_queue_len",
    "managers.schedule_policy.PrefillAdder.add_one_req": "self, req, has_chunked_req, truncation_align_size",
    "managers.schedule_policy.PrefillAdder._update_prefill_budget": "self, prefix_len, extend_input_len, max_new_tokens, retracted_stain, mamba_gap_reserve",
    "layers.attention.hybrid_attn_backend.HybridAttnBackend._select_backend": "self, forward_mode",
    "models.llama.LlamaDecoderLayer.forward": "self, positions, hidden_states, forward_batch, residual",
    "models.qwen2.Qwen2DecoderLayer.forward": "self, positions, hidden_states, forward_batch, residual",
    "models.qwen3.Qwen3DecoderLayer.forward": "self, positions, hidden_states, forward_batch, residual, post_residual_addition",
    "layers.attention.hybrid_attn_backend.HybridAttnBackend.forward": "self, q, k, v, layer, forward_batch, save_kv_cache, kwargs",
    "managers.schedule_batch.Req.set_extend_range": "self, start, end",
    "managers.schedule_batch.Req.finished": "self",
    "mem_cache.radix_cache.RadixCache.__init__": "self, params",
    "mem_cache.radix_cache.RadixCache.reset": "self",
    "mem_cache.radix_cache.RadixCache.cache_unfinished_req": "self, req, chunked",
    "mem_cache.radix_cache.RadixCache.cache_finished_req": "self, req, is_insert, kv_len_to_handle",
    "mem_cache.radix_cache.RadixCache.match_prefix": "self, params",
    "mem_cache.radix_cache.RadixCache.inc_lock_ref": "self, node",
    "mem_cache.radix_cache.RadixCache.dec_lock_ref": "self, node, params",
    "mem_cache.radix_cache.RadixCache.protected_size": "self",
    "mem_cache.radix_cache.RadixCache._delete_leaf": "self, node",
    "mem_cache.radix_cache.RadixCache._record_remove_event": "self, node, medium",
    "mem_cache.radix_cache.RadixKey.__init__": "self, token_ids, extra_key, is_bigram, limit",
    "mem_cache.allocator.PagedTokenToKVPoolAllocator.alloc_extend": "self, prefix_lens, prefix_lens_cpu, seq_lens, seq_lens_cpu, last_loc, extend_num_tokens, num_new_pages",
    "mem_cache.allocator.PagedTokenToKVPoolAllocator.alloc_decode": "self, seq_lens, seq_lens_cpu, last_loc",
    "mem_cache.allocator.PagedTokenToKVPoolAllocator.free_segment": "self, free_index, start_pos",
    "mem_cache.registry.register_radix_cache_backend": "name, factory",
    "managers.tokenizer_manager.TokenizerManager._should_use_batch_tokenization": "self, batch_size, requests",
    "managers.tokenizer_manager.TokenizerManager._send_one_request": "self, tokenized_obj",
    "managers.tokenizer_manager.TokenizerManager._send_batch_request": "self, tokenized_objs",
    "managers.tokenizer_manager.TokenizerManager._tokenize_texts": "self, texts, is_cross_encoder",
    "managers.tokenizer_manager.TokenizerManager._dispatch_to_scheduler": "self, obj",
    "managers.tokenizer_manager.TokenizerManager.generate_request": "self, obj, request",
    "managers.tokenizer_manager.TokenizerManager.get_internal_state": "self",
    "managers.tokenizer_manager.TokenizerManager.flush_cache": "self, timeout_s",
    "managers.tokenizer_manager.TokenizerManager.freeze_gc": "self",
    "lang.interpreter.run_program_batch": "program, backend, batch_arguments, default_sampling_para, num_threads, progress_bar, generator_style",
    "lang.interpreter.run_program": "program, backend, func_args, func_kwargs, default_sampling_para, stream, sync, use_thread",
    "lang.interpreter.run_internal": "state, program, func_args, func_kwargs, sync",
    "lang.interpreter.StreamExecutor.__init__": "self, backend, arguments, default_sampling_para, chat_template, stream, num_api_spec_tokens, use_thread",
    "lang.interpreter.StreamExecutor.submit": "self, expr",
    "lang.interpreter.StreamExecutor.fork": "self, size, position_ids_offset",
    "lang.interpreter.StreamExecutor.sync": "self",
    "lang.interpreter.StreamExecutor.get_var": "self, name",
    "lang.interpreter.StreamExecutor.get_meta_info": "self, name, timeout",
    "lang.interpreter.StreamExecutor._init_var_event": "self, expr",
    "lang.interpreter.StreamExecutor._execute_commit_lazy_operations": "self, expr",
    "lang.interpreter.StreamExecutor._execute_select": "self, expr",
    "lang.interpreter.StreamExecutor._execute_image": "self, expr",
    "lang.interpreter.StreamExecutor._execute_video": "self, expr",
    "lang.interpreter.StreamExecutor._resolve_sampling_params": "self, sampling_params",
    "lang.backend.runtime_endpoint.http_request": "url, json, stream, api_key, verify, method",
    "lang.backend.runtime_endpoint.RuntimeEndpoint.__init__": "self, base_url, api_key, verify, chat_template_name",
    "lang.backend.runtime_endpoint.RuntimeEndpoint.get_server_info": "self",
    "entrypoints.http_server._setup_and_run_http_server": "server_args, tokenizer_manager, template_manager, port_args, scheduler_infos, subprocess_watchdog, execute_warmup_func, launch_callback",
    "server_args.ServerArgs.__post_init__": "self",
    "server_args.ServerArgs._handle_gpu_memory_settings": "self, gpu_mem",
    "server_args.ServerArgs.from_cli_args": "cls, args",
    "server_args.ServerArgs.get_model_config": "self",
    "plugins.load_plugins": "",
    "plugins.hook_registry.HookRegistry.register": "cls, target, hook, hook_type, source",
    "plugins.hook_registry.HookRegistry.apply_hooks": "cls",
    "platforms.interface.SRTPlatform.init_backend": "self",
    "layers.attention.attention_registry.register_attention_backend": "name",
    "platforms.interface.SRTPlatform.apply_server_args_defaults": "self, server_args",
    "platforms.interface.SRTPlatform.get_default_attention_backend": "self",
    "platforms.interface.SRTPlatform.get_mha_kv_pool_cls": "self",
    "platforms.interface.SRTPlatform.get_paged_allocator_cls": "self",
    "platforms.interface.SRTPlatform.get_dispatch_key_name": "self",
    "platforms.cpu.CpuDeviceMixin.get_device": "self, local_rank",
    "utils.broadcast_pyobj": "data, rank, dist_group, src, force_cpu_device",
}

ATTRIBUTES = {
    "managers.schedule_batch.Req": (
        "origin_input_ids output_ids extra_key sampling_params finished_reason to_finish "
        "already_computed cached_tokens prefix_indices extend_range last_node req_pool_idx "
        "cache_protected_len input_embeds positional_embed_overrides session rid "
        "full_untruncated_fill_ids"
    ),
    "managers.schedule_policy.PrefillAdder": "rem_total_token_offset cur_rem_token_offset",
    "layers.attention.hybrid_attn_backend.HybridAttnBackend": "decode_backend prefill_backend",
    "lang.interpreter.StreamExecutor": "variables variable_event meta_info messages_ text_ fork_start_text_pos error_",
    "managers.scheduler.Scheduler": (
        "waiting_queue chunked_req chunked_prefill_size max_prefill_tokens grammar_manager "
        "tree_cache page_size max_total_num_tokens token_to_kv_pool_allocator ps tp_group "
        "tp_cpu_group tp_worker server_args is_mixed_chunk forward_ct running_batch _request_dispatcher"
    ),
    **{
        f"models.{name}DecoderLayer": "self_attn post_attention_layernorm mlp o_proj"
        for name in ("llama.Llama", "qwen2.Qwen2", "qwen3.Qwen3")
    },
    "mem_cache.radix_cache.RadixCache": "req_to_token_pool token_to_kv_pool_allocator root_node",
    "mem_cache.radix_cache.TreeNode": "children parent key value lock_ref",
}
"""Instance attributes, which must be assigned somewhere in the class's module."""

FIELDS = {
    "managers.schedule_batch.ScheduleBatch": "reqs batch_is_full decoding_reqs forward_mode",
    "model_executor.forward_batch_info.ForwardBatch": (
        "forward_mode batch_size input_ids req_pool_indices seq_lens seq_lens_cpu seq_lens_sum "
        "orig_seq_lens out_cache_loc positions extend_num_tokens extend_seq_lens "
        "extend_seq_lens_cpu extend_prefix_lens extend_prefix_lens_cpu extend_start_loc "
        "extend_logprob_start_lens_cpu _attn_output capture_hidden_mode return_logprob "
        "multi_item_delimiter_indices"
    ),
}
"""Fields of dataclasses."""


def resolve(name: str) -> Any:
    package = "sglang" if name.startswith("lang.") else "sglang.srt"
    owner, attribute = f"{package}.{name}".rsplit(".", 1)
    found = inspect.getattr_static(pkgutil.resolve_name(owner), attribute)
    return getattr(found, "__func__", found)


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature(name: str):
    assert ", ".join(inspect.signature(resolve(name)).parameters) == SIGNATURES[name]


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_attributes(name: str):
    source = inspect.getsource(inspect.getmodule(resolve(name)))
    source += inspect.getsource(pkgutil.resolve_name("sglang.srt.managers.scheduler"))
    missing = [a for a in ATTRIBUTES[name].split() if f"self.{a}" not in source]
    assert not missing


@pytest.mark.parametrize("name", FIELDS)
def test_fields(name: str):
    assert set(FIELDS[name].split()) <= set(resolve(name).__dataclass_fields__)


def test_every_overridden_method_is_listed():
    from sglang_batchllm.args import BatchLLMServerArgs
    from sglang_batchllm.frontend.direct import DirectExecutor
    from sglang_batchllm.frontend.engine_backend import EngineBackend
    from sglang_batchllm.frontend.tracing import TracingExecutor
    from sglang_batchllm.platform.cpu import CpuReferencePlatform
    from sglang_batchllm.platform.paged_allocator import CpuPagedAllocator
    from sglang_batchllm.runtime.adder import ForecastPrefillAdder
    from sglang_batchllm.runtime.cache import PinnedGroupCache
    from sglang_batchllm.runtime.scheduler import BatchLLMScheduler

    listed = {name.rsplit(".", 1)[1] for name in SIGNATURES}
    ours = (
        BatchLLMScheduler,
        PinnedGroupCache,
        ForecastPrefillAdder,
        CpuPagedAllocator,
        CpuReferencePlatform,
        BatchLLMServerArgs,
        TracingExecutor,
        DirectExecutor,
        EngineBackend,
    )
    for cls in ours:
        methods = {name: getattr(value, "__func__", value) for name, value in vars(cls).items()}
        overridden = {
            name
            for name, method in methods.items()
            if getattr(method, "__module__", None) == cls.__module__
            and any(name in vars(base) for base in cls.__mro__[1:-1])
            and (name == "__post_init__" or not name.startswith("__"))
        }
        assert overridden <= listed, f"{cls.__name__} overrides {overridden - listed}"
