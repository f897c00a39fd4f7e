"""vllmd/core/need, case, kv, activation: what a start will take, against figures of real models and of vLLM itself."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllmd.core.case import CONTEXT, NCCL, SLACK
from vllmd.core.kv import kv_bytes_per_token, kv_for
from vllmd.core.need import estimate, learned_key, on_each
from vllmd.facts import DeviceReading, EngineFacts, Inspection, Learned, ModelFacts, Need
from vllmd.modelconfig import default_context, max_context, run_dtype
from vllmd.spec import Cause, ModelSpec, Share
from vllmd.units import GIB, MIB

Config = dict[str, Any]


def text(layers: int, heads: int, kv: int, head: int, **more: Any) -> Config:
    """A text model's configuration."""
    return {
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "head_dim": head,
        "hidden_size": heads * head,
        "intermediate_size": 4 * heads * head,
        "vocab_size": 151936,
    } | more


DOTS = text(28, 12, 2, 128, model_type="dots_ocr", max_position_embeddings=131072, vision_config={"embed_dim": 1536})
QWEN3_VL = {"model_type": "qwen3_vl", "text_config": text(28, 16, 8, 128, max_position_embeddings=262144)}
TINY = text(2, 4, 2, 32, max_position_embeddings=2048)
GEMMA3 = {
    "model_type": "gemma3",
    "text_config": {"model_type": "gemma3_text", "num_hidden_layers": 34, "hidden_size": 2560, "sliding_window": 1024},
}
DEEPSEEK = text(27, 16, 16, 128, model_type="deepseek_v2", kv_lora_rank=512, qk_rope_head_dim=64, v_head_dim=128)
QWEN3_NEXT = text(
    48, 16, 2, 256, full_attention_interval=4, linear_num_key_heads=16, linear_num_value_heads=32,
    linear_key_head_dim=128, linear_value_head_dim=128, linear_conv_kernel_dim=4,
)  # fmt: skip


def found(config: Config, weights: int | None = 4 * GIB, path: str | None = "/m") -> Inspection:
    return Inspection(ModelFacts(path, config, weights, "abc"), EngineFacts("/bin/vllm", "0.32.0"))


def gpu(total: int = 12227 * MIB, name: str = "RTX") -> DeviceReading:
    return DeviceReading("GPU-1", "gpu", 0, name, total, 0, total, total)


def cpu(total: int = 64 * GIB, node: int = 32 * GIB) -> DeviceReading:
    return DeviceReading("cpu", "cpu", None, "x86", total, 0, node, node)


def spec(**more: Any) -> ModelSpec:
    return ModelSpec("m", "org/m", **more)


def need(outcome: Need | Cause) -> Need:
    assert isinstance(outcome, Need), outcome
    return outcome


def cause(outcome: Need | Cause) -> Cause:
    assert isinstance(outcome, Cause), outcome
    return outcome


@pytest.mark.parametrize(
    ("config", "size"),
    [
        (DOTS, 28_672),
        (QWEN3_VL, 114_688),
        (text(28, 12, 2, 128), 28_672),  # Qwen2-VL-2B
        (text(36, 16, 2, 128), 36_864),  # Qwen2.5-VL-3B
        (text(28, 28, 4, 128), 57_344),  # Qwen2.5-VL-7B
        (text(28, 16, 8, 128), 114_688),  # Qwen3-0.6B, 1.7B
        (text(36, 32, 8, 128), 147_456),  # Qwen3-4B, 8B
        ({"text_config": text(24, 16, 16, 64)}, 98_304),  # GOT-OCR-2.0-hf
        (TINY, 512),
        (DEEPSEEK, 27 * (512 + 64) * 2),  # MLA: one latent vector
        (QWEN3_NEXT, 12 * 2 * 512 * 2),  # only every fourth layer keeps tokens
    ],
)
def test_kv_bytes_per_token_of_known_models(config: Config, size: int) -> None:
    """Heads, head size and layers give the bytes of a token that vLLM itself reports."""
    assert kv_bytes_per_token(config) == size


def test_tensor_parallel_splits_heads_but_not_latents() -> None:
    """KV heads are divided among devices and repeated where there are fewer; MLA's latent is whole on each."""
    assert kv_bytes_per_token(QWEN3_VL, tp=4) == 114_688 // 4
    assert kv_bytes_per_token(TINY, tp=4) == 512 // 2
    assert kv_bytes_per_token(DEEPSEEK, tp=4) == kv_bytes_per_token(DEEPSEEK)


def test_fp8_cache_halves_a_token() -> None:
    """An 8-bit cache takes a byte for each number."""
    assert kv_bytes_per_token(DOTS, kv_dtype="fp8") == 28_672 // 2


@pytest.mark.parametrize(("tokens", "blocks"), [(512, 5), (384, 4), (128, 2), (1, 2)])
def test_kv_for_a_request_counts_the_empty_block(tokens: int, blocks: int) -> None:
    """vLLM's CPU build serves 512 tokens of 512 bytes with 5 blocks of 128 and refuses them with 4 (measured)."""
    assert kv_for(TINY, tokens, block=128) == blocks * 128 * 512


def test_sliding_layers_stop_growing_past_their_window() -> None:
    """Gemma 3 keeps only every sixth layer's tokens of a long request, in padded groups of equal size."""
    short, long = kv_for(GEMMA3, 1024), kv_for(GEMMA3, 131072)
    whole = kv_for(GEMMA3, 131072, hybrid=False)
    assert short and long and whole
    page = 16 * 4 * 512 * 2  # 4 KV heads of 256, keys and values
    window = -(-(1023 + 2 * 2048) // 16) + 1
    assert long == 5 * page * (131072 // 16 + 6 * window + 1)  # 5 full layers; 29 sliding ones in 6 groups of 5
    assert whole == 34 * page * (131072 // 16 + 1)


def test_kinds_in_nearly_equal_number_share_the_larger_group() -> None:
    """12 sliding and 13 full layers are two groups of 13, not of 12 with a third for the one over."""
    kinds = ["full_attention", "sliding_attention"] * 12 + ["full_attention"]
    config = text(25, 8, 8, 64, layer_types=kinds, sliding_window=128)
    window = -(-(127 + 2 * 2048) // 16) + 1
    assert kv_for(config, 32768) == 13 * (8 * 128 * 2 * 16) * (32768 // 16 + window + 1)


def test_state_layers_cost_a_constant() -> None:
    """A gated-delta-net layer keeps one state, whatever the length; blocks of attention grow to its size."""
    one, two = kv_for(QWEN3_NEXT, 4096), kv_for(QWEN3_NEXT, 8192)
    assert one and two
    state = (2 * 16 * 128 + 32 * 128) * 3 * 2 + 32 * 128 * 128 * 4
    assert one == 12 * state * (4096 // 16 + 3 * 2 + 1)
    assert two > one


def test_unknown_shapes_are_not_guessed() -> None:
    """Without layers or heads there is no number."""
    assert kv_for({}, 4096) is None
    assert kv_bytes_per_token({"num_hidden_layers": 4}) is None


@given(st.integers(1, 300_000), st.integers(0, 50_000), st.sampled_from([DOTS, GEMMA3, DEEPSEEK, QWEN3_NEXT, TINY]))
def test_more_tokens_never_need_less(tokens: int, more: int, config: Config) -> None:
    """KV cache grows with the request, for every kind of attention."""
    first, second = kv_for(config, tokens), kv_for(config, tokens + more)
    assert first is not None and second is not None
    assert first <= second


@given(st.integers(2 * MIB, 200 * GIB), st.integers(6 * GIB, 192 * GIB))
def test_share_never_exceeds_what_was_given(vram: int, total: int) -> None:
    """share * total <= vram - context - slack: rounding is down, and never to nothing."""
    outcome = estimate(spec(vram=vram, max_model_len=2048), found(TINY, MIB), gpu(total), None)
    if isinstance(outcome, Need):
        assert outcome.share is not None and 0 < outcome.share <= 1
        assert round(outcome.share * 10_000) * total <= max(0, vram - CONTEXT - SLACK) * 10_000
        assert outcome.total == vram


@given(
    st.one_of(st.none(), st.integers(1, 100 * GIB)),
    st.one_of(st.none(), st.integers(1, 40 * GIB)),
    st.one_of(st.none(), st.integers(1, 20 * GIB)),
    st.integers(1, 30 * GIB),
    st.booleans(),
    st.sampled_from([DOTS, QWEN3_VL, GEMMA3, DEEPSEEK, QWEN3_NEXT, {}]),
)
def test_parts_always_add_up(
    vram: int | None, kv: int | None, base: int | None, weights: int, on_cpu: bool, config: Config
) -> None:
    """Whatever is asked, the parts of a need are not negative and add up to what is reserved."""
    learned = None if base is None else Learned(base=base, kv=GIB)
    reading = cpu() if on_cpu else gpu(80 * GIB)
    outcome = estimate(spec(vram=vram, kv_cache=kv), found(config, weights), reading, learned)
    if isinstance(outcome, Need):
        assert sum(size for _, size in outcome.parts) == outcome.total == outcome.base + (outcome.kv or 0)
        assert all(size >= 0 for _, size in outcome.parts)
        assert outcome.pinned == (on_cpu or learned is not None or kv is not None)
        assert (outcome.share is None) == on_cpu
        assert vram is None or outcome.total == vram
    else:
        assert len(outcome.short) <= 24 and outcome.remedies and not outcome.heals


def test_first_start_on_a_gpu_measures() -> None:
    """Nothing is pinned while vLLM is to measure, and the share leaves context and slack out."""
    outcome = need(estimate(spec(vram=7 * GIB, max_model_len=8192), found(DOTS, 5797 * MIB), gpu(), None))
    assert not outcome.pinned and not outcome.measured
    assert outcome.share == (7 * GIB - CONTEXT - SLACK) * 10_000 // (12227 * MIB) / 10_000


def test_automatic_need_leaves_room_for_what_the_share_loses() -> None:
    """CUDA sees 4 % less than NVML; even so one request of the full length fits beside weights and activations."""
    outcome = need(estimate(spec(max_model_len=4096, args={"enforce-eager": True}), found(QWEN3_VL), gpu(), None))
    parts = dict(outcome.parts)
    assert outcome.share is not None
    left = outcome.share * 12227 * MIB * 0.96 - parts["weights"] - parts["activations"]
    assert left >= (kv_for(QWEN3_VL, 4096, block=64) or 0)


def test_after_a_good_start_the_measured_base_counts() -> None:
    """Base measured, KV pinned, 3 % on top: so is at least 90 % of the plan used."""
    outcome = need(estimate(spec(max_model_len=4096), found(QWEN3_VL), gpu(), Learned(base=5 * GIB, kv=9 * GIB)))
    assert outcome.pinned and outcome.measured
    assert outcome.kv == kv_for(QWEN3_VL, 4096, block=64)
    used = 5 * GIB + (outcome.kv or 0)
    assert used <= outcome.total <= used / 0.9


def test_learned_base_and_given_vram_fill_the_rest_with_kv() -> None:
    """The operator's figure stands; what the base leaves of it becomes KV cache."""
    outcome = need(estimate(spec(vram=8 * GIB, max_model_len=4096), found(QWEN3_VL), gpu(), Learned(5 * GIB, GIB)))
    assert outcome.total == 8 * GIB
    assert outcome.kv == int(8 * GIB / 1.03) - 5 * GIB


def test_kv_cache_is_exact() -> None:
    """kv_cache is passed as it is."""
    outcome = need(estimate(spec(kv_cache=GIB, max_model_len=4096), found(QWEN3_VL), gpu(), None))
    assert outcome.pinned and outcome.kv == GIB


def test_cpu_counts_processes_and_pins() -> None:
    """On the CPU build 1,024 MiB of KV cache for a tiny model came to 2,318 MiB (measured): planned is not below."""
    outcome = need(estimate(spec(kv_cache=GIB, max_model_len=512), found(TINY, 853_248), cpu(), None))
    assert outcome.pinned and outcome.share is None
    assert 2318 * MIB <= outcome.total <= 2318 * MIB / 0.9


def test_a_share_is_of_the_budget() -> None:
    """vram = 0.5 means half of what the device offers, not half of the device."""
    outcome = need(estimate(spec(vram=Share(0.5), max_model_len=512), found(TINY, MIB), gpu(), None, 1, 8 * GIB))
    assert outcome.total == 4 * GIB


def test_tensor_parallel_divides_weights() -> None:
    """Each of two devices takes half of the weights, and buffers for talking."""
    parts = dict(need(estimate(spec(max_model_len=4096, gpus=2), found(QWEN3_VL), gpu(), None, 2)).parts)
    assert parts["weights"] == 2 * GIB and parts["communication"] > 0


@pytest.mark.parametrize("learned", [None, Learned(5 * GIB, GIB)])
@pytest.mark.parametrize("vram", [20 * GIB, None])
def test_tensor_parallel_keeps_what_is_there_before_vllm_looks_out_of_the_share(
    vram: int | None, learned: Learned | None
) -> None:
    """CUDA's context and NCCL's buffers: share * total + both <= what is reserved."""
    card = gpu(24 * GIB)
    outcome = need(estimate(spec(vram=vram, max_model_len=4096, gpus=2), found(QWEN3_VL), card, learned, 2))
    assert outcome.share is not None
    assert outcome.share * card.total + CONTEXT + SLACK + NCCL <= outcome.total


def test_each_card_of_a_mixed_set_is_asked_for_what_the_share_takes_of_it() -> None:
    """More of the larger one; with a pinned cache the same, and a share that is right for both."""
    small, large = gpu(12 * GIB), replace(gpu(24 * GIB), id="GPU-2")
    first = need(estimate(spec(vram=9 * GIB, max_model_len=1024), found(TINY, MIB), small, None, 2))
    kept, parts = on_each(first, [small, large])
    assert kept.share is not None
    assert parts["GPU-1"] == 9 * GIB and parts["GPU-2"] >= kept.share * 24 * GIB + CONTEXT + SLACK + NCCL
    later = need(estimate(spec(vram=9 * GIB, max_model_len=1024), found(TINY, MIB), small, Learned(2 * GIB, GIB), 2))
    kept, parts = on_each(later, [small, large])
    assert kept.share is not None and kept.share * 24 * GIB <= 9 * GIB
    assert parts == {"GPU-1": 9 * GIB, "GPU-2": 9 * GIB}
    assert on_each(first, [small, replace(small, id="GPU-3")]) == (first, {"GPU-1": 9 * GIB, "GPU-3": 9 * GIB})


def test_too_small_names_the_sum() -> None:
    """vram below weights, context and one request is refused with the sum and what would do."""
    outcome = cause(estimate(spec(vram=5 * GIB, max_model_len=4096), found(QWEN3_VL), gpu(), None))
    assert outcome.kind == "too-small" and not outcome.heals
    assert "weights 4.0 GiB" in outcome.text and "its vram is 5.0 GiB" in outcome.text
    assert "vram = " in outcome.remedies[0].text


def test_what_too_small_proposes_is_enough() -> None:
    """The remedies hold: the larger vram and the shorter context are both accepted."""
    args = {"enforce-eager": True, "max-num-seqs": 2}
    tight = spec(vram=6 * GIB, max_model_len=32768, args=args)
    outcome = cause(estimate(tight, found(QWEN3_VL), gpu(), None))
    vram, length = (remedy.text.partition(" = ")[2] for remedy in outcome.remedies)
    larger = spec(vram=int(float(vram.strip('"GiB')) * GIB), max_model_len=32768, args=args)
    shorter = spec(vram=6 * GIB, max_model_len=int(length), args=args)
    assert isinstance(estimate(larger, found(QWEN3_VL), gpu(), None), Need)
    parts = dict(need(estimate(shorter, found(QWEN3_VL), gpu(), None)).parts)
    spare = dict(need(estimate(spec(max_model_len=512, args=args), found(QWEN3_VL), gpu(), None)).parts)["activations"]
    assert parts["KV cache"] >= (kv_bytes_per_token(QWEN3_VL) or 0) * int(length)
    assert parts["activations and slack"] >= spare > 0


def test_kv_cache_below_one_request_is_refused() -> None:
    """vLLM would say so after a minute; the number it would propose is ours too."""
    outcome = cause(estimate(spec(kv_cache=262144, max_model_len=512), found(TINY, MIB), cpu(), None))
    assert outcome.kind == "kv-too-small"
    assert outcome.remedies[0].text == "models.m.max_model_len = 384"


@pytest.mark.parametrize(
    "quantization",
    [
        {"quant_method": "modelopt", "quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8"},
        {"quant_method": "modelopt", "quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8"}},
        {"quant_method": "modelopt", "quant_algo": "FP8"},  # may say so in hf_quant_config.json
        {"quant_method": "compressed-tensors", "kv_cache_scheme": {"num_bits": 8, "type": "float"}},
    ],
)
def test_a_checkpoint_that_asks_for_a_smaller_cache_is_not_refused(quantization: Config) -> None:
    """An FP8 cache takes half: what two bytes would need is not certain. With the type given it is."""
    kv = (kv_bytes_per_token(QWEN3_VL) or 0) * 4096 * 3 // 4
    config = QWEN3_VL | {"quantization_config": quantization}
    asked = spec(kv_cache=kv, max_model_len=4096)
    assert isinstance(estimate(asked, found(config), gpu(), None), Need)
    forced = spec(kv_cache=kv, max_model_len=4096, args={"kv-cache-dtype": "bfloat16"})
    assert cause(estimate(forced, found(config), gpu(), None)).kind == "kv-too-small"
    plain = QWEN3_VL | {"quantization_config": {"quant_method": "awq", "bits": 4}}
    assert cause(estimate(asked, found(plain), gpu(), None)).kind == "kv-too-small"


def test_a_window_is_never_refused_for_its_estimate() -> None:
    """Where the sum is not vLLM's own to the byte, vLLM decides."""
    assert isinstance(estimate(spec(kv_cache=64 * MIB, max_model_len=131072), found(GEMMA3), gpu(80 * GIB), None), Need)


def test_node_of_the_cpu_worker_bounds_the_cache() -> None:
    """A cache beyond the NUMA node is refused when asked for, and cut when it is only the rest of vram."""
    small = cpu(64 * GIB, 8 * GIB)
    asked = cause(estimate(spec(kv_cache=16 * GIB), found(TINY, MIB), small, None))
    assert asked.kind == "node-too-small"
    assert asked.remedies[0].text == 'models.m.kv_cache = "8128MiB"'
    heavy = cause(estimate(spec(kv_cache=GIB), found(TINY, 100 * GIB), cpu(200 * GIB, 8 * GIB), None))
    assert heavy.kind == "node-too-small" and "kv_cache" not in heavy.remedies[0].text
    rest = need(estimate(spec(vram=32 * GIB, max_model_len=512), found(TINY, MIB), small, None))
    assert rest.kv is not None and rest.kv < 8 * GIB


def test_undownloaded_model_needs_a_size() -> None:
    """Nothing on disk and vram "auto": there is nothing to reckon with. With vram given it starts."""
    assert cause(estimate(spec(), found({}, None, None), gpu(), None)).kind == "size-unknown"
    assert isinstance(estimate(spec(vram=8 * GIB), found({}, None, None), gpu(), None), Need)
    assert isinstance(estimate(spec(vram=8 * GIB), found({}, None, None), cpu(), None), Need)


def test_learned_key_ignores_what_it_is_used_to_fill() -> None:
    """vram, kv_cache, timings and the spelling of flags do not change it; flags, context, version and device do."""
    base = learned_key(spec(args={"enforce-eager": True}), found(DOTS), [gpu()])
    assert base == learned_key(
        spec(args={"enforce_eager": True}, vram=GIB, kv_cache=GIB, ttl=5.0), found(DOTS), [gpu()]
    )
    others = {
        learned_key(spec(), found(DOTS), [gpu()]),
        learned_key(spec(args={"enforce-eager": True}, max_model_len=512), found(DOTS), [gpu()]),
        learned_key(spec(args={"enforce-eager": True}), found(DOTS), [cpu()]),
        learned_key(spec(args={"enforce-eager": True}), found(DOTS), [gpu(), gpu()]),
    }
    assert base not in others and len(others) == 4
    assert learned_key(spec(), found(DOTS), [cpu(8 * GIB)]) == learned_key(spec(), found(DOTS), [cpu(9 * GIB)])


@pytest.mark.parametrize(
    ("config", "longest", "default"),
    [
        (TINY, 2048, 2048),
        (QWEN3_VL, 262144, 262144),
        ({"max_position_embeddings": 4096, "rope_scaling": {"type": "linear", "factor": 4.0}}, 16384, 16384),
        ({"max_position_embeddings": 131072, "rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, 131072, 131072),
        ({"max_position_embeddings": 32768, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, 32768, 32768),
        (
            {
                "max_position_embeddings": 131072,
                "original_max_position_embeddings": 4096,
                "rope_scaling": {"type": "longrope"},
            },
            131072,
            4096,
        ),
        ({"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 2}}, "n_positions": 100}, 200, 200),
        (GEMMA3, 131072, 131072),
        ({"hidden_size": 128}, None, None),
    ],
)
def test_context_length_follows_vllm(config: Config, longest: int | None, default: int | None) -> None:
    """Rope scaling multiplies the length unless the file holds the product already."""
    assert (max_context(config), default_context(config)) == (longest, default)


def test_float32_files_are_run_in_half() -> None:
    """dtype "auto" turns a float32 checkpoint into 16 bits."""
    assert run_dtype({"torch_dtype": "float32"}, {}) == "bfloat16"
    assert run_dtype({"torch_dtype": "float32"}, {"dtype": "float32"}) == "float32"
