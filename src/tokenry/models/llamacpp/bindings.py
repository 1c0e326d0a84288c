"""The C functions of llama.cpp that are used, by cffi on the shared object that xllamacpp brings.

Structures are passed by value, so that a build with another layout would take our fields for others, without a word
and often without a crash. Their defaults are known: they are read through these declarations before anything is opened,
and a library that gives others is refused.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections import deque
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from ...core.errors import InputError

__all__ = ["F16", "F32", "Library", "check_layout", "library"]

PACKAGE = "xllamacpp"
INSTALL = "run `pip install 'tokenry[llamacpp]'`, which brings both"
F32, F16 = 0, 1  # of ggml_type
WARNING = 3  # of ggml_log_level
DECLARATIONS = """
typedef int32_t llama_token;
typedef int32_t llama_pos;
typedef int32_t llama_seq_id;

struct llama_model_params {
    void * devices;
    void * tensor_buft_overrides;
    int32_t n_gpu_layers;
    int split_mode;
    int load_mode;
    int lazy_mode;
    int32_t main_gpu;
    const float * tensor_split;
    void * progress_callback;
    void * progress_callback_user_data;
    void * kv_overrides;
    bool vocab_only;
    bool check_tensors;
    bool use_extra_bufts;
    bool no_host;
    bool no_alloc;
    bool load_mtp;
};

struct llama_context_params {
    uint32_t n_ctx;
    uint32_t n_batch;
    uint32_t n_ubatch;
    uint32_t n_seq_max;
    uint32_t n_rs_seq;
    uint32_t n_outputs_max;
    uint32_t n_outputs_max_per_seq;
    int32_t n_threads;
    int32_t n_threads_batch;
    int ctx_type;
    int rope_scaling_type;
    int pooling_type;
    int attention_type;
    int flash_attn_type;
    float rope_freq_base;
    float rope_freq_scale;
    float yarn_ext_factor;
    float yarn_attn_factor;
    float yarn_beta_fast;
    float yarn_beta_slow;
    uint32_t yarn_orig_ctx;
    float defrag_thold;
    void * cb_eval;
    void * cb_eval_user_data;
    int type_k;
    int type_v;
    size_t moe_cache_size;
    void * abort_callback;
    void * abort_callback_data;
    bool embeddings;
    bool offload_kqv;
    bool no_perf;
    bool op_offload;
    bool swa_full;
    bool kv_unified;
    void * samplers;
    size_t n_samplers;
    void * ctx_other;
};

struct llama_batch {
    int32_t n_tokens;
    llama_token * token;
    float * embd;
    llama_pos * pos;
    int32_t * n_seq_id;
    llama_seq_id ** seq_id;
    int8_t * logits;
};

typedef void (*ggml_log_callback)(int level, const char * text, void * user_data);

void llama_log_set(ggml_log_callback log_callback, void * user_data);
void llama_backend_init(void);

struct llama_model_params llama_model_default_params(void);
struct llama_context_params llama_context_default_params(void);
void * llama_model_load_from_file(const char * path_model, struct llama_model_params params);
void llama_model_free(void * model);
void * llama_init_from_model(void * model, struct llama_context_params params);
void llama_free(void * ctx);

const void * llama_model_get_vocab(const void * model);
int32_t llama_vocab_n_tokens(const void * vocab);
bool llama_vocab_is_eog(const void * vocab, llama_token token);
int32_t llama_model_meta_val_str(const void * model, const char * key, char * buf, size_t buf_size);
bool llama_model_is_recurrent(const void * model);
bool llama_model_is_hybrid(const void * model);
uint32_t llama_n_ctx(const void * ctx);

struct llama_batch llama_batch_init(int32_t n_tokens, int32_t embd, int32_t n_seq_max);
void llama_batch_free(struct llama_batch batch);
int32_t llama_decode(void * ctx, struct llama_batch batch);
float * llama_get_logits(void * ctx);

void * llama_get_memory(const void * ctx);
bool llama_memory_seq_rm(void * mem, llama_seq_id seq_id, llama_pos p0, llama_pos p1);
void llama_memory_seq_cp(void * mem, llama_seq_id seq_id_src, llama_seq_id seq_id_dst, llama_pos p0, llama_pos p1);
llama_pos llama_memory_seq_pos_max(void * mem, llama_seq_id seq_id);
size_t llama_state_seq_get_size(void * ctx, llama_seq_id seq_id);
size_t llama_state_seq_get_data(void * ctx, uint8_t * dst, size_t size, llama_seq_id seq_id);
size_t llama_state_seq_set_data(void * ctx, const uint8_t * src, size_t size, llama_seq_id dest_seq_id);
"""
# What every build with these layouts gives; fields at the end of each structure are among them.
MODEL_DEFAULTS: dict[str, Any] = {
    "split_mode": 1,
    "main_gpu": 0,
    "vocab_only": False,
    "check_tensors": False,
    "use_extra_bufts": True,
    "no_host": False,
    "no_alloc": False,
    "load_mtp": False,
}
CONTEXT_DEFAULTS: dict[str, Any] = {
    "n_ctx": 512,
    "n_batch": 2048,
    "n_ubatch": 512,
    "n_seq_max": 1,
    "rope_scaling_type": -1,
    "pooling_type": -1,
    "attention_type": -1,
    "flash_attn_type": -1,
    "yarn_ext_factor": -1.0,
    "defrag_thold": -1.0,
    "type_k": F16,
    "type_v": F16,
    "moe_cache_size": 0,
    "embeddings": False,
    "offload_kqv": True,
    "no_perf": True,
    "op_offload": True,
    "swa_full": True,
    "kv_unified": False,
    "n_samplers": 0,
}


class Library(NamedTuple):
    """llama.cpp. `warnings` are the newest lines that it has said."""

    ffi: Any
    lib: Any
    warnings: deque[str]
    callback: Any  # llama.cpp calls it as long as it is loaded


@lru_cache(maxsize=1)
def library() -> Library:
    """llama.cpp, opened once.

    Raises:
        InputError: xllamacpp or cffi is missing, or its build is laid out otherwise than these declarations say.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None or importlib.util.find_spec("cffi") is None:
        raise InputError(f"the engine 'llamacpp' needs xllamacpp and cffi, which are not installed; {INSTALL}")
    from cffi import FFI

    ffi: Any = FFI()
    ffi.cdef(DECLARATIONS)
    (file,) = Path(spec.origin).parent.glob(f"{PACKAGE}*.so")
    lib = ffi.dlopen(str(file))
    check_layout(lib.llama_model_default_params(), MODEL_DEFAULTS)
    check_layout(lib.llama_context_default_params(), CONTEXT_DEFAULTS)
    warnings: deque[str] = deque(maxlen=8)

    @ffi.callback("ggml_log_callback")
    def said(level: int, text: Any, _: Any) -> None:
        if level >= WARNING:
            warnings.append(ffi.string(text).decode("utf-8", "replace").strip())

    lib.llama_log_set(said, ffi.NULL)
    lib.llama_backend_init()
    return Library(ffi, lib, warnings, said)


def check_layout(found: Any, defaults: dict[str, Any]) -> None:
    """Refuse a structure whose defaults are not the known ones: its fields lie elsewhere."""
    for name, value in defaults.items():
        if getattr(found, name) != value:
            version = importlib.metadata.version(PACKAGE)
            raise InputError(
                f"{PACKAGE} {version} is laid out otherwise than tokenry knows it ({name} is {getattr(found, name)!r}, "
                f"expected {value!r}); install the version that the extra tokenry[llamacpp] was tested with"
            )
