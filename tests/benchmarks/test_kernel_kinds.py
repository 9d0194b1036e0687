"""Kinds of kernels, on names of torch 2.11's CUDA library, cuBLAS, cuDNN, Triton and ATen."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

from kernel_kinds import KINDS, kind_of, profiled, sorted_by_kind

NATIVE, ANONYMOUS = "void at::native::", "void at::native::(anonymous namespace)::"
NAMES = {
    "attention": [
        "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<96, 128, 64, 4, false, cutlass::bfloat16_t>>",
        "void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<Flash_bwd_kernel_traits<96, 64, 128, 8>>",
        "void pytorch_flash::flash_bwd_convert_dq_kernel<Flash_bwd_kernel_traits<32, 128, 128, 8, 4, 4, 4, true>>",
        "fmha_cutlassF_bf16_aligned_64x64_rf_sm80(PyTorchMemEffAttention::AttentionKernel<cutlass::bfloat16_t>::Params)",
        "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x128_4x1x1_cga1x1x1_kernel0_0",
        "cudnn_generated_fort_native_sdpa_sm90_knob_26_64x64x128_1x4x1_cga1x1x1_kernel0_0",
        "void cudnn::fusion::compute_dot_do_o_specialized<true, 128, __nv_bfloat16>",
        "aten::_scaled_dot_product_flash_attention_for_cpu",
    ],
    "matrix products": [
        "nvjet_tst_256x128_64x4_1x2_h_bz_coopA_NNT",
        "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_warpgroupsize1x1x1_execute_segment_k_off_kernel",
        "void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16_16x16_128x2_tn_align8>",
        "void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16, float, __nv_bfloat16>",
        "triton_tem_fused_addmm_3",
        *("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"),
    ],
    "fused by the compiler": [
        "triton_per_fused_add_native_layer_norm_native_layer_norm_backward_4",
        "triton_poi_fused_gelu_1",
    ],
    "layer norm": [
        f"{ANONYMOUS}vectorized_layer_norm_kernel<float, float, true>(int, float, float const*)",
        f"{ANONYMOUS}layer_norm_grad_input_kernel_vectorized<c10::BFloat16, float, true>(c10::BFloat16 const*)",
        f"{ANONYMOUS}GammaBetaBackwardCUDAKernelTemplate<c10::BFloat16, float, 32u, 32u, 256u, false, true, true>",
        f"{ANONYMOUS}cuComputeGradGammaBeta<float, float>",
        "aten::native_layer_norm_backward",
    ],
    "optimiser, average, norm of gradients": [
        f"{ANONYMOUS}multi_tensor_apply_kernel<FusedOptimizerTensorListMetadata<4>, FusedAdamMathFunctor<float, 4>>",
        f"{ANONYMOUS}multi_tensor_apply_kernel<TensorListScalarListMetadata<float, 2>, LerpFunctor<float> >",
        f"{ANONYMOUS}multi_tensor_apply_kernel<TensorListMetadata<1>, LpNormFunctor<float, (NormType)2, float>>",
        f"{NATIVE}lpnorm_cleanup<float, (at::native::NormType)1, float, false, float>(float const*)",
        "aten::_fused_adamw_",
    ],
    "reductions (bias gradients, loss)": [
        f"{NATIVE}reduce_kernel<128, 4, at::native::ReduceOp<c10::BFloat16, at::native::func_wrapper_t<sum_functor>>>",
        "aten::sum",
    ],
    "copies and casts": [
        *("Memcpy HtoD (Pinned -> Device)", "Memcpy DtoD (Device -> Device)", "aten::copy_"),
        f"{NATIVE}unrolled_elementwise_kernel<at::native::direct_copy_kernel_cuda(at::TensorIteratorBase&)>",
        f"{ANONYMOUS}CatArrayBatchedCopy<at::native::(anonymous namespace)::OpaqueType<16u>, unsigned int, 4, 64, 64>",
    ],
    "zero fills": ["Memset (Device)", f"{NATIVE}vectorized_elementwise_kernel<4, at::native::FillFunctor<float>>"],
    "gather, scatter, index": [
        f"{NATIVE}vectorized_gather_kernel<16, int>(char*, char*, int*, int, long, long, long, long, bool)",
        f"{NATIVE}indexFuncLargeIndex<c10::BFloat16, long, unsigned long, -1, -1, -1, true, ReduceMinimum>",
        f"{NATIVE}index_elementwise_kernel<128, 4, at::native::flip_kernel_impl<at::native::OpaqueType<16> >>",
    ],
    "GELU": [
        f"{NATIVE}vectorized_elementwise_kernel<4, at::native::GeluBackwardCUDAKernelImpl(at::TensorIteratorBase&)>"
    ],
    "other elementwise": [
        f"{NATIVE}vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>, std::array<char*, 3ul> >",
    ],
}


@pytest.mark.parametrize("kind", [kind for kind, _ in KINDS])
def test_kernels_are_of_their_kind(kind):
    assert {name: kind_of(name) for name in NAMES[kind]} == dict.fromkeys(NAMES[kind], kind)


def event(key, device, own, count=1, annotation=False):
    return SimpleNamespace(
        key=key,
        count=count,
        device_type=getattr(torch.autograd.DeviceType, device),
        is_user_annotation=annotation,
        self_device_time_total=own if device == "CUDA" else 0.0,
        self_cpu_time_total=own if device == "CPU" else 0.0,
    )


def test_annotations_are_no_kernels_and_waits_are_named():
    events = [
        event("nvjet_tst_64x64", "CUDA", 30.0, 2),
        event("Memset (Device)", "CUDA", 2.0),
        event("Optimizer.step#AdamW.step", "CUDA", 500.0, annotation=True),
        event("aten::addmm", "CPU", 7.0),
        event("cudaMemcpyAsync", "CPU", 1.0, 4),
        event("cudaStreamSynchronize", "CPU", 90.0, 3),
        event("aten::_local_scalar_dense", "CPU", 1.0, 3),
    ]
    found = sorted_by_kind(events, "cuda")
    assert {kind: s for kind, s in found["seconds"].items() if s} == {"matrix products": 3e-5, "zero fills": 2e-6}
    assert found["launches"] == 3
    assert found["waits"] == {"cudaStreamSynchronize": 3, "aten::_local_scalar_dense": 3}
    assert [(k["name"], k["count"]) for k in found["longest"]] == [("nvjet_tst_64x64", 2), ("Memset (Device)", 1)]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_profile_of_products_and_norms(device):
    a = torch.randn(300, 300, device=device)

    def work():
        with torch.profiler.record_function("mine"):
            for _ in range(3):
                torch.nn.functional.layer_norm(a @ a, (300,))

    work()
    found = profiled(work, device)
    assert found["seconds"]["matrix products"] > 0
    assert found["seconds"]["layer norm"] > 0
    assert "mine" not in {kernel["name"] for kernel in found["longest"]}
    assert found["launches"] >= 6
